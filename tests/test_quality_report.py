"""Calibration and cost in reports and in the summary, also of runs that lack them."""

import json

import pytest
from conftest import REPOSITORY

from kd_lightning.reports import documents, plots
from kd_lightning.reports.documents import write_report
from kd_lightning.reports.quality_plots import accuracy_by_cost, pareto_front
from kd_lightning.reports.runs import read_runs
from kd_lightning.reports.statistics import summarise
from kd_lightning.reports.summary import print_summary
from kd_lightning.reports.tables import cost_table, quality_and_cost

KNOWN = {
    "test_nll": 0.5, "test_ece": 0.04, "temperature": 1.25, "test_ece_calibrated": 0.01,
    "macs": 9_400_000, "file_bytes": 2_121_024,
}  # fmt: skip
BINS = "scores,lower,upper,images,confidence,accuracy\nraw,0.0,0.5,0,,\nraw,0.5,1.0,9,0.8,0.7\n"


def write_run(folder, method, seed=0, student="small", **figures):
    run = folder / f"{method}-{student}-s{seed}"
    run.mkdir(parents=True)
    taught = method != "none"
    values = {
        "status": "finished", "name": run.name, "setting": "set", "method": method, "seed": seed,
        "student": student, "teacher": "convnet", "data": "digits", "parameters": 530_090,
        "compression_ratio": 4.0, "val_accuracy": 0.8, "test_accuracy": 0.8, "epochs": 2,
        "best_val_accuracy": 0.8, "test_accuracy_at_best": 0.8, "best_epoch": 2,
        "teacher_test_accuracy": 0.9 if taught else None, "teacher_parameters": 4_000_000,
        "teacher_val_accuracy": 0.9 if taught else None, "agreement": 0.8 if taught else None,
        "train_seconds": 3.0, "images_per_second": 10.0, "device": "CPU", "precision": "32-true",
    }  # fmt: skip
    (run / "metrics.json").write_text(json.dumps({**values, **figures}))
    (run / "reliability.csv").write_text(BINS)
    return run


def tables(folder):
    runs = read_runs([folder])
    return quality_and_cost(summarise(runs), runs)


def test_runs_of_older_versions_have_no_table(tmp_path, capsys):
    run = write_run(tmp_path, "logit")
    assert tables(tmp_path) is None
    write_report([tmp_path], tmp_path / "out", page=True, draw_figures=False)
    assert "Calibration" not in (tmp_path / "out" / "results.md").read_text()
    runs = read_runs([tmp_path])
    assert accuracy_by_cost(summarise(runs), runs) is None
    print_summary(json.loads((run / "metrics.json").read_text()), run)
    assert "calibration" not in capsys.readouterr().out


def test_missing_figures_are_dashes(tmp_path):
    write_run(tmp_path, "none")
    write_run(tmp_path, "logit", **KNOWN, teacher_macs=1_240_000_000, teacher_test_nll=0.3)
    write_run(tmp_path, "logit", seed=1, **{**KNOWN, "test_nll": 0.7, "temperature": 1.75})
    table = tables(tmp_path).set_index("method")
    assert "ms for 1" not in table  # never measured
    assert table.loc["logit"].tolist() == [
        "small", "0.600", "4.00", "1.500", "1.00", "9.4 M", "2.12 MB",
    ]  # fmt: skip
    assert set(table.loc["none"][1:]) == {"-"}
    assert table.loc["teacher convnet", ["NLL", "MACs", "fitted temperature"]].tolist() == [
        "0.300", "1.24 G", "-",
    ]  # fmt: skip


def test_report_shows_costs_reliability_and_the_explanation_of_the_best_run(tmp_path):
    write_run(tmp_path / "runs", "none", **KNOWN)
    write_run(tmp_path / "runs", "attention", val_accuracy=0.85, **KNOWN)
    for method, accuracy in (("logit", 0.7), ("combined", 0.75)):
        run = write_run(tmp_path / "runs", method, val_accuracy=accuracy, **KNOWN)
        (run / "explanation").mkdir()
        (run / "explanation" / "cka.png").write_bytes(b"\x89PNG" + method.encode())
    out = tmp_path / "out"
    write_report([tmp_path / "runs"], out, page=True)
    text = (out / "results.md").read_text()
    for name in ("cost", "reliability", "cka"):
        assert f"![{name}]({name}.png)" in text
    assert (out / "cka.png").read_bytes() == b"\x89PNGcombined"
    assert "![attention]" not in text
    assert "Calibration and cost" in (out / "report.html").read_text()
    # A table of runs gives the same figures.
    write_report([out / "results.csv"], tmp_path / "again", draw_figures=False)
    assert "| none | 0.500 | 4.00 |" in (tmp_path / "again" / "results.md").read_text()


def test_summary_shows_quality_and_cost(tmp_path, capsys):
    given = {**KNOWN, "test_nll_calibrated": 0.45, "teacher_macs": 40_000, "teacher_bytes": 999}
    run = write_run(tmp_path, "logit", **given)
    print_summary(json.loads((run / "metrics.json").read_text()), run)
    out = capsys.readouterr().out
    assert (
        "likelihood 0.500, calibration error 4.00 %; with temperature 1.250: 0.450, 1.00 %" in out
    )
    assert "9.4 M multiply-accumulates per image (40 k), 2.12 MB of weights (999 B)" in out


def test_table_of_one_run():
    table = cost_table({"macs": 1000, "latency_1_one_thread_p50": 0.1234, "memory_64": 5e9})
    assert list(table) == ["cost", "student"]
    shown = dict(zip(table["cost"], table["student"], strict=True))
    assert shown["multiply-accumulates"] == "1 k"
    assert shown["1 image, one thread, p50 (ms)"] == "0.123"
    assert shown["64 images, peak memory"] == "5 GB"
    assert shown["weights"] == shown["64 images, all threads, p95 (ms)"] == "-"


def test_pareto_front_by_hand():
    costs = [3, 1, 2, 2, 4, 1]
    gains = [5, 1, 4, 3, 5, 2]
    assert pareto_front(costs, gains) == [5, 2, 0]


@pytest.mark.parametrize("names", [("none",), ("$_$", "logit")])
def test_cost_figure_has_a_panel_for_each_known_cost(tmp_path, names):
    latency = {"latency_1_one_thread_p50": 2.0} if len(names) > 1 else {}
    for name in names:
        write_run(tmp_path, name, **KNOWN, **latency)
    runs = read_runs([tmp_path])
    figure = accuracy_by_cost(summarise(runs), runs)
    assert len(figure.axes) == 2 + bool(latency)
    assert plots.pixels(figure).std() > 5
    (legend,) = figure.legends
    assert len(legend.get_texts()) == len(names) + 1  # and the front


def test_definitions_name_every_figure():
    text = (REPOSITORY / "docs" / "quality.md").read_text()
    for names in (*KNOWN, "teacher_kl_wrong", "agreement_right", "test_brier", "memory_64"):
        assert f"`{names}`" in text
    assert all(f"`{name}.png`" in text for name in documents.EXPLANATIONS)
