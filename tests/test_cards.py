"""Runs on machines with GPUs, which are pretended."""

import gc
import multiprocessing
import os
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import FOLDER, TINY, write_folder
from torch import distributed

from kd_lightning import api
from kd_lightning.config.resolve import check_devices
from kd_lightning.data.sources import InMemoryImages
from kd_lightning.engine.callbacks.resuming import ExactResume
from kd_lightning.engine.supervision import Supervision
from kd_lightning.engine.worker import portable
from kd_lightning.errors import InputError, RunError
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import student


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
    assert begun("cpu", begun("cpu").state_dict()).state_dict().keys() == {"cpu", "python", "numpy"}


FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 1 has a total capacity of 79.11 GiB of "
    "which 3.52 GiB is free. Including non-PyTorch memory, this process has 75.58 GiB memory in "
    "use. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
)
SENTENCE = (
    "the device has too little memory (CUDA out of memory; Tried to allocate 20.00 GiB; GPU 1 has "
    "a total capacity of 79.11 GiB of which 3.52 GiB is free): reduce data.batch_size, or the "
    "number of runs at a time"
)


def outcome_of(*errors):
    """What the workers' parent raises if each of them reports an error."""
    pipes = [multiprocessing.Pipe() for _ in errors]
    for (_, theirs), error in zip(pipes, errors, strict=True):
        theirs.send(("error", portable(error)))
    workers = [SimpleNamespace(connection=ours, place="") for ours, _ in pipes]
    with pytest.raises(RunError) as raised:
        Supervision(workers).result()
    return str(raised.value)


def test_memory_of_a_gpu_is_the_cause_of_lost_connections():
    lost = RuntimeError("Connection closed by peer")
    assert outcome_of(lost, FULL) == f"worker 1 of 2: {SENTENCE}"
    assert outcome_of(FULL, lost) == SENTENCE


def test_error_of_a_gpu_is_the_cause_of_lost_connections():
    lost, broken = RuntimeError("Connection closed by peer"), torch.AcceleratorError("CUDA error")
    assert outcome_of(lost, broken) == "worker 1 of 2: CUDA error"


def test_out_of_memory_is_one_sentence(tmp_path, monkeypatch):
    def fill(*given):
        raise FULL

    monkeypatch.setattr(student, "train_student", fill)
    images = write_folder(tmp_path / "images")
    config = api.compose(
        *FOLDER, *TINY, "method=none", f"data.root={images}", f"output_dir={tmp_path}"
    )
    with pytest.raises(RunError) as raised:
        student.run(config, tmp_path / "run")
    assert str(raised.value) == SENTENCE
    assert RunDirectory(tmp_path / "run").read_metrics()["error"] == SENTENCE


def test_images_that_do_not_fit_on_the_device(monkeypatch):
    images = InMemoryImages(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))

    def fill(*given):
        raise FULL

    monkeypatch.setattr(torch.Tensor, "to", fill)
    with pytest.raises(InputError, match=r"^the images need 9.6e-08 GB on cuda:1, .*streamed"):
        images.to(torch.device("cuda", 1))


def test_images_are_released_after_a_run(tmp_path, monkeypatch):
    made = []
    create = InMemoryImages.__init__

    def note(self, pixels):
        create(self, pixels)
        made.append(weakref.ref(pixels))

    monkeypatch.setattr(InMemoryImages, "__init__", note)
    # As on an accelerator: a copy for every training.
    monkeypatch.setattr(
        InMemoryImages, "to", lambda self, device: InMemoryImages(self.pixels.clone())
    )
    images = write_folder(tmp_path / "images")
    config = api.compose(
        *FOLDER, *TINY, "method=logit", f"data.root={images}", f"output_dir={tmp_path}"
    )
    gc.disable()
    try:
        student.run(config, tmp_path / "run")
        assert len(made) > 4
        assert not any(pixels() is not None for pixels in made)
    finally:
        gc.enable()


SRUN = {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NNODES": "1"}


@pytest.mark.parametrize(("seen", "words"), [(1, "see 1 GPU:"), (2, "see 2 GPUs:"), (4, "")])
def test_more_processes_than_gpus_are_rejected(monkeypatch, seen, words):
    config = api.compose("trainer=ddp", "method=none")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    if not words:
        check_devices(config)
        return
    with pytest.raises(InputError, match=f"srun has started 4 processes on this node, .*{words}"):
        check_devices(config)


def test_runs_of_all_settings_share_the_gpus(train, monkeypatch):
    folders = []

    @contextmanager
    def note(folder, trainer):
        folders.append(folder)
        yield

    monkeypatch.setattr("kd_lightning.workflows.cards.card_in_turn", note)
    done = train(*TINY, "method=none", "seed=0", "trainer.max_epochs=1,2", "-m")
    assert done.code == 0, done.err
    assert len({run.parent for run in done.runs}) == 2
    assert len(folders) == 2
    assert folders[0] == folders[1]


def test_ddp_in_one_process_leaves_nothing_behind(tmp_path):
    images, before = write_folder(tmp_path / "images"), set(os.environ)
    config = api.compose(
        *FOLDER, *TINY, "method=none", "trainer=ddp", "trainer.devices=1",
        "trainer.accelerator=cpu", f"data.root={images}", f"output_dir={tmp_path}",
    )  # fmt: skip
    student.run(config, tmp_path / "run")
    assert not distributed.is_initialized()
    assert not {"MASTER_PORT", "LOCAL_RANK"} & (set(os.environ) - before)
