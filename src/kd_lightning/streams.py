"""Standard output that cannot fail a run: closed, of a reader that has left, or not in Unicode."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def robust_streams() -> Iterator[None]:
    """Within it, printing never raises.

    Characters that the terminal cannot show are escaped. What is printed after the reader
    of a pipe has left (``| head``) is dropped, and so is everything if a stream was closed from the
    start (``>&-``).
    """
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or io.StringIO()
    sys.stdout, sys.stderr = _robust(sys.stdout), _robust(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before


def _robust(stream: Any) -> Any:
    if stream is None:
        return io.StringIO()
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return _Stream(stream)


class _Stream:
    """A text stream that goes to nowhere once its pipe is broken.

    Args:
        stream: the one that is written to.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As of the stream."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As of the stream."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BrokenPipeError:
            # What is buffered goes there too, else Python complains when it exits.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
