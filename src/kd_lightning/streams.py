"""Standard streams that never raise: closed streams, broken pipes, non-Unicode encodings."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def robust_streams() -> Iterator[None]:
    """Context manager within which printing never raises.

    Characters outside the terminal's encoding are escaped. Output is discarded once the reader of
    a pipe has exited (``| head``), or if the stream was closed from the start (``>&-``).
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
    """A text stream that discards its output once its pipe is broken.

    Args:
        stream: the wrapped stream.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write to the wrapped stream."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush the wrapped stream."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except BrokenPipeError:
            # Redirect the buffered rest too, else Python reports an error at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
