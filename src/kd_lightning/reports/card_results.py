"""The results of a model card: accuracy with intervals, calibration and cost."""

import re
from collections.abc import Iterable
from pathlib import Path

from kd_lightning.config.nodes import Node
from kd_lightning.reports.runs import read_numbers, read_runs
from kd_lightning.reports.statistics import CONFIDENCE, groups, summarise, wilson
from kd_lightning.results import FIGURE

CALIBRATION = (
    "test_nll", "test_brier", "test_ece", "temperature", "test_nll_calibrated",
    "test_ece_calibrated", "teacher_test_nll", "teacher_test_ece", "teacher_kl",
)  # fmt: skip
COST = ("parameters", "macs", "file_bytes", "teacher_parameters", "teacher_macs", "teacher_bytes")
MEASURED = ("latency_", "memory_", "teacher_latency_", "teacher_memory_")
BAR = r"\|"
UNUSUAL = r"[^\w .,:%()/+@-]"  # characters in the name of a machine
UNITS = {"fraction": " %", "milliseconds": " ms"}


def result_tables(folder: Path, metrics: Node) -> list[str]:
    """Markdown tables of a run's results; figures that it does not have are left out.

    Args:
        folder: folder of the run; other seeds and the baseline are found next to it.
        metrics: of the run.
    """
    rows = [("test accuracy", f"{_percent(metrics['test_accuracy'])}{_interval(folder, metrics)}")]
    rows += _over_seeds(folder)
    for name, title in (
        ("val_accuracy", "validation accuracy"),
        ("test_accuracy_at_best", "test accuracy at the best epoch on validation images"),
        ("teacher_test_accuracy", "test accuracy of the teacher"),
        ("agreement", "same class as the teacher, on test images"),
    ):
        if metrics.get(name) is not None:
            rows.append((title, _percent(metrics[name])))
    found = [
        _table(rows),
        f"The test accuracy is that of the last epoch. Intervals: {100 * CONFIDENCE:g} %.",
    ]
    if calibration := _figures(metrics, CALIBRATION):
        found += ["### Calibration", _table(calibration)]
    measured = [name for name in metrics if name.startswith(MEASURED)]
    if cost := _figures(metrics, [*COST, *measured]):
        found += ["### Cost", _table(cost)]
        if metrics.get("measured_on"):
            found.append(f"Measured on: {re.sub(UNUSUAL, ' ', str(metrics['measured_on']))}.")
    return found


def _interval(folder: Path, metrics: Node) -> str:
    """Wilson's interval, from the number of test images in the confusion matrix."""
    counts = read_numbers(folder / "confusion.csv")
    total = 0 if counts is None else int(counts.to_numpy().sum())
    if not total:
        return ""
    low, high = wilson(metrics["test_accuracy"], total)
    return f" ({100 * low:.2f} to {100 * high:.2f}; Wilson, {total:,} images)"


def _over_seeds(folder: Path) -> list[tuple[str, str]]:
    """Mean over the seeds of the run's cell, and its gain over the method `none`."""
    folder = folder.resolve()  # "." has no parent
    # Only the folders next to the run: its parent may contain anything.
    runs = read_runs(sorted(path.parent for path in folder.parent.glob("*/metrics.json")))
    own = runs[runs["folder"] == str(folder)]
    if own.empty or own["status"].iloc[0] != "finished":
        return []
    run = own.iloc[0]
    group = next(g for g in groups(runs) if (g.runs["folder"] == str(folder)).any())
    cells = summarise(runs)
    (cell,) = cells[
        (cells["group"] == group.title)
        & (cells["method"] == run["method"])
        & (cells["student"] == run["student"])
        & (cells["variant"] == run["variant"])
    ].itertuples()
    rows = []
    if cell.n > 1:
        spread = f"{100 * cell.test:.2f} ± {100 * cell.test_std:.2f} % ({cell.n} seeds)"
        rows.append(("test accuracy, mean ± standard deviation over seeds", spread))
    if cell.pairs:
        gain = f"{100 * cell.gain:+.2f} percentage points"
        if cell.pairs > 1:
            gain += f" ({100 * cell.gain_low:+.2f} to {100 * cell.gain_high:+.2f}; Student's t, "
            gain += f"{cell.pairs} pairs of seeds)"
        else:
            gain += " (1 seed)"
        rows.append(("gain over the same student without a teacher", gain))
    return rows


def _figures(metrics: Node, names: Iterable[str]) -> list[tuple[str, str]]:
    rows = []
    for name in names:
        value, figure = metrics.get(name), FIGURE.get(name)
        if isinstance(value, int | float) and figure is not None:
            shown = f"{figure.show(value)}{UNITS.get(figure.kind, '')}"
            rows.append((f"`{name}`: {figure.meaning}", shown))
    return rows


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    # As in KL(teacher || student).
    lines = [f"| {title.replace('|', BAR)} | {value} |" for title, value in rows]
    return "\n".join(["| figure | value |", "| --- | --- |", *lines])
