"""Schema of a run's results: the keys of `metrics.json`, their meaning, how they are aggregated
over seeds, and how they are formatted.

Accuracies are stored as fractions and displayed in per cent.
"""

from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

Kind = Literal[
    "text", "count", "fraction", "number", "score", "milliseconds", "bytes", "operations", "list"
]
DASH = "-"


@dataclass(frozen=True)
class Figure:
    """One value in a run's results.

    Attributes:
        name: its key.
        kind: ``count`` is an integer, ``number`` any number, ``fraction`` is shown in per cent,
            ``score`` with three decimals, ``bytes`` and ``operations`` with a prefix (MB, M).
        meaning: short description, with its unit.
        over_seeds: aggregation over the runs of a cell; None: not aggregated.
        since: status from which every run has it. None: optional, because runs of older versions
            or of some methods lack it.
        column: whether it is a column of `results.csv`.
        old_tables_have_it: whether tables written by older versions have that column.
    """

    name: str
    kind: Kind
    meaning: str
    over_seeds: Literal["mean", "median"] | None = None
    since: Literal["running", "finished"] | None = None
    column: bool = True
    old_tables_have_it: bool = True

    @property
    def is_number(self) -> bool:
        """Whether its values are numeric."""
        return self.kind not in ("text", "list")

    def fits(self, value: Any) -> bool:
        """Whether a value read from a file is valid for this figure."""
        if self.is_number:
            number = isinstance(value, Real) and not isinstance(value, bool)
            return number and -(2**53) <= value <= 2**53
        return isinstance(value, list if self.kind == "list" else str)

    def show(self, value: float | None) -> str:
        """Format for display, without unit: `92.31`, `530,090`, `16.0`; a dash if missing."""
        if value is None or value != value:
            return DASH
        formats = {
            "fraction": f"{100 * value:.2f}",
            "count": f"{value:,.0f}",
            "score": f"{value:.3f}",
            "milliseconds": f"{value:.3g}" if value < 100 else f"{value:,.0f}",
            "bytes": _with_unit(value, ("B", "kB", "MB", "GB")),
            "operations": _with_unit(value, ("", "k", "M", "G", "T")),
        }
        return formats.get(self.kind, f"{value:.1f}" if value >= 0.1 else f"{value:.2g}")


def _with_unit(value: float, units: tuple[str, ...]) -> str:
    """`2.12 MB`: three significant digits, and a unit of 1000 to some power."""
    power = 0
    while power + 1 < len(units) and abs(value) >= 999.5:
        value, power = value / 1000, power + 1
    digits = f"{value:,.0f}" if abs(value) >= 99.95 else f"{value:.3g}"
    return f"{digits} {units[power]}".strip()


def _new(
    name: str, kind: Kind, meaning: str, over_seeds: Literal["mean", "median"] | None = None
) -> "Figure":
    """A figure that runs and tables of older versions lack."""
    return Figure(name, kind, meaning, over_seeds, old_tables_have_it=False)


BATCHES = (1, 64)
"""Batch sizes at which latency and memory are measured."""


def _measured(prefix: str, over_seeds: Literal["mean", "median"] | None) -> tuple["Figure", ...]:
    """The figures of `scripts/measure.py`, of the student or, with a prefix, of the teacher."""
    whose = "of the teacher" if prefix else "of the student"
    found = []
    for batch in BATCHES:
        for threads, how in (
            ("one_thread", "one thread"),
            ("all_threads", "all threads, or a GPU"),
        ):
            for part in ("p50", "p95"):
                name = f"{prefix}latency_{batch}_{threads}_{part}"
                meaning = f"{whose}: milliseconds for {batch} images, {how}, percentile {part[1:]}"
                found.append(_new(name, "milliseconds", meaning, over_seeds))
        name, meaning = f"{prefix}memory_{batch}", f"{whose}: peak memory for {batch} images"
        found.append(_new(name, "bytes", meaning, over_seeds))
    return tuple(found)


FIGURES = (
    # Identity of the run.
    Figure("setting", "text", "what runs share that may be compared"),
    Figure("method", "text", "name of the method", since="running"),
    Figure("student", "text", "name of the student", since="running"),
    Figure("seed", "count", "of initial weights and batch order", since="running"),
    Figure("variant", "text", "what else tells the run from others"),
    Figure("status", "text", "running, finished or failed", since="running"),
    # Results.
    Figure("parameters", "count", "of the student", "median", "finished"),
    Figure("compression_ratio", "number", "teacher's parameters by the student's", "median"),
    Figure("val_accuracy", "fraction", "on validation images, last epoch", "mean", "finished"),
    Figure("test_accuracy", "fraction", "on test images, last epoch", "mean"),
    Figure("best_val_accuracy", "fraction", "on validation images, best epoch", "mean"),
    Figure("best_epoch", "count", "the epoch of the best validation accuracy"),
    Figure("test_accuracy_at_best", "fraction", "on test images, best epoch", "mean"),
    Figure("agreement", "fraction", "of student and teacher on test images", "mean"),
    Figure("teacher", "text", "name of the teacher"),
    Figure("teacher_parameters", "count", "of the teacher"),
    Figure("teacher_val_accuracy", "fraction", "of the teacher on validation images"),
    Figure("teacher_test_accuracy", "fraction", "of the teacher on test images", "median"),
    Figure("data", "text", "name of the data set"),
    Figure("epochs", "count", "that were trained"),
    Figure("train_seconds", "count", "of training, validation included", "median"),
    Figure("images_per_second", "count", "of training, validation left out"),
    # Probabilities on the test images, and the student beside its teacher.
    _new("test_nll", "score", "negative log-likelihood on test images, in nats", "mean"),
    _new("test_brier", "score", "Brier score on test images, in [0, 2]", "mean"),
    _new("test_ece", "fraction", "expected calibration error on test images", "mean"),
    _new("temperature", "score", "that calibrates the logits, from validation images", "mean"),
    _new("test_nll_calibrated", "score", "the same with the temperature", "mean"),
    _new("test_ece_calibrated", "fraction", "the same with the temperature", "mean"),
    _new("teacher_test_nll", "score", "of the teacher on test images", "median"),
    _new("teacher_test_ece", "fraction", "of the teacher on test images", "median"),
    _new("teacher_kl", "score", "KL(teacher || student) on test images, in nats", "mean"),
    _new("teacher_kl_right", "score", "the same where the teacher is right", "mean"),
    _new("teacher_kl_wrong", "score", "the same where the teacher is wrong", "mean"),
    _new("agreement_right", "fraction", "agreement where the teacher is right", "mean"),
    _new("agreement_wrong", "fraction", "agreement where the teacher is wrong", "mean"),
    # Cost of one image.
    _new("macs", "operations", "multiply-accumulates of the student per image", "median"),
    _new("file_bytes", "bytes", "size of the student's weights file", "median"),
    _new("teacher_macs", "operations", "multiply-accumulates of the teacher per image", "median"),
    _new("teacher_bytes", "bytes", "size of the teacher's weights and buffers", "median"),
    # Measured by `scripts/measure.py`.
    *_measured("", "median"),
    *_measured("teacher_", "median"),
    _new("measured_on", "text", "device, threads and version of torch of the measurement"),
    # Provenance.
    Figure("precision", "text", "as Lightning calls it"),
    Figure("device", "text", "that trained"),
    Figure("git_commit", "text", "of this package"),
    Figure("torch", "text", "version"),
    Figure("lightning", "text", "version"),
    Figure("python", "text", "version"),
    Figure("teacher_key", "text", "hash of all that the teacher's weights depend on"),
    Figure("images_sha256", "text", "of all images and labels", old_tables_have_it=False),
    Figure("teacher_sha256", "text", "of a teacher of the user's own", old_tables_have_it=False),
    Figure("code_sha256", "text", "of the user's own code", old_tables_have_it=False),
    Figure("name", "text", "of the run"),
    Figure("error", "text", "why it failed"),
    Figure("folder", "text", "of the run"),
    # Only in `metrics.json`.
    Figure("val_accuracy_batch_statistics", "fraction", "with BatchNorm's batch statistics",
           column=False),
    Figure("processes", "count", "that trained together", column=False),
    Figure("class_names", "list", "in the order of their labels", column=False),
    Figure("trained_teachers_sha256", "list", "of their weights", column=False),
    Figure("config_key", "text", "hash of the configuration", column=False),
    Figure("key_without_teacher", "text", "the same but for the teacher", column=False),
    Figure("baseline_key", "text", "the same but for teacher and method", column=False),
    Figure("stamps", "text", "digest of sizes and times of the files", column=False),
)  # fmt: skip

FIGURE = {figure.name: figure for figure in FIGURES}
"""`FIGURES` by name."""

COLUMNS = tuple(figure.name for figure in FIGURES if figure.column)
"""Columns of `results.csv`, before one for each setting that differs."""

NUMBERS = tuple(name for name in COLUMNS if FIGURE[name].is_number)

STATUSES: dict[str, tuple[str, ...]] = {
    "unreadable": (),
    "running": ("running",),
    "failed": ("running",),
    "finished": ("running", "finished"),
}
"""Run status to the `Figure.since` values that are required at that status."""


def wrong_figure(run: Any) -> str | None:
    """The name of the first missing or invalid figure of a run, if any.

    Args:
        run: a mapping from names to values; NaN marks a missing value in a table.
    """
    status = run.get("status")
    if not isinstance(status, str) or status not in STATUSES:
        return "status"
    for figure in FIGURES:
        value = run.get(figure.name)
        if value is None or value != value:
            fits = figure.since not in STATUSES[status]
        else:
            fits = figure.fits(value)
        if not fits:
            return figure.name
    return None
