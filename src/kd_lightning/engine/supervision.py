"""Supervision of the workers of a launch: their results, errors, and requests to stop."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, Protocol

import torch

from kd_lightning.engine.agreement import last_batch
from kd_lightning.errors import RunError, Stopped

log = logging.getLogger(__name__)

LATER = 5.0
"""Seconds to wait for the original error, after a worker reported a lost connection."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Supervised(Protocol):
    """A worker, started by this process or by another one.

    Attributes:
        connection: connection to the worker; see `engine.worker` for the messages.
        place: where it runs, for messages; empty if in this process's machine.
    """

    connection: Connection
    place: str

    def kill(self) -> None:
        """End the worker at once."""


class Supervision:
    """Waits for workers; if one fails, the others are not waited for.

    Args:
        workers: in the order of their ranks.
    """

    def __init__(self, workers: Sequence[Supervised]) -> None:
        self._workers = workers
        self._signals, self._notify = multiprocessing.Pipe(duplex=False)
        self._signalled = False
        self._asked: int | None = None
        self._training: set[int] = set()
        self._begun: dict[int, int] = {}

    def result(self) -> Any:
        """Wait for all workers and return the result of rank 0; handles its log records.

        Raises:
            RunError: another worker failed; exceptions of rank 0 are raised unchanged.
            Stopped: a signal was received by this process or by a worker.
        """
        waiting = {worker.connection: rank for rank, worker in enumerate(self._workers)}
        result: Any = None
        while waiting:
            for connection in wait([self._signals, *waiting]):
                assert isinstance(connection, Connection)
                if connection is self._signals:
                    self._ask(connection.recv())
                    continue
                kind, value = receive(connection)
                rank = waiting[connection]
                if kind in ("done", "error"):
                    del waiting[connection]
                if kind == "done" and rank == 0:
                    result = value
                elif kind == "error":
                    raise self._reason({rank: value}, waiting)
                else:
                    self._note(kind, value, rank)
        return result

    def _note(self, kind: str, value: Any, rank: int) -> None:
        if kind == "log":
            logging.getLogger(value.name).handle(value)
        elif kind == "training":
            (self._training.add if value else self._training.discard)(rank)
            if self._asked is not None and not value:
                self._end(self._asked)
        elif kind == "stop":
            self._ask(value)
        elif kind == "begun":
            self._begun[rank] = value
            if len(self._begun) == len(self._workers):
                self._tell("last", last_batch([*self._begun.values()]))

    def _ask(self, number: int) -> None:
        """Ask the workers to save and stop."""
        if self._asked is not None:
            return
        self._asked = number
        if len(self._training) < len(self._workers):
            self._end(number)
        self._tell("stop", number)

    def _tell(self, kind: str, value: int) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):  # it has ended, which `result` will see
                worker.connection.send((kind, value))

    def _end(self, number: int) -> None:
        """End at once, before or after a training, like a single process."""
        raise Stopped(number)

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
                kind, value = receive(connection)
                if kind in ("done", "error"):
                    rank = waiting.pop(connection)
                    if kind == "error":
                        failed[rank] = value
        # A worker that died without an error is the cause of the others' lost connections.
        silent = [rank for rank, error in failed.items() if isinstance(error, EOFError)]
        spoken = [rank for rank, error in failed.items() if not _lost(error)]
        rank = min(spoken or silent or failed)
        error = failed[rank]
        if isinstance(error, Stopped) or (rank == 0 and not isinstance(error, EOFError)):
            return error
        reason = "it exited unexpectedly"
        if not isinstance(error, EOFError):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
        place = self._workers[rank].place
        return RunError(f"worker {rank} of {len(self._workers)}{place}: {reason}")

    def stop(self) -> None:
        """Kill the remaining workers: they have nothing left to write."""
        for worker in self._workers:
            worker.kill()

    def signals_handled(self) -> AbstractContextManager[None]:
        """Stop the training on Ctrl-C and SIGTERM; a second one ends all processes at once."""

        def note(number: int, frame: FrameType | None) -> None:
            if self._signalled:
                self.stop()
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._signalled = True
            self._notify.send(number)

        return handling_signals(note)


@contextmanager
def handling_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle `SIGNALS` in the block; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def receive(connection: Connection) -> tuple[str, Any]:
    """Receive a message; the loss of the connection is one, of the kind ``error``."""
    try:
        message: tuple[str, Any] = connection.recv()
        return message
    except (EOFError, OSError) as error:
        return "error", EOFError(str(error))


def _lost(error: BaseException) -> bool:
    """Whether an error only reports the loss of a process."""
    # Errors of a GPU are those of its own process: losses of others are reported otherwise.
    of_this_process = isinstance(error, NotImplementedError | torch.AcceleratorError)
    return isinstance(error, EOFError) or (isinstance(error, RuntimeError) and not of_this_process)
