"""Figures of calibration and cost; see `plots` for their common rules."""

from typing import TYPE_CHECKING, Any

import numpy as np

from kd_lightning.reports.plots import _legend, beside, colours, text
from kd_lightning.results import FIGURE

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

COSTS = {
    "macs": ("multiply-accumulates per image", "operations"),
    "file_bytes": ("size of the weights", "bytes"),
    "latency_1_one_thread_p50": ("latency of one image, one thread (ms)", "milliseconds"),
}
"""Figures that accuracy is drawn against, with their axis labels and kinds."""

FRONT = "best for its cost"

TEACHER_COSTS = {
    "macs": "teacher_macs",
    "file_bytes": "teacher_bytes",
    "latency_1_one_thread_p50": "teacher_latency_1_one_thread_p50",
}


def accuracy_by_cost(cells: "pd.DataFrame", runs: "pd.DataFrame") -> "Figure | None":
    """Test accuracy against each known cost, with the Pareto front of the students; None if no cost
    is known.

    Args:
        cells: from `statistics.summarise`, of one setting.
        runs: the finished runs, for the teacher.
    """
    import seaborn
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    done = cells[(cells["n"] > 0) & cells["test"].notna()]
    known = [name for name in COSTS if done[name].notna().any()]
    if not known:
        return None
    figure = Figure(figsize=(0.8 + 4.4 * len(known), 4.8), layout="constrained")
    panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, known, strict=True):
        _draw_costs(axes, done[done[name].notna()], name)
        _draw_teacher(axes, runs, name)
        axes.set_xscale("log")
        axes.margins(x=0.15, y=0.12)
        axes.set(xlabel=COSTS[name][0])
        # Three to about eight ticks within the few decades of most grids.
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        show = FIGURE[name].show
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _, show=show: show(value)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(axis="x", labelrotation=30)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("test accuracy (%)")
    handles: dict[str, Any] = {}
    for axes in panels:
        found = zip(*axes.get_legend_handles_labels(), strict=True)
        handles |= {label: handle for handle, label in found if label not in handles}
    handles[FRONT] = handles.pop(FRONT)  # last
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", frameon=False,
        ncols=min(6, len(handles)), fontsize="medium" if len(handles) <= 15 else "x-small",
    )  # fmt: skip
    seaborn.despine(figure)
    return figure


def _draw_costs(axes: Any, cells: "pd.DataFrame", name: str) -> None:
    """The cells of all methods, and the front of the best ones."""
    shifts, colour = beside(cells["label"].nunique()), colours(cells["label"])
    for shift, (label, part) in zip(shifts, cells.groupby("label", sort=False), strict=True):
        axes.errorbar(
            part[name] * shift, 100 * part["test"], yerr=100 * part["test_std"],
            marker="o", linestyle="", capsize=3, color=colour[str(label)], zorder=3,
            label=_legend(label),
        )  # fmt: skip
    front = pareto_front(cells[name].to_numpy(float), cells["test"].to_numpy(float))
    best = cells.iloc[front]
    axes.step(
        best[name], 100 * best["test"], where="post", color="0.6", linewidth=1, zorder=1,
        label=FRONT,
    )  # fmt: skip
    for student, part in cells.groupby("student", sort=False):
        place = part["test"].idxmax()
        spread = part["test_std"].fillna(0)[place]
        axes.annotate(
            text(student), (part[name][place], 100 * (part["test"][place] + spread)), (0, 7),
            textcoords="offset points", ha="center", fontsize="small", color="0.3",
        )  # fmt: skip


def _draw_teacher(axes: Any, runs: "pd.DataFrame", name: str) -> None:
    columns = [TEACHER_COSTS[name], "teacher_test_accuracy"]
    known = runs.dropna(subset=columns)
    if len(known):
        cost, accuracy = known[columns].astype(float).median()
        label = text(f"teacher {known.iloc[0]['teacher']}", 64)
        axes.plot(
            cost, 100 * accuracy, marker="*", markersize=12, linestyle="", color="0.2", label=label
        )


def pareto_front(costs: Any, gains: Any) -> list[int]:
    """Indices of the points that no other point beats in both, by ascending cost.

    Args:
        costs: (N,), lower is better.
        gains: (N,), higher is better.
    """
    front: list[int] = []
    for index in np.lexsort((-np.asarray(gains), costs)):
        if not front or gains[index] > gains[front[-1]]:
            front.append(int(index))
    return front


def reliability_diagram(bins: "pd.DataFrame", title: str = "Reliability, test set") -> "Figure":
    """Accuracy by confidence, above the distribution of confidence, before and after scaling.

    Args:
        bins: the rows of `reliability.csv`.
        title: title of the figure.
    """
    import seaborn
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="calibrated")
    palette = seaborn.color_palette("colorblind")
    styles = {"raw": ("o", "-"), "calibrated": ("s", ":")}
    names = {"raw": "as trained", "calibrated": "scaled"}
    for colour, (scores, part) in zip(palette, bins.groupby("scores", sort=False), strict=False):
        share = part["images"] / max(1, part["images"].sum())
        error = (share * (part["accuracy"] - part["confidence"]).abs()).sum()
        marker, line = styles.get(str(scores), ("o", "-"))
        filled = part["images"] > 0
        place = part["confidence"][filled], part["accuracy"][filled]
        upper.plot(
            *place, marker=marker, markersize=4, linestyle=line, color=colour,
            label=f"{names.get(str(scores), scores)}, error {100 * error:.1f} %",
        )  # fmt: skip
        # Larger for more images: bins of a few are noise.
        upper.scatter(*place, s=500 * share[filled], marker=marker, color=colour, alpha=0.35)
        edges = [*part["lower"], float(part["upper"].iloc[-1])]
        lower.stairs(100 * share, edges, color=colour, linestyle=line, linewidth=1.5)
    upper.set(ylabel="accuracy", xlim=(0, 1.03), ylim=(0, 1.03), title=text(title, 64))
    figure.legend(loc="outside lower center", frameon=False, ncols=3, fontsize="small")
    lower.set(xlabel="confidence", ylabel="images (%)")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    seaborn.despine(figure)
    return figure
