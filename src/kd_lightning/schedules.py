"""Learning-rate schedules: linear warm-up to the optimizer's learning rate, then decay to zero."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def one_cycle(optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.2) -> LambdaLR:
    """Linear decay: the one-cycle policy of Smith & Topin (2018), without its cycle of momentum.

    Args:
        optimizer: its learning rate is the peak learning rate.
        total_steps: total number of optimizer steps.
        warmup_fraction: fraction of the steps used for warm-up, in [0, 1).
    """
    return _warm_up_and_decay(optimizer, total_steps, warmup_fraction, lambda done: 1 - done)


def cosine(optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.05) -> LambdaLR:
    """Half a cosine (Loshchilov & Hutter 2017, without restarts); arguments as of `one_cycle`."""
    return _warm_up_and_decay(
        optimizer, total_steps, warmup_fraction, lambda done: (1 + math.cos(math.pi * done)) / 2
    )


def _warm_up_and_decay(
    optimizer: Optimizer, total_steps: int, warmup_fraction: float, decay: Callable[[float], float]
) -> LambdaLR:
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must be in [0, 1), not {warmup_fraction}")
    warmup = round(total_steps * warmup_fraction)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return decay(min(1.0, (step - warmup) / max(1, total_steps - warmup)))

    return LambdaLR(optimizer, factor)
