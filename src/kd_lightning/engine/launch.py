"""Launching of distributed training.

One process prepares a run, has every process of the training started, supervises them and records
the results. Each of them is a worker process: of this process, or, under torchrun and srun, of the
process that the launcher started in its place (`engine.group`). Lightning's strategies do the rest.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from kd_lightning.engine import group
from kd_lightning.engine.supervision import Supervised, Supervision
from kd_lightning.engine.worker import Task, Worker

Result = TypeVar("Result")


def launch(
    processes: int, work: Callable[..., Result], *arguments: Any, on_cpu: bool = True
) -> Result:
    """Run a function in several processes and return the result of rank 0.

    Args:
        processes: number of processes. With one, runs in this process.
        work: a module-level function, so that it can be pickled.
        arguments: its arguments; pickled if workers are started.
        on_cpu: whether they compute on the CPU: the processes of this machine then share its
            threads.

    Raises:
        RunError: a worker other than rank 0 failed; exceptions of rank 0 are raised unchanged.
    """
    if processes == 1:
        with _nothing_left_behind():
            return work(*arguments)
    leader = group.leader()
    if leader is None:
        threads = max(1, torch.get_num_threads() // processes) if on_cpu else None
        return _supervise(processes, "127.0.0.1", None, threads, work, arguments)
    with leader.busy():
        # The launcher decides about the threads of its processes.
        return _supervise(processes, leader.address, leader, None, work, arguments)


@contextmanager
def _nothing_left_behind() -> Iterator[None]:
    """End the process group of a training with `strategy=ddp` in this process, and restore the
    variables that Lightning sets. The next training may use another device.
    """
    there, variables = distributed.is_available(), dict(os.environ)
    before = there and distributed.is_initialized()
    try:
        yield
    finally:
        if there and distributed.is_initialized() and not before:
            distributed.destroy_process_group()
        for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK"):
            os.environ.pop(name, None)
            if name in variables:
                os.environ[name] = variables[name]


def _supervise(
    processes: int,
    address: str,
    leader: group.Leader | None,
    threads: int | None,
    work: Callable[..., Result],
    arguments: Any,
) -> Result:
    # Served by this process, as by torchrun's agent: any free port, and no process of the group
    # has to be started before the others.
    store = TCPStore(address, 0, processes, is_master=True, wait_for_workers=False)
    rendezvous = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    launcher = leader.launcher.name if leader else None
    task = Task(work, arguments, launcher, rendezvous, threads)
    if leader is not None:
        workers: list[Supervised] = [Worker(0, {}, task), *leader.start(task)]
    else:
        places = [{"NODE_RANK": "0", "LOCAL_RANK": str(rank)} for rank in range(processes)]
        workers = [Worker(rank, variables, task) for rank, variables in enumerate(places)]
    supervision = Supervision(workers)
    with supervision.signals_handled():
        try:
            result: Result = supervision.result()
            return result
        finally:
            supervision.stop()
