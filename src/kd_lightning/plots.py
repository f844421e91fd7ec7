"""Pictures: drawn with Matplotlib and Seaborn, imported only when a picture is wanted."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


MOST_PANELS = 12  # students whose learning curves are drawn, the first ones


def accuracy_by_size(cells: "pd.DataFrame", runs: "pd.DataFrame") -> "Figure":
    """Test accuracy against parameters, a line a method, with the spread over seeds.

    Args:
        cells: from `report.summarise`, of one setting.
        runs: the finished runs, from which the teacher's accuracy is taken.
    """
    import seaborn
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    done = cells[cells["n"] > 0].sort_values("parameters")
    for place, (label, part) in enumerate(done.groupby("label", sort=False)):
        axes.errorbar(
            # A little beside each other, else spreads hide one another.
            part["parameters"] * 1.03**place,
            100 * part["test"],
            yerr=100 * part["test_std"],  # none from a single run
            label=label,
            marker="o",
            capsize=3,
            color=_colour(str(label), place),
        )
    teacher = runs.dropna(subset="teacher_test_accuracy")
    if len(teacher):
        row = teacher.iloc[0]
        axes.axhline(
            100 * row["teacher_test_accuracy"], color="0.4", linestyle="--",
            label=f"teacher {row['teacher']}, {_count(row['teacher_parameters'])}",
        )  # fmt: skip
    axes.set_xscale("log")
    sizes = done.drop_duplicates("student")
    axes.set_xticks(
        sizes["parameters"],
        [f"{r.student}\n{_count(r.parameters)}" for r in sizes.itertuples()],
    )
    low, high = sizes["parameters"].min(), sizes["parameters"].max()
    axes.set_xlim(low / 1.5, high * 1.5 * 1.03 ** done["label"].nunique())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="parameters", ylabel="test accuracy (%)")
    axes.grid(axis="y", alpha=0.3)
    _legend(axes)
    seaborn.despine(figure)
    return figure


def gain_by_method(cells: "pd.DataFrame") -> "Figure":
    """Bars: each method's gain over `none`, with its confidence interval.

    Where there is nothing to compare with, test accuracy instead.

    Args:
        cells: from `report.summarise`, of one setting.
    """
    import seaborn
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    compared = cells["gain"].notna().any()
    done = cells[cells["gain"].notna()] if compared else cells[cells["n"] > 0]
    done = done.sort_values("parameters", kind="stable")
    students = list(dict.fromkeys(done["student"]))
    names = list(dict.fromkeys(done["label"]))
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        part = done[done["label"] == name]
        x = (
            np.array([students.index(s) for s in part["student"]])
            + (place - (len(names) - 1) / 2) * width
        )
        middle = part["gain"] if compared else part["test"]
        high = part["gain_high"] - part["gain"] if compared else part["test_std"]
        axes.bar(
            x, 100 * middle, width * 0.92, yerr=100 * high, capsize=3, label=name,
            color=_colour(name, place),
        )  # fmt: skip
    axes.set_xticks(range(len(students)), students)
    axes.set_xlim(-0.75, len(students) - 0.25)
    if compared:
        axes.axhline(0, color="0.2", linewidth=0.8)
        axes.set(ylabel="gain over none (points of test accuracy)")
    else:
        axes.set(ylabel="test accuracy (%)")
    axes.set(xlabel="student")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    _legend(axes)
    seaborn.despine(figure)
    return figure


def learning_curves(histories: "pd.DataFrame") -> "Figure":
    """Validation accuracy by epoch: mean and spread over seeds, a panel a student.

    Args:
        histories: from `report.read_histories`, of one setting.
    """
    import seaborn
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    students = list(dict.fromkeys(histories["student"]))[:MOST_PANELS]
    columns = min(3, len(students))
    rows = -(-len(students) // columns)
    figure = Figure(figsize=(4.2 * columns + 0.8, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes, student in zip(panels, students, strict=False):
        part = histories[histories["student"] == student]
        for place, (label, own) in enumerate(part.groupby("label", sort=False)):
            curve = 100 * own.groupby("epoch")["val_accuracy"].agg(["mean", "std"])
            colour = _colour(str(label), place)
            axes.plot(curve.index, curve["mean"], label=label, color=colour)
            spread = curve["std"].fillna(0)
            axes.fill_between(
                curve.index, curve["mean"] - spread, curve["mean"] + spread,
                color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
        axes.set(title=student, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    for axes in list(panels)[len(students) :]:
        axes.set_axis_off()
    first = figure.axes[0]
    first.set_ylabel("validation accuracy (%)")
    _legend(first)
    seaborn.despine(figure)
    return figure


def _legend(axes: Any) -> None:
    """A legend inside the axes; beyond ten lines it becomes smaller and wider."""
    lines = len(axes.get_legend_handles_labels()[1])
    size = "medium" if lines <= 10 else "xx-small"
    axes.legend(frameon=False, fontsize=size, ncols=1 + lines // 16)


def _count(parameters: float) -> str:
    """`2.12 million`, or `16,890`."""
    return f"{parameters / 1e6:.2f} million" if parameters >= 1e5 else f"{parameters:,.0f}"


def _colour(label: str, place: int) -> Any:
    """A method has the same colour in every picture."""
    import seaborn

    palette = seaborn.color_palette("colorblind")
    known = {"none": "0.35", "logit": palette[0], "attention": palette[1], "combined": palette[2]}
    return known.get(label, palette[(place + 3) % len(palette)])


def confusion_matrix(
    counts: npt.NDArray[np.int64], classes: Sequence[str], title: str = "Confusion matrix, test set"
) -> "Figure":
    """How often each class is taken for which: rows are the truth and sum to 100 %.

    Args:
        counts: (C, C) counts, [true class, predicted class].
        classes: names of the classes.
        title: what to write above.
    """
    import seaborn
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.55 * len(classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    seaborn.heatmap(
        share,
        ax=axes,
        annot=len(classes) <= 20,
        fmt=".0f",
        cmap="Blues",
        vmin=0,
        vmax=100,
        square=True,
        linewidths=0.5,
        xticklabels=classes,
        yticklabels=classes,
        cbar_kws={"label": "share of the true class (%)", "shrink": 0.8},
    )
    axes.set(xlabel="predicted", ylabel="true", title=title)
    axes.tick_params(axis="x", rotation=45)
    return figure
