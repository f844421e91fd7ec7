"""Agreement of the processes of a training on the batch to stop after.

A checkpoint within an epoch is only complete if every process has trained on the same batches, but
a request to stop reaches them at different times. On a request every process replies with the
number of batches that it has begun, and begins no other one until it knows the last batch, one
more than the largest reply. A process in the middle of a batch still finishes it, because all
others have begun that batch, too. Training needs no further communication for this.
"""

import threading
from collections.abc import Callable


class Agreement:
    """One process's part of the agreement.

    Args:
        reply: sends the number of batches that this process has begun.

    Attributes:
        signal: number of the signal that the stop was requested by; None if it was not.
    """

    def __init__(self, reply: Callable[[int], None]) -> None:
        self.signal: int | None = None
        self._reply = reply
        self._begun = 0
        self._last: int | None = None
        self._changed = threading.Condition()

    def request(self, signal: int) -> None:
        """A stop is requested."""
        with self._changed:
            self.signal = signal
            self._reply(self._begun)

    def decide(self, last: int) -> None:
        """The last batch is known, the number of batches up to it."""
        with self._changed:
            self._last = last
            self._changed.notify_all()

    def begin_batch(self) -> None:
        """Count a batch; wait for the decision if a stop is requested."""
        with self._changed:
            self._changed.wait_for(lambda: self.signal is None or self._last is not None)
            self._begun += 1

    @property
    def due(self) -> bool:
        """Whether the last batch has begun."""
        return self._last is not None and self._begun >= self._last


def last_batch(begun: list[int]) -> int:
    """The batch after which all processes stop, from their replies."""
    return max(begun) + 1
