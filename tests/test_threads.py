"""The processes of a training on the CPU share its threads, whatever else the machine has."""

import pytest
import torch

from kd_lightning import api
from kd_lightning.engine import launch
from kd_lightning.workflows import student


class RecordedError(Exception):
    pass


@pytest.mark.parametrize(("on_cpu", "threads"), [(True, 2), (False, None)])
def test_processes_share_the_threads_of_the_cpu(monkeypatch, on_cpu, threads):
    def worker(rank, variables, task):
        raise RecordedError(task.threads)

    monkeypatch.setattr(launch, "Worker", worker)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    with pytest.raises(RecordedError) as recorded:
        launch.launch(2, print, on_cpu=on_cpu)
    assert recorded.value.args == (threads,)


@pytest.mark.parametrize(("accelerator", "on_cpu"), [("cpu", True), ("cuda", False)])
def test_device_of_the_run_decides(monkeypatch, tmp_path, accelerator, on_cpu):
    """With a GPU in the machine, too."""

    def launched(processes, *_, on_cpu):
        raise RecordedError(processes, on_cpu)

    monkeypatch.setattr(student, "launch", launched)
    monkeypatch.setattr(student, "check_nodes", lambda *_: None)
    prepare = student.prepare

    def prepared(config):
        job = prepare(config)
        job.plan.student.trainer.arguments["accelerator"] = accelerator
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return job

    monkeypatch.setattr(student, "prepare", prepared)
    with pytest.raises(RecordedError) as recorded:
        api.run(
            "data=digits", "method=none", "student=small", "trainer=ddp", "trainer.devices=2",
            "trainer.accelerator=cpu", f"output_dir={tmp_path}", f"data_dir={tmp_path}",
        )  # fmt: skip
    assert recorded.value.args == (2, on_cpu)
