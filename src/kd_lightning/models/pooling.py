"""Average pooling of feature maps to a given size."""

import torch.nn.functional as F
from torch import Tensor


def pool(feature_map: Tensor, size: tuple[int, int]) -> Tensor:
    """Average-pool a map (B, C, H, W) to (B, C, *size); unchanged if it has that size."""
    height, width = feature_map.shape[2:]
    if (height, width) == size:
        return feature_map
    if height % size[0] == 0 and width % size[1] == 0:
        # The same values, and on CUDA, unlike adaptive pooling, a deterministic gradient.
        return F.avg_pool2d(feature_map, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(feature_map, size)
