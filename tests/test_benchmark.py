"""Parts of `scripts/benchmark.py`, for devices of any speed."""

from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY

from kd_lightning import transfer
from kd_lightning.engine.callbacks import speed


def test_memory_does_not_grow_with_the_speed(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "scripts")
    import random_images

    monkeypatch.setattr(random_images, "DISTINCT", 100)
    data = random_images.random_batches(count=50, batch_size=16)
    batches = list(data.train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [16] * 50
    assert len(torch.cat([batch["shown"].index for batch in batches]).unique()) == 100
    assert len(data.labels) == 100 + 1000 + 1000
    # As many as are used, if fewer.
    few = random_images.random_batches(count=2, batch_size=16)
    assert len(few.labels) == 32 + 1000 + 1000


def test_device_is_synchronised_before_reading_the_clock(monkeypatch):
    did = []
    monkeypatch.setattr(speed, "synchronize", lambda device: did.append(device))
    clock = speed.Speed()
    clock.images = clock._clock_images = 8
    module = SimpleNamespace(device="there", log=lambda *_, **__: did.append("read"))
    clock.on_validation_start(SimpleNamespace(), module)
    assert did == ["there", "read"]


@pytest.mark.parametrize(
    ("device", "expected"), [("cuda:1", ["cuda:1"]), ("mps", ["mps"]), ("cpu", []), ("meta", [])]
)
def test_synchronisation_by_device_type(monkeypatch, device, expected):
    did = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: did.append(str(device)))
    monkeypatch.setattr(torch.mps, "synchronize", lambda: did.append("mps"))
    transfer.synchronize(torch.device(device))
    assert did == expected
