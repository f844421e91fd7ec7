"""Similarity of the representations of two networks: linear CKA.

Kornblith et al. (2019), "Similarity of Neural Network Representations Revisited", section 3.
"""

import torch
from torch import Tensor

_COLUMNS = 8192  # converted to float64 at a time


def centered_gram(features: Tensor) -> Tensor:
    """Inner products of all pairs of images, of features centred over the images.

    Args:
        features: (N, ...), flattened to (N, P).

    Returns:
        (N, N), float64; its rows and columns sum to 0.
    """
    flat = features.flatten(1)
    gram = flat.new_zeros(len(flat), len(flat), dtype=torch.float64)
    for part in flat.split(_COLUMNS, dim=1):
        columns = part.double()
        columns = columns - columns.mean(dim=0)
        gram += columns @ columns.T
    return gram


def cka(gram: Tensor, other: Tensor) -> float:
    """Linear CKA from two results of `centered_gram`, in [0, 1]; NaN if one is constant.

    <K, L> / (||K|| ||L||), which equals ||Y'X||^2 / (||X'X|| ||Y'Y||) of the centred features X, Y
    (Frobenius norms; equation 3 with linear kernels). Invariant to orthogonal maps and isotropic
    scaling of either features. It is the biased estimate: with fewer images than features,
    unrelated representations are well above 0.
    """
    return float((gram * other).sum() / (gram.norm() * other.norm()))
