"""Reports: settings are labelled by their differences, and by nothing else."""

import json

import pandas as pd
import pytest
from conftest import REPOSITORY
from reported_runs import write_config, write_run

from kd_lightning.reports import documents
from kd_lightning.reports.documents import write_report
from kd_lightning.reports.runs import read_runs
from kd_lightning.reports.statistics import groups, summarise


@pytest.fixture
def two_rates(tmp_path):
    """Two settings that differ in the learning rate, three seeds each."""
    for seed in range(3):
        for setting, rate in (("x-1", 0.1), ("x-2", 0.05)):
            run = write_run(tmp_path / setting, "none", "small", seed, rate, setting=setting)
            write_config(run, seed, optimizer__lr=rate)
    return tmp_path


def title(runs):
    return [group.words for group in groups(read_runs([runs]))]


@pytest.mark.usefixtures("unrendered")
def test_settings_are_labelled_by_their_differences(two_rates, tmp_path):
    out = tmp_path / "out"
    write_report([two_rates], out, page=True)
    text, page = (out / "results.md").read_text(), (out / "report.html").read_text()
    for rate in ("0.1", "0.05"):
        assert f"## optimizer.lr {rate} (" in text
        assert f"{text.partition('## ')[0]}".count(f"optimizer.lr {rate} (") == 1  # the contents
        assert f">optimizer.lr {rate} (" in page
        assert list(out.glob(f"*optimizer.lr_{rate}-accuracy.png"))
    # Equal settings are not differences; they are listed with the facts.
    assert "data.batch_size 64" in text
    assert not [line for line in text.splitlines() if "batch_size" in line and line[0] in "#-"]
    table = pd.read_csv(out / "results.csv")
    assert sorted(table["optimizer.lr"].unique()) == [0.05, 0.1]
    assert set(table["data.batch_size"]) == {64}
    assert "optimizer.momentum" not in table
    again = tmp_path / "again"
    write_report([out / "results.csv"], again)
    same = (again / "results.md").read_text()
    assert [line for line in same.splitlines() if line[:2] != "!["] == [
        line for line in text.splitlines() if line[:2] != "!["
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (
            {"teacher__name": "other", "teacher__layers": ["c"]},
            {"teacher convnet", "teacher other"},
        ),
        (
            {"optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.1}},
            {"optimizer SGD", "optimizer AdamW"},
        ),
        ({"data__name": "folder", "data__padding": 5}, {"data digits", "data folder"}),
        (
            {"trainer__limit_train_batches": 5},
            {"trainer.limit_train_batches 5", "trainer.limit_train_batches not set"},
        ),
        ({"teacher__model__hidden": 9}, {"teacher.model.hidden 8", "teacher.model.hidden 9"}),
        # Older runs lack a key that has its default or none in the others.
        ({"remember": {"dtype": "float16"}, "teacher__checkpoint": None}, {""}),
    ],
)
def test_only_comparable_keys_are_differences(tmp_path, changed, words):
    for number, change in enumerate(({}, changed)):
        names = {part: change.get(f"{part}__name") for part in ("teacher", "data")}
        given = {part: name for part, name in names.items() if name}
        run = write_run(tmp_path / str(number), "none", "small", 0, 0.5, setting=f"x-{number}")
        metrics = json.loads((run / "metrics.json").read_text())
        (run / "metrics.json").write_text(json.dumps({**metrics, **given}))
        write_config(run, **change)
    assert set(title(tmp_path)) == words


def test_settings_of_an_old_table_are_distinguished():
    runs = read_runs([REPOSITORY / "docs" / "results" / "runs.csv"])
    assert groups(runs)[0].words == "teacher convnet"


def test_epochs_of_old_runs_are_those_of_the_table(two_rates, tmp_path):
    write_run(tmp_path / "old", "none", "small", 0, 0.5, setting="x-0", epochs=12)
    old, *new = sorted(title(tmp_path), key=lambda words: "optimizer.lr 0" in words)
    assert "trainer.max_epochs 12" in old
    assert all("trainer.max_epochs 2" in words for words in new)


def test_runs_without_a_commit_are_not_taken_for_those_with_one(tmp_path):
    write_run(tmp_path, "none", "small", 0, 0.5, git_commit="abc1234")
    write_run(tmp_path, "none", "small", 1, 0.5, git_commit="")
    assert "commit abc1234, unknown." in documents.facts(read_runs([tmp_path]))


def test_limited_images_are_always_shown(tmp_path):
    run = write_run(tmp_path, "none", "small", 0, 0.8)
    write_config(run, 0, trainer__limit_test_batches=2)
    facts = documents.facts(read_runs([tmp_path]))
    assert "trainer.limit_test_batches 2" in facts


def test_user_defined_setting_name_hides_no_difference(tmp_path):
    for seed, rate in enumerate((0.1, 0.2)):
        run = write_run(tmp_path, "none", "small", seed, rate)
        write_config(run, seed, optimizer__lr=rate)
    cells = summarise(read_runs([tmp_path]))
    assert dict(zip(cells["label"], cells["test"], strict=True)) == {
        "none optimizer.lr 0.1": 0.1, "none optimizer.lr 0.2": 0.2,
    }  # fmt: skip


def test_settings_that_follow_the_seed_are_no_difference(tmp_path):
    changes = ("data__view_seed", "data__split_seed", "teacher__seed")
    for seed in range(3):
        run = write_run(tmp_path, "none", "small", seed, 0.7 + seed / 100)
        member = {"name": "convnet", "seed": seed}
        write_config(run, seed, **dict.fromkeys(changes, seed), teacher__members=[member])
    runs = read_runs([tmp_path])
    runs.to_csv(tmp_path / "results.csv", index=False)
    for table in (runs, read_runs([tmp_path / "results.csv"])):
        assert summarise(table)["n"].tolist() == [3]
    # The same numbers in another order are other settings.
    for seed in range(3):
        run = write_run(tmp_path / "other", "logit", "small", seed, 0.8)
        write_config(run, seed, data__view_seed=(seed + 1) % 3)
    assert summarise(read_runs([tmp_path / "other"]))["n"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "content",
    ["", "[1", "[" * 100_000, "a: &a [1]\nb: *a", "- 1", "optimizer: 3", "teacher: [{}, [1]]",
     "name: {1: {2: 3}}\nstatus: x\n? [1, 2]\n: 4", "\0", "x: !!python/object:os.system y",
     "optimizer:\n  lr: &x 0.1"],
)  # fmt: skip
def test_invalid_config_only_loses_the_labels(two_rates, tmp_path, content, monkeypatch):
    monkeypatch.setattr(documents, "MOST_DRAWN", 0)
    run = write_run(tmp_path / "odd", "none", "small", 0, 0.7, setting="odd")
    (run / "config.yaml").write_text(content)
    words = " ".join(title(two_rates))
    assert "optimizer.lr 0.1" in words
    assert "optimizer.lr 0.05" in words


def test_huge_config_is_truncated(tmp_path):
    for number in range(2):
        run = write_run(tmp_path / str(number), "none", "small", 0, 0.5, setting=f"x-{number}")
        keys = "".join(f"key{key}: {number}\n" for key in range(1_000))
        (run / "config.yaml").write_text(f"{keys}'': 1\n2: 3\n")
    assert len(read_runs([tmp_path]).columns) < 600
    assert all("more differences" in words for words in title(tmp_path))
