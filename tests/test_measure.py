"""Costs of networks, linear CKA, and the commands that measure and explain a finished run."""

import csv
import json
import runpy
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FOLDER, REPOSITORY, TINY, write_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from kd_lightning import api
from kd_lightning.config.stored import student_model
from kd_lightning.data.views import Normalization
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.errors import InputError
from kd_lightning.models import CifarResNet
from kd_lightning.models.cost import (
    FEWEST_CALLS,
    count_bytes,
    count_macs,
    measure_latency,
    peak_memory,
)
from kd_lightning.models.preparing import resize
from kd_lightning.models.similarity import centered_gram, cka
from kd_lightning.reports import plots
from kd_lightning.results import FIGURE
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import explain as explaining
from kd_lightning.workflows import measure as workflow
from kd_lightning.workflows.costs import count_costs, networks_of
from kd_lightning.workflows.explain import explain
from kd_lightning.workflows.jobs import output_dir
from kd_lightning.workflows.measure import measure


class Apply(nn.Module):
    """A network from a function."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, images):
        return self.function(self, images)


def test_macs_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Flatten(), nn.LazyLinear(5))
    network(torch.zeros(1, 3, 16, 16))
    assert count_macs(network, 16) == 8 * 8 * 8 * 3 * 9 + 8 * 8 * 8 * 5
    assert network.training


def test_macs_of_a_published_network():
    """The 40.55 million of ResNet-20 on CIFAR, with its downsampling by padding."""
    assert count_macs(CifarResNet(20, num_classes=10), 32) == pytest.approx(40.55e6, rel=1e-4)


def test_fused_attention_is_counted():
    """Projections of 12 positions of width 4 to 3 x 4 and to 4, two products of 12 x 12 x 4."""
    network = Apply(
        lambda self, x: self.attention(*[x.view(-1, 12, 4)] * 3, need_weights=False)[0],
        attention=nn.MultiheadAttention(4, 2, batch_first=True),
    )
    assert count_macs(network, 4) == 12 * 3 * 16 + 12 * 16 + 2 * 12 * 12 * 4


def test_bytes_include_buffers():
    assert count_bytes(nn.BatchNorm2d(5)) == 4 * 5 * 4 + 8


def test_peak_memory_by_hand():
    def function(_, x):
        a = x * 2
        b = a + 1  # images, a and b
        del a
        c = b[:, :1].clone()
        return c.mean()

    images = torch.zeros(4, 3, 8, 8)
    assert peak_memory(Apply(function), images) == 3 * images.numel() * 4
    linear = Apply(lambda self, x: self.layer(x.flatten(1)), layer=nn.Linear(192, 10))
    assert peak_memory(linear, images) == images.numel() * 4 + count_bytes(linear) + 4 * 10 * 4


def test_latency_is_of_single_calls_with_these_threads():
    threads, seen = torch.get_num_threads(), set()

    def function(_, x):
        seen.add((torch.get_num_threads(), torch.is_inference_mode_enabled()))
        time.sleep(0.002)
        return x

    latency = measure_latency(Apply(function), torch.zeros(1), threads=threads + 1, seconds=0.03)
    assert 2 <= latency.p50 <= latency.p95
    assert latency.calls >= FEWEST_CALLS
    assert seen == {(threads + 1, True)}
    assert torch.get_num_threads() == threads


def features(seed, columns=6, rows=40):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def linear_cka(features, other):
    return cka(centered_gram(features), centered_gram(other))


def test_cka_is_invariant_to_rotation_scale_and_offset():
    x, y = features(0), features(1, columns=9) + features(0) @ features(2, 9, 6)
    rotation = torch.linalg.qr(features(3, 6, 6))[0]
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x, 7 * x @ rotation + 3) == pytest.approx(1, abs=1e-6)
    assert linear_cka(-2 * x @ rotation, y) == pytest.approx(linear_cka(x, y), abs=1e-6)
    assert linear_cka(x, y) == pytest.approx(linear_cka(y, x))
    # Not to other invertible maps.
    assert linear_cka(x, x @ torch.diag(torch.arange(1.0, 7))) < 0.99


def test_cka_by_hand():
    """Centred: X = (-1, 0, 1), Y = (-1, 0, 1) and (1, -2, 1).

    ||Y'X||^2 = 4 + 0, ||X'X|| = 2, ||Y'Y||^2 = 4 + 36.
    """
    x = torch.tensor([[1.0], [2.0], [3.0]])
    y = torch.tensor([[0.0, 5.0], [1.0, 2.0], [2.0, 5.0]])
    assert linear_cka(x, y) == pytest.approx(4 / (2 * 40**0.5))


def test_cka_of_maps_equals_the_formula_of_features(monkeypatch):
    monkeypatch.setattr("kd_lightning.models.similarity._COLUMNS", 4)
    x, y = features(0, 18).view(40, 2, 3, 3), features(1, 5)
    a, b = (part.flatten(1).double() for part in (x, y))
    a, b = a - a.mean(0), b - b.mean(0)
    expected = (b.T @ a).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y) == pytest.approx(float(expected))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of a student with and without a teacher."""
    root = tmp_path_factory.mktemp("measured")
    images = write_folder(root / "images", per_class=24)
    given = [*FOLDER, *TINY, f"data.root={images}", f"output_dir={root / 'outputs'}"]
    given += [f"data_dir={root / 'data'}", "student=small", "trainer.precision=32-true"]
    given += ["trainer.max_epochs=1"]
    return {name: api.run(*given, f"method={name}") for name in ("logit", "none")}


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained["logit"]["folder"], tmp_path / "logit")


def read(run):
    return json.loads((run / "metrics.json").read_text())


def test_a_run_has_quality_and_costs(trained):
    for name, metrics in trained.items():
        expected = {
            "test_nll", "test_brier", "test_ece", "temperature", "test_nll_calibrated",
            "test_ece_calibrated", "macs", "file_bytes",
        }  # fmt: skip
        taught = {"teacher_kl", "teacher_test_nll", "teacher_test_ece", "teacher_macs"}
        for figure in expected | (taught if name == "logit" else set()):
            assert FIGURE[figure].fits(metrics[figure]), figure
        assert not taught & set(metrics) or name == "logit"
        assert not any("latency" in figure for figure in metrics)
    folder = Path(trained["logit"]["folder"])
    with (folder / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == trained["logit"]["class_names"]
    accuracy = sum(float(row["accuracy"]) * int(row["images"]) for row in rows)
    count = sum(int(row["images"]) for row in rows)
    assert accuracy / count == pytest.approx(trained["logit"]["test_accuracy"], abs=1e-5)
    with (folder / "reliability.csv").open() as file:
        bins = [row for row in csv.DictReader(file) if row["scores"] == "raw"]
    assert sum(int(row["images"]) for row in bins) == count


def test_measure_adds_figures_and_keeps_the_rest(run, tmp_path, monkeypatch):
    other = shutil.copytree(run, tmp_path / "same")
    measured = []
    once = workflow.measure_latency
    monkeypatch.setattr(
        workflow, "measure_latency", lambda *given: measured.append(given) or once(*given)
    )
    before = read(run)
    for metrics in (before, json.loads(json.dumps(before))):
        for name in ("macs", "file_bytes", "teacher_macs", "teacher_bytes"):
            metrics.pop(name)  # as of a run of an older version
    (run / "metrics.json").write_text(json.dumps(metrics))
    found = dict(measure([run, other, run], threads=2, seconds=0.001))
    assert list(found) == [run, other]
    assert len(measured) == 2 * 2 * 2  # networks, batch sizes, threads: equal networks only once
    after = read(run)
    assert {name: after[name] for name in before} == before
    for name, value in found[run].items():
        assert after[name] == value
        assert FIGURE[name].fits(value), name
    for prefix in ("", "teacher_"):
        for batch in (1, 64):
            for how in ("one_thread", "all_threads"):
                name = f"{prefix}latency_{batch}_{how}"
                assert 0 < after[f"{name}_p50"] <= after[f"{name}_p95"]
        assert after[f"{prefix}memory_64"] > after[f"{prefix}memory_1"]
    assert after["file_bytes"] == (run / "student.safetensors").stat().st_size
    assert after["macs"] == read(other)["macs"]
    assert "2 threads" in after["measured_on"]


def test_figures_of_another_device_do_not_remain(run, monkeypatch):
    old = ("latency_1_one_thread_p50", "memory_64", "teacher_latency_64_one_thread_p95")
    metrics = {**read(run), **dict.fromkeys(old, 7.0), "measured_on": "a CPU"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    monkeypatch.setattr(workflow, "_figures", lambda *_: {"latency_1_all_threads_p50": 2.0})
    list(measure([run]))
    after = read(run)
    assert not set(old) & set(after)
    assert after["teacher_latency_1_all_threads_p50"] == 2
    assert set(metrics) - set(after) == set(old)


def test_files_among_the_runs_are_ignored_but_a_misspelt_run_is_not(run, script, monkeypatch):
    (run.parent / "table.md").write_text("")
    monkeypatch.setattr(workflow, "_figures", lambda *_: {})
    code, out, _ = script("measure.py", run, run.parent / "table.md")
    assert code == 0
    assert str(run) in out
    code, out, err = script("measure.py", run, run.parent / "logti")
    assert code == 2
    assert f"{run.parent / 'logti'} is not a run directory" in err
    assert not out


def test_a_teacher_is_measured_on_images_of_its_own_size(run):
    directory = RunDirectory(run)
    config = directory.read_config()
    model = {"_target_": "kd_lightning.models.CifarResNet", "depth": 8, "num_classes": 3}
    config["teacher"] |= {"model": model, "image_size": 32}
    directory.write_config(config)
    ((_, found),) = measure([run], seconds=0.001)
    network = CifarResNet(8, num_classes=3)
    assert found["teacher_macs"] == count_macs(network, 32) > 3.9 * count_macs(network, 16)
    assert found["teacher_memory_1"] > peak_memory(network.eval(), torch.zeros(1, 3, 32, 32))
    teacher = FrozenTeacher(network, *[Normalization((0.5,) * 3, (0.5,) * 3)] * 2, image_size=32)
    weights = run / "student.safetensors"
    costs = count_costs(network, weights, networks_of([teacher], 16), 16)
    assert costs["teacher_macs"] == found["teacher_macs"] > costs["macs"]


@pytest.mark.parametrize(
    ("change", "device", "message"),
    [({"status": "failed"}, "cpu", "no finished run"), ({}, "cuda:99", "not available")],
)
def test_measure_refuses(run, change, device, message):
    (run / "metrics.json").write_text(json.dumps({**read(run), **change}))
    with pytest.raises(InputError, match=message):
        list(measure([run], device))


def test_explain_compares_student_and_teacher(run):
    result = explain(run, images=1000)
    metrics = read(run)
    assert result["images"] == 24
    assert result["different"] == pytest.approx(24 * (1 - metrics["agreement"]))
    folder = run / "explanation"
    assert {path.name for path in folder.iterdir()} == {
        "cka.csv", "cka.png", "differences.csv", "differences.png", "attention.png",
    }  # fmt: skip
    differences = list(csv.DictReader((folder / "differences.csv").open()))
    assert len(differences) == result["different"]
    assert all(row["student"] != row["teacher"] for row in differences)
    rows = list(csv.DictReader((folder / "cka.csv").open()))
    assert [row["student"] for row in rows][:2] == ["stage1", "stage2"]
    assert all(0 <= float(value) <= 1 for row in rows for value in list(row.values())[1:])
    events = EventAccumulator(str(run))
    events.Reload()
    assert {f"explanation/{name}" for name in ("cka", "differences", "attention")} <= set(
        events.Tags()["images"]
    )


def test_explain_reads_the_weights_of_the_teacher(run, monkeypatch):
    """The student's own weights as the teacher's: everything is the same."""
    directory = RunDirectory(run)
    config = directory.read_config()
    weights = str(run / "student.safetensors")
    config["teacher"] |= {
        "model": student_model(config),
        "checkpoint": weights,
        "rename_keys": None,
    }
    directory.write_config(config)
    monkeypatch.setattr(plots, "png", lambda *_, **__: b"")
    monkeypatch.setattr(plots, "pixels", lambda *_: np.zeros((1, 1, 3), np.uint8))
    assert explain(run)["different"] == 0
    rows = list(csv.DictReader((run / "explanation" / "cka.csv").open()))
    assert [float(row[row["student"]]) for row in rows] == pytest.approx([1] * len(rows), abs=1e-5)


def test_explain_normalises_as_the_run(run, monkeypatch):
    """The student's own weights as the teacher's, both with a normalisation of their own."""
    directory = RunDirectory(run)
    config = directory.read_config()
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.2, 0.2, 0.2]}
    config["student"] |= own
    config["teacher"] |= {
        "model": student_model(config),
        "checkpoint": str(run / "student.safetensors"),
        "rename_keys": None,
        **own,
    }
    directory.write_config(config)
    asked = []
    monkeypatch.setattr(explaining._Comparison, "__init__", lambda *_: None)
    monkeypatch.setattr(
        explaining._Comparison, "read", lambda _, data, index: asked.append(data) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        explain(run)
    assert asked[0].mean == tuple(own["mean"])
    images = torch.rand(2, 3, 16, 16)
    teacher = explaining._load_teacher(config, read(run))
    student, _ = directory.load_student()
    torch.testing.assert_close(teacher(images), student(images))


def test_explain_loads_the_teacher_that_the_run_had(run, tmp_path):
    config = RunDirectory(run).read_config()
    trained = explaining._load_teacher(config, read(run))
    fine_tuned = config["teacher"] | {"checkpoint": str(tmp_path / "start.pt"), "finetune": True}
    found = explaining._load_teacher({**config, "teacher": fine_tuned}, read(run))
    assert found.fingerprint() == trained.fingerprint()  # not the weights that it started from
    network = CifarResNet(8, num_classes=3)
    torch.save(network.state_dict(), tmp_path / "teacher.pt")
    larger = config["teacher"] | {
        "model": {"_target_": "kd_lightning.models.CifarResNet", "depth": 8, "num_classes": 3},
        "checkpoint": str(tmp_path / "teacher.pt"),
        "image_size": 24,
    }
    found = explaining._load_teacher({**config, "teacher": larger}, read(run))
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = network.eval()(resize(images, 24))
    torch.testing.assert_close(found(images), expected)


@pytest.mark.parametrize(("name", "entry"), [("measure", ".lock"), ("explain", "explanation")])
def test_a_folder_that_cannot_be_written_is_one_sentence(run, monkeypatch, capsys, name, entry):
    (run / ".lock").unlink(missing_ok=True)
    (run / entry).mkdir() if name == "measure" else (run / entry).write_text("")
    monkeypatch.setattr(sys, "argv", [name, str(run)])
    monkeypatch.setattr(workflow, "_figures", lambda *_: {})
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(REPOSITORY / "scripts" / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 1
    assert f"{entry}: " in capsys.readouterr().err


def test_explain_finds_the_teacher_of_outputs_that_were_moved(run, tmp_path):
    directory = RunDirectory(tmp_path / "outputs" / "runs" / "setting" / "run")
    config = {"output_dir": str(tmp_path / "gone")}
    assert output_dir(config, directory) == tmp_path / "gone"
    (tmp_path / "outputs" / "teachers").mkdir(parents=True)
    assert output_dir(config, directory) == tmp_path / "outputs"


def test_explain_takes_an_ensemble_of_one(run):
    directory = RunDirectory(run)
    config = directory.read_config()
    expected = explain(run)["different"]
    member = {**config["teacher"]}
    directory.write_config({**config, "teacher": {**member, "model": None, "members": [member]}})
    assert explain(run)["different"] == expected


def test_no_teacher_is_measured_for_a_run_without_one(trained, monkeypatch):
    monkeypatch.setattr(workflow, "_figures", lambda *_: {})
    ((_, found),) = measure([trained["none"]["folder"]])
    assert not any(key.startswith("teacher_") for key in found)


def test_explain_needs_a_teacher(trained):
    with pytest.raises(InputError, match="has no teacher"):
        explain(trained["none"]["folder"])
