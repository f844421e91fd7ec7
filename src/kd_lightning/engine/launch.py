"""Launching of distributed training.

Under a launcher (torchrun, SLURM) every process executes the whole run, and only rank 0 writes.
Otherwise the main process prepares the run, starts one worker per device, waits for them and
records the results. In both cases Lightning's strategies do the rendezvous.
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
"""Seconds to wait for the original error, after a worker reported a lost connection."""

# Lightning derives the rank from RANK, SLURM_PROCID etc., and only rank 0 writes. Outside of
# distributed training every process is rank 0.
rank_zero_only.rank = 0  # type: ignore[attr-defined]


def launched() -> ClusterEnvironment | None:
    """The environment of a launcher (torchrun or SLURM) with several processes, if any.

    Raises:
        InputError: the launcher's configuration is not supported by Lightning.
    """
    try:
        for kind in (TorchElasticEnvironment, SLURMEnvironment):
            if kind.detect() and (environment := kind()).world_size() > 1:
                return environment
    except RuntimeError as error:
        raise InputError(f"trainer: {error}") from error
    return None


def started_by_a_launcher(processes: int) -> bool:
    """Whether torchrun or SLURM has started the processes of this run.

    Args:
        processes: number of processes that the run requires.

    Raises:
        InputError: the launcher has started a different number of processes.
    """
    environment = launched() if processes > 1 else None
    if environment is None:
        return False
    if environment.world_size() != processes:
        raise InputError(
            f"trainer.devices and trainer.num_nodes require {processes} processes, but "
            f"{environment.world_size()} were started"
        )
    return True


def rank(processes: int) -> int:
    """Global rank of this process under a launcher; otherwise 0."""
    environment = launched() if started_by_a_launcher(processes) else None
    return environment.global_rank() if environment else 0


def launch(processes: int, work: Callable[..., Result], *arguments: Any) -> Result:
    """Run a function in several processes and return the result of rank 0.

    Args:
        processes: number of processes. With one, or under a launcher, runs in this process.
        work: a module-level function, so that it can be pickled.
        arguments: its arguments; pickled if workers are started.

    Raises:
        RunError: a worker other than rank 0 failed; exceptions of rank 0 are raised unchanged.
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
    """The worker processes started by the main process."""

    def __init__(self, processes: int, work: Callable[..., Any], arguments: Any) -> None:
        context: Any = multiprocessing.get_context(START)
        if START == "forkserver":  # import once for all workers
            context.set_forkserver_preload(["kd_lightning.engine.trainer", work.__module__])
        threads = max(1, torch.get_num_threads() // processes)
        # Override variables that a scheduler or torchrun may have set.
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
        """Wait for all workers and return the result of rank 0; handles its log records."""
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
        """The original error among those of all workers, rather than a lost connection."""
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
        # A worker that died without an error is the cause of the others' lost connections.
        silent = [number for number, error in failed.items() if isinstance(error, EOFError)]
        spoken = [number for number, error in failed.items() if not _lost(error)]
        number = min(spoken or silent or failed)
        error = failed[number]
        if number == 0 and not isinstance(error, EOFError):
            return error
        reason = (
            "it exited unexpectedly" if isinstance(error, EOFError) else str(error).splitlines()[0]
        )
        return RunError(f"worker {number} of {len(self._all)}: {reason or type(error).__name__}")

    def stop(self) -> None:
        """Kill the remaining workers: they have nothing left to write."""
        for process, connection in self._all:
            process.kill()
            process.join()
            connection.close()

    @contextmanager
    def signals_forwarded(self) -> Iterator[None]:
        """Forward Ctrl-C and SIGTERM to rank 0, which saves and stops; a second one kills all."""
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
    """Whether an error only reports the loss of a process."""
    return isinstance(error, EOFError) or (
        isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
    )


class _Forward(logging.Handler):
    """Logging handler that sends records to the main process."""

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
    """Entry point of a worker."""
    os.setsid()  # the terminal's Ctrl-C goes to the parent, which forwards it
    os.environ.update(environment)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
        logging.getLogger(name).handlers.clear()  # added when the root logger has no handlers
    if number == 0:
        logging.getLogger().addHandler(_Forward(parent))
        logging.getLogger().setLevel(logging.INFO)
    else:
        logging.disable()  # rank 0 logs the same
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
    """The error, or a `RunError` with the same message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RunError(f"{type(error).__name__}: {error}")


def _end_with(parent: Connection) -> None:
    """Exit when the main process has died."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def quiet_lightning() -> None:
    """Suppress messages of Lightning that are the same in every training."""
    threading.excepthook = _report_thread
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for module in ("seed", "distributed"):
        logging.getLogger(f"lightning.fabric.utilities.{module}").setLevel(logging.WARNING)
    # Data-loader workers are useless here: pixels are rendered on the model's device.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Caused by Lightning itself.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # The last step of every epoch is logged, however short the epoch.
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # A resumed training has existing checkpoints.
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    # Epochs without validation; `fitting.fit` validates at the end.
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread, and raises its errors in the next call too."""
    if type(failed.thread).__module__.startswith("tensorboard"):
        log.info("failed in %s", failed.thread, exc_info=failed.exc_value)
    else:
        threading.__excepthook__(failed)


def _leave() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
