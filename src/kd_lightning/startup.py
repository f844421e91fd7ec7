"""Start and end of a process that imports torch and Lightning: quick, and without lost errors.

Importing them creates half a million objects, which last as long as the process. The garbage
collector would search them again and again, and at the end the interpreter would free them one by
one: a fifth of the time to the first training step, and seconds after the last. And torchmetrics
imports `scipy.signal`, which nothing here uses.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import os
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType
from typing import Any, NoReturn

from kd_lightning.errors import InputError, RunError, Stopped
from kd_lightning.streams import robust_streams

_leaves_memory = False
"""Whether this process will end by `run_process`."""


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Keep the garbage collector away from what is imported: now, and in `run_process` later, too.

    Where the interpreter frees all objects at its end, some libraries would report leaks.
    """
    if "torch" in sys.modules:  # nothing left to save; more than imports may be in memory
        yield
        return
    gc.disable()
    try:
        with _unused("scipy.signal", hamming=None):
            yield
        if _leaves_memory:
            gc.freeze()
    finally:
        gc.enable()


@contextlib.contextmanager
def _unused(name: str, **given: Any) -> Iterator[None]:
    """Do not import a module before something other than the given attributes is taken from it. Its
    package must import its modules on demand, as SciPy does.

    Importing torchmetrics imports `scipy.signal`, a sixth of all imports of a run, only to add
    `hamming`, the old name of a function, for an audio package.
    """
    if name in sys.modules:
        yield
        return

    def imported(attribute: str) -> Any:
        if attribute.startswith("__") and attribute != "__path__":  # asked of every module
            raise AttributeError(attribute)
        if sys.modules.get(name) is placeholder:
            del sys.modules[name]
        return getattr(importlib.import_module(name), attribute)

    placeholder = ModuleType(name)
    vars(placeholder).update(given, __getattr__=imported, __spec__=ModuleSpec(name, None))
    sys.modules[name] = placeholder
    try:
        yield
    finally:
        if sys.modules.get(name) is placeholder:
            del sys.modules[name]


def run_process(main: Callable[[], None]) -> None:
    """Run `main` with robust streams and end the process as the interpreter does, but without
    freeing each object.

    Under a profiler, debugger or test, which go on afterwards, only run `main`.

    Args:
        main: may raise SystemExit. Interruptions by a signal end with a sentence; other exceptions
            are not caught.
    """
    if not _is_program(sys._getframe(1)):
        with robust_streams():
            main()
        return
    global _leaves_memory
    _leaves_memory = True
    try:
        with robust_streams():
            main()
        code = 0
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise
        code = stop.code or 0
    except Stopped as stop:
        print(stop, file=sys.stderr)
        code = stop.exit_code
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        code = 130
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    _flush_all()
    os._exit(code & 0xFF)


def run_script(main: Callable[[], None]) -> None:
    """`run_process` for a script, with errors reported in one sentence.

    Exit code 2 for an `InputError`; 1 for a `RunError`, and for an error of the operating system,
    such as a full disk.
    """

    def reporting() -> None:
        try:
            main()
        except InputError as error:
            _fail(str(error), 2)
        except RunError as error:
            _fail(str(error), 1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}", 1)

    run_process(reporting)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _flush_all() -> None:
    """Flush every open file, and what C libraries have printed."""
    written = io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom
    files = [thing for thing in gc.get_objects() if issubclass(type(thing), written)]
    files += [sys.stdout, sys.stderr]  # frozen in `importing`
    # Text before the bytes that it is written to.
    for file in sorted(files, key=lambda file: not isinstance(file, io.TextIOWrapper)):
        with contextlib.suppress(Exception):  # closed, or its reader has gone
            file.flush()
    with contextlib.suppress(Exception):  # not on Windows
        ctypes.CDLL(None).fflush(None)


def _is_program(frame: FrameType) -> bool:
    """Whether the interpreter itself executes the module of a frame, also by ``python -m``."""
    while frame.f_code.co_name != "<module>" and frame.f_back is not None:
        frame = frame.f_back
    while frame.f_back is not None and frame.f_back.f_globals.get("__name__") == "runpy":
        frame = frame.f_back
    return frame.f_back is None
