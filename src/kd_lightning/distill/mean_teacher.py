"""The moving average of the student as its teacher: Tarvainen & Valpola (2017), "Mean teachers are
better role models", section 2.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_lightning.data.views import Normalization
from kd_lightning.distill.teacher import FrozenTeacher


class MeanTeacher(FrozenTeacher):
    """A teacher whose weights are an exponential moving average of the student's.

    Its outputs change in every step and are never cached. `FollowStudent` updates it.

    Args:
        model: a network of the student's architecture.
        given: the normalisation of the images.
        decay: weight of the previous average in each optimizer step, in (0, 1).
    """

    def __init__(self, model: nn.Module, given: Normalization, decay: float) -> None:
        super().__init__(model, given, given)
        self.decay = decay

    def fingerprint(self) -> None:
        """None: the weights change."""

    def why_not_stored(self, images: Tensor) -> str:
        """Always given: the weights change."""
        return "it follows the student"

    @torch.no_grad()
    def follow(self, student: nn.Module, steps: int) -> None:
        """Update the average after an optimizer step.

        First the mean over all steps so far, and the moving average once its window is shorter than
        that, as in the authors' code, whose mean also contains the initial weights. After the first
        step these are the student's weights.

        Args:
            student: the network in training.
            steps: number of optimizer steps so far, from 1.
        """
        share = max(1 / steps, 1 - self.decay)
        weights = _weights(student)
        for name, mean in _weights(self.model).items():
            if mean.is_floating_point():
                mean.lerp_(weights[name].to(mean), share)
            else:
                mean.copy_(weights[name])

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Replace the average."""
        self.model.load_state_dict(weights)

    def _choose(self, images: Tensor, place: object) -> nn.Module:
        """The network itself: an optimised copy would not follow."""
        return self.model.to(images.device)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; shared ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
