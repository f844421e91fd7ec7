"""The precision in which losses are computed."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or unchanged if they are float64."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
