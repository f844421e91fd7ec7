"""The tables in the documents follow from the committed runs."""

import itertools

import pandas as pd
import pytest
from conftest import REPOSITORY

from kd_lightning.reports.documents import write_report
from kd_lightning.reports.runs import read_runs
from kd_lightning.reports.statistics import summarise
from kd_lightning.results import FIGURE

RUNS = REPOSITORY / "docs" / "results" / "runs.csv"
GRIDS = REPOSITORY / "docs" / "twelve-epochs.md"
FURTHER = REPOSITORY / "docs" / "further-trainings.md"


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The lines of all tables, computed from the runs."""
    out = tmp_path_factory.mktemp("results")
    write_report([RUNS], out, draw_figures=False)
    lines = (out / "results.md").read_text().splitlines()
    return [line for line in lines if line.startswith("| ") and "---" not in line]


@pytest.mark.parametrize("name", ["hundred-epochs.csv", "negative-control.csv"])
def test_further_trainings_follow_from_the_runs(tmp_path, name):
    write_report([RUNS.with_name(name)], tmp_path, draw_figures=False)
    text = FURTHER.read_text().splitlines()
    rows = [line for line in (tmp_path / "results.md").read_text().splitlines()
            if line.startswith("| small |") and "530,090" in line]  # fmt: skip
    assert len(rows) >= 3
    for row in rows:
        assert any(line.endswith(row) for line in text)  # some begin with a number of views


def test_accuracy_by_number_of_views_follows_from_the_runs():
    runs = pd.read_csv(RUNS.with_name("hundred-epochs.csv"))
    lines = FURTHER.read_text().splitlines()
    unchanged = runs[(runs["method"] == "matching") & runs["variant"].isna()]
    accuracies = unchanged.groupby("data.views")["test_accuracy"].mean()
    assert len(accuracies) == 6
    for views, accuracy in accuracies.items():
        (line,) = [line for line in lines if line.startswith(f"| {views} | small | matching |")]
        assert f"| {100 * accuracy:.2f}" in line


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """The lines of the tables of students trained on half of the images."""
    return lines_of("half-cifar.csv", tmp_path_factory.mktemp("half"))


MAIN = ["cifar10.csv", "methods.csv", "cifar100.csv"]


@pytest.fixture(scope="module")
def main_tables(tmp_path_factory):
    """The lines of the tables of RESULTS.md, by their file of runs."""
    return {
        name: lines_of(
            name,
            tmp_path_factory.mktemp("main"),
            ("| none |", "| logit", "| combined |", "| dist |", "| dkd |", "| matching"),
        )
        for name in MAIN
    }


def lines_of(name, out, more=()):
    """The lines about students, and those that begin with `more`, in the tables of these runs."""
    write_report([RUNS.with_name(name)], out, draw_figures=False)
    lines = (out / "results.md").read_text().splitlines()
    return [
        line
        for line in lines
        if line.startswith(("| small |", "| medium |", "| large |", *more))
        and "| 0, " not in line  # a cell without runs
    ]


ABLATIONS = {
    "| - |": ("882be1f9", "matching", ""),
    "| `method.terms.logit.temperature=2` |": ("882be1f9", "matching", "logit.temperature_2"),
    "| `method=logit`": ("882be1f9", "logit", ""),
    "| `teacher.members=": ("010ab600", "matching", ""),
    "| `ema=0.999` |": ("1a7ffb17", "matching", ""),
    "| `augmentation=mixup` |": ("8f3b9c54", "matching", ""),
}


def change(setting, method, variant):
    """The columns of the table of changes, computed from the runs."""
    runs = pd.read_csv(RUNS.with_name("ablations.csv"), keep_default_na=False)
    runs = runs[runs["setting"].str.endswith(setting)].sort_values("seed")
    cell = runs[(runs["method"] == method) & (runs["variant"] == variant)]
    none = runs[runs["method"] == "none"]
    assert list(cell["seed"]) == list(none["seed"]) == [0, 1, 2]
    test, without = (100 * part["test_accuracy"].to_numpy(float) for part in (cell, none))
    validation = 100 * cell["val_accuracy"].astype(float)
    half = 4.302653 * (test - without).std(ddof=1) / 3**0.5  # Student's t, two degrees of freedom
    gain = (test - without).mean()
    return [
        *(f"{x.mean():.2f} ± {x.std(ddof=1):.2f}" for x in (validation, test, without)),
        f"{gain:+.2f} [{gain - half:+.2f}, {gain + half:+.2f}]",
    ]


@pytest.mark.parametrize("begin", ABLATIONS)
def test_changes_one_at_a_time_follow_from_the_runs(begin):
    section = (REPOSITORY / "RESULTS.md").read_text().partition("### Changes")[2]
    (line,) = [x for x in section.partition("\n#")[0].splitlines() if x.startswith(begin)]
    assert columns_of(line) == change(*ABLATIONS[begin])


def columns_of(line):
    """All columns but the first."""
    return [column.strip() for column in line.split("|")[2:-1]]


def test_searched_weights_follow_from_the_runs():
    runs = pd.read_csv(RUNS.with_name("searched.csv"), keep_default_na=False)
    assert set(runs["seed"]) == {0}
    text = (REPOSITORY / "RESULTS.md").read_text().splitlines()
    assert runs["method"].nunique() == 7
    for method, tried in runs.groupby("method"):
        accuracies = {
            variant.replace("_", "="): f"{100 * value:.2f}"
            for variant, value in zip(tried["variant"], tried["val_accuracy"], strict=True)
        }
        cells = [f"`{method}`", accuracies.pop("")]
        cells += [f"`{variant}` {value}" for variant, value in accuracies.items()]
        assert f"| {' | '.join(cells)} |" in text


def test_the_pair_follows_from_the_runs(tmp_path):
    write_report([RUNS.with_name("crd-pair.csv")], tmp_path, draw_figures=False)
    text = (REPOSITORY / "docs" / "networks.md").read_text().splitlines()
    lines = (tmp_path / "results.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| resnet8 |") and line.count("|") == 12]
    assert len(rows) == 2
    assert all(row in text for row in rows)


def test_half_of_the_images_follow_from_the_runs(half):
    text = FURTHER.read_text().splitlines()
    rows = [row for row in half if "5 missing" not in row and row.count("±") and " 1, " not in row]
    assert len(rows) == 7
    for row in rows:
        assert row in text


CHANGES = {
    "-": {},
    "ema=0.999": {"ema": "0.999"},
    "augmentation=mixup": {"data.mixing": "Mixup"},
    "augmentation=strong": {"data.augmentation": "RandomOperations"},
    "data.views=25": {"data.views": "25"},
    "method.terms.logit.temperature=2": {"method.terms.logit.temperature": "2"},
    "method.terms.logit.temperature=1": {"method.terms.logit.temperature": "1"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_follow_from_the_runs(change):
    runs = pd.read_csv(RUNS.with_name("half-cifar.csv"), dtype=str, keep_default_na=False)
    runs = runs[(runs["student"] == "small") & (runs["seed"] == "0")]
    standard = {
        "ema": "none",
        "data.mixing": "none",
        "data.augmentation": "none",
        "data.views": "none",
    }
    for column, value in (standard | CHANGES[change]).items():
        runs = runs[runs[column] == value]
    if "temperature" not in change:
        runs = runs[runs["variant"] == ""]
    test = runs.set_index("method")["test_accuracy"].astype(float) * 100
    cells = [f"{test[m]:.2f}" if m in test else "-" for m in ("none", "matching")]
    gain = f"{test['matching'] - test['none']:+.2f}" if "none" in test else "-"
    name = change if change == "-" else f"`{change}`"
    line = f"| {name} | {' | '.join(cells)} | {gain} |"
    assert line in FURTHER.read_text().splitlines()


def test_results_follow_from_the_runs(tables):
    text = GRIDS.read_text().splitlines()
    assert len(tables) > 30
    for line in tables:
        assert line in text


def test_comparison_with_the_original_table():
    runs = read_runs([RUNS])
    cells = summarise(runs)
    text = GRIDS.read_text().partition("## Comparison with the original")[2]
    rows = [line.split("|") for line in text.partition("\n## ")[0].splitlines() if "(+" in line]
    assert len(rows) == 7
    for _, method, student, original, *ours, _ in rows:
        for teacher, shown in zip(("convnet", "resnet9"), ours, strict=True):
            cell = cells[
                cells["setting"].isin(runs.loc[runs["method"] == "combined", "setting"])
                & cells["setting"].str.contains(teacher)
                & (cells["method"] == method.strip(" `"))
                & (cells["student"] == student.strip())
            ]
            test = 100 * cell["test"].item()
            assert shown.strip() == f"{test:.2f} ({test - float(original):+.2f})"


@pytest.mark.parametrize(
    ("name", "columns", "number"),
    [("cifar10.csv", 11, 15), ("methods.csv", 11, 27), ("cifar100.csv", 4, 6)],
)
def test_main_tables_follow_from_the_runs(main_tables, name, columns, number):
    """RESULTS.md has every cell of the first two sets of runs, and the overview of the third."""
    rows = [line for line in main_tables[name] if line.count("|") == columns + 1]
    assert len(rows) == number
    text = (REPOSITORY / "RESULTS.md").read_text().splitlines()
    for row in rows:
        assert row in text


@pytest.mark.parametrize("document", ["README.md", "RESULTS.md"])
def test_documents_show_no_other_figures(tables, main_tables, document):
    text = (REPOSITORY / document).read_text()
    shown = [line for line in text.splitlines() if line.startswith("| ") and " ± " in line]
    assert len(shown) >= 2
    known = [*tables, *itertools.chain.from_iterable(main_tables.values())]
    known += [line.replace(", 2 missing", "") for line in known]
    changes = [change(*ablation) for ablation in ABLATIONS.values()]
    for line in shown:
        assert line in known or columns_of(line) in changes


def test_grids_are_complete():
    runs = read_runs([RUNS])
    assert set(runs["status"]) == {"finished"}
    assert sorted(len(grid) for _, grid in runs.groupby("setting")) == [2 * 3 * 3, 36, 36]
    for _, cell in runs.groupby(["setting", "method", "student"]):
        assert sorted(cell["seed"]) == [0, 1, 2]
    assert not runs["git_commit"].str.contains("dirty").any()


def test_small_ratios_are_shown():
    shown = [FIGURE["compression_ratio"].show(value) for value in (64.01, 1.25, 0.51, 0.0062)]
    assert shown == ["64.0", "1.2", "0.5", "0.0062"]


def test_self_distillation_follows_from_the_runs():
    runs = pd.read_csv(RUNS.with_name("self-distillation.csv"), keep_default_na=False)
    lines = (REPOSITORY / "docs" / "self-distillation.md").read_text().splitlines()
    cells = summarise(read_runs([RUNS.with_name("self-distillation.csv")])).set_index("setting")
    for words, setting in (("born-again: ", "b16f90b5"), ("assistant: ", "37d5a9b9")):
        (line,) = [line for line in lines if line.startswith(f"| {words}")]
        cell = cells[(cells.index.str.endswith(setting)) & (cells["method"] == "logit")]
        mean, deviation, *gain = 100 * cell.iloc[0][
            ["test", "test_std", "gain", "gain_low", "gain_high"]
        ].astype(float)
        assert line.endswith("| {:.2f} ± {:.2f} | {:+.2f} [{:+.2f}, {:+.2f}] |".format(
            mean, deviation, *gain
        ))  # fmt: skip
    first = runs[runs["precision"] == "32-true"].set_index(["method", "teacher", "seed"])
    found = 100 * first["test_accuracy"].astype(float)
    rows = {
        "`method=none` | 75.83": ("none", "resnet20"), "`method=byot`": ("byot", "resnet20"),
        "`method=tfkd`": ("tfkd", "resnet20"), "`method=logit teacher=mean`": ("logit", "mean"),
    }  # fmt: skip
    for words, cell in rows.items():
        (line,) = [line for line in lines if line.startswith(f"| {words}")]
        shown = [part.strip() for part in line.split("|")[2:4]]
        assert shown == [
            f"{found[(*cell, seed)]:.2f}" if (*cell, seed) in found.index else "" for seed in (0, 1)
        ]
