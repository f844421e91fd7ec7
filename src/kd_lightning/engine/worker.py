"""A training process on this machine: how it is started, and what it tells its parent.

Messages to the parent, tuples of a kind and a value: ``log`` (a log record), ``training`` (whether
a training can be interrupted now), ``stop`` (a signal), ``begun`` (see `engine.agreement`),
``done`` (the result), ``error`` (an exception). Messages to the worker: ``stop`` and ``last``.
"""

import contextlib
import copy
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from kd_lightning.engine.agreement import Agreement
from kd_lightning.engine.memory import explained
from kd_lightning.engine.quiet import quiet_lightning
from kd_lightning.errors import InputError, RunError

log = logging.getLogger(__name__)

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"

# Lightning derives the rank from RANK, SLURM_PROCID etc., and only rank 0 writes. Outside of
# distributed training every process is rank 0.
rank_zero_only.rank = 0  # type: ignore[attr-defined]


class Task(NamedTuple):
    """What the workers of a launch execute.

    Attributes:
        work: a module-level function, so that it can be pickled.
        arguments: its arguments.
        launcher: name of the launcher that started this command in several processes, if any.
        rendezvous: environment variables with the address of the store of the process group.
        threads: threads per worker; None: as they are.
    """

    work: Callable[..., Any]
    arguments: tuple[Any, ...]
    launcher: str | None
    rendezvous: dict[str, str]
    threads: int | None


class Worker:
    """A worker process that was started by this process.

    Args:
        rank: its global rank.
        variables: environment variables of its own.
        task: what it executes.
    """

    def __init__(self, rank: int, variables: dict[str, str], task: Task) -> None:
        context: Any = multiprocessing.get_context(START)
        if START == "forkserver":  # import once for all workers
            context.set_forkserver_preload(["kd_lightning.engine.preload", task.work.__module__])
        self.connection, theirs = context.Pipe()
        variables = {**os.environ, **variables, **task.rendezvous}
        inherited = self.connection if START == "fork" else None
        self.process = context.Process(
            target=_main, args=(rank, variables, theirs, inherited, task), daemon=True
        )
        self.process.start()
        theirs.close()
        self.place = ""

    def kill(self) -> None:
        """End the worker at once: it has nothing left to write."""
        self.process.kill()
        self.process.join()
        self.connection.close()


class _State:
    """What the code that runs in a worker needs to know about it."""

    environment: Callable[[], ClusterEnvironment] = LightningEnvironment
    parent: "_Parent | None" = None
    agreement: Agreement | None = None


def cluster_environment() -> ClusterEnvironment:
    """Lightning's environment of this process: of the launcher in a worker that it started.

    Other processes ignore the variables of a launcher.
    """
    return _State.environment()


def environment_of(launcher: str | None) -> Callable[[], ClusterEnvironment]:
    """Constructor of Lightning's environment for a launcher."""
    if launcher == "torchrun":
        return TorchElasticEnvironment
    if launcher == "srun":
        # This project saves and stops on SIGTERM; the job's script decides about requeuing.
        return lambda: SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment


def check_environment(launcher: str) -> ClusterEnvironment:
    """Lightning's environment for a launcher.

    Raises:
        InputError: Lightning does not support how it was called.
    """
    try:
        return environment_of(launcher)()
    except RuntimeError as error:
        raise InputError(f"{launcher}: {error}") from error


def tell_training(runs: bool) -> Agreement | None:
    """Tell the parent whether a training can be interrupted now; None if this is no worker."""
    if _State.parent is not None:
        _State.parent.send("training", runs)
    return _State.agreement


def ask_parent(number: int) -> None:
    """Ask the parent to stop the training, after a signal."""
    if _State.parent is not None:
        _State.parent.send("stop", number)


class _Parent:
    """The connection to the parent; messages are sent by a thread, also from signal handlers."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send_all, daemon=True)
        self._thread.start()

    def send(self, kind: str, value: Any) -> None:
        """Send a message."""
        self._waiting.put((kind, value))

    def finish(self) -> None:
        """Wait until all messages are sent."""
        self._waiting.put(None)
        self._thread.join()

    def _send_all(self) -> None:
        with contextlib.suppress(OSError):
            while (message := self._waiting.get()) is not None:
                self._connection.send(message)

    def obey(self, agreement: Agreement) -> None:
        """Receive messages; exit when the parent has died."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                kind, value = self._connection.recv()
                (agreement.request if kind == "stop" else agreement.decide)(value)
        os._exit(1)


_PLAIN = vars(logging.makeLogRecord({})).keys()
"""The attributes of every log record."""


class _Forward(logging.Handler):
    """Logging handler that sends records to the parent."""

    def __init__(self, parent: _Parent) -> None:
        super().__init__()
        self._parent = parent

    def emit(self, record: logging.LogRecord) -> None:
        record = copy.copy(record)  # others may handle it, too
        if record.exc_info:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info))
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        for name in vars(record).keys() - _PLAIN:  # of `extra`: it may not be possible to pickle it
            delattr(record, name)
        self._parent.send("log", record)


def _main(
    rank: int,
    variables: dict[str, str],
    connection: Connection,
    inherited: Connection | None,
    task: Task,
) -> None:
    """Entry point of a worker."""
    if inherited is not None:  # the parent's end: the death of the parent must close the connection
        inherited.close()
    os.setsid()  # the terminal's Ctrl-C goes to the parent
    os.environ.clear()
    os.environ.update(variables)
    parent = _Parent(connection)
    agreement = Agreement(lambda begun: parent.send("begun", begun))
    _State.environment, _State.parent = environment_of(task.launcher), parent
    _State.agreement = agreement
    # A scheduler signals all processes of a job.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: ask_parent(number))
    threading.Thread(target=parent.obey, args=(agreement,), daemon=True).start()
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).handlers.clear()  # added when the root logger has no handlers
    if rank == 0:
        logging.getLogger().addHandler(_Forward(parent))
        logging.getLogger().setLevel(logging.INFO)
    else:
        logging.disable()  # rank 0 logs the same
        warnings.simplefilter("ignore")
    quiet_lightning()
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    rank_zero_only.rank = rank  # type: ignore[attr-defined]
    try:
        result = task.work(*task.arguments)
    except BaseException as error:
        log.info("failed", exc_info=error)
        parent.send("error", portable(error))
        parent.finish()
        os._exit(1)  # at once: leaving the process group could wait for the other processes
    parent.send("done", result)
    parent.finish()
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def portable(error: BaseException) -> BaseException:
    """The error, or a `RunError`: if a device has too little memory, or, with the same message, if
    the error cannot be pickled.
    """
    error = explained(error)
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")
