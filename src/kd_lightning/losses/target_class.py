"""Separation of the target class from the others, for losses that treat them differently."""

from collections.abc import Callable

import torch
from torch import Tensor

from kd_lightning.losses.term import TermBatch


def split_target(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits of the target classes (B, 1) and, in order, those of the others (B, C - 1).

    Exact, in contrast to a mask with a large negative number, which fails for a large lead of the
    target class.

    Args:
        logits: (B, C), with at least two classes.
        labels: target classes (B,), int64.
    """
    target = labels[:, None]
    others = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    return logits.gather(1, target), logits.gather(1, others + (others >= target))


def mean_over_labels(losses: Callable[[Tensor], Tensor], batch: TermBatch) -> Tensor:
    """The mean over the batch of a loss with respect to the labels, a scalar.

    For mixed images, the average of the losses with respect to both labels, weighted with their
    shares, as for the cross-entropy (Zhang et al. 2018, "mixup: Beyond Empirical Risk
    Minimization").

    Args:
        losses: labels (B,) to losses (B,).
        batch: labels and, for mixed images, those of the partners, and the shares.
    """
    own = losses(batch.labels)
    if batch.partner_labels is None or batch.ratio is None:
        return own.mean()
    return torch.lerp(losses(batch.partner_labels), own, batch.ratio.to(own.dtype)).mean()
