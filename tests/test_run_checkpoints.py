"""The checkpoint of a run: its position, and files that are damaged or contain code."""

from pathlib import Path

import pytest
import torch

from kd_lightning.errors import InputError
from kd_lightning.storage.run_directory import Checkpoint


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
