"""Runs become one table: a line a run, a line a cell, and what can be concluded from them.

A *cell* is a method and a student in one setting; its runs differ in the seed. Runs of different
settings (another teacher, number of epochs, data set, ...) are never put into one cell, and neither
are runs of one setting for which the images, the teacher's weights or the user's own code were
different.
"""

import glob
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from kd_lightning.errors import InputError
from kd_lightning.files import read_json
from kd_lightning.reports.differences import (
    ALWAYS,
    CODE,
    IMAGES,
    NAMED,
    TEACHER,
    Settings,
    SettingsReader,
    differences,
    in_words,
    recipe,
    union,
)

METHODS = ("none", "logit", "attention", "combined")  # in this order; others follow by name
COLUMNS = (
    "setting", "method", "student", "seed", "variant", "status", "parameters",
    "compression_ratio", "val_accuracy", "test_accuracy", "best_val_accuracy", "best_epoch",
    "test_accuracy_at_best", "agreement", "teacher", "teacher_parameters",
    "teacher_val_accuracy", "teacher_test_accuracy", "data", "epochs", "train_seconds",
    "images_per_second", "precision", "device", "git_commit", "torch", "lightning", "python",
    "teacher_key", "images_sha256", "teacher_sha256", "code_sha256", "name", "error", "folder",
)  # fmt: skip
OPTIONAL = ("images_sha256", "teacher_sha256", "code_sha256")  # tables of before lack these
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
AXES = ("method.", "student.")  # settings that differ within a group


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
    """One line for each run, finished or not.

    Args:
        sources: folders in and below which runs are, or tables of runs that were written before
            (`results.csv`).

    Returns:
        `COLUMNS`; what to call a run's cell, ``label``; and a column for each setting that is in
        `ALWAYS` or tells two runs apart, by its dotted key (`setting_columns`).

    Raises:
        InputError: a file is not such a table.
    """
    paths = [Path(source) for source in sources]
    rows: list[dict[str, Any]] = []
    settings: list[Settings] = []
    for path in paths:
        if path.is_file():
            for row in _read_table(path).to_dict("records"):
                known = {str(key): value for key, value in row.items() if value == value}
                rows.append({key: known.get(key) for key in COLUMNS})
                settings.append({k: v for k, v in known.items() if k not in (*COLUMNS, "label")})
    reader = SettingsReader()
    for folder in run_folders(path for path in paths if not path.is_file()):
        metrics = read_json(folder / "metrics.json")
        if _wrong(metrics):
            metrics = {"status": "unreadable", "name": folder.name}
        rows.append({**metrics, "variant": _suffix(metrics), "folder": str(folder)})
        settings.append(reader.read(folder))
    for metrics, folder in _baselines(rows):
        rows.append({**metrics, "variant": "", "folder": str(folder)})
        settings.append(reader.read(folder))
    rows = [{key: _shown(key, value) for key, value in row.items()} for row in rows]
    _tell_runs_of_a_cell_apart(rows, settings)
    runs = pd.DataFrame(rows, columns=list(COLUMNS))
    runs[list(NUMBERS)] = runs[list(NUMBERS)].apply(pd.to_numeric)
    told = [
        {**known, **{name: str(row[name]) for name in NAMED if row.get(name) is not None}}
        for row, known in zip(rows, settings, strict=True)
        if known
    ]
    columns = {
        key: pd.Series([known.get(key) for known in settings], dtype=object, index=runs.index)
        for key in union([dict.fromkeys(ALWAYS, ""), *differences(told)])
        if key not in (*COLUMNS, "label")
    }
    runs = pd.concat([runs, pd.DataFrame(columns, index=runs.index)], axis=1)
    for column in ("setting", "variant"):
        runs[column] = runs[column].astype(object).fillna("")
    order = runs["method"].map({name: rank for rank, name in enumerate(METHODS)})
    runs["rank"] = order.fillna(len(METHODS))
    by = ["setting", "parameters", "student", "rank", "method", "variant", "seed"]
    runs = runs.sort_values(by, ignore_index=True).drop(columns="rank")
    # What to call a run's cell: the variant only where there is more than one to tell apart.
    several = runs.groupby("setting")["variant"].transform("nunique") > 1
    methods = runs["method"].astype(object)
    runs["label"] = methods.where(
        ~several | methods.isna(), (methods.map(str) + " " + runs["variant"]).str.strip()
    )
    return runs


def _baselines(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[dict[str, Any], Path]]:
    """Runs of other settings that are the baseline of some of these runs.

    The same student without a teacher is trained once for all teachers. Where another teacher is
    distilled, it is found by what the two settings have in common.
    """
    known = {
        (row.get("baseline_key"), row.get("setting")) for row in rows if row.get("method") == "none"
    }
    for row in list(rows):
        key, folder = row.get("baseline_key"), row.get("folder")
        if key is None or folder is None or (key, row["setting"]) in known:
            continue
        known.add((key, row["setting"]))
        name = f"none-{row['student']}-s{row['seed']}"
        for path in sorted(Path(folder).parent.parent.glob(f"*/{glob.escape(name)}/metrics.json")):
            metrics = read_json(path)
            same = all(metrics.get(k) == row.get(k) for k in ("baseline_key", "images_sha256"))
            if same and metrics.get("status") == "finished" and not _wrong(metrics):
                yield {**metrics, **_of_teacher(row, metrics)}, path.parent
                break


def _of_teacher(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """What a baseline is called and compared with beside a run of another setting."""
    parameters = row.get("teacher_parameters")
    return {
        "setting": row["setting"],
        "teacher": row["teacher"],
        "teacher_parameters": parameters,
        "compression_ratio": parameters / baseline["parameters"] if parameters else None,
    }


def _suffix(metrics: Mapping[str, Any]) -> str:
    """What a run's name says beyond method, student and seed."""
    name, seed = str(metrics.get("name", "")), f"-s{metrics.get('seed')}"
    usual = f"{metrics.get('method')}-{metrics.get('student')}{seed}"
    rest = name.removeprefix(usual) if name.startswith(usual) else name.partition(seed)[2]
    return rest.lstrip("-")


def _shown(column: str, value: Any) -> Any:
    """Text that can be shown and written anywhere; a folder stays as the system calls it."""
    if not isinstance(value, str) or column == "folder" or value.isprintable():
        return value
    return "".join(c if c.isprintable() else " " for c in value)


def setting_columns(runs: pd.DataFrame) -> list[str]:
    """The columns of `read_runs` that are keys of the configuration."""
    return [column for column in runs.columns if column not in (*COLUMNS, "label")]


def _tell_runs_of_a_cell_apart(
    rows: Sequence[dict[str, Any]], settings: Sequence[Settings]
) -> None:
    """Make runs variants of each other that one cell would hold and that were not made alike.

    Their names do not say it if the user chose the setting's name, or corrected code of his own.
    """
    cells: dict[Any, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if row["status"] != "unreadable":
            keys = ("setting", "method", "student", "variant", "teacher_sha256", "images_sha256")
            cells[tuple(row.get(key) for key in keys)].append(number)
    for numbers in cells.values():
        known = [number for number in numbers if settings[number]]
        own = [recipe(settings[number]) for number in known]
        for number, differing in zip(known, differences(own), strict=True):
            _add_to_variant(rows[number], in_words(differing))
        codes = {rows[number].get("code_sha256") for number in numbers} - {None}
        for number in numbers if len(codes) > 1 else ():
            _add_to_variant(rows[number], f"{CODE} {_short(rows[number].get('code_sha256'))}")


def _add_to_variant(row: dict[str, Any], words: str) -> None:
    row["variant"] = ", ".join(part for part in (row["variant"], words) if part)


def _short(sha256: Any) -> str:
    return str(sha256)[:8] if isinstance(sha256, str) else "unknown"


def _read_table(path: Path) -> pd.DataFrame:
    try:
        columns = pd.read_csv(path, nrows=0).columns
        # A commit, a version or a setting may look like a number.
        text = dict.fromkeys(set(columns) - set(NUMBERS), str)
        table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
    except ValueError as error:
        raise InputError(f"{path} cannot be read as a table of runs: {error}") from error
    for column in COLUMNS:
        if column not in table and column not in OPTIONAL:
            raise InputError(f"{path} is not a table of runs: it has no column '{column}'")
    for line, row in enumerate(table.to_dict("records"), 2):
        if wrong := _wrong(row):
            raise InputError(f"{path}, line {line}: {wrong} cannot be {row[wrong]}")
    return table


class Group(NamedTuple):
    """Runs that can be compared: of one setting, made of the same images and teacher.

    Attributes:
        title: what to call it among others: what differs, in words, and the setting's name.
        words: only what differs; empty if it is not known, or there is no other group.
        setting: its name.
        runs: a part of what `read_runs` returned.
    """

    title: str
    words: str
    setting: str
    runs: pd.DataFrame


def groups(runs: pd.DataFrame) -> list[Group]:
    """Settings, and parts of settings whose images or teacher's weights were not the same.

    A run without a teacher belongs to the groups of all teachers, as what their runs are measured
    against. Finished runs that are too old to say what they were made of are put with the others as
    long as those agree, else they are a group of their own.

    Args:
        runs: from `read_runs`.
    """
    found: list[tuple[str, Settings, pd.DataFrame]] = []
    for setting, part in runs[runs["status"] != "unreadable"].groupby("setting", sort=False):
        for images, same in _split(part, "images_sha256"):
            for teacher, own in _split(same, "teacher_sha256"):
                contents = {IMAGES: images, TEACHER: teacher}
                known = {name: value for name, value in contents.items() if value}
                found.append((str(setting), known, own))
    keys = [key for key in setting_columns(runs) if not key.startswith(AXES)]
    facts = ["teacher", "data", *keys]
    if not any(runs[key].notna().any() for key in keys if key == "trainer.max_epochs"):
        facts.append("epochs")  # of tables that are too old to have settings
    rows = []
    for setting, known, own in found:
        values = {key: own[key].dropna().unique() for key in facts}
        constant = {key: _plain(value[0]) for key, value in values.items() if len(value) == 1}
        rows.append({**constant, **known, "setting": setting})
    named = []
    for (setting, _, own), differing in zip(found, differences(rows), strict=True):
        words = in_words(differing)
        named.append(Group(f"{words} ({setting})" if words else setting, words, setting, own))
    return named


def _plain(value: Any) -> str:
    return f"{value:.0f}" if isinstance(value, Real) else str(value)


def _split(part: pd.DataFrame, column: str) -> list[tuple[str | None, pd.DataFrame]]:
    """The parts in which a column is the same, and how to call each; see `groups`."""
    known = part[column].dropna().unique()
    if not len(known):
        return [(None, part)]
    if len(known) == 1:
        return [(_short(known[0]), part)]
    free = part[column].isna() & (part["status"] != "finished")
    if column == "teacher_sha256":
        free |= part[column].isna() & part["teacher_test_accuracy"].isna()
    parts: list[tuple[str | None, pd.DataFrame]] = [
        (_short(value), part[(part[column] == value) | free]) for value in known
    ]
    if (part[column].isna() & ~free).any():
        parts.append(("unknown", part[part[column].isna()]))
    return parts


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

    Args:
        runs: from `read_runs`.

    Returns:
        Columns ``setting, group`` (the title of the `Group`), ``method, student, variant, label``;
        ``n`` finished runs, and how many are ``failed``, ``unfinished`` or ``missing`` of those
        that another cell of the group has; ``parameters, compression_ratio``; mean ``val``,
        ``test``, ``agreement`` and their standard deviations over seeds ``val_std``, ``test_std``;
        ``gain``, the mean difference of test accuracy to `none` with the same student and seed, its
        confidence interval ``gain_low, gain_high`` (Student's t over ``pairs`` of seeds, NaN for
        fewer than two); and ``gap_closed``, the gain as a share of the teacher's lead over `none`.
        Accuracies are fractions.
    """
    cells = []
    for title, _, setting, part in groups(runs):
        seeds = set(part["seed"])
        place = {"setting": setting, "group": title}
        # As they were sorted: students by size, methods in the usual order.
        for key, cell in part.groupby(["method", "student", "variant"], sort=False):
            cells.append(
                {
                    **place,
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
                    row = {**place, "method": method, "student": student}
                    missing = {"variant": "", "label": method, "missing": len(seeds)}
                    cells.append({**row, **missing})
    counts = ["n", "failed", "unfinished", "missing", "pairs"]
    table = pd.DataFrame(cells, columns=list(_CELL_COLUMNS))
    table[counts] = table[counts].fillna(0).astype(int)
    return table


_CELL_COLUMNS = (
    "setting", "group", "method", "student", "variant", "label", "n", "failed", "unfinished",
    "missing", "parameters", "compression_ratio", "val", "val_std", "test", "test_std", "agreement",
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
    compared = ["seed", "test_accuracy"]
    pairs = finished[compared].merge(none[compared], on="seed", suffixes=("", "_none"))
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
