"""Distributed training."""

import json
import os
import re
import shutil
import signal

import processes
import pytest
import torch
from conftest import TINY, in_a_new_process
from safetensors.torch import load
from test_launchers import at_batch

from kd_lightning import api
from kd_lightning.data.loading import ViewSampler
from kd_lightning.errors import InputError
from kd_lightning.workflows import student

COMMAND = (
    "train.py", *TINY, "method=combined", "student=small", "data=digits", "data.batch_size=45",
    "data.image_size=16", "trainer.precision=32-true", "remember.dtype=float32",
    "+trainer.limit_train_batches=8", "+teacher.trainer.limit_train_batches=4",
)  # fmt: skip
TEST_IMAGES = 359  # an odd number, so that two processes have unequal parts
TWO = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")
GRID = ("hydra.mode=MULTIRUN", *TWO, "method=none,combined", "seed=0")


def train(root, *arguments, prepare=None):
    command = (*COMMAND, *arguments, f"output_dir={root}", f"data_dir={root}/data")
    done = in_a_new_process(*command, prepare=prepare)
    assert done.code == 0, done.err
    return done


def results(root, method=""):
    (run,) = [path.parent for path in root.glob(f"runs/*/{method}*/metrics.json")]
    metrics = json.loads((run / "metrics.json").read_text())
    history = [row.rpartition(",")[0] for row in (run / "history.csv").read_text().splitlines()]
    return metrics, (run / "student.safetensors").read_bytes(), history


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A grid, every run of which is trained in two processes."""
    root = tmp_path_factory.mktemp("whole")
    train(root, *GRID)
    return root


def test_two_processes_train_the_same_student_as_one(tmp_path, whole):
    api.run(*COMMAND[1:], f"output_dir={tmp_path}", f"data_dir={tmp_path}/data")
    one, weights, history = results(tmp_path)
    two, same_weights, same_history = results(whole, "combined")
    assert (one["processes"], two["processes"]) == (1, 2)
    same_weights = load(same_weights)
    for name, weight in load(weights).items():
        torch.testing.assert_close(same_weights[name], weight, rtol=1e-3, atol=1e-4)
    probabilities = ("temperature", "test_nll", "test_ece", "teacher_kl", "teacher_test_nll")
    for key in ("val_accuracy", "test_accuracy", "agreement", *probabilities):
        assert two[key] == pytest.approx(one[key], abs=0.01)
    assert two["teacher_key"] == one["teacher_key"]
    # Metrics cover all images, not only one process's part.
    for row, same in zip(history[1:], same_history[1:], strict=True):
        assert [*map(float, same.split(","))] == pytest.approx([*map(float, row.split(","))], 1e-3)
    for root in (tmp_path, whole):
        (confusion,) = root.glob("runs/*/combined*/confusion.csv")
        counts = [map(int, row.split(",")) for row in confusion.read_text().splitlines()[1:]]
        assert sum(map(sum, counts)) == TEST_IMAGES


def interrupt_command():
    os.killpg(os.getppid(), signal.SIGINT)  # as from a terminal: to the process group


def kill_command():
    os.kill(os.getppid(), signal.SIGKILL)


def interrupt_in_second_epoch():
    at_batch(10, None, interrupt_command)


def kill_in_second_epoch():
    at_batch(10, None, kill_command)


def test_resume_of_a_distributed_grid(tmp_path, whole):
    """Interrupted in its first run, then killed in the second."""
    command = [*COMMAND, *GRID, f"output_dir={tmp_path}", f"data_dir={tmp_path}/data"]
    first = processes.start(*command, prepare=interrupt_in_second_epoch)
    _, said = first.communicate()
    assert first.returncode == 130
    assert " of epoch 2" in said
    second = processes.start(*command, prepare=kill_in_second_epoch)
    _, said = second.communicate()
    assert second.returncode == -9
    assert re.search("resuming .*/none-", said)
    done = train(tmp_path, *GRID)
    assert re.search("resuming .*/combined-", done.err)
    for method in ("none", "combined"):
        assert results(tmp_path, method)[1:] == results(whole, method)[1:]


@pytest.mark.parametrize("where", ["student.open_caches", "DistillationModule.on_train_epoch_end"])
@pytest.mark.parametrize("how", ["raise OSError('no more of it')", "os._exit(9)"])
def test_failed_worker_is_reported(tmp_path, whole, where, how):
    shutil.copytree(whole / "teachers", tmp_path / "teachers")
    script = tmp_path / "breaks.py"
    script.write_text(
        "import os\n"
        "from kd_lightning import cli\n"
        "from kd_lightning.engine import supervision\n"
        "from kd_lightning.workflows import student\n"
        "from kd_lightning.distill.module import DistillationModule\n"
        f"works = {where}\n"
        "def fails(*given):\n"
        "    if os.environ.get('LOCAL_RANK', '0') != '0':\n"
        f"        {how}\n"
        "    return works(*given)\n"
        f"{where} = fails\n"
        # A worker that exited says nothing later.
        f"supervision.LATER = {5 if 'raise' in how else 1}\n"
        "if __name__ == '__main__': cli.main()\n"
    )
    done = in_a_new_process(
        str(script), *COMMAND[1:], *TWO, f"output_dir={tmp_path}", f"data_dir={tmp_path}/data"
    )
    assert done.code == 1
    reason = "no more of it" if "raise" in how else "it exited unexpectedly"
    assert f"error: worker 1 of 2: {reason}" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ("trainer.devices=0", "trainer.devices must be a whole number of at least 1, or auto"),
        ("trainer.strategy=fsdp", "trainer.strategy must be one of auto, ddp, not fsdp"),
        ("+trainer.num_nodes=2", "trainer.num_nodes"),
        ("+teacher.trainer.devices=2", "teacher.trainer.devices must be 1"),
    ],
)
def test_unsupported_ddp_settings_are_rejected(tmp_path, wrong, sentence):
    config = api.compose(*COMMAND[1:], "trainer=ddp", wrong, f"output_dir={tmp_path}")
    with pytest.raises(InputError, match=re.escape(sentence)):
        student.prepare(config)


@pytest.mark.parametrize("images", [100, 101, 103])
def test_every_image_has_equal_weight_in_an_epoch(images):
    world, seen, weights = 3, [], {}
    samplers = [
        ViewSampler(torch.arange(images), 25, shuffle=True, seed=1, rank=rank, world=world)
        for rank in range(world)
    ]
    assert len({len(sampler) for sampler in samplers}) == 1
    whole = list(ViewSampler(torch.arange(images), 25, shuffle=True, seed=1))
    for together, *parts in zip(whole, *samplers, strict=True):
        own = [part["shown"].index for part in parts if part["loss_weight"] > 0]
        assert sorted(torch.cat(own).tolist()) == sorted(together["shown"].index.tolist())
        seen += torch.cat(own).tolist()
        for part in parts:  # the mean over processes of weight * mean is the mean over the batch
            for index in part["shown"].index.tolist():
                weight = float(part["loss_weight"]) / len(part["shown"].index) / world
                weights[index] = weights.get(index, 0) + weight * len(together["shown"].index)
    assert sorted(seen) == list(range(images))
    assert set(weights) == set(range(images))
    assert all(weight == pytest.approx(1) for weight in weights.values())


@pytest.mark.slow  # a launcher and two fresh interpreters
def test_torchrun_trains_the_same_student_as_own_processes(tmp_path):
    train(tmp_path / "own", *TWO)
    command = [*COMMAND, *TWO, f"output_dir={tmp_path / 'torchrun'}", f"data_dir={tmp_path}/data"]
    done = in_a_new_process("-m", "torch.distributed.run", "--nproc-per-node=2", *command)
    assert done.code == 0, done.err
    assert results(tmp_path / "torchrun")[1] == results(tmp_path / "own")[1]
