"""Run directories: files of a run, and loading of the student."""

import csv
import errno
import json
import os
import threading
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_teachers import until_said
from torch import nn

from kd_lightning.config import stored
from kd_lightning.errors import InputError, RunError
from kd_lightning.files import replacing
from kd_lightning.models import ConvNet
from kd_lightning.storage import weights
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.weights import fit_state, load_weights

MODEL = {
    "_target_": "kd_lightning.models.ConvNet", "channels": [4], "hidden": 4, "num_classes": 3,
    "image_size": 8,
}  # fmt: skip
CONFIG = {
    "student": {"name": "tiny", "model": MODEL},
    "data": {"_target_": "kd_lightning.data.FolderDataModule", "num_classes": 3, "image_size": 8},
    "optimizer": {"_target_": "torch.optim.SGD"},
    "trainer": {"accelerator": "cpu", "precision": "32-true", "memory_format": "auto"},
}


def model():
    return ConvNet(channels=[4], hidden=4, num_classes=3, image_size=8)


# --- configuration and metrics ---------------------------------------------------------------


def test_configuration_roundtrip(run):
    config = {**CONFIG, "name": "größer"}
    run.write_config(config)
    assert run.read_config() == config
    (run.path / "config.yaml").write_bytes(yaml.safe_dump(config, allow_unicode=True).encode())
    assert run.read_config() == config
    text = (run.path / "config.yaml").read_text(encoding="utf-8")
    run.write_config(CONFIG)
    assert list(yaml.safe_load((run.path / "config.yaml").read_text())) == list(
        CONFIG
    )  # in the usual order
    assert "!!" not in text


def test_configuration_is_written_without_aliases(run):
    layers = ["stage1", {"a": [1]}]
    run.write_config({**CONFIG, "layers": layers, "again": [layers, layers]})
    assert run.read_config()["again"] == [layers, layers]


@pytest.mark.parametrize("name", ["caf\udce9", "\U0001f600 \x1b[2J \x85\ufeff", "1e5", "- a: b #"])
def test_any_name_survives_in_a_configuration(run, name):
    run.write_config({**CONFIG, "name": name})
    assert run.read_config()["name"] == name


def test_folder_without_configuration_is_not_a_run(run):
    with pytest.raises(InputError) as refused:
        run.read_config()
    assert str(refused.value) == f"{run.path} is not a run directory: it has no config.yaml"


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe\x00", b"day: 2001-99-99"])
def test_damaged_configuration_is_reported(run, content):
    run.path.mkdir(parents=True)
    (run.path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError) as refused:
        run.read_config()
    path = run.path / "config.yaml"
    assert str(refused.value) == f"{path} is damaged and cannot be read as YAML"


@pytest.mark.parametrize("key", stored.NEEDED)
def test_missing_configuration_keys_are_reported(run, key):
    *nest, last = key.split(".")
    for wrong in (None, [], "a string" if stored.NEEDED[key] is int else 7):
        config = json.loads(json.dumps(CONFIG))
        node = config
        for part in nest:
            node = node[part]
        node[last] = wrong
        run.write_config(config)
        with pytest.raises(InputError) as refused:
            run.read_config()
        path = run.path / "config.yaml"
        expected = f"{path} is not the configuration of a run: {key} is {wrong!r}"
        assert str(refused.value) == expected
        config[nest[0]] = "no section"
        run.write_config(config)
        with pytest.raises(InputError, match="is None"):
            run.read_config()


def test_yaml_aliases_are_rejected(run):
    run.path.mkdir(parents=True)
    (run.path / "config.yaml").write_text("a: &a [1]\nb: *a\n")
    with pytest.raises(InputError) as refused:
        run.read_config()
    assert str(refused.value).startswith(f"{run.path / 'config.yaml'} contains YAML aliases")


def test_metrics_are_replaced(run):
    assert run.read_metrics() == {}
    run.write_metrics({"status": "running", "accuracy": 0.5})
    run.write_metrics({"status": "finished"})
    assert run.read_metrics() == {"status": "finished"}
    assert [path.name for path in run.path.iterdir()] == ["metrics.json"]


def test_a_table_has_every_column_of_every_row(run):
    run.write_table("history", [{"epoch": 1, "a": 0.5}, {"epoch": 2, "b": 0.25}])
    text = (run.path / "history.csv").read_bytes().decode()
    assert text == "epoch,a,b\n1,0.5,\n2,,0.25\n"
    with (run.path / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]


def test_run_lock_is_exclusive(run):
    with run.lock(), pytest.raises(RunError) as busy, run.lock(wait=False):
        pass
    assert str(busy.value) == "another process is working on run"
    with run.lock(wait=False):
        assert (run.path / ".lock").exists()


def test_run_lock_waits_by_default(run, caplog):
    held, order = threading.Event(), []

    def work():
        with run.lock():
            held.set()
            until_said(caplog)
            order.append("the other's work")

    other = threading.Thread(target=work)
    other.start()
    held.wait()
    with run.lock():
        order.append("ours")
    other.join()
    assert order == ["the other's work", "ours"]
    assert caplog.messages == ["another process is working on run; waiting for it"]


def test_every_superseded_run_is_kept(run, tmp_path):
    for number in (1, 2, 3):
        run.write_metrics({"number": number})
        (run.path / "train.log").write_text(f"log {number}")
        (run.path / "events").mkdir()
        with run.lock():
            aside = run.set_aside(tmp_path / "superseded")
        assert aside == tmp_path / "superseded" / f"run-{number}"
        assert sorted(path.name for path in run.path.iterdir()) == [".lock", "train.log"]
    for number in (1, 2, 3):
        kept = tmp_path / "superseded" / f"run-{number}"
        assert RunDirectory(kept).read_metrics() == {"number": number}
        assert (kept / "train.log").read_text() == f"log {number}"
        assert sorted(path.name for path in kept.iterdir()) == [
            "events", "metrics.json", "train.log",
        ]  # fmt: skip


# --- weights -----------------------------------------------------------------------------------


def test_student_is_loaded_from_its_folder(run):
    student = model()
    student.to(memory_format=torch.channels_last)
    run.write_config(CONFIG)
    run.save_weights(student)
    rebuilt, config = run.load_student()
    assert not any(module.training for module in rebuilt.modules())
    assert config == CONFIG
    assert type(rebuilt) is ConvNet
    for key, value in student.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[key], value)
    run.save_weights(student, "teacher")
    assert (run.path / "teacher.safetensors").exists()


def test_saved_weights_are_plain_safetensors(run):
    run.save_weights(model())
    assert set(load_file(run.path / "student.safetensors")) == set(model().state_dict())


def test_weights_write_is_atomic(run, monkeypatch):
    run.save_weights(model())
    before = (run.path / "student.safetensors").read_bytes()

    def dies(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", dies)
    with pytest.raises(OSError, match="No space"):
        run.save_weights(model())
    assert (run.path / "student.safetensors").read_bytes() == before
    assert [path.name for path in run.path.iterdir()] == ["student.safetensors"]


def test_written_file_is_on_the_disk_before_it_replaces_another(tmp_path, monkeypatch):
    """A power failure in between must not leave an empty file in the place of the previous one."""
    path = tmp_path / "file"
    path.write_text("previous")
    flushed = []

    def flush(descriptor):
        flushed.append((os.fstat(descriptor).st_size, path.read_text()))

    monkeypatch.setattr(os, "fsync", flush)
    with replacing(path) as partial:
        partial.write_text("new")
    assert flushed == [(len("new"), "previous")]
    assert path.read_text() == "new"


@pytest.mark.parametrize("name", [None, "partial", "another"])
def test_failed_write_names_the_file(tmp_path, name):
    path = tmp_path / "file"
    path.write_text("previous")

    def write(partial):
        partial.write_text("ne")
        where = {None: (), "partial": (partial,), "another": ("another",)}[name]
        raise OSError(errno.ENOSPC, "full", *where)

    with pytest.raises(OSError, match="full") as failed, replacing(path) as partial:
        write(partial)
    assert str(failed.value.filename) == ("another" if name == "another" else str(path))
    assert path.read_text() == "previous"


def test_missing_or_damaged_weights_are_reported(tmp_path):
    path = tmp_path / "student.safetensors"
    with pytest.raises(InputError) as refused:
        load_weights(model(), path)
    assert str(refused.value) == f"{path} does not exist"
    path.write_bytes(b"no header")
    with pytest.raises(InputError) as refused:
        load_weights(model(), path)
    assert str(refused.value).startswith(f"{path} is damaged: ")
    assert not str(refused.value).endswith("None")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(InputError) as refused:
        load_weights(model(), path)
    assert str(refused.value).startswith(f"{path} does not match the architecture ConvNet")


def test_state_mismatch_names_key_and_shape():
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    def refusal(state):
        with pytest.raises(InputError) as refused:
            fit_state(net, state, "that file")
        return str(refused.value)

    state = net.state_dict()
    other = "that file does not match the architecture Sequential: "
    lacking = {key: value for key, value in state.items() if key != "0.bias"}
    assert refusal(lacking).startswith(f"{other}it has no '0.bias', but '0.weight'")
    assert refusal({}).startswith(f"{other}it has no '0.weight', but 'nothing'")
    larger = {**state, "0.weight": torch.zeros(4, 2)}
    assert refusal(larger) == f"{other}'0.weight' has the shape (4, 2) instead of (3, 2)"
    assert refusal({**state, "2.bias": torch.zeros(1)}) == f"{other}unexpected key '2.bias'"


def test_num_batches_tracked_is_optional():
    net = nn.BatchNorm1d(3)
    net.num_batches_tracked += 7
    state = {"weight": torch.full((3,), 2.0), "bias": torch.ones(3), "running_mean": torch.ones(3)}
    fit_state(net, {**state, "running_var": torch.ones(3)}, "it")
    assert net.weight.tolist() == [2, 2, 2]
    assert int(net.num_batches_tracked) == 7
    with pytest.raises(InputError):  # nothing else may be missing
        fit_state(net, state, "it")
