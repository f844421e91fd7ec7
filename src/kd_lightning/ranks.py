"""Several processes train one student (`trainer=ddp`): each takes its share of every batch.

Lightning would start the others by repeating the command line, which in a grid is the whole grid.
Here the process that was started, rank 0, starts them itself, each for this one run. A helper goes
through the same code, finds the teacher in its store, and writes nothing.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from kd_lightning.config import Node
from kd_lightning.errors import RunError

Meet = Callable[[int], None]
"""Called by every process of a run, with their number, before they do anything together."""


@contextmanager
def together(trainer: Node, helper: Callable[..., Any], *run: Any) -> Iterator[Meet]:
    """Be rank 0 of the processes that a run's trainer asks for.

    Args:
        trainer: arguments of Lightning's Trainer.
        helper: what each of the others does, called with `run` and its own `Meet`; a function of
            a module, since it goes to another process.
        run: further arguments of it.

    Raises:
        RunError: another process failed.
    """
    if trainer["devices"] == 1:
        yield lambda processes: None
        return
    threads = torch.get_num_threads()
    # Where Lightning looks; a scheduler or torchrun may have left values of its own there.
    place = {"LOCAL_RANK": "0", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    place["MASTER_PORT"] = str(_free_port())
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    helpers = _Helpers(helper, *run)
    try:
        yield helpers.meet
        helpers.join()
    except RuntimeError:  # how torch says that another process is gone
        helpers.check()
        raise
    finally:
        helpers.stop()
        _leave()
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


class _Helpers:
    """The other processes, as rank 0 sees them."""

    def __init__(self, *run: Any) -> None:
        self._run = run
        self._all: list[tuple[BaseProcess, Connection]] = []

    def meet(self, processes: int) -> None:
        """Start them, and wait until all have come as far as this process."""
        context = multiprocessing.get_context("spawn")
        threads = max(1, torch.get_num_threads() // processes)
        for rank in range(1, processes):
            ours, theirs = context.Pipe(duplex=False)
            os.environ["LOCAL_RANK"] = str(rank)  # inherited
            process = context.Process(target=_help, args=(theirs, threads, *self._run), daemon=True)
            try:
                process.start()
            finally:
                os.environ["LOCAL_RANK"] = "0"
            theirs.close()
            self._all.append((process, ours))
        # Torch would wait for one that never comes, and cannot be interrupted.
        self.check(None)
        _divide_threads(threads)

    def check(self, seconds: float | None = 5) -> None:
        """Hear what each has to say.

        Args:
            seconds: how long to wait for it; None: for as long as it lives.

        Raises:
            RunError: one of them failed.
        """
        for rank, (_, connection) in enumerate(self._all, start=1):
            try:
                heard = seconds is None or connection.poll(seconds)
                complaint = connection.recv() if heard else ""
            except EOFError:
                complaint = "it has ended"
            if complaint:
                raise RunError(f"process {rank} of {len(self._all) + 1}: {complaint}")

    def join(self) -> None:
        """Wait until they are through."""
        for process, _ in self._all:
            process.join()

    def stop(self) -> None:
        """End those that are still there, whatever they wait for: they write nothing."""
        for process, _ in self._all:
            process.kill()
            process.join()


def _help(rank_zero: Connection, threads: int, helper: Callable[..., Any], *run: Any) -> None:
    """What a helper does, from its start to its end."""
    logging.disable()  # rank 0 says it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # and hears it
    warnings.simplefilter("ignore")
    _divide_threads(threads)
    rank_zero_only.rank = int(os.environ["LOCAL_RANK"])  # type: ignore[attr-defined]
    try:
        helper(*run, lambda processes: rank_zero.send(""))
    except BaseException as error:
        rank_zero.send((str(error).splitlines() or [""])[0] or type(error).__name__)
        sys.exit(1)
    finally:
        _leave()


def _divide_threads(threads: int) -> None:
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)


def _leave() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
