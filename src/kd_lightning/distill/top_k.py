"""Teacher logits of many classes, reduced to the k largest and four statistics of the rest.

A dense row of 1,000 classes takes 2,008 bytes in float16, a reduced one with k = 10 takes 76.

The probability of the k classes, and of the rest as a whole, is that of the dense logits at the
temperatures 1, 2 and 4, and is interpolated between and beyond these. Within the rest, the
probability is spread evenly: what the teacher says about unlikely classes is lost. For skewed
Gaussian logits of 1,000 classes and a student far from the teacher, the gradient of the KL
divergence has a cosine of 0.998 with the exact one at T = 1, 0.99 at T = 2 and 0.87 at T = 4; for
one whose logits differ by 0.5 from the teacher's, 0.97, 0.73 and 0.36 (`test_top_k.py`). For higher
temperatures use dense rows. In an ensemble the members are reduced one by one, before they are
averaged.
"""

import math

import torch
from torch import Tensor

DENSE_CLASSES = 128
"""Largest number of classes for which all logits are stored by default."""

DEFAULT_K = 10
TEMPERATURES = (1.0, 2.0, 4.0, math.inf)
LOWEST = -60_000.0  # the smallest logit of the rest, representable in float16
_BASE = 256  # class numbers are stored as two digits, exact in every storage dtype


def chosen_k(setting: int | str | None, classes: int) -> int | None:
    """The number of logits to store; None: all.

    Args:
        setting: ``auto``, None or a number.
        classes: number of classes.
    """
    if setting == "auto":
        setting = DEFAULT_K if classes > DENSE_CLASSES else None
    return int(setting) if setting is not None and int(setting) < classes else None


def reduce(logits: Tensor, k: int) -> Tensor:
    """Reduce logits (B, C) to rows (B, 3 k + 4), float32.

    A row consists of the k largest logits, their classes as two digits to base 256, and the level
    of the rest at each of `TEMPERATURES`: the value that, for all of the rest, gives it the same
    probability at this temperature. At infinity it is the mean.

    Args:
        logits: (B, C), with C at most 65,536.
        k: less than C.
    """
    values, classes = logits.float().topk(k, dim=1)
    others = _without(logits.float(), classes).clamp(min=LOWEST)
    count = math.log(others.shape[1])
    levels = [
        t * ((others / t).logsumexp(dim=1, keepdim=True) - count) if math.isfinite(t)
        else others.mean(dim=1, keepdim=True)
        for t in TEMPERATURES
    ]  # fmt: skip
    digits = classes.div(_BASE, rounding_mode="floor").float(), (classes % _BASE).float()
    return torch.cat([values, *digits, *levels], dim=1)


def _without(values: Tensor, classes: Tensor) -> Tensor:
    """The values (B, C) of all but some classes (B, k), in their order: (B, C - k).

    By places rather than by a mask, for which the host would wait for the device.
    """
    left = values.shape[1] - classes.shape[1]
    rest = torch.ones_like(values, dtype=torch.bool).scatter_(1, classes, False)
    place = torch.where(rest, rest.cumsum(dim=1) - 1, left)  # the last column is dropped
    found = values.new_empty(len(values), left + 1).scatter_(1, place, values)
    return found[:, :left].contiguous()


def restore(rows: Tensor, classes: int, temperature: float) -> Tensor:
    """Logits (B, C), float32, from reduced rows, for use at a temperature.

    The level of the rest is interpolated linearly in 1 / T, so that it lies between two stored
    ones; below T = 1 it is extrapolated, up to the smallest of the k logits.

    Args:
        rows: from `reduce`, (B, 3 k + 4).
        classes: C.
        temperature: T, positive.
    """
    k = (rows.shape[1] - len(TEMPERATURES)) // 3
    values, high, low, levels = rows.float().split([k, k, k, len(TEMPERATURES)], dim=1)
    inverse, known = 1 / temperature, [1 / t for t in TEMPERATURES]
    place = next(n for n in range(len(known) - 1) if inverse >= known[n + 1])
    share = (known[place] - inverse) / (known[place] - known[place + 1])
    level = levels[:, place] + share * (levels[:, place + 1] - levels[:, place])
    level = torch.minimum(level, values[:, -1])
    index = (high * _BASE + low).long().clamp(0, classes - 1)
    return level[:, None].repeat(1, classes).scatter_(1, index, values)
