"""GPUs for the runs of a grid: concurrent runs take them in turn."""

import contextlib
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from kd_lightning.config import hardware
from kd_lightning.config.nodes import Node


@contextmanager
def card_in_turn(folder: Path, trainer: Node) -> Iterator[int | None]:
    """Use the GPU that the fewest concurrent runs of a grid use, until the block ends.

    The runs may be in any process of this machine: workers of a launcher, or several commands. Each
    holds a file lock, which the operating system releases if the process dies.

    Args:
        folder: folder of the locks, the same for all runs.
        trainer: the trainer section; a run that chooses its GPUs itself keeps them.

    Yields:
        The number of the GPU; None if there is no choice.
    """
    on_gpu = hardware.device_type(trainer["accelerator"]) == "cuda"
    number = torch.cuda.device_count() if on_gpu else 0
    if trainer["devices"] != 1 or number < 2:
        yield None
        return
    lock, hardware.chosen_card = _claim(folder, number)
    try:
        yield hardware.chosen_card
    finally:
        hardware.chosen_card = None
        lock.release()


def _claim(folder: Path, number: int) -> tuple[FileLock, int]:
    folder.mkdir(parents=True, exist_ok=True)
    turn = 0
    while True:
        for card in range(number):
            lock = FileLock(folder / f".gpu-{socket.gethostname()}-{card}-{turn}.lock")
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=0)
                return lock, card
        turn += 1
