"""Statistics over runs: comparable groups, cells over seeds, paired gains."""

import re
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import special

from kd_lightning.errors import InputError
from kd_lightning.reports.differences import IMAGES, TEACHER, Settings, differences, in_words
from kd_lightning.reports.runs import GIVEN, setting_columns, short_hash
from kd_lightning.results import FIGURE, NUMBERS

CONFIDENCE = 0.95


AXES = ("method.", "student.")  # settings that differ within a group
EPOCHS = "trainer.max_epochs"


class Group(NamedTuple):
    """Comparable runs: those of one setting with the same images and teacher weights.

    Attributes:
        title: display name: the differences from other groups, and the setting.
        words: the differences only; empty if unknown, or if there is no other group.
        setting: name of the setting.
        runs: the group's rows of the table of `read_runs`.
    """

    title: str
    words: str
    setting: str
    runs: pd.DataFrame


def groups(runs: pd.DataFrame) -> list[Group]:
    """Group runs by setting, and by the hashes of images and teacher weights.

    A run without a teacher belongs to the groups of all teachers, as their baseline. Finished runs
    of older versions without hashes join the group of their setting if there is only one, and
    otherwise form their own.

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
    if not any(runs[key].notna().any() for key in keys if key == EPOCHS):
        facts.append("epochs")  # for tables of older versions, without settings
    rows = []
    for setting, known, own in found:
        values = {key: own[key].dropna().unique() for key in facts}
        if not len(values.get(EPOCHS, ["unused"])):  # of an older version, beside newer ones
            values[EPOCHS] = own["epochs"].dropna().unique()
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
    """Split by the values of a column, with a name for each part; see `groups`."""
    known = part[column].dropna().unique()
    if not len(known):
        return [(None, part)]
    if len(known) == 1:
        return [(short_hash(known[0]), part)]
    free = part[column].isna() & (part["status"] != "finished")
    if column == "teacher_sha256":
        free |= part[column].isna() & part["teacher_test_accuracy"].isna()
    parts: list[tuple[str | None, pd.DataFrame]] = [
        (short_hash(value), part[(part[column] == value) | free]) for value in known
    ]
    if (part[column].isna() & ~free).any():
        parts.append(("unknown", part[part[column].isna()]))
    return parts


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Aggregate runs to one row per cell.

    Args:
        runs: from `read_runs`.

    Returns:
        Columns ``setting, group`` (the title of the `Group`), ``method, student, variant, label``;
        the number ``n`` of seeds with a finished run, and of ``failed``, ``unfinished`` and
        ``missing`` runs (seeds that another cell of the group has); ``parameters,
        compression_ratio``; mean ``val``, ``test``, ``agreement`` and their standard deviations
        over seeds ``val_std``, ``test_std``, where runs with the same seed count as their average;
        ``gain``, the mean difference of test accuracy to `none` with the same student and seed, its
        confidence interval ``gain_low, gain_high`` (Student's t over ``pairs`` of seeds, NaN for
        fewer than two); ``gap_closed``, the gain as a fraction of the teacher's lead over `none`;
        and the `SCORES`. Accuracies are fractions.
    """
    cells = []
    for title, _, setting, part in groups(runs):
        seeds = set(part["seed"])
        place = {"setting": setting, "group": title}
        # Unsorted, to keep the order of `read_runs`: students by size, methods by `METHODS`.
        for key, cell in part.groupby(["method", "student", "variant"], sort=False):
            cells.append(
                {
                    **place,
                    **dict(zip(("method", "student", "variant"), key, strict=True)),
                    "label": cell["label"].iloc[0],
                    **_cell(cell, _baseline(part, cell), seeds),
                }
            )
        # Add rows for combinations of method and student without any run yet.
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


def check_paired(runs: pd.DataFrame, baseline: str | Path) -> None:
    """Check that some run can be compared with a given baseline.

    Args:
        runs: from `read_runs`, with this baseline.
        baseline: its folder.

    Raises:
        InputError: there are runs, but none with the student, the seed and the images of one of it.
    """
    cells = summarise(runs)
    compared = cells[(cells["method"] != "none") & (cells["n"] > 0)]
    if len(compared) and not compared["pairs"].any():
        raise InputError(
            f"no gain can be computed: no run of the method none in {baseline} has the same "
            "student, seed and images as one of the runs"
        )


SCORES = (
    "test_nll", "test_ece", "temperature", "test_ece_calibrated", "macs", "file_bytes",
    "latency_1_one_thread_p50", "latency_64_all_threads_p50",
)  # fmt: skip
"""Figures that are aggregated under their own name."""

_CELL_COLUMNS = (
    "setting", "group", "method", "student", "variant", "label", "n", "failed", "unfinished",
    "missing", "parameters", "compression_ratio", "val", "val_std", "test", "test_std", "agreement",
    "gain", "gain_low", "gain_high", "pairs", "gap_closed", "seconds",
    *SCORES,
)  # fmt: skip


def _baseline(part: pd.DataFrame, cell: pd.DataFrame) -> pd.DataFrame:
    """The finished `none` runs that a cell's gain refers to; empty if there are none.

    They have the same student, and no override that the cell does not have: those with the same
    variant or, if there are none, those with the fewest overrides.

    Args:
        part: runs of the cell's group.
        cell: runs of the cell.
    """
    finished = part["status"] == "finished"
    none = part[
        (part["method"] == "none") & finished & (part["student"] == cell["student"].iloc[0])
    ]
    done = cell[cell["status"] == "finished"]
    if done.empty or cell["method"].iloc[0] == "none":
        return none.iloc[:0]
    run, keys = done.iloc[0], setting_columns(part)
    own = run["variant"]
    suited = {
        variant: rows
        for variant, rows in none.groupby("variant")
        if _overrides(variant) <= _overrides(own) and _same_student(run, rows.iloc[0], keys)
    }
    best = min(suited, key=lambda other: (other != own, len(_overrides(other))), default=None)
    return none.iloc[:0] if best is None else suited[best]


def _overrides(variant: str) -> set[str]:
    if variant.startswith(GIVEN):
        return set()
    return set(re.split(", |-", variant)) - {""}


def _same_student(run: "pd.Series[Any]", other: "pd.Series[Any]", keys: list[str]) -> bool:
    """Whether two runs with the same name of the student have the same student.

    Their settings decide, because a method may add parameters to the student; the number of
    parameters decides where settings are missing, as in runs of older versions.
    """
    known = [row[keys].dropna().to_dict() for row in (run, other)]
    own, its = ({k: v for k, v in row.items() if k.startswith("student.")} for row in known)
    if all(known) and own == its:
        return True
    if all(known) and any(differences([own, its])):
        return False
    return bool(run["parameters"] == other["parameters"])


def _cell(cell: pd.DataFrame, none: pd.DataFrame, seeds: set[int]) -> dict[str, float]:
    finished, none = _one_per_seed(cell), _one_per_seed(none)
    row: dict[str, float] = {
        "n": len(finished),
        "failed": int((cell["status"] == "failed").sum()),
        "unfinished": int((cell["status"] == "running").sum()),
        "missing": len(seeds - set(cell["seed"])),
        "parameters": _over_seeds(finished, "parameters"),
        "compression_ratio": _over_seeds(finished, "compression_ratio"),
        "agreement": _over_seeds(finished, "agreement"),
        "seconds": _over_seeds(finished, "train_seconds"),
        **{name: _over_seeds(finished, name) for name in SCORES},
    }
    for short in ("val", "test"):
        row[short] = _over_seeds(finished, f"{short}_accuracy")
        row[f"{short}_std"] = finished[f"{short}_accuracy"].std(ddof=1)
    compared = ["seed", "test_accuracy"]
    pairs = finished[compared].merge(none[compared], on="seed", suffixes=("", "_none")).dropna()
    difference = (pairs["test_accuracy"] - pairs["test_accuracy_none"]).astype(float)
    row["pairs"] = len(pairs)
    if len(pairs):
        row["gain"] = difference.mean()
        lead = _over_seeds(finished, "teacher_test_accuracy") - pairs["test_accuracy_none"].mean()
        if lead > 0:
            row["gap_closed"] = row["gain"] / lead
    if len(pairs) > 1:
        row["gain_low"], row["gain_high"] = interval(difference.tolist())
    return row


def _one_per_seed(runs: pd.DataFrame) -> pd.DataFrame:
    """The figures of finished runs, averaged over runs with the same seed: copies and repetitions
    must not make deviation and interval smaller.
    """
    figures = runs.loc[runs["status"] == "finished", list(NUMBERS)].astype(float)
    return figures.groupby("seed", as_index=False).mean()


def _over_seeds(runs: pd.DataFrame, name: str) -> float:
    """Aggregate a figure over seeds, as defined in `results.FIGURES`."""
    return float(runs[name].astype(float).agg(FIGURE[name].over_seeds))


def interval(differences: list[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's t confidence interval of the mean of paired differences."""
    n = len(differences)
    values = pd.Series(differences)
    half = special.stdtrit(n - 1, (1 + confidence) / 2) * values.std(ddof=1) / n**0.5
    return values.mean() - half, values.mean() + half


def wilson(fraction: float, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's score interval of a binomial proportion (Wilson 1927, J. Am. Stat. Assoc. 22).

    Args:
        fraction: observed proportion.
        total: number of trials, above 0.
        confidence: coverage.
    """
    z = float(special.ndtri((1 + confidence) / 2))
    scale = 1 + z**2 / total
    centre = (fraction + z**2 / (2 * total)) / scale
    half = z * (fraction * (1 - fraction) / total + z**2 / (4 * total**2)) ** 0.5 / scale
    return max(0.0, centre - half), min(1.0, centre + half)
