"""Runs on machines with several GPUs, which are pretended."""

from types import SimpleNamespace

import pytest
import torch

from kd_lightning.engine.callbacks.resuming import ExactResume


@pytest.fixture
def generators(monkeypatch):
    """The states of the random generators of two GPUs, by their names."""
    states = {f"cuda:{number}": torch.full((16,), number, dtype=torch.uint8) for number in (0, 1)}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[_name(device)].clone())
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: states.update({_name(device): state})
    )
    return states


def _name(device):
    return f"cuda:{device}" if isinstance(device, int) else str(device)


def begun(device, state=None):
    """The callback after the start of a training, which is resumed if there is a state."""
    callback = ExactResume()
    trainer = SimpleNamespace(should_stop=False, global_rank=0)
    module = SimpleNamespace(device=torch.device(device))
    if state is not None:
        callback.load_state_dict(state)
    callback.on_fit_start(trainer, module)
    callback.on_train_start(trainer, module)
    return callback


@pytest.mark.parametrize("saved_on", ["cuda:0", "cuda:1"])
@pytest.mark.parametrize("resumed_on", ["cuda:0", "cuda:1"])
def test_random_state_is_restored_on_another_gpu(generators, saved_on, resumed_on):
    expected = {**generators, resumed_on: generators[saved_on]}
    begun(resumed_on, begun(saved_on).state_dict())
    assert all(torch.equal(generators[name], expected[name]) for name in expected)


def test_random_states_of_an_earlier_checkpoint(generators):
    earlier = {"cpu": torch.get_rng_state(), "cuda:1": torch.full((16,), 7, dtype=torch.uint8)}
    begun("cuda:1", earlier)
    assert generators["cuda:1"].tolist() == [7] * 16
    begun("cuda:0", earlier)
    assert generators["cuda:0"].tolist() == [0] * 16


def test_training_on_a_cpu_does_not_touch_a_gpu(generators):
    generators.clear()
    assert begun("cpu", begun("cpu").state_dict()).state_dict().keys() == {"cpu"}
