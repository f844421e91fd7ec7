"""The ways a run can end badly, told apart because scripts read the exit code."""

import signal


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
        what: was trained, a run or a teacher.
        place: after which the same command will go on, as `epoch 3`; None: at the beginning.
    """

    def __init__(self, number: int, what: str, place: str | None) -> None:
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        then = f"goes on with {what} after {place}" if place else f"begins {what} anew"
        super().__init__(f"stopped by {name}; the same command {then}")
        self.exit_code = 128 + number
