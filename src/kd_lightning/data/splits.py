"""Splitting of validation images off the training images, and the order of evaluation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kd_lightning.errors import InputError


def stratified_split(
    labels: Tensor, fraction: float, seed: int, classes: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Split off validation images, stratified by class.

    Args:
        labels: (N,) int64.
        fraction: fraction of the validation part, in (0, 1).
        seed: seed of the split.
        classes: class names.

    Returns:
        Indices of the training part and of the validation part, each in ascending order.

    Raises:
        InputError: a class has fewer than two images.
    """
    generator = torch.Generator().manual_seed(seed)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label, name in enumerate(classes):
        members = (labels == label).nonzero().flatten()
        if len(members) < 2:
            raise InputError(
                f"class '{name}' has {len(members)} training images; it needs at least 2, "
                "one of them for validation"
            )
        count = min(max(1, math.floor(len(members) * fraction + 0.5)), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return (~held_out).nonzero().flatten(), held_out.nonzero().flatten()


def evaluation_order(images: Tensor, batch_size: int, limit: int | float) -> Tensor:
    """The images of a split (N,) in the order in which they are evaluated.

    It is unchanged, unless Lightning evaluates only the first batches: it is then random, but the
    same for every run, because the images of a folder are ordered by class.

    Args:
        images: image indices (N,), int64.
        batch_size: images per batch.
        limit: Lightning's `limit_val_batches` or `limit_test_batches`, a number or a fraction.
    """
    whole = math.ceil(len(images) / batch_size) if isinstance(limit, int) else 1.0
    if limit >= whole:
        return images
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
