"""Parts of a training step for which the host does not wait for the device."""

import pytest
import torch
from emulated_device import DEVICE, EmulatedDevice
from test_relational_losses import rows

from kd_lightning import transfer
from kd_lightning.distill import top_k
from kd_lightning.distill.ensemble import Ensemble
from kd_lightning.transfer import to_device


@pytest.fixture
def device(monkeypatch):
    emulated = EmulatedDevice()
    monkeypatch.setattr(transfer, "copies_in_background", lambda where: where == DEVICE)
    with emulated:
        yield emulated


def there(values):
    return to_device(values, DEVICE)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_average_of_an_ensemble(device, average):
    members = [rows(4, 5), rows(4, 5)]
    found = Ensemble([], average).combine([there(part) for part in members])
    assert not device.waits
    assert torch.equal(found.cpu(), Ensemble([], average).combine(members))


def test_reduction_to_the_largest_logits(device):
    logits = rows(6, 40)
    found = top_k.reduce(there(logits), 3)
    assert not device.waits
    assert torch.equal(found.cpu(), top_k.reduce(logits, 3))
