"""Runs become one table: a line a run, a line a cell, and what can be concluded from them.

A *cell* is a method and a student in one setting; its runs differ in the seed. Runs of different
settings (another teacher, number of epochs, data set, ...) are never put into one cell.
"""

import os
from collections.abc import Iterable, Mapping
from numbers import Real
from pathlib import Path
from typing import Any

import pandas as pd
from scipy import stats

from kd_lightning.errors import InputError
from kd_lightning.files import read_json

METHODS = ("none", "logit", "attention", "combined")  # in this order; others follow by name
COLUMNS = (
    "setting", "method", "student", "seed", "variant", "status", "parameters",
    "compression_ratio", "val_accuracy", "test_accuracy", "best_val_accuracy", "best_epoch",
    "test_accuracy_at_best", "agreement", "teacher", "teacher_parameters",
    "teacher_val_accuracy", "teacher_test_accuracy", "data", "epochs", "train_seconds",
    "images_per_second", "precision", "device", "git_commit", "torch", "lightning", "python",
    "teacher_key", "name", "error", "folder",
)  # fmt: skip
NUMBERS = (
    "seed", "parameters", "compression_ratio", "val_accuracy", "test_accuracy",
    "best_val_accuracy", "best_epoch", "test_accuracy_at_best", "agreement", "teacher_parameters",
    "teacher_val_accuracy", "teacher_test_accuracy", "epochs", "train_seconds",
    "images_per_second",
)  # fmt: skip
# What a run of each status has at least.
NEEDED: dict[str, tuple[str, ...]] = {
    "unreadable": (),
    "running": ("method", "student", "seed"),
    "failed": ("method", "student", "seed"),
    "finished": ("method", "student", "seed", "parameters", "val_accuracy"),
}
CONFIDENCE = 0.95


def run_folders(folders: Iterable[str | Path]) -> list[Path]:
    """All run directories in and below these folders, in order."""
    found = []
    for folder in folders:
        for path, below, files in os.walk(folder):
            if "metrics.json" in files:
                found.append(Path(path))
                below.clear()  # what is inside a run belongs to it
            below.sort()
    return list(dict.fromkeys(found))


def read_runs(sources: Iterable[str | Path]) -> pd.DataFrame:
    """One line for each run, finished or not: `COLUMNS`, and what to call its cell, ``label``.

    Args:
        sources: folders in and below which runs are, or tables of runs that were written before
            (`results.csv`).

    Raises:
        InputError: a file is not such a table.
    """
    paths = [Path(source) for source in sources]
    tables = [_read_table(path) for path in paths if path.is_file()]
    rows = []
    for folder in run_folders(path for path in paths if not path.is_file()):
        metrics = read_json(folder / "metrics.json")
        if _wrong(metrics):
            metrics = {"status": "unreadable", "name": folder.name}
        suffix = str(metrics.get("name", "")).partition(f"-s{metrics.get('seed')}")[2]
        rows.append({**metrics, "variant": suffix.lstrip("-"), "folder": str(folder)})
    found = pd.DataFrame(rows, columns=list(COLUMNS))
    runs = pd.concat([found, *tables], ignore_index=True) if tables else found
    for column in ("setting", "variant"):
        runs[column] = runs[column].fillna("")
    order = runs["method"].map({name: rank for rank, name in enumerate(METHODS)})
    runs["rank"] = order.fillna(len(METHODS))
    by = ["setting", "parameters", "student", "rank", "method", "variant", "seed"]
    runs = runs.sort_values(by, ignore_index=True).drop(columns="rank")
    # What to call a run's cell: the variant only where there is more than one to tell apart.
    several = runs.groupby("setting")["variant"].transform("nunique") > 1
    runs["label"] = runs["method"].where(
        ~several, (runs["method"] + " " + runs["variant"]).str.strip()
    )
    return runs


def _read_table(path: Path) -> pd.DataFrame:
    try:
        # A commit or a version may look like a number.
        text = dict.fromkeys(set(COLUMNS) - set(NUMBERS), str)
        table = pd.read_csv(path, dtype=text)
    except ValueError as error:
        raise InputError(f"{path} cannot be read as a table of runs: {error}") from error
    if missing := [column for column in COLUMNS if column not in table]:
        raise InputError(f"{path} is not a table of runs: it has no column '{missing[0]}'")
    for line, row in enumerate(table.to_dict("records"), 2):
        if column := _wrong(row):
            raise InputError(f"{path}, line {line}: {column} cannot be {row[column]}")
    return table[list(COLUMNS)]


def _wrong(run: Mapping[str, Any]) -> str | None:
    """The first column of a run that is not what a run would say, if any."""
    status = run.get("status")
    if not isinstance(status, str) or status not in NEEDED:
        return "status"
    for column in COLUMNS:
        value = run.get(column)
        if value is None or value != value:  # NaN is how a table says that there is none
            fits = column not in NEEDED[status]
        elif column in NUMBERS:
            number = isinstance(value, Real) and not isinstance(value, bool)
            fits = number and -(2**53) <= value <= 2**53
        else:
            fits = isinstance(value, str)
        if not fits:
            return column
    return None


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """One line for each cell.

    Returns:
        Columns ``setting, method, student, variant, label``; ``n`` finished runs, and how many are
        ``failed``, ``unfinished`` or ``missing`` of those that another cell of the setting has;
        ``parameters, compression_ratio``; mean ``val``, ``test``, ``agreement`` and their
        standard deviations over seeds ``val_std``, ``test_std``; ``gain``, the mean difference of
        test accuracy to `none` with the same student and seed, its confidence interval
        ``gain_low, gain_high`` (Student's t over ``pairs`` of seeds, NaN for fewer than two); and
        ``gap_closed``, the gain as a share of the teacher's lead over `none`. Accuracies are
        fractions.
    """
    cells = []
    for setting, part in runs[runs["status"] != "unreadable"].groupby("setting", sort=False):
        seeds = set(part["seed"])
        # As they were sorted: students by size, methods in the usual order.
        for key, cell in part.groupby(["method", "student", "variant"], sort=False):
            cells.append(
                {
                    "setting": setting,
                    **dict(zip(("method", "student", "variant"), key, strict=True)),
                    "label": cell["label"].iloc[0],
                    **_cell(cell, _baseline(part, *key), seeds),
                }
            )
        # A method that has not come to some student yet is missing there altogether.
        plain = part[part["variant"] == ""]
        for student in plain["student"].unique():
            for method in plain["method"].unique():
                if not ((plain["method"] == method) & (plain["student"] == student)).any():
                    row = {"setting": setting, "method": method, "student": student}
                    missing = {"variant": "", "label": method, "missing": len(seeds)}
                    cells.append({**row, **missing})
    counts = ["n", "failed", "unfinished", "missing", "pairs"]
    table = pd.DataFrame(cells, columns=list(_CELL_COLUMNS))
    table[counts] = table[counts].fillna(0).astype(int)
    return table


_CELL_COLUMNS = (
    "setting", "method", "student", "variant", "label", "n", "failed", "unfinished", "missing",
    "parameters", "compression_ratio", "val", "val_std", "test", "test_std", "agreement",
    "gain", "gain_low", "gain_high", "pairs", "gap_closed", "seconds",
)  # fmt: skip


def _baseline(part: pd.DataFrame, method: str, student: str, variant: str) -> pd.DataFrame:
    """The finished `none` runs that a cell is measured against: those of the same student."""
    none = part[
        (part["method"] == "none") & (part["student"] == student) & (part["status"] == "finished")
    ]
    same = none[none["variant"] == variant]
    return none.iloc[:0] if method == "none" else same if len(same) else none[none["variant"] == ""]


def _cell(cell: pd.DataFrame, none: pd.DataFrame, seeds: set[int]) -> dict[str, float]:
    finished = cell[cell["status"] == "finished"]
    row: dict[str, float] = {
        "n": len(finished),
        "failed": int((cell["status"] == "failed").sum()),
        "unfinished": int((cell["status"] == "running").sum()),
        "missing": len(seeds - set(cell["seed"])),
        "parameters": finished["parameters"].median(),
        "compression_ratio": finished["compression_ratio"].median(),
        "agreement": finished["agreement"].astype(float).mean(),
        "seconds": finished["train_seconds"].median(),
    }
    for short in ("val", "test"):
        row[short] = finished[f"{short}_accuracy"].mean()
        row[f"{short}_std"] = finished[f"{short}_accuracy"].std(ddof=1)
    pairs = finished.merge(none, on="seed", suffixes=("", "_none"))
    difference = (pairs["test_accuracy"] - pairs["test_accuracy_none"]).astype(float)
    row["pairs"] = len(pairs)
    if len(pairs):
        row["gain"] = difference.mean()
        lead = finished["teacher_test_accuracy"].median() - pairs["test_accuracy_none"].mean()
        if lead > 0:
            row["gap_closed"] = row["gain"] / lead
    if len(pairs) > 1:
        row["gain_low"], row["gain_high"] = interval(difference.tolist())
    return row


def interval(differences: list[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's t interval of the mean of paired differences."""
    n = len(differences)
    values = pd.Series(differences)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / n**0.5
    return values.mean() - half, values.mean() + half


def read_numbers(path: Path) -> pd.DataFrame | None:
    """A run's table of numbers; None if there is none, or something else is in it."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError):
        return None
    numbers = table.select_dtypes("number")
    return table if len(table) and numbers.shape == table.shape else None


def read_histories(runs: pd.DataFrame) -> pd.DataFrame:
    """The learning curves of the finished runs: a line an epoch, with the run's own columns."""
    parts = []
    for run in runs[runs["status"] == "finished"].itertuples():
        history = read_numbers(Path(str(run.folder)) / "history.csv")
        if history is None or not {"epoch", "val_accuracy"} <= set(history):
            continue
        parts.append(history.assign(label=run.label, student=run.student, seed=run.seed))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
