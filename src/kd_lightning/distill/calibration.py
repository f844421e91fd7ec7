"""Quality of predicted probabilities, and temperature scaling.

Guo et al. (2017), "On Calibration of Modern Neural Networks".
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

BINS = 15
"""Number of equal-width bins of confidence, as in Guo et al."""

SMALLEST, LARGEST = 0.1, 10.0
"""Bounds of a fitted temperature. If every validation image is classified correctly, the optimum
is 0."""

MOST_VALUES = 2**25
"""Maximum number of logits kept by `RecordedLogits` in each process: 134 MB."""

_ROWS = 4096


class Scores(NamedTuple):
    """Scores of predicted probabilities; see `docs/quality.md`.

    Attributes:
        nll: mean negative log-likelihood of the true class, in nats.
        brier: mean over images of the sum over classes of (p - y)^2, in [0, 2].
        bins: (BINS, 3): number of images, sum of confidences, and number of correct predictions,
            by confidence in ((m - 1) / BINS, m / BINS].
    """

    nll: Tensor
    brier: Tensor
    bins: Tensor

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean over images of |accuracy - confidence| of the
        image's bin (Guo et al., equation 3); NaN without images.
        """
        images, confidence, correct = self.bins.double().unbind(1)
        return float((correct - confidence).abs().sum() / images.sum())


class ProbabilityScores(Metric):
    """Computes `Scores` from logits, over all batches and processes.

    Args:
        temperature: divides the logits.
    """

    full_state_update = False
    nll: Tensor
    brier: Tensor
    bins: Tensor

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.add_state("nll", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("brier", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("bins", torch.zeros(BINS, 3), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch of logits (B, C) with labels (B,)."""
        scaled = logits.float() / self.temperature
        probabilities = scaled.softmax(dim=1)
        self.nll += F.cross_entropy(scaled, labels, reduction="sum")
        confidence, predicted = probabilities.max(dim=1)
        # Expanded, so that there is no second matrix (B, C): sum p^2 - 2 p_y + 1.
        true = probabilities.gather(1, labels.unsqueeze(1)).squeeze(1)
        self.brier += (probabilities.square().sum(dim=1) - 2 * true + 1).sum()
        place = F.one_hot((confidence * BINS).ceil().long().clamp(1, BINS) - 1, BINS)
        columns = torch.stack(
            [torch.ones_like(confidence), confidence, (predicted == labels).float()], dim=1
        )
        # Not a matrix product, which may be computed in lower precision.
        self.bins += (place.unsqueeze(2) * columns.unsqueeze(1)).sum(dim=0)

    def compute(self) -> Scores:
        """The scores of all images."""
        images = self.bins[:, 0].sum()
        return Scores(self.nll / images, self.brier / images, self.bins)


class RecordedLogits(Metric):
    """Keeps the logits (N, C) and labels (N,) of a pass, of all processes.

    At most `MOST_VALUES` logits in each process: of more images, every second, fourth, ... is kept,
    because images may be ordered by class.
    """

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("logits", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")
        self._images, self._values, self._step = 0, 0, 1

    def update(self, logits: Tensor, labels: Tensor, counts: bool = True) -> None:
        """Add a batch.

        Args:
            logits: (B, C).
            labels: (B,).
            counts: whether it is part of the pass. If not, only its shape is kept: every process
                needs something to exchange.
        """
        kept = slice(-self._images % self._step, None, self._step) if counts else slice(0)
        self._images += len(labels) if counts else 0
        self.logits.append(logits[kept].detach().float())
        self.labels.append(labels[kept])
        self._values += logits[kept].numel()
        while self._values > max(MOST_VALUES, logits.shape[1]):
            self.logits = [torch.cat(self.logits)[::2].clone()]
            self.labels = [torch.cat(self.labels)[::2].clone()]
            self._values, self._step = self.logits[0].numel(), 2 * self._step

    def reset(self) -> None:
        """Forget the pass."""
        super().reset()
        self._images, self._values, self._step = 0, 0, 1

    def compute(self) -> tuple[Tensor, Tensor]:
        """Logits (N, C), float32, and labels (N,)."""
        # One tensor after the synchronisation of processes, a list otherwise.
        return _whole(self.logits), _whole(self.labels)


def _whole(parts: list[Tensor] | Tensor) -> Tensor:
    return parts if isinstance(parts, Tensor) else torch.cat(parts)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T that minimises the negative log-likelihood of softmax(logits / T).

    The likelihood is concave in 1 / T, so its only maximum is the root of its derivative, which is
    found by bracketing, in float64. Guo et al., section 4.2.

    Args:
        logits: (N, C), of images that were not trained on.
        labels: (N,).

    Returns:
        T in [`SMALLEST`, `LARGEST`]; the nearer bound if the optimum is outside.
    """
    # torchmetrics removes the dimension of a single label.
    logits, labels = logits.detach().cpu(), labels.cpu().reshape(-1)

    def slope(inverse: float) -> float:
        """Derivative of the summed negative log-likelihood with respect to 1 / T."""
        total = 0.0
        for part, true in _chunks(logits, labels):
            p = (part * inverse).softmax(dim=1)
            expected = torch.where(p > 0, p * part, 0).sum(dim=1)  # 0 * -inf is 0
            total += float((expected - part.gather(1, true.unsqueeze(1)).squeeze(1)).sum())
        return total

    low, high = 1 / LARGEST, 1 / SMALLEST
    if slope(low) >= 0:
        return LARGEST
    if slope(high) <= 0:
        return SMALLEST
    from scipy.optimize import brentq  # slow to import, and not needed before the end of a run

    return float(1 / brentq(slope, low, high, xtol=1e-10))


def _chunks(logits: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for part, true in zip(logits.split(_ROWS), labels.split(_ROWS), strict=True):
        yield part.double(), true
