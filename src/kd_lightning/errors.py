"""The two ways a run can end badly, told apart because scripts read the exit code."""


class InputError(Exception):
    """What the user asked for cannot be done; found before any training. Exit code 2.

    The message is one sentence: what is wrong, where, and what to do about it.
    """


class RunError(Exception):
    """A run that had begun could not go on. Exit code 1."""
