"""Collection of runs into one table, with one row per run.

A *cell* is a method and a student in one setting; its runs differ only in the seed. Runs of
different settings (teacher, number of epochs, data set, ...) never share a cell, and neither do
runs of one setting with different images, teacher weights or user code.
"""

import glob
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import pandas as pd

from kd_lightning.errors import InputError
from kd_lightning.files import read_json, tidy
from kd_lightning.reports.differences import (
    ALWAYS,
    CODE,
    NAMED,
    Settings,
    SettingsReader,
    differences,
    follow_the_seed,
    in_words,
    recipe,
    union,
)
from kd_lightning.results import COLUMNS, FIGURE, NUMBERS, wrong_figure

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_TRAINED_FIRST = re.compile(r"(teacher|teacher\.members\.\d+)\.run\.")
"""Settings of a run that `teacher.run={...}` trains before, for a teacher or a member."""

GIVEN = "given "
"""Prefix of the variant of a given baseline, which counts whatever the overrides of its method."""

_CELL = ("setting", "method", "student", "variant", "teacher_sha256", "images_sha256")
"""Columns that are equal within a cell."""

METHODS = ("none", "logit", "attention", "combined")  # display order; other methods follow by name


def run_folders(folders: Iterable[str | Path]) -> list[Path]:
    """All run directories in and below these folders, sorted; each once, however it is named."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path, below, files in os.walk(folder, onerror=_warn):
            if "metrics.json" in files:
                found.setdefault(os.path.realpath(path), Path(path))
                below.clear()  # do not descend into a run
            below.sort()
    return list(found.values())


def _warn(error: OSError) -> None:
    log.warning("%s cannot be read: %s", error.filename, error.strerror)


def python_text(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: pandas stores text as Python does. In pyarrow's format, its choice where that is
    installed, text must be valid UTF-8.
    """
    decorate: Any = pd.option_context("mode.string_storage", "python")
    return cast(Callable[P, T], decorate(function))


@python_text
def read_runs(sources: Iterable[str | Path], baseline: str | Path | None = None) -> pd.DataFrame:
    """Read runs, finished or not, into a table with one row per run.

    Args:
        sources: folders that contain runs, or tables of runs (`results.csv`).
        baseline: folder of the runs of the method `none` that gains refer to in every setting,
            instead of those with the same configuration: for a baseline with settings of its own,
            such as its best augmentation.

    Returns:
        `COLUMNS`; the display name of a run's cell, ``label``; and a column for each setting that
        is in `ALWAYS` or differs between runs, by its dotted key (`setting_columns`).

    Raises:
        InputError: a file is not such a table.
    """
    paths = [Path(source) for source in sources]
    rows: list[dict[str, Any]] = []
    settings: list[Settings] = []
    reader = SettingsReader()
    for folder in run_folders(path for path in paths if not path.is_file()):
        metrics = read_json(folder / "metrics.json")
        if wrong_figure(metrics):
            metrics = {"status": "unreadable", "name": folder.name}
        own = reader.read(folder)
        if trained := {found[1] for key in own if (found := _TRAINED_FIRST.match(key))}:
            # The setting says how these teachers were trained, with the seed of the run.
            metrics = {**metrics, "teacher_sha256": None}
            if "teacher.run.seed" not in own and isinstance(metrics.get("teacher"), str):
                suffix = rf"-s{metrics.get('seed')}(?!\d)"
                metrics["teacher"] = re.sub(suffix, "", metrics["teacher"])
            files = {f"{teacher}.checkpoint" for teacher in trained}
            own = {key: value for key, value in own.items() if key not in files}
        rows.append({**metrics, "variant": _suffix(metrics), "folder": str(folder)})
        settings.append(own)
    # A run that is read twice would be counted twice: deviation and interval would be too small.
    read = {_place(row) for row in rows}
    for path in paths:
        if path.is_file():
            for row in _read_table(path).to_dict("records"):
                known = {str(key): value for key, value in row.items() if value == value}
                place = _place(known)
                if place is not None and place in read:
                    continue
                read.add(place)
                rows.append({key: known.get(key) for key in COLUMNS})
                settings.append({k: v for k, v in known.items() if k not in (*COLUMNS, "label")})
    if baseline is None:
        added = list(_runs_without_teacher(rows))
    else:
        kept = [number for number, row in enumerate(rows) if row.get("method") != "none"]
        rows, settings = [rows[n] for n in kept], [settings[n] for n in kept]
        added = list(_given_baselines(rows, Path(baseline)))
    for metrics, folder, row in added:
        suffix = _suffix(metrics)
        rows.append(
            {
                **metrics,
                **_of_teacher(row, metrics),
                "variant": f"{GIVEN}{suffix}" if suffix and baseline is not None else suffix,
                "folder": str(folder),
            }
        )
        teacher = _teacher_settings(reader.read(Path(row["folder"])) if row.get("folder") else {})
        own = reader.read(folder)
        settings.append({k: v for k, v in own.items() if k not in _teacher_settings(own)} | teacher)
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
        for key in union([dict.fromkeys(ALWAYS, ""), *differences(told), *map(_limits, told)])
        if key not in (*COLUMNS, "label")
    }
    runs = pd.concat([runs, pd.DataFrame(columns, index=runs.index)], axis=1)
    for column in ("setting", "variant"):
        runs[column] = runs[column].astype(object).fillna("")
    order = runs["method"].map({name: rank for rank, name in enumerate(METHODS)})
    runs["rank"] = order.fillna(len(METHODS))
    by = ["setting", "parameters", "student", "rank", "method", "variant", "seed"]
    runs = runs.sort_values(by, ignore_index=True).drop(columns="rank")
    # The label of a cell includes the variant only if there is more than one.
    several = runs.groupby("setting")["variant"].transform("nunique") > 1
    methods = runs["method"].astype(object)
    runs["label"] = methods.where(
        ~several | methods.isna(), (methods.map(str) + " " + runs["variant"]).str.strip()
    )
    _warn_of_equal_seeds(runs)
    return runs


def _warn_of_equal_seeds(runs: pd.DataFrame) -> None:
    finished = runs[runs["status"] == "finished"]
    again = finished.duplicated([*_CELL, "seed"])
    if again.any():
        cells = finished.groupby([*_CELL, "seed"], dropna=False)["folder"]
        first, second = next(own.iloc[:2] for _, own in cells if len(own) > 1)
        log.warning(
            "%d of %d finished runs repeat the seed of another run of their cell, such as %s and "
            "%s: one average per seed is used",
            again.sum(), len(finished), first, second,
        )  # fmt: skip


def _limits(settings: Settings) -> Settings:
    """What restricts a run to a part of the images: shown even if all runs have it."""
    return {key: value for key, value in settings.items() if key.startswith("trainer.limit_")}


def _place(row: Mapping[str, Any]) -> tuple[Any, str] | None:
    """What identifies a run in a report: a baseline may be in several settings."""
    folder = row.get("folder")
    return None if folder is None else (row.get("setting"), os.path.realpath(str(folder)))


_Added = tuple[dict[str, Any], Path, Mapping[str, Any]]
"""Metrics and folder of a run of another setting, and a run of the setting it is added to."""


def _runs_without_teacher(rows: Sequence[Mapping[str, Any]]) -> Iterator[_Added]:
    """Runs of other settings that used no teacher, `none` among them, and belong to these runs too.

    They are trained only once, whatever the configured teacher. For other teachers they are found
    by the common part of the settings.
    """
    known = {(*_without_teacher(row), row.get("setting")) for row in rows}
    searched = set()
    for row in _teacher_known_first(rows):
        key, folder = row.get("baseline_key"), row.get("folder")
        if key is None or folder is None or (key, row.get("setting")) in searched:
            continue
        searched.add((key, row.get("setting")))
        name = glob.escape(f"-{tidy(str(row['student']))}-s{row['seed']}")
        for path in sorted(Path(folder).parent.parent.glob(f"*/*{name}*/metrics.json")):
            metrics = read_json(path)
            identity = (*_without_teacher(metrics), row.get("setting"))
            if identity[0] is None or identity in known:
                continue
            same = all(metrics.get(k) == row.get(k) for k in ("baseline_key", "images_sha256"))
            # User code of the student must be the same; code of a term is the row's alone.
            same = same and metrics.get("code_sha256") in (None, row.get("code_sha256"))
            if same and metrics.get("status") == "finished" and not wrong_figure(metrics):
                known.add(identity)
                yield metrics, path.parent, row


def _without_teacher(metrics: Mapping[str, Any]) -> tuple[Any, ...]:
    """A key that runs share if they differ only in an unused teacher; (None,): it is used."""
    if metrics.get("method") == "none":  # overrides of the method are not in `baseline_key`
        return "none", metrics.get("baseline_key"), _suffix(metrics)
    return (metrics.get("key_without_teacher"),)


def _given_baselines(rows: Sequence[Mapping[str, Any]], folder: Path) -> Iterator[_Added]:
    """Runs without a teacher in a folder, as the baseline of every setting."""
    found: dict[Any, Any] = {}
    for path in run_folders([folder]):
        metrics = read_json(path / "metrics.json")
        if wrong_figure(metrics):
            continue
        if metrics.get("method") == "none" and metrics.get("status") == "finished":
            key = (metrics.get("student"), metrics.get("seed"), metrics.get("images_sha256"))
            if key in found:
                raise InputError(
                    f"the baseline is ambiguous: {found[key][1]} and {path} have the same student "
                    "and seed; give a folder with one of them"
                )
            found[key] = (metrics, path)
    if not found:
        raise InputError(f"there is no finished run of the method none in {folder}")
    settings: dict[Any, Mapping[str, Any]] = {}
    for row in _teacher_known_first(rows):
        settings.setdefault((row.get("setting"), row.get("student"), row.get("images_sha256")), row)
    for (_, student, images), row in settings.items():
        for (other, _, same), (metrics, path) in found.items():
            if (other, same) == (student, images):
                yield metrics, path, row


def _teacher_known_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """An unfinished run may not know its teacher's size yet."""
    return sorted(rows, key=lambda row: row.get("teacher_parameters") is None)


def _teacher_settings(settings: Settings) -> Settings:
    return {k: v for k, v in settings.items() if k == "teacher" or k.startswith("teacher.")}


def _of_teacher(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a baseline that are taken from a run of another setting."""
    parameters, count = row.get("teacher_parameters"), baseline.get("parameters")
    return {
        "setting": row.get("setting"),
        "teacher": row.get("teacher"),
        "teacher_parameters": parameters,
        "compression_ratio": parameters / count if parameters and count else None,
    }


def _suffix(metrics: Mapping[str, Any]) -> str:
    """The part of a run's name after method, student and seed."""
    name, seed = str(metrics.get("name", "")), f"-s{metrics.get('seed')}"
    usual = f"{tidy(str(metrics.get('method')))}-{tidy(str(metrics.get('student')))}{seed}"
    rest = name.removeprefix(usual) if name.startswith(usual) else name.partition(seed)[2]
    return rest.lstrip("-")


def _shown(column: str, value: Any) -> Any:
    """Replace unprintable characters, except in folder names."""
    if not isinstance(value, str) or column == "folder" or value.isprintable():
        return value
    return "".join(c if c.isprintable() else " " for c in value)


def setting_columns(runs: pd.DataFrame) -> list[str]:
    """The columns of `read_runs` that are keys of the configuration."""
    return [column for column in runs.columns if column not in (*COLUMNS, "label")]


def _tell_runs_of_a_cell_apart(
    rows: Sequence[dict[str, Any]], settings: Sequence[Settings]
) -> None:
    """Make runs of one cell with different settings or user code variants of each other.

    Their names do not show this if the setting's name was chosen by the user, or if user code was
    changed.
    """
    cells: dict[Any, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        if row["status"] != "unreadable":
            cells[tuple(row.get(key) for key in _CELL)].append(number)
    for numbers in cells.values():
        known = [number for number in numbers if settings[number]]
        own = [recipe(settings[number]) for number in known]
        follow = follow_the_seed(own, [str(int(rows[number]["seed"])) for number in known])
        own = [{key: row[key] for key in row if key not in follow} for row in own]
        for number, differing in zip(known, differences(own), strict=True):
            _add_to_variant(rows[number], in_words(differing))
        codes = {rows[number].get("code_sha256") for number in numbers} - {None}
        for number in numbers if len(codes) > 1 else ():
            _add_to_variant(rows[number], f"{CODE} {short_hash(rows[number].get('code_sha256'))}")


def _add_to_variant(row: dict[str, Any], words: str) -> None:
    row["variant"] = ", ".join(part for part in (row["variant"], words) if part)


def short_hash(sha256: Any) -> str:
    """The first digits of a hash; `unknown` if there is none."""
    return str(sha256)[:8] if isinstance(sha256, str) else "unknown"


def _read_table(path: Path) -> pd.DataFrame:
    try:
        columns = pd.read_csv(path, nrows=0).columns
        # A commit, a version or a setting may look like a number.
        text = dict.fromkeys(set(columns) - set(NUMBERS), str)
        table = pd.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read as a table of runs: {reason}") from error
    for column in COLUMNS:
        if column not in table and FIGURE[column].old_tables_have_it:
            raise InputError(f"{path} is not a table of runs: it has no column '{column}'")
    for line, row in enumerate(table.to_dict("records"), 2):
        if wrong := wrong_figure(row):
            raise InputError(f"{path}, line {line}: {wrong} cannot be {row[wrong]}")
    return table


def read_numbers(path: Path) -> pd.DataFrame | None:
    """Read a run's numeric table; None if missing, empty or not numeric."""
    try:
        table = pd.read_csv(path)
    except (OSError, ValueError):
        return None
    numbers = table.select_dtypes("number")
    return table if len(table) and numbers.shape == table.shape else None


def read_histories(runs: pd.DataFrame) -> pd.DataFrame:
    """The learning curves of finished runs: one row per epoch, with label, student and seed."""
    parts = []
    for run in runs[runs["status"] == "finished"].itertuples():
        history = read_numbers(Path(str(run.folder)) / "history.csv")
        if history is None or not {"epoch", "val_accuracy"} <= set(history):
            continue
        parts.append(history.assign(label=run.label, student=run.student, seed=run.seed))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()
