"""The scale of features, for losses that do not depend on it."""

import torch
from torch import Tensor

from kd_lightning.losses.precision import at_least_float32

USUAL = 2.0**10
"""Features are left as they are if their largest magnitude is between 1 / USUAL and USUAL."""


def to_usual_scale(features: Tensor) -> Tensor:
    """Features of any scale times `power_of_two`, at least float32."""
    features = at_least_float32(features)
    return scaled(features, power_of_two(features))


def scaled(features: Tensor, factor: Tensor) -> Tensor:
    """Features times a factor; on the CPU, where reading it needs no synchronisation, not a copy if
    it is 1.
    """
    if factor.device.type == "cpu" and factor == 1:
        return features
    return features * factor


def power_of_two(features: Tensor) -> Tensor:
    """A factor that brings the largest magnitude of features to about 1, so that their squares
    do not overflow and are not negligible compared with an epsilon.

    A scalar without a gradient, of at least float32, on the device. As a power of two it changes no
    digit. It is 1 in the usual range, for zeros, for infinity and NaN, and for float16, whose
    squares are in the range of float32.
    """
    if features.dtype == torch.float16:
        return features.new_ones((), dtype=torch.float32)
    # Read in the order of the memory, which is several times as fast.
    order = sorted(range(features.dim()), key=features.stride, reverse=True)
    smallest, largest = at_least_float32(
        torch.stack(torch.aminmax(features.detach().permute(order).flatten()))
    )
    largest = torch.maximum(-smallest, largest)
    # Without the bits of the mantissa; `frexp` is missing on Apple GPUs.
    integer, mask = (
        (torch.int64, 0x7FF << 52) if largest.dtype == torch.float64 else (torch.int32, 0xFF << 23)
    )
    factor = 1 / (largest.view(integer) & mask).view(largest.dtype)
    unusual = ((factor > 0) & (factor < 1 / USUAL)) | ((factor > USUAL) & (factor < torch.inf))
    return torch.where(unusual, factor, 1.0)
