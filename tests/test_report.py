"""Reports: means, deviations, paired intervals, missing runs."""

import json
import math
import runpy
import statistics
import sys

import pandas as pd
import pytest
import yaml
from conftest import REPOSITORY

from kd_lightning.errors import InputError
from kd_lightning.reports import documents
from kd_lightning.reports.documents import write_report
from kd_lightning.reports.runs import read_runs, setting_columns
from kd_lightning.reports.statistics import groups, interval, summarise

PARAMETERS = {"small": 530_090, "medium": 2_117_962}


def write_run(folder, method, student, seed, test, status="finished", **metrics):
    run = folder / f"{method}-{student}-s{seed}"
    run.mkdir(parents=True)
    values = {
        "status": status, "name": run.name, "setting": "set", "method": method,
        "student": student, "seed": seed, "teacher": "convnet", "data": "digits",
    }  # fmt: skip
    if status == "finished":
        values |= {
            "parameters": PARAMETERS[student], "compression_ratio": 4.0, "val_accuracy": test,
            "test_accuracy": test, "teacher_test_accuracy": None if method == "none" else 0.9,
            "teacher_val_accuracy": None if method == "none" else 0.91,
            "teacher_parameters": 4_000_000, "agreement": None if method == "none" else 0.8,
            "epochs": 2, "train_seconds": 3.0,
        }  # fmt: skip
        (run / "history.csv").write_text("epoch,val_accuracy\n1,0.5\n2,0.6\n")
        (run / "confusion.csv").write_text("cat,dog\n8,2\n1,9\n")
    (run / "metrics.json").write_text(json.dumps({**values, **metrics}))
    return run


@pytest.fixture
def runs(tmp_path):
    for seed, (none, logit) in enumerate([(0.80, 0.82), (0.81, 0.82), (0.79, 0.83)]):
        write_run(tmp_path, "none", "small", seed, none)
        write_run(tmp_path, "logit", "small", seed, logit)
    write_run(tmp_path, "none", "medium", 0, 0.85)
    write_run(tmp_path, "none", "medium", 1, None, "failed", error="the loss is not finite")
    write_run(tmp_path, "none", "medium", 2, None, "running")
    return tmp_path


def cell(cells, method, student):
    (row,) = cells[(cells["method"] == method) & (cells["student"] == student)].itertuples()
    return row


def test_mean_deviation_and_paired_gain_of_a_cell(runs):
    row = cell(summarise(read_runs([runs])), "logit", "small")
    assert (row.n, row.pairs) == (3, 3)
    assert row.test == pytest.approx((0.82 + 0.82 + 0.83) / 3)
    assert row.test_std == pytest.approx(statistics.stdev([0.82, 0.82, 0.83]))
    # By hand: differences 2, 1 and 4 points; t of 97.5 % with two degrees of freedom is 4.302653.
    gain, half = 7 / 3, 4.302653 * statistics.stdev([2, 1, 4]) / math.sqrt(3)
    assert 100 * row.gain == pytest.approx(gain)
    assert 100 * row.gain_low == pytest.approx(gain - half, abs=1e-4)
    assert 100 * row.gain_high == pytest.approx(gain + half, abs=1e-4)
    assert row.gap_closed == pytest.approx(row.gain / (0.9 - 0.8))


def test_pairs_have_equal_seeds(tmp_path):
    write_run(tmp_path, "none", "small", 0, 0.80)
    write_run(tmp_path, "none", "small", 7, 0.20)
    write_run(tmp_path, "logit", "small", 0, 0.82)
    row = cell(summarise(read_runs([tmp_path])), "logit", "small")
    assert (row.pairs, row.missing) == (1, 1)
    assert row.gain == pytest.approx(0.02)
    assert math.isnan(row.gain_low)  # no interval from a single pair


def test_failed_unfinished_and_missing_runs_are_counted(runs):
    cells = summarise(read_runs([runs]))
    row = cell(cells, "none", "medium")
    assert (row.n, row.failed, row.unfinished, row.missing) == (1, 1, 1, 0)
    row = cell(cells, "logit", "medium")
    assert (row.n, row.missing) == (0, 3)


def test_settings_are_never_mixed(tmp_path):
    write_run(tmp_path / "a", "none", "small", 0, 0.5)
    write_run(tmp_path / "b", "none", "small", 0, 0.9, setting="other")
    assert sorted(summarise(read_runs([tmp_path]))["test"]) == [0.5, 0.9]


def test_variants_are_separate_cells_with_one_baseline(tmp_path):
    write_run(tmp_path / "a", "none", "small", 0, 0.80)
    write_run(tmp_path / "b", "logit", "small", 0, 0.82)
    write_run(tmp_path / "c", "logit", "small", 0, 0.84, name="logit-small-s0-logit.temperature_2")
    cells = summarise(read_runs([tmp_path]))
    gains = dict(zip(cells["label"], cells["gain"], strict=True))
    assert gains["logit"] == pytest.approx(0.02)
    assert gains["logit logit.temperature_2"] == pytest.approx(0.04)


@pytest.mark.parametrize("again", ["../outputs", "link", "results.csv"])
def test_a_run_that_is_named_twice_counts_once(tmp_path, monkeypatch, again):
    outputs = tmp_path / "outputs"
    for seed, accuracy in ((0, 0.7), (1, 0.8)):
        write_run(outputs, "none", "small", seed, accuracy)
    (tmp_path / "link").symlink_to(outputs)
    monkeypatch.chdir(outputs)
    write_report([outputs], tmp_path, draw_figures=False)
    if again != "../outputs":
        again = tmp_path / again
    assert len(read_runs([again, outputs])) == 2
    assert len(read_runs([again, again])) == 2


def test_gain_of_some_seeds_says_of_how_many(tmp_path):
    write_run(tmp_path, "none", "small", 0, 0.7)
    for seed in range(3):
        write_run(tmp_path, "logit", "small", seed, 0.75)
    table = documents.details(summarise(read_runs([tmp_path]))).set_index("method")
    assert table.loc["logit", "gain"] == "+5.00 (1 of 3 runs)"


def test_interval_of_equal_differences_is_a_point():
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_markdown_report_is_complete(runs):
    (runs / "broken").mkdir()
    (runs / "broken" / "metrics.json").write_text('{"status": "finish')
    write_report([runs], runs, page=True)
    text = (runs / "results.md").read_text()
    assert "| none | 80.00 ± 1.00 (3) | 85.00 (1, 1 failed, 1 unfinished) |" in text
    assert "| logit | 82.33 ± 0.58 (3) | missing |" in text
    assert "+2.33 [-1.46, +6.13]" in text
    assert "**none-medium-s1** failed: the loss is not finite" in text
    assert "broken" in text
    for picture in ("accuracy", "methods", "curves", "confusion"):
        assert (runs / f"{picture}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({picture}.png)" in text
    page = (runs / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in page  # self-contained
    assert (runs / "results.csv").read_text().count("\n") == 1 + 9 + 1


@pytest.fixture
def unrendered(monkeypatch):
    """Figures are made, but not rendered."""
    monkeypatch.setattr(documents.plots, "png", lambda figure: b"\x89PNG")


@pytest.mark.usefixtures("unrendered")
def test_tables_can_be_reproduced_from_the_csv(runs, tmp_path):
    write_report([runs], runs)
    again = tmp_path / "again"
    write_report([runs / "results.csv"], again)
    text, same = ((place / "results.md").read_text() for place in (runs, again))
    assert same.partition("![")[0] == text.partition("![")[0]
    table = (again / "results.csv").read_text()
    assert table == (runs / "results.csv").read_text()
    assert ",530090," in table  # also where other runs have no number of parameters
    assert (again / "accuracy.png").exists()


def script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    try:
        runpy.run_path(str(REPOSITORY / "scripts" / "report.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.usefixtures("unrendered")
def test_report_script_rejects_empty_folders(runs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    assert script(monkeypatch, runs / "none-small-s0", runs / "logit-small-s0", "--out", out) == 0
    assert (out / "report.html").exists()
    assert "2 runs" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert script(monkeypatch, tmp_path / "empty") == 2
    assert "there is no run" in capsys.readouterr().err
    assert script(monkeypatch, tmp_path / "nowhere") == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert script(monkeypatch, out / "results.csv") == 2
    assert "--out" in capsys.readouterr().err
    assert script(monkeypatch, out / "report.html", "--out", out) == 2
    assert "report.html" in capsys.readouterr().err
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert script(monkeypatch, tmp_path / "other.csv", "--out", out) == 2
    assert "it has no column 'setting'" in capsys.readouterr().err


def write_config(run, seed=0, **changed):
    """The settings of a run, with some dotted keys changed."""
    config = {
        "seed": seed, "output_dir": f"somewhere/{seed}", "data_dir": "data", "name": run.name,
        "data": {"name": "digits", "batch_size": 64, "seed": seed, "padding": 3},
        "teacher": {"name": "convnet", "layers": ["a", "b"], "model": {"hidden": 8}},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9},
        "trainer": {"max_epochs": 2, "precision": "auto"},
    }  # fmt: skip
    for key, value in changed.items():
        *path, name = key.split("__")
        node = config
        for part in path:
            node = node.setdefault(part, {})
        node[name] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return run


@pytest.fixture
def two_rates(tmp_path):
    """Two settings that differ in the learning rate, three seeds each."""
    for seed in range(3):
        for setting, rate in (("x-1", 0.1), ("x-2", 0.05)):
            run = write_run(tmp_path / setting, "none", "small", seed, rate, setting=setting)
            write_config(run, seed, optimizer__lr=rate)
    return tmp_path


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


def title(runs):
    return [group.words for group in groups(read_runs([runs]))]


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


def test_runs_without_a_commit_are_not_taken_for_those_with_one(tmp_path):
    write_run(tmp_path, "none", "small", 0, 0.5, git_commit="abc1234")
    write_run(tmp_path, "none", "small", 1, 0.5, git_commit="")
    assert "commit abc1234, unknown." in documents.facts(read_runs([tmp_path]))


def test_limited_images_are_always_shown(tmp_path):
    run = write_run(tmp_path, "none", "small", 0, 0.8)
    write_config(run, 0, trainer__limit_test_batches=2)
    facts = documents.facts(read_runs([tmp_path]))
    assert "trainer.limit_test_batches 2" in facts


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


def test_user_defined_setting_name_hides_no_difference(tmp_path):
    for seed, rate in enumerate((0.1, 0.2)):
        run = write_run(tmp_path, "none", "small", seed, rate)
        write_config(run, seed, optimizer__lr=rate)
    cells = summarise(read_runs([tmp_path]))
    assert dict(zip(cells["label"], cells["test"], strict=True)) == {
        "none optimizer.lr 0.1": 0.1, "none optimizer.lr 0.2": 0.2,
    }  # fmt: skip


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


def test_titles_are_within_their_figures(runs, tmp_path, monkeypatch):
    widths = []

    def png(figure):
        assert figure.get_suptitle()
        widths.append(max(t.get_window_extent().width for t in figure.texts) / figure.bbox.width)
        return b""

    monkeypatch.setattr(documents.plots, "png", png)
    table = read_runs([runs])
    documents.draw(table, summarise(table), "teacher.model.hidden 512, " * 6)
    assert len(widths) >= 4
    assert max(widths) <= 1


@pytest.mark.usefixtures("unrendered")
def test_number_of_figures_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MOST_DRAWN", 1)
    for number in range(6):
        setting = f"{'long' * 100}-{number}"
        run = write_run(tmp_path / str(number), "none", "small", 0, 0.5, setting=setting)
        write_config(run, optimizer__lr=number)
    write_report([tmp_path], tmp_path / "out", page=True)
    assert len(list((tmp_path / "out").glob("*.png"))) == 4
    assert "Only the first 1 of 6 settings" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.usefixtures("unrendered")
def test_special_characters_in_names_are_escaped(tmp_path):
    name = "$_$ a|b\n<b>"
    run = write_run(tmp_path, "none", "small", 0, 0.5, teacher=name)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "method": name, "student": name}))
    write_report([tmp_path], tmp_path / "out", page=True)
    lines = (tmp_path / "out" / "results.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("| $_$ a\\|b <b> |")]
    assert (tmp_path / "out" / "accuracy.png").exists()
    assert "<b>" not in (tmp_path / "out" / "report.html").read_text()


def test_report_of_unreadable_runs(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "metrics.json").write_text("{")
    write_report([tmp_path], tmp_path, page=True)
    assert "Not readable as runs: " in (tmp_path / "results.md").read_text()
    assert "Not readable as runs: " in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("unrendered")
def test_report_with_names_that_are_not_utf_8(tmp_path):
    folder = tmp_path / "caf\udce9"
    run = write_run(folder, "none", "small", 0, 0.5)
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "teacher": "\udce9\x1b[31m"}))
    write_report([folder], tmp_path / "out", page=True)
    assert (tmp_path / "out" / "curves.png").exists()  # found below that folder


def test_student_name_may_look_like_a_seed(tmp_path, monkeypatch):
    monkeypatch.setitem(PARAMETERS, "net-s0", 1)
    write_run(tmp_path, "none", "net-s0", 0, 0.5)
    assert read_runs([tmp_path])["variant"].tolist() == [""]


def test_huge_config_is_truncated(tmp_path):
    for number in range(2):
        run = write_run(tmp_path / str(number), "none", "small", 0, 0.5, setting=f"x-{number}")
        keys = "".join(f"key{key}: {number}\n" for key in range(1_000))
        (run / "config.yaml").write_text(f"{keys}'': 1\n2: 3\n")
    assert len(read_runs([tmp_path]).columns) < 600
    assert all("more differences" in words for words in title(tmp_path))
