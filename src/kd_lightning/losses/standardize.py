"""Logit standardization: Sun, Ren, Li, Wang & Cao (2024), "Logit Standardization in Knowledge
Distillation", section 4, algorithm 1.
"""

import torch
from torch import Tensor

from kd_lightning.losses.precision import at_least_float32

EPSILON = 1e-7  # the authors' value


def standardize(logits: Tensor) -> Tensor:
    """Logits with a mean of 0 and a standard deviation of 1 for each image, at least float32.

    The student then matches the order and the ratios of the teacher's logits, but not their range.
    As in the authors' code, the variance is divided by C - 1, and 1e-7 is added to the deviation.
    With two classes every result is +-0.7071, whatever the logits are.

    If all logits of an image are equal, e.g. those of a last layer that is initialized with zeros,
    their deviation is at most a rounding error. The result is then 0 as in the authors' code, but
    also its gradient, which would be of the order of 1e7.

    Args:
        logits: (B, C), with at least two classes.
    """
    values = at_least_float32(logits)
    deviation = values.std(dim=1, keepdim=True)
    scaled = (values - values.mean(dim=1, keepdim=True)) / (deviation + EPSILON)
    rounding = 8 * torch.finfo(values.dtype).eps * values.detach().abs().amax(dim=1, keepdim=True)
    return torch.where(deviation > rounding, scaled, torch.zeros_like(scaled))
