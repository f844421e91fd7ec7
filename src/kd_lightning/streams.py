"""Standard streams that never raise: closed streams, broken pipes, full disks, encodings."""

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
    a pipe has exited (``| head``), or if the stream was closed from the start (``>&-``). If it
    cannot be written for another reason, such as a full disk, the process exits with 1 at the end.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    sys.stdin = sys.stdin or io.StringIO()
    sys.stdout, sys.stderr = _robust(sys.stdout), _robust(sys.stderr)
    try:
        yield
    except SystemExit as stop:
        if stop.code or _why_lost() is None:
            raise
    finally:
        lost = _why_lost()
        sys.stderr.flush()
        sys.stdin, sys.stdout, sys.stderr = before
    if lost is not None:
        print(f"error: standard output cannot be written: {lost.strerror}", file=sys.stderr)
        sys.exit(1)


def _why_lost() -> OSError | None:
    sys.stdout.flush()
    lost: OSError | None = getattr(sys.stdout, "lost", None)
    return lost


def _robust(stream: Any) -> Any:
    if stream is None:
        return io.StringIO()
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return _Stream(stream)


class _Stream:
    """A text stream that discards its output once it cannot be written.

    Args:
        stream: the wrapped stream.

    Attributes:
        lost: why output was lost; None if none was, or only for a reader that has gone.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: OSError | None = None

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
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                self.lost = error
            # Redirect the buffered rest too, else Python reports an error at exit.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
