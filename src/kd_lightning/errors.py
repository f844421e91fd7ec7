"""Exceptions that end a run, one per exit code."""

import signal
from typing import Any


class InputError(Exception):
    """Invalid input, usually detected before training. Exit code 2.

    The message is one sentence: what is wrong, where, and how to fix it.
    """


class RunError(Exception):
    """A run failed after it had started. Exit code 1."""


class Stopped(BaseException):
    """The process was interrupted by Ctrl-C or a signal. Exit code 128 + signal number.

    Not an `Exception`, so that it also ends the grid that the run belongs to.

    Args:
        number: signal number.
        what: what was being trained, a run or a teacher; empty if nothing was.
        place: position of the checkpoint to resume from, e.g. `epoch 3`; None if there is none.
    """

    def __init__(self, number: int, what: str = "", place: str | None = None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        saved = f"saved at {place}" if place else "not saved yet"
        then = "resume" if place else "start it again"
        super().__init__(
            f"stopped by {name}: {what} is {saved}; run the same command again to {then}"
            if what
            else f"stopped by {name}; run the same command again to resume"
        )
        self.exit_code = 128 + number
        self._given = (number, what, place)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by constructor arguments, so that it can be sent to another process."""
        return type(self), self._given
