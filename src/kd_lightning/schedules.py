"""Learning-rate schedules, for any number of steps.

`one_cycle` and `cosine` begin with a linear warm-up to the optimizer's learning rate, and decay to
zero.
"""

import math
from collections.abc import Callable, Sequence

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


def multi_step(
    optimizer: Optimizer, total_steps: int, milestones: Sequence[float], gamma: float = 0.1
) -> LambdaLR:
    """The optimizer's learning rate, multiplied by a factor at each milestone.

    Args:
        optimizer: its learning rate is that of the beginning.
        total_steps: total number of optimizer steps.
        milestones: fractions of the steps, in (0, 1); 0.625 is epoch 150 of 240.
        gamma: the factor, above 0.
    """
    if not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(
            f"milestones must be fractions of the training, above 0 and below 1, not {milestones}"
        )
    if not gamma > 0:
        raise ValueError(f"gamma must be above 0, not {gamma}")
    ends = [round(total_steps * milestone) for milestone in milestones]
    return LambdaLR(optimizer, lambda step: gamma ** sum(step >= end for end in ends))


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
