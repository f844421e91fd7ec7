"""Run directories: files of a run, and loading of the student."""

import csv
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

from kd_lightning.config import stored
from kd_lightning.config.trust import TRUSTED, check_trusted
from kd_lightning.errors import InputError, RunError
from kd_lightning.files import replacing
from kd_lightning.models import ConvNet
from kd_lightning.storage import provenance, weights
from kd_lightning.storage.provenance import device_name, versions
from kd_lightning.storage.run_directory import Checkpoint, RunDirectory
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


@pytest.fixture
def run(tmp_path):
    return RunDirectory(tmp_path / "setting" / "run")


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
            time.sleep(0.2)
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


# --- checkpoints -------------------------------------------------------------------------------


def lightnings(epochs, steps, batches, begun):
    current = {"ready": epochs + begun, "started": epochs + begun, "processed": epochs}
    loops = {
        "epoch_progress": {"current": current, "total": {"ready": 90, "processed": 80}},
        "epoch_loop.batch_progress": {
            "current": {"ready": 70, "processed": batches},
            "total": {"ready": 60, "processed": 50},
        },
    }
    return {"global_step": steps, "epoch": 40, "loops": {"fit_loop": loops}}


def test_checkpoint_position(run):
    assert run.checkpoint() is None
    path = run.path / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(lightnings(3, 21, 7, begun=0), path)
    assert run.checkpoint() == Checkpoint(path, epochs=3, steps=21, batches=0)
    assert run.checkpoint().place == "epoch 3"
    torch.save(lightnings(3, 26, 5, begun=1), path)
    assert run.checkpoint() == Checkpoint(path, epochs=3, steps=26, batches=5)
    assert run.checkpoint().place == "step 26 (batch 5 of epoch 4)"
    assert Checkpoint(path, 2, 14).batches == 0


def test_damaged_checkpoint_is_reported_and_ignored(run, caplog):
    path = run.path / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half of it")
    assert run.checkpoint() is None
    (message,) = caplog.messages
    assert message.startswith(f"{path} is damaged")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), MemoryError()])
def test_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(run, monkeypatch, error):
    path = run.path / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"intact")

    def read(path):
        raise error

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(InputError, match="cannot be read"):
        run.checkpoint()
    monkeypatch.undo()
    assert path.read_bytes() == b"intact"


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (self.path.touch, ())


def test_checkpoint_cannot_run_code(run):
    path = run.path / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({**lightnings(1, 7, 0, begun=0), "bomb": Bomb(run.path / "exploded")}, path)
    assert run.checkpoint() is None
    assert not (run.path / "exploded").exists()


def test_checkpoint_of_another_device_is_loaded(run, monkeypatch):
    path = run.path / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save(lightnings(1, 7, 0, begun=0), path)
    asked = []
    original = torch.load

    def load(*args, **kwargs):
        asked.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    run.checkpoint()
    assert asked == [{"map_location": "cpu", "weights_only": True}]


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


# --- trust -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    ["os.system", "builtins.eval", "torch.hub.load", "subprocess.Popen", "torch.load",
     "kd_lightning.data.folder.os.system",
     "torchvision.models.squeezenet.torch.load", "kd_lightning.data.views.PLAIN"],
)  # fmt: skip
@pytest.mark.parametrize("nest", [lambda n: n, lambda n: {"a": [1, {"b": n}]}, lambda n: [n]])
def test_untrusted_targets_are_rejected_at_any_depth(target, nest):
    node = {"_target_": "torch.nn.Identity", "inner": nest({"_target_": target, "x": 1})}
    with pytest.raises(InputError, match=r"student\.model") as refused:
        check_trusted(node, "student.model")
    sentence = str(refused.value)
    assert sentence.startswith(f"student.model._target_={target} is not in {', '.join(TRUSTED)}")
    assert "--trust" in sentence


def test_untrusted_modules_are_not_imported():
    sys.modules.pop("this", None)
    with pytest.raises(InputError, match="rejected"):
        check_trusted({"_target_": "this.s"}, "student.model")
    assert "this" not in sys.modules


def test_user_packages_can_be_trusted(run):
    run.write_config({**CONFIG, "student": {"model": {"_target_": "test_runs.own"}}})
    run.save_weights(model())
    for trust in ((), ("test",), ("elsewhere", "kd_lightning.files")):
        with pytest.raises(InputError, match="--trust"):
            run.load_student(trust)
    student, _ = run.load_student(trust=("elsewhere", "test_runs"))
    assert type(student) is ConvNet
    # A function that is only imported there is still rejected.
    with pytest.raises(InputError, match="--trust"):
        check_trusted({"_target_": "test_runs.subprocess.run"}, "x", ("test_runs",))


def own():
    return model()


@pytest.mark.parametrize(
    "target", ["kd_lightning.models.ConvNet", "torch.nn.Linear", "torchvision.models.resnet18"]
)
def test_models_and_layers_are_trusted(target):
    check_trusted({"_target_": target, "parts": [{"_target_": "torch.nn.ReLU"}]}, "student.model")


def test_untrusted_student_is_not_built(run):
    config = json.loads(json.dumps(CONFIG))
    config["student"]["model"] = {"_target_": "os.mkdir", "path": str(run.path / "made")}
    run.write_config(config)
    run.save_weights(model())
    with pytest.raises(InputError, match=r"^student\.model\._target_=os.mkdir .* rejected"):
        run.load_student()
    assert not (run.path / "made").exists()


def test_invalid_student_node_is_reported(run):
    for node in ({**MODEL, "depth": 3}, {"_target_": "kd_lightning.models.Nothing"}):
        run.write_config({**CONFIG, "student": {"model": node}})
        with pytest.raises(InputError, match=r"^student\.model"):
            run.load_student()


# --- provenance --------------------------------------------------------------------------------


def test_versions_name_the_commit(monkeypatch):
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["lightning"][0].isdigit()
    assert found["python"].startswith("3.")
    root = Path(provenance.__file__).resolve().parents[3]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        commit, _, dirty = found["git_commit"].partition("-")
        assert len(commit) == 12
        assert head.startswith(commit)
        assert dirty in ("", "dirty")


@pytest.mark.parametrize("error", [OSError("no git"), subprocess.TimeoutExpired("git", 10)])
def test_without_git_there_is_no_commit(monkeypatch, error, tmp_path):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a" / "b" / "c" / "x.py"))

    def fails(*_, timeout, **__):
        assert 1 <= timeout <= 60  # with a timeout
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", fails)
        assert versions()["git_commit"] == ""
    assert versions()["git_commit"] == ""  # looks like a repository, but is not
    (tmp_path / ".git").rmdir()
    assert versions()["git_commit"] == ""


def test_modified_checkout_is_dirty(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    (tmp_path / "file").write_text("1")
    git("init", "--quiet")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a" / "b" / "c" / "x.py"))
    clean = versions()["git_commit"]
    assert len(clean) == 12
    (tmp_path / "file").write_text("2")
    assert versions()["git_commit"] == f"{clean}-dirty"


def test_device_has_a_human_readable_name(monkeypatch):
    name = device_name(torch.device("cpu"))
    assert f", {torch.get_num_threads()} thread" in name
    info = Path("/proc/cpuinfo")
    if info.exists() and "model name" in info.read_text():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        assert name.rpartition(",")[0] == models[0].split(":")[1].strip()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    assert device_name(torch.device("cuda:1")) == "a GPU at cuda:1"
    assert device_name(torch.device("mps")) == "mps"


def test_device_name_without_proc(monkeypatch):
    def absent(self, *_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "open", absent)
    for processor, machine, expected in (("chip", "arch", "chip"), ("", "arch", "arch")):
        monkeypatch.setattr(provenance.platform, "processor", lambda p=processor: p)
        monkeypatch.setattr(provenance.platform, "machine", lambda m=machine: m)
        assert device_name(torch.device("cpu")).startswith(f"{expected}, ")


def test_saved_weights_are_plain_safetensors(run):
    run.save_weights(model())
    assert set(load_file(run.path / "student.safetensors")) == set(model().state_dict())
