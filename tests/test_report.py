"""Reports: means, deviations, paired intervals, missing runs."""

import json
import math
import runpy
import statistics
import sys

import pytest
from conftest import REPOSITORY
from reported_runs import PARAMETERS, cell, write_config, write_run

from kd_lightning.reports import documents
from kd_lightning.reports.documents import write_report
from kd_lightning.reports.runs import read_runs
from kd_lightning.reports.statistics import interval, summarise


@pytest.fixture
def runs(tmp_path):
    for seed, (none, logit) in enumerate([(0.80, 0.82), (0.81, 0.82), (0.79, 0.83)]):
        write_run(tmp_path, "none", "small", seed, none)
        write_run(tmp_path, "logit", "small", seed, logit)
    write_run(tmp_path, "none", "medium", 0, 0.85)
    write_run(tmp_path, "none", "medium", 1, None, "failed", error="the loss is not finite")
    write_run(tmp_path, "none", "medium", 2, None, "running")
    return tmp_path


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


@pytest.mark.parametrize("teacher", [0.7, 0.8])
def test_no_gap_is_closed_to_a_teacher_that_is_not_better(tmp_path, teacher):
    write_run(tmp_path, "none", "small", 0, 0.80)
    write_run(tmp_path, "logit", "small", 0, 0.82, teacher_test_accuracy=teacher)
    assert math.isnan(cell(summarise(read_runs([tmp_path])), "logit", "small").gap_closed)


def test_a_run_that_was_not_tested_is_no_pair(tmp_path):
    for seed, accuracy in ((0, 0.82), (1, 0.84), (2, None)):
        write_run(tmp_path, "none", "small", seed, 0.80)
        write_run(tmp_path, "logit", "small", seed, accuracy)
    row = cell(summarise(read_runs([tmp_path])), "logit", "small")
    assert row.pairs == 2
    # t of 97.5 % with one degree of freedom is 12.7062.
    half = 12.7062 * statistics.stdev([0.02, 0.04]) / math.sqrt(2)
    assert row.gain_high - row.gain == pytest.approx(half, rel=1e-4)


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
