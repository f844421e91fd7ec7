"""Training in the processes of a launcher (torchrun, srun), and launchers that must not matter."""

import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import processes
import pytest
import torch
from conftest import TINY, in_a_new_process

from kd_lightning import api
from kd_lightning.config import hardware
from kd_lightning.config.launcher import find_launcher, launched_together, trainer_of
from kd_lightning.config.resolve import check_devices, resolve_trainer
from kd_lightning.engine import supervision, worker
from kd_lightning.engine.agreement import Agreement, last_batch
from kd_lightning.engine.callbacks.curves import Curves
from kd_lightning.engine.group import Follower
from kd_lightning.errors import InputError
from kd_lightning.workflows import nodes
from kd_lightning.workflows.cards import card_in_turn

COMMAND = (
    "train.py", *TINY, "method=logit", "student=small", "data=digits", "data.batch_size=45",
    "data.image_size=16", "trainer.precision=32-true", "trainer=ddp", "trainer.accelerator=cpu",
    "+trainer.limit_train_batches=8", "+teacher.trainer.limit_train_batches=4",
)  # fmt: skip
SECONDS = 30  # far below the half hour that a collective may wait


def arguments(root, *more):
    return [*COMMAND, f"output_dir={root}", f"data_dir={root}/data", *more]


def srun(root, *more, tasks=2, prepare=None):
    """Start the command as srun does on nodes with one task each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = []
    for rank in range(tasks):
        variables = {
            "SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": str(rank),
            "SLURM_NNODES": str(tasks), "SLURM_NODEID": str(rank), "SLURM_LOCALID": "0",
            "SLURM_JOB_NAME": "kd", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        started.append(processes.start(*arguments(root, *more), prepare=prepare, **variables))
    return started


def finish(started):
    """Exit codes and standard error of the processes."""
    errors = [process.communicate()[1] for process in started]
    return [process.wait() for process in started], errors


def results(root):
    (run,) = [path.parent for path in root.glob("runs/*/*/metrics.json")]
    history = [row.rpartition(",")[0] for row in (run / "history.csv").read_text().splitlines()]
    return (run / "student.safetensors").read_bytes(), history


def at_batch(number, *acts):
    """Let rank r do acts[r] in its worker after this many batches; inherited by forked workers."""
    counted = 0

    def on_train_batch_end(self, trainer, *given):
        nonlocal counted
        counted += trainer.world_size > 1
        if counted == number and acts[trainer.global_rank] is not None:
            acts[trainer.global_rank]()
        return before(self, trainer, *given)

    before, Curves.on_train_batch_end = Curves.on_train_batch_end, on_train_batch_end


def note_time():
    Path(os.environ["FAILED_AT"]).write_text(str(time.monotonic()))


def fail():
    note_time()
    raise OSError("no more of it")


def wait_as_in_a_collective():
    time.sleep(600)


def stop_this_task():
    os.kill(os.getppid(), signal.SIGTERM)


def kill_this_task():
    note_time()
    os.kill(os.getppid(), signal.SIGKILL)


def signal_in_second_epoch():
    at_batch(11, None, stop_this_task)


def failure_of_rank_1():
    at_batch(5, wait_as_in_a_collective, fail)


def loss_of_rank_1():
    supervision.LATER = 1  # a killed task says nothing later
    at_batch(5, wait_as_in_a_collective, kill_this_task)


def test_signal_to_any_task_saves_within_the_epoch_and_resumes_exactly(tmp_path):
    """The result is also that of processes that the command starts itself."""
    own, root = tmp_path / "own", tmp_path / "srun"
    done = in_a_new_process(*arguments(own, "trainer.devices=2"))
    assert done.code == 0, done.err
    codes, errors = finish(srun(root, prepare=signal_in_second_epoch))
    assert codes == [143, 143]
    assert "stopped by SIGTERM" in errors[0]
    assert "of epoch 2" in errors[0]
    assert errors[1] == ""
    codes, errors = finish(srun(root))
    assert codes == [0, 0]
    assert "resuming" in errors[0]
    assert errors[1] == ""
    assert results(root) == results(own)


@pytest.mark.parametrize(
    ("prepare", "code", "sentence"),
    [(failure_of_rank_1, 1, "no more of it"), (loss_of_rank_1, -9, "it exited unexpectedly")],
)
def test_failure_of_one_task_ends_all_within_seconds(
    tmp_path, monkeypatch, prepare, code, sentence
):
    monkeypatch.setenv("FAILED_AT", str(tmp_path / "failed"))
    codes, errors = finish(srun(tmp_path, "method=none", prepare=prepare))
    assert time.monotonic() - float((tmp_path / "failed").read_text()) < SECONDS
    assert codes == [1, code]
    assert f"error: worker 1 of 2 ({socket.gethostname()}): {sentence}" in errors[0]
    assert errors[1] == ""
    (metrics,) = tmp_path.glob("runs/*/*/metrics.json")
    assert json.loads(metrics.read_text())["status"] == "failed"


def test_invalid_input_is_reported_once(tmp_path):
    codes, errors = finish(srun(tmp_path, "method.terms.logit.temperature=-1"))
    assert codes == [2, 2]
    assert "temperature" in errors[0]
    assert errors[1] == ""


def test_node_without_the_folder_or_the_images_is_reported(tmp_path):
    data = api.compose(*arguments(tmp_path)[1:])["data"]
    with pytest.raises(InputError, match="output_dir is not shared"):
        nodes._prepare_node(data, tmp_path / "config.yaml")
    (tmp_path / "config.yaml").touch()
    assert len(nodes._prepare_node(data, tmp_path / "config.yaml")) == 64


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "1",
}  # fmt: skip
SRUN = {
    "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NNODES": "2",
    "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "kd",
}  # fmt: skip


@pytest.fixture
def variables(monkeypatch):
    def set_variables(*parts, **more):
        for name in (*TORCHRUN, *SRUN):
            monkeypatch.delenv(name, raising=False)
        for part in (*parts, more):
            for name, value in part.items():
                monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize(
    "left",
    [
        {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere"},
        {"SLURM_PROCID": "1"},
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "1"},
        {**SRUN, "SLURM_JOB_NAME": "interactive"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        {**SRUN, "SLURM_NTASKS": "1"},
        {**SRUN, "SLURM_NTASKS": "many"},
        {**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"},
    ],
)
def test_variables_that_are_left_over_are_no_launcher(variables, left):
    variables(left)
    assert find_launcher() is None


def test_launchers_are_found(variables):
    variables(TORCHRUN, SRUN)
    assert find_launcher() == ("torchrun", 1, 1, 2, 1)
    variables(SRUN)
    assert find_launcher() == ("srun", 1, 1, 4, 2)
    assert find_launcher().per_node == 2


def test_only_a_training_on_several_devices_uses_the_launcher(variables):
    variables(SRUN)  # srun may start a run of its own in every task
    assert launched_together({"devices": 1}) is None
    assert launched_together({"devices": "auto"}).world == 4
    variables(TORCHRUN)
    with pytest.raises(InputError, match="add trainer=ddp"):
        launched_together({"devices": 1})


def test_trainer_of_a_command():
    assert trainer_of(["seed=0,1", "trainer=ddp", "-m"])["devices"] == "auto"
    assert trainer_of(["experiment=grid", "+trainer.num_nodes=2"])["num_nodes"] == 2
    assert trainer_of(["trainer.max_epochs=1,2"])["devices"] == 1
    assert trainer_of(["experiment=grid,demo", "trainer=ddp", "-m"])["devices"] == "auto"
    with pytest.raises(InputError, match="different numbers of processes"):
        trainer_of(["trainer=ddp", "trainer.devices=1,2", "-m"])


def test_processes_follow_from_the_launcher(variables):
    trainer = api.compose("data=digits", "trainer=ddp", "trainer.accelerator=cpu")["trainer"]
    model = {"_target_": "torch.nn.Identity"}
    variables(SRUN)
    plan = resolve_trainer(trainer, model)
    assert (plan.arguments["devices"], plan.arguments["num_nodes"], plan.processes) == (2, 2, 4)
    with pytest.raises(InputError, match="srun has started 2 on each of 2 nodes"):
        resolve_trainer({**trainer, "devices": 4}, model)
    variables()
    with pytest.raises(InputError, match="on every node, with torchrun or srun"):
        resolve_trainer({**trainer, "num_nodes": 2}, model)
    assert resolve_trainer({**trainer, "devices": 1}, model).processes == 1


class OwnError(Exception):
    """An error that cannot be unpickled, like those of failed downloads."""

    def __init__(self, file, reason):
        super().__init__(f"{file}: {reason}")


def failing(file):
    raise OwnError(file, "not found")


def test_any_error_of_another_node_reaches_rank_0():
    here, link = multiprocessing.Pipe()
    follower = object.__new__(Follower)
    follower._link = link
    follower._obey("call", (failing, ("x.png",)))
    kind, error = here.recv()
    assert (kind, str(error)) == ("error", "OwnError: x.png: not found")


def test_any_log_record_of_a_worker_reaches_its_parent():
    here, connection = multiprocessing.Pipe()
    parent = worker._Parent(connection)
    record = logging.makeLogRecord({"msg": "%s left", "args": (3,), "cannot_be_pickled": lambda: 0})
    worker._Forward(parent).emit(record)
    parent.send("done", {})
    parent.finish()
    assert here.poll(10)
    assert here.recv()[1].getMessage() == "3 left"
    assert here.recv() == ("done", {})


@pytest.mark.parametrize("slowest", range(3))
def test_all_processes_stop_after_the_same_batch(slowest):
    """Batches begin and end together, as gradients are averaged, but requests arrive late."""
    world, requested, replies = 3, 4, {}
    decided = threading.Event()
    together = threading.Barrier(world)

    def reply(rank, begun):
        replies[rank] = begun
        if len(replies) == world:
            decided.set()

    agreements = [Agreement(lambda begun, rank=rank: reply(rank, begun)) for rank in range(world)]
    stopped = []

    def train(rank):
        for batch in range(1, 1000):
            agreements[rank].begin_batch()
            together.wait(timeout=10)
            if batch == requested and rank != slowest:
                agreements[rank].request(15)
            if agreements[rank].due:
                stopped.append(batch)
                return

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    time.sleep(0.05)
    agreements[slowest].request(15)
    assert decided.wait(timeout=10)
    for agreement in agreements:
        agreement.decide(last_batch([*replies.values()]))
    for thread in threads:
        thread.join(timeout=10)
    assert len(stopped) == world
    assert len({*stopped}) == 1


@pytest.fixture
def three_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(hardware, "device_type", lambda accelerator: "cuda")
    monkeypatch.setattr("kd_lightning.config.resolve.device_type", lambda accelerator: "cuda")


def test_concurrent_runs_take_gpus_in_turn(tmp_path, three_gpus):
    trainer = {
        "accelerator": "auto", "devices": 1, "precision": "32-true", "memory_format": "contiguous"
    }  # fmt: skip
    with card_in_turn(tmp_path, trainer) as first, card_in_turn(tmp_path, trainer) as second:
        assert (first, second) == (0, 1)
        assert resolve_trainer(trainer, {}).arguments["devices"] == [1]
        with card_in_turn(tmp_path, trainer), card_in_turn(tmp_path, trainer) as fourth:
            assert fourth == 0  # shared, as all are in use
    with card_in_turn(tmp_path, {**trainer, "devices": [2]}) as chosen:
        assert chosen is None
        assert resolve_trainer({**trainer, "devices": [2]}, {}).arguments["devices"] == [2]
    assert resolve_trainer(trainer, {}).arguments["devices"] == 1
    with card_in_turn(tmp_path, trainer) as again:
        assert again == 0


def test_number_of_the_gpu_does_not_affect_the_result(monkeypatch):
    one, other = (
        api.compose("data=digits", f"trainer.devices={devices}") for devices in ("1", "[1]")
    )
    assert one["setting"] == other["setting"]
    with pytest.raises(InputError, match="selects GPUs by their numbers"):
        check_devices({**other, "trainer": {**other["trainer"], "accelerator": "cpu"}})
