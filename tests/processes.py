"""Commands in new processes, as a user starts them.

Importing torch and Lightning takes ten seconds. A server imports them once a session and is forked
for every command; nothing is computed in it. What depends on how Python starts runs in a fresh
interpreter.
"""

import contextlib
import gc
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "kd_lightning.engine.preload", "kd_lightning.cli", "kd_lightning.workflows.student",
        "kd_lightning.workflows.evaluate",
        "kd_lightning.reports.documents", "kd_lightning.reports.summary", "torchvision.datasets",
        "seaborn", "scipy.stats", "scipy.optimize", "torch.distributed.nn.functional",
        "lightning.pytorch.strategies", "tensorboard.compat.tensorflow_stub",
        "fsspec.implementations.chained", "kd_lightning.schedules", "kd_lightning.workflows.cards",
        "tensorboard.plugins.hparams.metadata",
        "torch.utils.serialization.config", "composition",
    ]
)  # fmt: skip


ADDRESS = "KD_TEST_SERVER"
"""Environment variable with the socket of the server that all test processes share."""


def share() -> None:
    """Start the server of the session, before its test processes."""
    forkserver.ensure_running()
    os.environ[ADDRESS] = forkserver._forkserver._forkserver_address


def serve() -> None:
    """Connect to the server, or start one. It also forks the workers of trainings in this process.

    Otherwise, if the first of these comes before the first command, all commands are forked from a
    server without most of the imports.
    """
    if ADDRESS not in os.environ:
        forkserver.ensure_running()
        return
    client: Any = forkserver._forkserver
    client._forkserver_address = os.environ[ADDRESS]
    client._forkserver_alive_fd = os.pipe()[1]  # unused: the server ends with the session
    client.ensure_running = resource_tracker.ensure_running


class Started:
    """A running command, in a fork of the server."""

    def __init__(
        self,
        command: tuple[str, ...],
        cwd: Path,
        env: dict[str, str],
        prepare: Callable[[], None] | None = None,
        terminal: str = "",
    ) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._paths = [Path(terminal or f"{self._folder.name}/{name}") for name in ("out", "err")]
        self._process: Any = SERVER.Process(
            target=_run,
            args=(command, str(cwd), {**os.environ, **env}, prepare, *map(str, self._paths)),
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative if killed by a signal."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Same as `returncode`."""
        return self._process.exitcode

    @property
    def out(self) -> str:
        """The output so far."""
        path = self._paths[0]
        return path.read_text(encoding="utf-8") if path.exists() else ""

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = 240) -> int:
        """Wait for the end; return the exit code."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            raise TimeoutError
        return self._process.exitcode

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for the end; return the output."""
        self.wait(timeout)
        out, err = (path.read_text(encoding="utf-8") for path in self._paths)
        return out, err


def start(
    *command: str,
    cwd: Path = REPOSITORY,
    prepare: Callable[[], None] | None = None,
    terminal: str = "",
    **env: str,
) -> Started:
    """Start a script.

    Args:
        command: its path, then its arguments.
        cwd: the folder that it is run in.
        prepare: called in the process first.
        terminal: path of a terminal for its output, instead of files.
        env: further environment variables.
    """
    return Started(command, cwd, env, prepare, terminal)


def _run(
    command: tuple[str, ...],
    cwd: str,
    env: dict[str, str],
    prepare: Callable[[], None] | None,
    *outputs: str,
) -> None:
    import composition
    import pytest
    from hydra._internal.hydra import Hydra

    from kd_lightning.engine import worker
    from kd_lightning.reports import documents

    gc.freeze()  # a collection would visit, and thereby copy, everything that is imported
    worker.START = "fork"  # cheap; test_gathering.py tests the real start method
    if "pictures=false" in command:  # also those of a grid
        documents.draw = lambda *_: {}
    patch = pytest.MonkeyPatch()
    composition.skip_waits(patch)
    if composition.STORE in env:
        composition.install(patch)
    if not composition.may_choose_mode(command):
        Hydra.get_mode = lambda *_, **__: None
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = os.fdopen(1, "w", encoding=encoding, closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding=encoding, closefd=False, buffering=1)
    sys.argv = list(command)
    if prepare is not None:
        prepare()
    script = Path(cwd) / command[0]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()


def run_fresh(
    *command: str, cwd: Path = REPOSITORY, **env: str
) -> "subprocess.CompletedProcess[str]":
    """Run a Python command line in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def wait_for(pattern: str, root: Path, process: Started, seconds: float = 120) -> None:
    """Wait until a path below `root` exists, while a process runs."""
    deadline = time.monotonic() + seconds
    while not list(root.glob(pattern)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
