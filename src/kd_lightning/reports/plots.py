"""Figures, drawn with Matplotlib and Seaborn, which are imported only when needed.

Figures have a bounded size for any number of classes, methods and students, and show names
literally: Matplotlib would render `$_$` as a formula.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

MOST_CELLS = 20
"""Maximum number of classes shown by name; with more classes, an overview is drawn."""

MOST_SQUARES = 250  # along a side of the overview
MOST_PAIRS = 20  # pairs of classes listed next to it
MOST_PANELS = 12  # of learning curves
LARGEST = 225
"""Maximum area of a figure in square inches: 2.25 million pixels at 100 dpi."""


@contextmanager
def optional(picture: str) -> Iterator[None]:
    """Turn any exception into a warning, so that a figure cannot fail a run or a report."""
    try:
        yield
    except Exception as error:  # Matplotlib, fonts, memory, a user-defined data module
        log.warning("%s is omitted: %s: %s", picture, type(error).__name__, error)


def pixels(figure: "Figure", dpi: int = 100) -> npt.NDArray[np.uint8]:
    """Render a figure to pixels (H, W, 3), RGB."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with _without_warnings():
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3]


def png(figure: "Figure", dpi: int = 150) -> bytes:
    """Render a figure to the content of a PNG file."""
    file = BytesIO()
    with _without_warnings():
        figure.savefig(file, dpi=dpi, format="png")
    return file.getvalue()


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Glyph.*missing from.*")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        yield


def text(name: object, longest: int = 32) -> str:
    """A name as a literal Matplotlib label, on one line of limited length."""
    label = str(name).encode("utf-8", "backslashreplace").decode()  # no lone surrogates
    label = re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", label)
    if len(label) > longest:
        label = f"{label[: longest // 2]}…{label[1 - longest // 2 :]}"
    return label.replace("$", r"\$")


def _legend(name: object) -> str:
    """A name for a legend; Matplotlib omits labels that begin with `_`."""
    label = text(name, 64)
    return f" {label}" if label.startswith("_") else label


def accuracy_by_size(cells: "pd.DataFrame", runs: "pd.DataFrame") -> "Figure":
    """Test accuracy against parameters, one line per method, with standard deviation over seeds.

    Args:
        cells: from `statistics.summarise`, of one setting.
        runs: the finished runs, for the teacher's accuracy.
    """
    import seaborn
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    done = cells[cells["n"] > 0].sort_values("parameters")
    colour = colours(done["label"])
    shifts = beside(done["label"].nunique())
    for shift, (label, part) in zip(shifts, done.groupby("label", sort=False), strict=True):
        axes.errorbar(
            part["parameters"] * shift,
            100 * part["test"],
            yerr=100 * part["test_std"],  # NaN for a single run
            label=_legend(label),
            marker="o",
            capsize=3,
            color=colour[str(label)],
        )
    teacher = runs.dropna(subset="teacher_test_accuracy")
    if teacher["teacher_parameters"].nunique() == 1:  # not of another size for every student
        row = teacher.iloc[0]
        axes.axhline(
            100 * teacher["teacher_test_accuracy"].median(), color="0.4", linestyle="--",
            label=text(f"teacher {row['teacher']}, {_count(row['teacher_parameters'])}", 64),
        )  # fmt: skip
    axes.set_xscale("log")
    sizes = done.drop_duplicates("student")
    axes.set_xticks(
        sizes["parameters"],
        [f"{text(r.student)}\n{_count(r.parameters)}" for r in sizes.itertuples()],
    )
    low, high = sizes["parameters"].min(), sizes["parameters"].max()
    axes.set_xlim(low / 1.5, high * 1.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="parameters", ylabel="test accuracy (%)")
    axes.grid(axis="y", alpha=0.3)
    _add_legend(axes)
    seaborn.despine(figure)
    return figure


def beside(number: int) -> npt.NDArray[np.float64]:
    """Factors for the places of several methods on a logarithmic axis, so that their error bars do
    not overlap: 3 % apart, but all within 10 %.
    """
    apart = min(1.03, 1.1 ** (1 / max(1, number - 1)))
    return np.asarray(apart ** (np.arange(number) - (number - 1) / 2))


def gain_by_method(cells: "pd.DataFrame") -> "Figure":
    """Each method's gain over `none` with its confidence interval, one panel per student (at most
    `MOST_PANELS`), the best method on average at the top.

    Without a baseline, test accuracy and its standard deviation are shown instead.

    Args:
        cells: from `statistics.summarise`, of one setting.
    """
    import seaborn

    compared = cells["gain"].notna().any()
    done = cells[cells["gain"].notna()] if compared else cells[cells["n"] > 0]
    done = done.sort_values("parameters", kind="stable")
    value = "gain" if compared else "test"
    names = done.groupby("label", sort=False)[value].mean().sort_values(kind="stable").index
    students = list(dict.fromkeys(done["student"]))
    figure, panels = _panels(students, 1.2 + 0.28 * len(names), sharex=True, sharey=True)
    colour = colours(names)
    for axes, student in zip(panels, students, strict=False):
        part = done[done["student"] == student]
        half = part["gain_high"] - part["gain"] if compared else part["test_std"]
        for row, error in zip(part.itertuples(), half, strict=True):
            axes.errorbar(
                100 * getattr(row, value), names.get_loc(row.label), xerr=100 * error,
                marker="o", capsize=3, color=colour[str(row.label)],
            )  # fmt: skip
        axes.set(title=text(student), ylim=(-0.6, len(names) - 0.4))
        axes.set_yticks(range(len(names)), [text(name) for name in names])
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="x", labelbottom=True)  # the last row may be incomplete
        if compared:
            axes.axvline(0, color="0.2", linewidth=0.8)
    label = "gain over none (points of test accuracy)" if compared else "test accuracy (%)"
    _add_label(figure, label, students)
    seaborn.despine(figure)
    return figure


def learning_curves(histories: "pd.DataFrame") -> "Figure":
    """Validation accuracy by epoch, one panel per student (at most `MOST_PANELS`), mean and
    standard deviation over seeds.

    Args:
        histories: from `runs.read_histories`, of one setting.
    """
    import seaborn
    from matplotlib.ticker import MaxNLocator

    students = list(dict.fromkeys(histories["student"]))
    figure, panels = _panels(students, 3.6, sharey=True)
    known = colours(histories["label"])
    for axes, student in zip(panels, students, strict=False):
        part = histories[histories["student"] == student]
        for label, own in part.groupby("label", sort=False):
            curve = 100 * own.groupby("epoch")["val_accuracy"].agg(["mean", "std"])
            colour = known[str(label)]
            axes.plot(curve.index, curve["mean"], label=_legend(label), color=colour)
            spread = curve["std"].fillna(0)
            axes.fill_between(
                curve.index, curve["mean"] - spread, curve["mean"] + spread,
                color=colour, alpha=0.15, linewidth=0,
            )  # fmt: skip
        axes.set(title=text(student), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation accuracy (%)")
    _add_legend(panels[0])
    _add_label(figure, "", students)
    seaborn.despine(figure)
    return figure


def _panels(students: Sequence[str], height: float, **settings: Any) -> "tuple[Figure, list[Any]]":
    """A figure of at most `LARGEST`, and the axes of at most `MOST_PANELS` students.

    Args:
        students: names.
        height: of each panel, in inches, if there is room.
        settings: of `Figure.subplots`.
    """
    from matplotlib.figure import Figure

    number = min(len(students), MOST_PANELS)
    columns = min(3, number)
    rows = -(-number // columns)
    width = 4.2 * columns + 0.8 if columns > 1 else 7.5
    height = min(height * rows, 0.99 * LARGEST / width)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, **settings).flat)
    for axes in panels[number:]:
        axes.set_axis_off()
    return figure, panels[:number]


def _add_label(figure: "Figure", label: str, students: Sequence[str]) -> None:
    """Add a common label of the horizontal axes, and the number of students without a panel."""
    left_out = len(students[MOST_PANELS:])
    note = f"{left_out} more students are not shown" if left_out else ""
    if label or note:
        figure.supxlabel("\n".join(filter(None, (label, note))), fontsize="medium")


def _add_legend(axes: Any) -> None:
    """Add a legend inside the axes, or to the right of the figure for more than ten lines."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= 10:
        axes.legend(framealpha=1, edgecolor="none")
        return
    axes.figure.legend(
        handles, labels, loc="outside right upper", frameon=False, fontsize="small",
        ncols=1 + len(labels) // 25,
    )  # fmt: skip


def _count(parameters: float) -> str:
    """`2.12 million`, or `16,890`."""
    return f"{parameters / 1e6:.2f} million" if parameters >= 1e5 else f"{parameters:,.0f}"


def colours(labels: Iterable[Any]) -> dict[str, Any]:
    """Colour of each method, the same in all figures of a setting."""
    import seaborn

    palette = seaborn.color_palette("colorblind")
    known = {"none": "0.35", "logit": palette[0], "attention": palette[1], "combined": palette[2]}
    others = sorted({str(label) for label in labels} - known.keys())
    if len(others) > len(palette) - 3:
        return known | dict(zip(others, seaborn.husl_palette(len(others), l=0.55), strict=True))
    return known | {name: palette[n + 3] for n, name in enumerate(others)}


def confusion_matrix(
    counts: npt.NDArray[np.int64], classes: Sequence[str], title: str = "Confusion matrix, test set"
) -> "Figure":
    """Confusion matrix in per cent of the true class (rows).

    More than `MOST_CELLS` classes are shown as an overview without names, next to a list of the
    most frequent confusions.

    Args:
        counts: (C, C) counts, [true class, predicted class].
        classes: class names.
        title: title of the figure.
    """
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    if len(classes) > MOST_CELLS:
        return _confusion_overview(counts, classes, title)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.5 + 0.55 * len(classes)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    # Seaborn's heatmap would render the whole figure once more, to measure its labels.
    mesh = axes.pcolormesh(share, cmap="Blues", vmin=0, vmax=100, edgecolors="white", linewidth=0.5)
    for (row, column), value in np.ndenumerate(share):
        axes.text(
            column + 0.5,
            row + 0.5,
            f"{value:.0f}",
            ha="center",
            va="center",
            color="white" if value > 50 else "0.15",
        )
    bar = figure.colorbar(mesh, ax=axes, label="share of the true class (%)", shrink=0.8)
    bar.outline.set_visible(False)
    ticks = np.arange(len(classes)) + 0.5
    names = [text(name) for name in classes]
    axes.set_xticks(ticks, names, rotation=45)
    axes.set_yticks(ticks, names)
    axes.set(xlabel="predicted", ylabel="true", title=text(title, 64), aspect="equal")
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    return figure


def _confusion_overview(
    counts: npt.NDArray[np.int64], classes: Sequence[str], title: str
) -> "Figure":
    """An overview of fixed size, with classes binned if necessary, and the top confusions."""
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    # At most one entry per test image, however many classes there are.
    true, predicted = counts.nonzero()
    number = counts[true, predicted]
    group = -(-len(classes) // MOST_SQUARES)
    side = -(-len(classes) // group)
    place = (true // group) * side + predicted // group
    squares = np.bincount(place, weights=number, minlength=side * side).reshape(side, side)
    share = 100 * squares / np.maximum(squares.sum(axis=1, keepdims=True), 1)

    figure = Figure(figsize=(14, 7), layout="constrained")
    left, right = figure.subplots(1, 2)
    end = side * group - 0.5
    image = left.imshow(
        share,
        cmap="Blues",
        norm=PowerNorm(0.5, 0, 100),  # makes rare confusions visible
        extent=(-0.5, end, end, -0.5),
        interpolation="nearest",
    )
    figure.colorbar(image, ax=left, label="share of the true class (%)", shrink=0.8)
    unit = "class number" if group == 1 else f"class number, {group} classes to a square"
    left.set(xlabel=f"predicted ({unit})", ylabel=f"true ({unit})", title=text(title, 64))

    wrong = true != predicted
    most = np.argsort(-number[wrong], kind="stable")[:MOST_PAIRS]
    pairs = list(zip(true[wrong][most], predicted[wrong][most], strict=True))
    bars = right.barh(range(len(pairs)), number[wrong][most], color="C0")
    of_class = [counts[one].sum() for one, _ in pairs]
    right.bar_label(
        bars,
        [
            f"{counts[p]:.0f} ({100 * counts[p] / n:.0f} %)"
            for p, n in zip(pairs, of_class, strict=True)
        ],
        padding=3,
    )
    # The leading mark forces left-to-right layout, whatever the script of the names.
    names = [f"\u200e{text(classes[one], 24)} → {text(classes[other], 24)}" for one, other in pairs]
    right.set_yticks(range(len(pairs)), names, fontsize="small")
    right.invert_yaxis()
    right.margins(x=0.15)
    right.set(
        xlabel="test images (share of the true class)",
        title="Most frequent confusions: true → predicted" if pairs else "No confusions",
    )
    for edge in ("top", "right"):
        right.spines[edge].set_visible(False)
    return figure
