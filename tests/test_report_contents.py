"""Reports: runs with different images, teachers or code share no cell; which baseline is theirs."""

import math

import pandas as pd
import pytest
import yaml
from reported_runs import cell, write_config, write_run

from kd_lightning.errors import InputError
from kd_lightning.reports import documents
from kd_lightning.reports.documents import write_report
from kd_lightning.reports.runs import read_runs, setting_columns
from kd_lightning.reports.statistics import groups, summarise


def contents(folder, method, seed, test, images, teacher=None, code=None, **more):
    hashes = {"images": images, "teacher": teacher, "code": code}
    given = {f"{name}_sha256": value and value * 64 for name, value in hashes.items()}
    return write_run(folder, method, "small", seed, test, **given, **more)


@pytest.mark.parametrize("what", ["images", "teacher", "code"])
def test_runs_with_different_contents_share_no_cell(tmp_path, what, monkeypatch):
    monkeypatch.setattr(documents, "MOST_DRAWN", 0)
    for name, test in (("a", 0.6), ("b", 0.8)):
        values = {"images": "c", "teacher": "d", "code": "e", what: name}
        contents(tmp_path / name, "logit", int(name == "b"), test, **values)
    runs = read_runs([tmp_path])
    assert sorted(summarise(runs)["test"]) == [0.6, 0.8]
    write_report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    words = {"teacher": "teacher's weights"}.get(what, what)
    assert f"{words} aaaaaaaa" in text
    assert f"{words} bbbbbbbb" in text
    pd.testing.assert_frame_equal(
        summarise(read_runs([tmp_path / "out" / "results.csv"])), summarise(runs)
    )


def test_teachers_that_depend_on_the_seed_share_a_cell(tmp_path):
    """Those that `teacher.run={...}` trains first, for each seed."""
    for seed in range(3):
        run = contents(
            tmp_path, "logit", seed, 0.8 + seed / 100, images="a", teacher=str(seed),
            teacher_test_accuracy=0.7 + seed / 100,
        )  # fmt: skip
        file = f"outputs/{seed}/student.safetensors"
        write_config(run, seed, teacher__run={"method": "none"}, teacher__checkpoint=file)
    runs = read_runs([tmp_path])
    row = cell(summarise(runs), "logit", "small")
    assert (row.n, row.missing) == (3, 0)
    table = documents.overview(summarise(runs), runs).set_index("method")
    assert table.loc["teacher convnet", "small"] == "71.00"
    assert "70.00 to 72.00 % on test" in documents.facts(runs)


def test_accuracy_of_a_teacher_that_follows_the_student(tmp_path):
    write_run(tmp_path, "logit", "small", 0, 0.8, teacher_test_accuracy=0.81)
    write_run(tmp_path, "logit", "medium", 0, 0.9, teacher_test_accuracy=0.91)
    runs = read_runs([tmp_path])
    table = documents.overview(summarise(runs), runs).set_index("method")
    assert list(table.loc["teacher convnet", ["small", "medium"]]) == ["81.00", "91.00"]


def test_baseline_of_all_teachers_with_the_same_images(tmp_path):
    contents(tmp_path / "1", "none", 0, 0.5, images="a")
    contents(tmp_path / "2", "logit", 0, 0.6, images="a", teacher="c")
    contents(tmp_path / "3", "logit", 0, 0.7, images="a", teacher="d")
    contents(tmp_path / "4", "logit", 0, 0.9, images="b", teacher="c")
    runs = read_runs([tmp_path])
    assert len(runs) == 4
    cells = summarise(runs)
    gains = cells[cells["method"] == "logit"].set_index("test")["gain"].to_dict()
    assert gains == pytest.approx({0.6: 0.1, 0.7: 0.2, 0.9: math.nan}, nan_ok=True)


@pytest.mark.parametrize(
    ("baseline", "found"),
    [
        ({}, True),
        ({"code": "x"}, True),
        ({"code": "y"}, False),  # the student's own code has changed
        ({"images": "b"}, False),
        ({"status": "running"}, False),
        ({"baseline_key": "other"}, False),
    ],
)
def test_baseline_of_another_setting_must_be_the_same_student(tmp_path, baseline, found):
    given = {"images": "a", "baseline_key": "k", "setting": "one", **baseline}
    contents(tmp_path / "one", "none", 0, 0.5, **given)
    contents(
        tmp_path / "two", "logit", 0, 0.6, images="a", code="x", baseline_key="k", setting="two"
    )
    runs = read_runs([tmp_path / "two"])
    assert list(runs["method"]) == (["none", "logit"] if found else ["logit"])
    assert list(summarise(runs)["pairs"])[-1] == int(found)


def test_runs_without_a_teacher_join_the_table_of_every_teacher(tmp_path):
    def write(setting, method, test, **extra):
        folder = contents(
            tmp_path / setting, method, 0, test,
            images="a", setting=setting, baseline_key="k", **extra,
        )  # fmt: skip
        teacher = {"_target_": "a.Net", "depth": 20 if setting == "one" else 32}
        (folder / "config.yaml").write_text(yaml.safe_dump({"teacher": {"model": teacher}}))

    write("one", "none", 0.5, key_without_teacher="n")
    write("one", "tfkd", 0.6, key_without_teacher="t")
    write("one", "logit", 0.7)
    write("two", "logit", 0.8)
    runs = read_runs([tmp_path / "two"])
    assert sorted(zip(runs["method"], runs["test_accuracy"], strict=True)) == [
        ("logit", 0.8), ("none", 0.5), ("tfkd", 0.6),
    ]  # fmt: skip
    # They do not bring along the teacher of the setting in which they were trained.
    assert set(read_runs([tmp_path])["setting"]) == {"one", "two"}
    assert "teacher.model.depth" not in setting_columns(runs)


def test_given_baseline_replaces_those_of_the_settings(tmp_path):
    for seed in (0, 1):
        contents(tmp_path / "best", "none", seed, 0.7, images="a", setting="best")
        for name, gain in (("one", 0.1), ("two", 0.2)):
            contents(tmp_path / name, "none", seed, 0.5, images="a", setting=name)
            contents(tmp_path / name, "logit", seed, 0.7 + gain, images="a", setting=name)
    contents(tmp_path / "other", "logit", 0, 0.9, images="b", setting="other")
    sources = [tmp_path / name for name in ("one", "two", "other")]
    cells = summarise(read_runs(sources, baseline=tmp_path / "best"))
    gains = cells[cells["method"] == "logit"].set_index("setting")["gain"].to_dict()
    assert gains == pytest.approx({"one": 0.1, "two": 0.2, "other": math.nan}, nan_ok=True)
    assert set(cells[cells["method"] == "none"]["test"]) == {0.7}


def test_size_of_the_teacher_is_known_from_a_finished_run(tmp_path):
    contents(tmp_path / "best", "none", 0, 0.7, images="a", setting="best")
    write_run(tmp_path / "one", "attention", "small", 0, None, "running", images_sha256="a" * 64)
    contents(tmp_path / "one", "logit", 0, 0.8, images="a")
    cells = summarise(read_runs([tmp_path / "one"], baseline=tmp_path / "best"))
    assert cell(cells, "none", "small").compression_ratio == pytest.approx(4e6 / 530_090)


def test_baseline_must_be_unique(tmp_path):
    contents(tmp_path / "distilled", "logit", 0, 0.6, images="a")
    for name in ("one", "two"):
        contents(tmp_path / "best" / name, "none", 0, 0.5, images="a")
    for folder, words in (("best", "ambiguous"), ("distilled", "no finished run")):
        with pytest.raises(InputError, match=words):
            read_runs([tmp_path / "distilled"], baseline=tmp_path / folder)


def test_old_runs_without_hashes_join_a_unique_group(tmp_path):
    write_run(tmp_path / "1", "none", "small", 0, 0.5)
    write_run(tmp_path / "2", "logit", "small", 0, 0.6)
    contents(tmp_path / "3", "logit", 1, 0.8, images="a", teacher="c")
    row = cell(summarise(read_runs([tmp_path])), "logit", "small")
    assert (row.n, row.test) == (2, pytest.approx(0.7))
    # With a second teacher the old run is ambiguous, and is averaged with neither.
    contents(tmp_path / "4", "logit", 1, 0.9, images="a", teacher="d")
    cells = summarise(read_runs([tmp_path]))
    assert sorted(cells[cells["method"] == "logit"]["test"]) == [0.6, 0.8, 0.9]


@pytest.mark.parametrize("fixed", [False, True])
def test_name_of_a_teacher_that_depends_on_the_seed(tmp_path, fixed):
    for seed in (1, 10):
        name = f"none-small-s{1 if fixed else seed}"
        run = write_run(
            tmp_path, "logit", "small", seed, 0.8, teacher=name, teacher_test_accuracy=0.7
        )
        write_config(run, seed, teacher__run={"method": "none", **({"seed": 1} if fixed else {})})
    runs = read_runs([tmp_path])
    assert set(runs["teacher"]) == {"none-small-s1" if fixed else "none-small"}


def test_ensembles_of_students_that_depend_on_the_seed_share_a_cell(tmp_path):
    for seed in range(2):
        for method, test in (("none", 0.7), ("logit", 0.8)):
            run = contents(
                tmp_path / method, "logit", seed, test, images="a", teacher=f"{method}{seed}",
                setting=method,
            )  # fmt: skip
            file = f"outputs/{seed}/student.safetensors"
            member = {"run": {"method": method}, "checkpoint": file}
            write_config(run, seed, teacher__members=[{"checkpoint": "fixed.pt"}, member])
    found = groups(read_runs([tmp_path]))
    assert [len(group.runs) for group in found] == [2, 2]
    assert all("teacher.members.1.run.method" in group.words for group in found)
