"""Quick start and end of a process that imports torch and Lightning.

Their half a million objects last as long as the process. The garbage collector would search them
again and again, and at its end the interpreter would free them one by one: a fifth of the time to
the first training step, and seconds after the last.
"""

import atexit
import contextlib
import gc
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Keep the garbage collector away from what is imported, now and later."""
    if "torch" in sys.modules:  # nothing left to save; more than imports may be in memory
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def run_process(main: Callable[[], None]) -> NoReturn:
    """Run `main` and end the process as the interpreter does, but without freeing each object.

    Args:
        main: may raise SystemExit; other exceptions are not caught.
    """
    try:
        main()
        code = 0
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            raise
        code = stop.code or 0
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or its reader has gone
            stream.flush()
    os._exit(code)
