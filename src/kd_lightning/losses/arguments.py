"""Checks of the arguments of terms."""

import math


def positive(name: str, value: float) -> float:
    """The value.

    Raises:
        ValueError: it is not a finite number above 0.
    """
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a number above 0, not {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """The value.

    Raises:
        ValueError: it is not a finite number of at least 0.
    """
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} must be a number of at least 0, not {value}")
    return value
