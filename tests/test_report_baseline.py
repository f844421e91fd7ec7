"""Reports: which runs of `none` a gain refers to."""

import shutil

import pandas as pd
import pytest
from reported_runs import cell, write_config, write_run

from kd_lightning.errors import InputError
from kd_lightning.reports.documents import write_report
from kd_lightning.reports.runs import read_runs
from kd_lightning.reports.statistics import summarise


def gains(*sources, **options):
    """The gain of each cell by its label, rounded; None if it has none."""
    cells = summarise(read_runs(sources, **options))
    shown = [None if gain != gain else round(gain, 6) for gain in cells["gain"]]
    return dict(zip(cells["label"], shown, strict=True))


def write(folder, method, test, variant="", hidden=64, seed=0, configured=True, **metrics):
    """A run whose student has some hidden channels."""
    name = "-".join(part for part in (f"{method}-small-s{seed}", variant) if part)
    metrics = {"parameters": 1_000 * hidden, **metrics}
    run = write_run(folder / "new", method, "small", seed, test, name=name, **metrics)
    run = run.rename(folder / name)
    if configured:
        write_config(run, seed, student={"name": "small", "model": {"hidden": hidden}})


@pytest.mark.parametrize("configured", [True, False])
def test_baseline_has_the_same_student(tmp_path, configured):
    def add(*args, **options):
        write(tmp_path, *args, configured=configured, **options)

    add("none", 0.80)
    add("logit", 0.81)
    add("logit", 0.82, "logit.temperature_2")
    add("logit", 0.50, "model.hidden_8", hidden=8)
    add("none", 0.70, "model.hidden_16", hidden=16)
    add("logit", 0.71, "model.hidden_16", hidden=16)
    add("logit", 0.73, "logit.temperature_2-model.hidden_16", hidden=16)
    expected = {
        "none": None, "none model.hidden_16": None,
        "logit": 0.01, "logit logit.temperature_2": 0.02,
        "logit model.hidden_8": None,  # not against a student of another size
        "logit model.hidden_16": 0.01, "logit logit.temperature_2-model.hidden_16": 0.03,
    }  # fmt: skip
    assert gains(tmp_path) == expected
    read_runs([tmp_path]).to_csv(tmp_path / "results.csv", index=False)
    assert gains(tmp_path / "results.csv") == expected


def test_student_of_equal_size_may_be_another(tmp_path):
    write(tmp_path, "none", 0.8, hidden=8, parameters=5)
    write(tmp_path, "logit", 0.9, "model.hidden_9", hidden=9, parameters=5)
    assert gains(tmp_path) == {"none": None, "logit model.hidden_9": None}


def test_method_may_add_parameters_to_the_student(tmp_path):
    write(tmp_path, "none", 0.8)
    write(tmp_path, "simkd", 0.9, parameters=123)
    assert gains(tmp_path) == {"none": None, "simkd": 0.1}


def test_baseline_with_overrides_of_the_method(tmp_path):
    smooth = "cross_entropy.label_smoothing_0.1"
    write(tmp_path / "a", "none", 0.82, smooth)
    write(tmp_path / "b", "logit", 0.9)
    write(tmp_path / "c", "logit", 0.9, smooth)
    label = f"logit {smooth}"
    assert gains(tmp_path) == {f"none {smooth}": None, "logit": None, label: 0.08}
    write(tmp_path / "d", "none", 0.8)
    write(tmp_path / "e", "logit", 0.9, f"{smooth}-logit.temperature_2")
    found = gains(tmp_path)
    assert (found["logit"], found[label]) == (0.1, 0.08)
    assert found[f"{label}-logit.temperature_2"] == 0.1


def test_runs_with_equal_seeds_count_once(tmp_path, caplog):
    for seed, test in enumerate([0.80, 0.82, 0.81]):
        write(tmp_path / "runs", "none", 0.7, seed=seed)
        write(tmp_path / "runs", "logit", test, seed=seed)
    once = summarise(read_runs([tmp_path / "runs"]))
    assert not caplog.records
    shutil.copytree(tmp_path / "runs", tmp_path / "copies")
    pd.testing.assert_frame_equal(summarise(read_runs([tmp_path])), once)
    (warning,) = caplog.messages
    assert "6 of 12 finished runs repeat the seed of another run of their cell" in warning
    assert "copies/" in warning
    # Another run with the seed is averaged, not paired once more.
    shutil.rmtree(tmp_path / "copies")
    write(tmp_path / "again", "logit", 0.84, seed=0)
    row = cell(summarise(read_runs([tmp_path])), "logit", "small")
    assert (row.n, row.pairs, row.missing) == (3, 3, 0)
    assert row.test == pytest.approx((0.82 + 0.82 + 0.81) / 3)
    assert row.gain == pytest.approx((0.12 + 0.12 + 0.11) / 3)


def test_baseline_has_the_fewest_overrides_not_the_shortest(tmp_path):
    one, two = "cross_entropy.label_smoothing_0.1", "ema_0.9-lr_0.2"
    write(tmp_path, "none", 0.7, one)
    write(tmp_path, "none", 0.8, two)
    write(tmp_path, "logit", 0.9, f"{one}-{two}-logit.temperature_2")
    assert gains(tmp_path)[f"logit {one}-{two}-logit.temperature_2"] == 0.2


def test_variant_does_not_hide_the_baseline_of_another_setting(tmp_path):
    smooth = "cross_entropy.label_smoothing_0.1"
    write(tmp_path / "one", "none", 0.8, setting="one", baseline_key="k")
    write(tmp_path / "two", "none", 0.82, smooth, setting="two", baseline_key="k")
    write(tmp_path / "two", "logit", 0.9, setting="two", baseline_key="k")
    expected = {"none": None, f"none {smooth}": None, "logit": 0.1}
    assert gains(tmp_path / "two") == expected
    # In the folder of its own setting, the run is not added once more.
    assert len(read_runs([tmp_path / "one"])) == 2


@pytest.mark.usefixtures("unrendered")
def test_given_baseline_may_have_overrides_of_the_method(tmp_path):
    smooth = "cross_entropy.label_smoothing_0.1"
    write(tmp_path / "best", "none", 0.85, smooth, setting="best")
    write(tmp_path / "runs", "none", 0.8)
    write(tmp_path / "runs", "logit", 0.9)
    write(tmp_path / "runs", "logit", 0.91, "logit.temperature_2")
    write(tmp_path / "runs", "logit", 0.5, "model.hidden_8", hidden=8)
    expected = {
        f"none given {smooth}": None, "logit": 0.05, "logit logit.temperature_2": 0.06,
        "logit model.hidden_8": None,  # another student
    }  # fmt: skip
    assert gains(tmp_path / "runs", baseline=tmp_path / "best") == expected
    out = tmp_path / "out"
    write_report([tmp_path / "runs"], out, draw_figures=False, baseline=tmp_path / "best")
    assert gains(out / "results.csv") == expected


@pytest.mark.parametrize("other", [{"hidden": 8}, {"seed": 1}, {"images_sha256": "a" * 64}])
def test_given_baseline_without_any_pair_is_an_error(tmp_path, other):
    write(tmp_path / "best", "none", 0.8, **other)
    write(tmp_path / "runs", "logit", 0.9)
    with pytest.raises(InputError, match=r"no gain can be computed: .*best"):
        write_report([tmp_path / "runs"], tmp_path / "out", baseline=tmp_path / "best")
    assert not (tmp_path / "out").exists()
