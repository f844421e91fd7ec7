"""Runs become a table: means, spreads, paired intervals, and what is missing is said."""

import json
import math
import runpy
import statistics
import sys

import pytest
from conftest import REPOSITORY

from kd_lightning.documents import write_report
from kd_lightning.report import interval, read_runs, summarise

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


def test_a_cell_has_its_mean_spread_and_paired_gain(runs):
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


def test_pairs_are_of_the_same_seed_only(tmp_path):
    write_run(tmp_path, "none", "small", 0, 0.80)
    write_run(tmp_path, "none", "small", 7, 0.20)
    write_run(tmp_path, "logit", "small", 0, 0.82)
    row = cell(summarise(read_runs([tmp_path])), "logit", "small")
    assert (row.pairs, row.missing) == (1, 1)
    assert row.gain == pytest.approx(0.02)
    assert math.isnan(row.gain_low)  # one pair says nothing about the spread


def test_what_failed_is_unfinished_or_missing_is_counted(runs):
    cells = summarise(read_runs([runs]))
    row = cell(cells, "none", "medium")
    assert (row.n, row.failed, row.unfinished, row.missing) == (1, 1, 1, 0)
    row = cell(cells, "logit", "medium")
    assert (row.n, row.missing) == (0, 3)


def test_settings_are_never_mixed(tmp_path):
    write_run(tmp_path / "a", "none", "small", 0, 0.5)
    write_run(tmp_path / "b", "none", "small", 0, 0.9, setting="other")
    assert sorted(summarise(read_runs([tmp_path]))["test"]) == [0.5, 0.9]


def test_variants_are_cells_of_their_own_and_share_the_baseline(tmp_path):
    write_run(tmp_path / "a", "none", "small", 0, 0.80)
    write_run(tmp_path / "b", "logit", "small", 0, 0.82)
    write_run(tmp_path / "c", "logit", "small", 0, 0.84, name="logit-small-s0-logit.temperature_2")
    cells = summarise(read_runs([tmp_path]))
    gains = dict(zip(cells["label"], cells["gain"], strict=True))
    assert gains["logit"] == pytest.approx(0.02)
    assert gains["logit logit.temperature_2"] == pytest.approx(0.04)


def test_the_interval_of_equal_differences_is_a_point():
    assert interval([0.5, 0.5, 0.5]) == (0.5, 0.5)


def test_the_document_says_all_of_it(runs):
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
    assert "http" not in page  # nothing is fetched from elsewhere
    assert (runs / "results.csv").read_text().count("\n") == 1 + 9 + 1


def test_the_tables_can_be_computed_again_from_the_csv(runs, tmp_path):
    write_report([runs], runs)
    again = tmp_path / "again"
    write_report([runs / "results.csv"], again)
    text, same = ((place / "results.md").read_text() for place in (runs, again))
    assert same.partition("![")[0] == text.partition("![")[0]
    assert (again / "results.csv").read_bytes() == (runs / "results.csv").read_bytes()
    assert (again / "accuracy.png").exists()


def script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    try:
        runpy.run_path(str(REPOSITORY / "scripts" / "report.py"), run_name="__main__")
    except SystemExit as stop:
        return stop.code
    return 0


def test_the_script_reports_any_folders_and_refuses_empty_ones(runs, tmp_path, monkeypatch, capsys):
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
