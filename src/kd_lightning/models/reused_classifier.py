"""Students with the classifier of their teacher: Chen et al. (2022), "Knowledge Distillation with
the Reused Teacher Classifier", section 3.2.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from kd_lightning.models.pooling import pool

POOLING: dict[str, Callable[[Tensor, int], Tensor]] = {
    "average": F.adaptive_avg_pool2d,
    "max": F.adaptive_max_pool2d,
}


class ReusedClassifier(nn.Module):
    """A student's feature extractor, a projector to the teacher's feature map, and its classifier.

    The projector is part of the student, as in the paper. Its convolutions have, in this order,
    1x1, 3x3 and 1x1 kernels, and half of the teacher's channels between them.

    Args:
        encoder: a network with a method `forward_features`, as those of this package and of timm;
            its own classifier is removed.
        channels: channels of the teacher's last feature map.
        size: height and width of that map; a larger one of the encoder is pooled to it.
        num_classes: number of classes.
        pooling: of the feature map before the classifier, as in the teacher: ``average`` or
            ``max``.

    Attributes:
        classifier: frozen; `losses.SimKD` copies the teacher's weights into it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        channels: int,
        size: int,
        num_classes: int = 10,
        pooling: str = "average",
    ) -> None:
        super().__init__()
        if pooling not in POOLING:
            raise ValueError(f"pooling must be one of {', '.join(POOLING)}, not {pooling}")
        if not hasattr(encoder, "forward_features"):
            raise ValueError(
                f"the student {type(encoder).__name__} has no method forward_features, which "
                "models of kd_lightning and of timm have"
            )
        self.encoder = _without_classifier(encoder)
        self.size, self.pooling = size, pooling
        width = max(1, channels // 2)
        self.projector = nn.Sequential(
            nn.LazyConv2d(width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(channels, num_classes).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to logits (B, num_classes)."""
        x: Tensor = self.encoder.forward_features(images)  # type: ignore[operator]
        if x.shape[2] > self.size:
            x = pool(x, (self.size, self.size))
        x = self.projector(x)
        return self.classifier(POOLING[self.pooling](x, 1).flatten(1))


def _without_classifier(encoder: nn.Module) -> nn.Module:
    """The network without the parameters that `forward_features` does not use.

    Those are after the last stage: children called classifier, linear, fc or head.
    """
    for name in ("classifier", "linear", "fc", "head"):
        if isinstance(getattr(encoder, name, None), nn.Module):
            setattr(encoder, name, nn.Identity())
    return encoder
