"""The processes that train one student together.

They may have been started by a launcher (torchrun, SLURM); then each goes through the whole run and
only rank 0 writes. Otherwise the process at hand starts them, hands them their work and waits: it
prepares and records, they train. Either way Lightning's own strategies connect them.
"""

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, TypeVar

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from kd_lightning.errors import InputError, RunError

log = logging.getLogger(__name__)

Result = TypeVar("Result")

START = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"

LATER = 5.0
"""Seconds in which a process may say why another one lost its connection."""

# Lightning takes RANK, SLURM_PROCID and their like for the rank of this process, and any but rank 0
# writes nothing. Until processes train together, each is on its own.
rank_zero_only.rank = 0  # type: ignore[attr-defined]


def launched() -> ClusterEnvironment | None:
    """The launcher, torchrun or SLURM, that has started this process and others.

    Raises:
        InputError: it has been told something that Lightning does not support.
    """
    try:
        for kind in (TorchElasticEnvironment, SLURMEnvironment):
            if kind.detect() and (environment := kind()).world_size() > 1:
                return environment
    except RuntimeError as error:
        raise InputError(f"trainer: {error}") from error
    return None


def started_by_a_launcher(processes: int) -> bool:
    """Whether torchrun or SLURM has started this process and others for the same run.

    Args:
        processes: that the run asks for.

    Raises:
        InputError: a launcher has started another number of processes than the run asks for.
    """
    environment = launched() if processes > 1 else None
    if environment is None:
        return False
    if environment.world_size() != processes:
        raise InputError(
            f"trainer.devices and trainer.num_nodes ask for {processes} processes, but "
            f"{environment.world_size()} were started"
        )
    return True


def rank(processes: int) -> int:
    """Of this process among those that a launcher has started; else 0."""
    environment = launched() if started_by_a_launcher(processes) else None
    return environment.global_rank() if environment else 0


def launch(processes: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Do some work in so many processes and return what rank 0 returns.

    Args:
        processes: how many. One, or those that a launcher has started: the work is done here.
        work: a function of a module, since it goes to other processes.
        arguments: its arguments; pickled if they go to other processes.

    Raises:
        RunError: a process other than rank 0 failed; what rank 0 raises is raised here.
    """
    if processes == 1:
        return work(*arguments)
    if started_by_a_launcher(processes):
        try:
            return work(*arguments)
        finally:
            _leave()
    workers = _Workers(processes, work, arguments)
    with workers.signals_forwarded():
        try:
            return workers.result()
        finally:
            workers.stop()


class _Workers:
    """The processes that this one has started."""

    def __init__(self, processes: int, work: Callable[..., Any], arguments: Any) -> None:
        context: Any = multiprocessing.get_context(START)
        if START == "forkserver":  # imports once for all of them; nothing is computed before
            context.set_forkserver_preload(["kd_lightning.engine.trainer", work.__module__])
        threads = max(1, torch.get_num_threads() // processes)
        # What Lightning reads; a scheduler or torchrun may have left values of its own.
        place = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self._all: list[tuple[BaseProcess, Connection]] = []
        for number in range(processes):
            ours, theirs = context.Pipe()
            own = {**place, "LOCAL_RANK": str(number)}
            process = context.Process(
                target=_worker, args=(number, own, theirs, threads, work, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._all.append((process, ours))
        self._asked = False

    def result(self) -> Any:
        """What rank 0 returns; its log records are handled here meanwhile."""
        waiting = {connection: number for number, (_, connection) in enumerate(self._all)}
        result: Any = None
        while waiting:
            for connection in wait(list(waiting)):
                assert isinstance(connection, Connection)
                kind, value = _receive(connection)
                if kind == "log":
                    logging.getLogger(value.name).handle(value)
                elif kind == "done":
                    if waiting.pop(connection) == 0:
                        result = value
                else:
                    raise self._reason({waiting.pop(connection): value}, waiting)
        return result

    def _reason(
        self, failed: dict[int, BaseException], waiting: dict[Connection, int]
    ) -> BaseException:
        """Of all that failed, what the others failed of: not that a connection was lost."""
        deadline = time.monotonic() + LATER
        while waiting and all(_lost(error) for error in failed.values()):
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                kind, value = _receive(connection)
                if kind != "log":
                    number = waiting.pop(connection)
                    if kind == "error":
                        failed[number] = value
        # One that has ended without a word is why the others lost their connection.
        silent = [number for number, error in failed.items() if isinstance(error, EOFError)]
        spoken = [number for number, error in failed.items() if not _lost(error)]
        number = min(spoken or silent or failed)
        error = failed[number]
        if number == 0 and not isinstance(error, EOFError):
            return error
        reason = "it has ended" if isinstance(error, EOFError) else str(error).splitlines()[0]
        return RunError(f"process {number} of {len(self._all)}: {reason or type(error).__name__}")

    def stop(self) -> None:
        """End those that are still there: whatever they wait for, they have nothing to write."""
        for process, connection in self._all:
            process.kill()
            process.join()
            connection.close()

    @contextmanager
    def signals_forwarded(self) -> Iterator[None]:
        """Let rank 0 hear Ctrl-C and SIGTERM, save and stop; a second signal ends all at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def forward(number: int, frame: FrameType | None) -> None:
            if self._asked:
                self.stop()
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._asked = True
            process = self._all[0][0]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

        before = {n: signal.signal(n, forward) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _receive(connection: Connection) -> tuple[str, Any]:
    try:
        return connection.recv()
    except EOFError as error:
        return "error", error


def _lost(error: BaseException) -> bool:
    """Whether an error only says that another process is gone, or that this one is."""
    return isinstance(error, EOFError) or (
        isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
    )


class _Forward(logging.Handler):
    """Sends log records to the process that started this one."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:
            record.exc_text = "".join(traceback.format_exception(*record.exc_info))
        record.msg, record.args, record.exc_info = record.getMessage(), None, None
        self._connection.send(("log", record))


def _worker(
    number: int,
    environment: dict[str, str],
    parent: Connection,
    threads: int,
    work: Callable[..., Any],
    arguments: Any,
) -> None:
    """The life of a process that was started for its share of the work."""
    os.setsid()  # the terminal's Ctrl-C reaches the parent, which passes it on
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).handlers.clear()  # of their own, without a root logger's
    if number == 0:
        logging.getLogger().addHandler(_Forward(parent))
        logging.getLogger().setLevel(logging.INFO)
    else:
        logging.disable()  # rank 0 says it
        warnings.simplefilter("ignore")
    quiet_lightning()
    if not torch.cuda.is_available():
        torch.set_num_threads(threads)
    rank_zero_only.rank = number  # type: ignore[attr-defined]
    try:
        parent.send(("done", work(*arguments)))
    except BaseException as error:
        log.info("failed", exc_info=error)
        parent.send(("error", _portable(error)))
        sys.exit(1)
    finally:
        _leave()


def _portable(error: BaseException) -> BaseException:
    """The error, or one that says the same and can go to another process."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")


def _end_with(parent: Connection) -> None:
    """End this process when the one that started it is gone."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def quiet_lightning() -> None:
    """Leave out what Lightning says about every training whatever its outcome."""
    # TensorBoard writes in a thread. What that fails of, its next caller hears too.
    threading.excepthook = lambda failed: log.info(
        "failed in %s", failed.thread, exc_info=failed.exc_value
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for module in ("seed", "distributed"):
        logging.getLogger(f"lightning.fabric.utilities.{module}").setLevel(logging.WARNING)
    # Workers would only pass indices on: pixels are made where the model is.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning's own use of a torch function, of no concern to whoever runs this.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # Short epochs log every step of theirs that there is.
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # A resumed training finds its own checkpoints.
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    # Epochs without a validation leave the best one unknown; `fitting.fit` validates at the end.
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")


def _leave() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
