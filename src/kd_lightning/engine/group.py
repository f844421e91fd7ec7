"""The processes that torchrun or srun has started: rank 0 leads, the others follow.

Rank 0 executes the command. The others wait for its tasks, start a worker for each, and pass on the
worker's messages, so that rank 0 supervises all workers like those that it starts itself. The
connections break as soon as a process or its machine is lost: no process waits for one that has
failed, whatever the communication library of the training does.
"""

import contextlib
import hmac
import multiprocessing
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from kd_lightning.config.launcher import Launcher
from kd_lightning.engine.supervision import handling_signals
from kd_lightning.engine.worker import Task, Worker, check_environment, portable
from kd_lightning.errors import InputError, RunError, Stopped
from kd_lightning.terminal import say

JOIN = 600.0
"""Seconds to wait for the other processes of the launcher."""

LOST = "the connection to the process of rank {rank} is lost"

_joined: "Leader | Follower | None" = None


def join(launcher: Launcher) -> "Leader | Follower":
    """Connect to the other processes of the launcher; once in a process.

    Raises:
        InputError: Lightning does not support how the launcher was called.
        RunError: a process did not connect in time.
    """
    global _joined
    if _joined is None:
        _joined = Leader(launcher) if launcher.rank == 0 else Follower(launcher)
    return _joined


def leader() -> "Leader | None":
    """The leader, if this process is rank 0 of a launcher that it has joined."""
    return _joined if isinstance(_joined, Leader) else None


def end(code: int) -> None:
    """End the other processes, if this one leads any, with an exit code."""
    if (leading := leader()) is not None:
        leading.end(code)


class _RemoteWorker:
    """A worker that a follower has started; its connection is that to the follower."""

    def __init__(self, rank: int, local_rank: int, host: str, connection: Connection) -> None:
        self.rank, self.local_rank, self.host = rank, local_rank, host
        self.connection = connection
        self.place = f" ({host})"
        self.lost = False

    def kill(self) -> None:
        """End the worker at once, and discard its messages."""
        try:
            self.connection.send(("kill", None))
            while self.connection.recv()[0] != "killed":
                pass
        except (OSError, EOFError):
            self.lost = True


class Leader:
    """Rank 0 of a launcher.

    Args:
        launcher: the launcher.

    Attributes:
        address: the address of this process, for the others.
    """

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.address, self._store = _meet(launcher)
        token = secrets.token_hex(16)
        with socket.create_server(("", 0)) as server:
            self._store.set("leader", f"{server.getsockname()[1]} {token}")
            self._followers = self._accept(server, token)
        self._busy, self._over = threading.RLock(), False
        threading.Thread(target=self._watch, daemon=True).start()

    def _accept(self, server: socket.socket, token: str) -> list[_RemoteWorker]:
        found: dict[int, _RemoteWorker] = {}
        deadline = time.monotonic() + JOIN
        while len(found) < self.launcher.world - 1:
            server.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                accepted, _ = server.accept()
            except TimeoutError as error:
                raise _late(self.launcher) from error
            _keep_alive(accepted)
            connection = Connection(accepted.detach())
            with contextlib.suppress(OSError, EOFError):
                # Anyone may connect; only our processes know the token.
                if connection.poll(10) and hmac.compare_digest(
                    connection.recv_bytes(len(token)), token.encode()
                ):
                    rank, local_rank, host = connection.recv()
                    found[rank] = _RemoteWorker(rank, local_rank, host, connection)
        return [found[rank] for rank in sorted(found)]

    @contextmanager
    def busy(self) -> Iterator[None]:
        """While this thread communicates with the followers."""
        with self._busy:
            yield

    def _watch(self) -> None:
        """Stop what this process does alone, such as training a teacher, if a follower is lost or
        has received a signal. Followers send nothing else at that time.
        """
        while not self._over:
            time.sleep(0.5)
            with self._busy, contextlib.suppress(OSError):
                present = [f.connection for f in self._followers if not f.lost]
                if not self._over and wait(present, timeout=0):
                    os.kill(os.getpid(), signal.SIGTERM)
                    return

    def start(self, task: Task) -> list[_RemoteWorker]:
        """Have every follower start a worker."""
        for follower in self._followers:
            self._send(follower, "start", task)
        return self._followers

    def on_every_node(self, work: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """Call a function in one process of every other node; results by host name.

        Raises:
            RunError: a process is lost.
            Exception: raised by the function.
        """
        with self.busy():
            chosen = [f for f in self._followers if f.local_rank == 0]
            for follower in chosen:
                self._send(follower, "call", (work, arguments))
            results, errors = {}, []
            for follower in chosen:
                try:
                    kind, value = follower.connection.recv()
                except (OSError, EOFError) as error:
                    raise RunError(LOST.format(rank=follower.rank)) from error
                if kind == "stop":
                    raise Stopped(value)
                if kind == "error":
                    errors.append((follower.host, value))
                results[follower.host] = value
            for host, failure in errors:
                if isinstance(failure, InputError):
                    raise InputError(f"{failure} (on {host})")
                raise failure
            return results

    def _send(self, follower: _RemoteWorker, kind: str, value: Any) -> None:
        try:
            follower.connection.send((kind, value))
        except OSError as error:
            raise RunError(LOST.format(rank=follower.rank)) from error

    def over(self) -> None:
        """A run is over: `Follower.follow` returns."""
        self._tell_all("over", None)

    def end(self, code: int) -> None:
        """The command is over."""
        self._over = True
        self._tell_all("end", code)

    def _tell_all(self, kind: str, value: Any) -> None:
        with self._busy:
            for follower in self._followers:
                with contextlib.suppress(OSError):
                    follower.connection.send((kind, value))


class Follower:
    """A rank other than 0 of a launcher.

    Args:
        launcher: the launcher.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        address, self._store = _meet(launcher)
        try:
            port, token = self._store.get("leader").decode().split()
        except RuntimeError as error:
            raise _late(launcher) from error
        try:
            connected = socket.create_connection((address, int(port)), timeout=JOIN)
        except OSError as error:
            raise _late(launcher) from error
        connected.settimeout(None)
        _keep_alive(connected)
        self._link = Connection(connected.detach())
        self._link.send_bytes(token.encode())
        self._link.send((launcher.rank, launcher.local_rank, socket.gethostname()))
        self._worker: Worker | None = None
        self._ended = False  # the worker has sent its last message
        self._signals, self._notify = multiprocessing.Pipe(duplex=False)
        self._signalled = False

    def follow(self) -> int | None:
        """Execute the tasks of rank 0 until a run is over.

        Returns:
            The exit code if the command is over, too.
        """
        with self._signals_passed_on():
            try:
                return self._follow()
            except (OSError, EOFError):
                if self._launcher.rank == 1:  # one message is enough
                    say(f"error: {LOST.format(rank=0)}", error=True)
                return 1
            finally:
                self._kill()

    def serve(self) -> int:
        """Execute the tasks of rank 0 until the command is over; return the exit code."""
        while (code := self.follow()) is None:
            pass
        return code

    def _follow(self) -> int | None:
        while True:
            sources = [self._link, self._signals]
            if self._worker is not None and not self._ended:
                sources.append(self._worker.connection)
            for ready in wait(sources):
                if ready is self._link:
                    kind, value = self._link.recv()
                    if kind in ("over", "end"):
                        return value if kind == "end" else None
                    self._obey(kind, value)
                elif ready is self._signals:
                    self._link.send(("stop", self._signals.recv()))
                elif self._worker is not None:
                    self._pass_on(self._worker)

    def _obey(self, kind: str, value: Any) -> None:
        if kind == "start":
            self._worker, self._ended = Worker(self._launcher.rank, {}, value), False
        elif kind == "kill":
            self._kill()
            self._link.send(("killed", None))
        elif kind == "call":
            work, arguments = value
            try:
                self._link.send(("done", work(*arguments)))
            except Exception as error:
                self._link.send(("error", portable(error)))
        elif self._worker is not None and not self._ended:
            with contextlib.suppress(OSError):  # it has ended, which will be passed on
                self._worker.connection.send((kind, value))

    def _pass_on(self, worker: Worker) -> None:
        try:
            message = worker.connection.recv_bytes()
        except (OSError, EOFError):
            self._ended = True
            self._link.send(("error", EOFError("the worker has ended")))
        else:
            self._link.send_bytes(message)

    def _kill(self) -> None:
        if self._worker is not None:
            self._worker.kill()
        self._worker = None

    def _signals_passed_on(self) -> AbstractContextManager[None]:
        def note(number: int, frame: FrameType | None) -> None:
            if self._signalled:
                self._kill()
                sys.exit(128 + number)
            self._signalled = True
            self._notify.send(number)

        return handling_signals(note)


def _meet(launcher: Launcher) -> tuple[str, Store]:
    """The address of rank 0, and the store of the launcher or of rank 0, in which it writes how to
    connect to it.
    """
    environment = check_environment(launcher.name)
    address = environment.main_address
    os.environ["MASTER_ADDR"] = address
    os.environ["MASTER_PORT"] = str(environment.main_port)
    try:
        store, _, _ = next(
            rendezvous("env://", launcher.rank, launcher.world, timeout=timedelta(seconds=JOIN))
        )
    except RuntimeError as error:
        raise _late(launcher) from error
    return address, PrefixStore("kd_lightning", store)


def _late(launcher: Launcher) -> RunError:
    return RunError(
        f"the {launcher.world} processes of {launcher.name} did not connect to each other within "
        f"{JOIN / 60:.0f} minutes (MASTER_ADDR={os.environ.get('MASTER_ADDR')}, "
        f"MASTER_PORT={os.environ.get('MASTER_PORT')}): start all of them, with the same command"
    )


def _keep_alive(connection: socket.socket) -> None:
    """Let the loss of a machine break the connection, within about a minute."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # The last one while data is on the way, which suspends the probes.
    options = {
        "TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000
    }  # fmt: skip
    for option, value in options.items():
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
