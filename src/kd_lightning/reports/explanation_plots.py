"""Figures that compare a student with its teacher; see `plots` for their common rules."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kd_lightning.reports.plots import text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

COLUMNS = 8  # images of each kind
MOST_LAYERS = 5  # pairs of layers with attention maps
KINDS = ("only the teacher is right", "only the student is right", "both are wrong")


def similarity(table: Sequence[Mapping[str, Any]]) -> "Figure":
    """Linear CKA of the layers of the student (rows) and of the teacher (columns).

    Args:
        table: the rows of `cka.csv`.
    """
    import seaborn
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    teacher = [name for name in table[0] if name != "student"]
    values = np.array([[row[name] for name in teacher] for row in table], float)
    width, height = min(14, 3.2 + 0.9 * len(teacher)), min(14, 2.2 + 0.6 * len(table))
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    seaborn.heatmap(
        values, ax=axes, annot=values.size <= 200, fmt=".2f", cmap="viridis", vmin=0, vmax=1,
        linewidths=0.5, xticklabels=[text(name) for name in teacher],
        yticklabels=[text(row["student"]) for row in table], cbar_kws={"label": "linear CKA"},
    )  # fmt: skip
    axes.set(xlabel="layer of the teacher", ylabel="layer of the student")
    axes.tick_params(axis="x", rotation=30)
    axes.tick_params(axis="y", rotation=0)
    return figure


def differences(
    pixels: "Tensor", classes: Sequence[tuple[int, int, int]], names: Sequence[str]
) -> "Figure":
    """Images that student and teacher classify differently, in rows of one kind.

    Args:
        pixels: (N, H, W, 3) in [0, 1].
        classes: true class, student's and teacher's prediction of each image.
        names: class names.
    """
    from matplotlib.figure import Figure

    rows: list[list[int]] = [[], [], []]
    for place, (label, own, other) in enumerate(classes):
        rows[0 if other == label else 1 if own == label else 2].append(place)
    figure = Figure(figsize=(1.5 * COLUMNS, 7.2), layout="constrained")
    panels = figure.subplots(len(KINDS), COLUMNS)
    for axes in panels.flat:
        axes.set_axis_off()
    for row, kind, places in zip(panels, KINDS, rows, strict=True):
        row[0].text(
            -0.12, 0.5, kind if places else f"{kind}:\nno image", transform=row[0].transAxes,
            rotation=90, ha="right", va="center", fontsize="medium",
        )  # fmt: skip
        for axes, place in zip(row, places, strict=False):
            axes.imshow(pixels[place].numpy(), interpolation="nearest")
            true, student, teacher = (text(names[number], 16) for number in classes[place])
            axes.set_title(f"is {true}\nstudent {student}\nteacher {teacher}", fontsize="small")
    return figure


def attention(pixels: "Tensor", maps: Sequence[tuple[str, "Tensor", "Tensor"]]) -> "Figure":
    """Attention maps of student and teacher side by side, one row per image, each map scaled to its
    largest value.

    Args:
        pixels: (N, H, W, 3) in [0, 1].
        maps: title of each pair of layers, and the maps (N, h, w) of student and teacher.
    """
    from matplotlib.figure import Figure

    left_out, maps = len(maps[MOST_LAYERS:]), maps[:MOST_LAYERS]
    rows, columns = max(1, len(pixels)), 1 + 2 * len(maps)
    figure = Figure(figsize=(1.5 * columns + 0.3, 1.5 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for number, row in enumerate(panels[: len(pixels)]):
        row[0].imshow(pixels[number].numpy(), interpolation="nearest")
        shown = [part[number] for _, *both in maps for part in both]
        for axes, energy in zip(row[1:], shown, strict=True):
            axes.imshow(energy.numpy(), cmap="magma", vmin=0, interpolation="nearest")
    for place, (title, *_) in enumerate(maps):
        names = title.split(" / ")
        for axes, who, name in zip(
            panels[0, 1 + 2 * place :], ("student", "teacher"), names, strict=False
        ):
            axes.set_title(f"{who}\n{text(name, 18)}", fontsize="small")
    panels[0, 0].set_title("image", fontsize="small")
    if left_out:
        figure.supxlabel(f"{left_out} more pairs of layers are not shown", fontsize="small")
    return figure
