"""Learning-rate schedules that torch does not have in one piece."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR


def cosine_with_warmup(
    optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.05
) -> LRScheduler:
    """Linear warm-up to the optimizer's learning rate, then half a cosine down to zero.

    Args:
        optimizer: its learning rate is the peak.
        total_steps: optimizer steps of the whole training.
        warmup_fraction: share of the steps that warms up, in [0, 1).
    """
    if not 0 <= warmup_fraction < 1:
        raise ValueError(f"warmup_fraction must be in [0, 1), not {warmup_fraction}")
    warmup = round(total_steps * warmup_fraction)
    decay = CosineAnnealingLR(optimizer, T_max=max(1, total_steps - warmup))
    if not warmup:
        return decay
    rise = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
    return SequentialLR(optimizer, [rise, decay], milestones=[warmup])
