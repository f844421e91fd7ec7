"""The ways a run can end badly, told apart because scripts read the exit code."""

import signal
from typing import Any


class InputError(Exception):
    """What the user asked for cannot be done; found before any training. Exit code 2.

    The message is one sentence: what is wrong, where, and what to do about it.
    """


class RunError(Exception):
    """A run that had begun could not go on. Exit code 1."""


class Stopped(BaseException):
    """The process was asked to end, by Ctrl-C or a signal. Exit code 128 and the signal's number.

    Not an Exception: it ends the grid that the run belongs to as well.

    Args:
        number: the signal's.
        what: was being trained, a run or a teacher.
        place: of the checkpoint that the same command resumes from, as `epoch 3`; None: there is
            none yet.
    """

    def __init__(self, number: int, what: str, place: str | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        saved = f"saved at {place}" if place else "not saved yet"
        then = "resume" if place else "start it again"
        super().__init__(
            f"stopped by {name}: {what} is {saved}; run the same command again to {then}"
        )
        self.exit_code = 128 + number
        self._given = (number, what, place)

    def __reduce__(self) -> tuple[Any, ...]:
        """As it was made, so that it can go to another process."""
        return type(self), self._given
