"""The frozen teacher: an inference-only network with deterministic outputs."""

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kd_lightning.data.checked_views import CHECKED_IMAGES
from kd_lightning.data.views import Normalization
from kd_lightning.models.features import (
    FeatureReader,
    LayerShapes,
    Output,
    count_parameters,
    layer_shapes,
)
from kd_lightning.models.folding import fold_batchnorm, has_hooks
from kd_lightning.models.preparing import resize, to_memory_format
from kd_lightning.models.trial import copied, no_gradients, stand_in
from kd_lightning.storage.weights import weights_sha256

TOLERANCE = 1e-3
"""Largest difference between two equivalent float32 outputs, due to rounding, relative to the
largest value."""


class _Place(NamedTuple):
    """Device, memory format and autocast dtype of the teacher; None if autocast is off."""

    device: torch.device
    memory_format: torch.memory_format
    dtype: torch.dtype | None


class Teacher(Protocol):
    """Interface of a teacher for the DistillationModule. It is never a submodule."""

    def shapes(self, image_size: int) -> LayerShapes:
        """Layer shapes for images of this height and width, in pixels."""
        ...

    def read(
        self, layers: Collection[str], logits: bool = True, num_classes: int | None = None
    ) -> None:
        """Select the outputs of `answer`."""
        ...

    def prepare(
        self, device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype | None
    ) -> None:
        """Set device and precision; `dtype` is the autocast dtype, None if autocast is off."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised as the student's, to logits (B, C)."""
        ...

    def answer(self, images: Tensor) -> Output:
        """Images (B, 3, H, W), normalised as the student's, to the outputs selected by `read`."""
        ...

    def fingerprint(self) -> str | None:
        """SHA-256 of everything its outputs depend on; None disables the teacher-output cache."""
        ...

    def why_not_stored(self, images: Tensor) -> str:
        """Reason why outputs must not be cached, checked on images (B, 3, H, W); empty if none."""
        ...

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        ...


class FrozenTeacher:
    """A teacher in evaluation mode, without gradients.

    Deliberately not an `nn.Module`: as it is not a submodule, Lightning cannot put it into training
    mode, optimise it, save it in checkpoints or synchronise it between processes.

    Args:
        model: the network; it is switched to evaluation mode and its parameters are frozen. After
            `prepare`, an optimised copy is used if its outputs are the same; the weights of the
            model itself never change.
        expects: the normalisation the network was trained with.
        given: the normalisation of the images it receives.
        image_size: height and width that images are resized to; None: they are not.

    Attributes:
        initial_sha256: hash of the weights that it starts from, if any, for its identity.
    """

    def __init__(
        self,
        model: nn.Module,
        expects: Normalization,
        given: Normalization,
        image_size: int | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.image_size = image_size
        self.initial_sha256 = ""
        self._layers: Collection[str] = ()
        self._logits = True
        self._num_classes: int | None = None
        self._place: _Place | None = None
        self._reader: FeatureReader | None = None
        mean_given, std_given = torch.tensor(given.mean), torch.tensor(given.std)
        mean, std = torch.tensor(expects.mean), torch.tensor(expects.std)
        self._scale = (std_given / std).view(1, 3, 1, 1)
        self._shift = ((mean_given - mean) / std).view(1, 3, 1, 1)
        self._renormalize = expects != given

    def read(
        self, layers: Collection[str], logits: bool = True, num_classes: int | None = None
    ) -> None:
        """Select the outputs of `answer`.

        Args:
            layers: layers whose feature maps are returned.
            logits: whether to return the logits; if not, the forward pass ends at the last layer.
            num_classes: number of classes, to identify the logits; see `find_logits`.
        """
        self._layers, self._logits, self._num_classes = layers, logits, num_classes
        self._use(None)
        self._place = None

    def prepare(
        self, device: torch.device, memory_format: torch.memory_format, dtype: torch.dtype | None
    ) -> None:
        """Set device and precision; the first images decide whether an optimised copy is used.

        On these it is verified that folding BatchNorm and converting weights do not change the
        outputs. Otherwise the model itself is used.

        Args:
            device: device of the images.
            memory_format: memory format of the convolution weights.
            dtype: autocast dtype, or None: convolution and linear weights are converted once, to
                exactly the values that autocast would convert them to in every step.
        """
        place = _Place(device, memory_format, dtype)
        if self._place != place:
            self._use(None)
            self._place = place

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalised as `given`, to logits (B, C)."""
        return self._ask(images, complete=True).logits

    def answer(self, images: Tensor) -> Output:
        """Images (B, 3, H, W), normalised as `given`, to the outputs selected by `read`."""
        return self._ask(images, complete=False)

    def shapes(self, image_size: int) -> LayerShapes:
        """Layer shapes for images of this height and width, in pixels."""
        return layer_shapes(self.model, self.image_size or image_size)

    def fingerprint(self) -> str | None:
        """SHA-256 of its weights and buffers and of the size of its images, in hex."""
        weights = weights_sha256(self.model)
        if self.image_size is None:
            return weights
        return hashlib.sha256(f"{weights} {self.image_size}".encode()).hexdigest()

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return count_parameters(self.model)

    def why_not_stored(self, images: Tensor) -> str:
        """Reason why the outputs must not be cached; empty if they may.

        Args:
            images: (B, 3, H, W), normalised as `given`, all different; B is at least 2.
        """
        images = images[:CHECKED_IMAGES]
        half = len(images) // 2
        with no_gradients(), torch.random.fork_rng(devices=[]):
            images = self._normalize(images)
            network = stand_in(self.model)
            first, again, fewer = (
                self._once(network, part) for part in (images, images, images[:half].flip(0))
            )
        if not _same(first, again):
            return "its outputs differ between two passes over the same images"
        one = Output(first.logits[:half], {k: v[:half] for k, v in first.features.items()})
        other = Output(fewer.logits.flip(0), {k: v.flip(0) for k, v in fewer.features.items()})
        if not _same(one, other):
            return "its output for an image depends on the other images of the batch"
        return ""

    @no_gradients()
    def _ask(self, images: Tensor, complete: bool) -> Output:
        images = self._normalize(images)
        if self._place is None:
            # On a copy: the model may cache state, e.g. a position grid, at its first forward pass.
            return self._once(stand_in(self.model), images, complete)
        if self._reader is None:
            self._use(self._choose(images[:CHECKED_IMAGES], self._place))
        assert self._reader is not None
        return self._reader(images, complete)

    def _normalize(self, images: Tensor) -> Tensor:
        if self.image_size is not None:
            images = resize(images, self.image_size)
        if not self._renormalize:
            return images
        if self._scale.device != images.device:
            self._scale, self._shift = self._scale.to(images), self._shift.to(images)
        return images * self._scale + self._shift

    def _use(self, network: nn.Module | None) -> None:
        if self._reader is not None:
            self._reader.close()
        self._reader = None if network is None else self._read_from(network)

    def _read_from(self, network: nn.Module) -> FeatureReader:
        return FeatureReader(network, self._layers, self._logits, self._num_classes)

    def _once(self, network: nn.Module, images: Tensor, complete: bool = True) -> Output:
        reader = self._read_from(network)
        try:
            return reader(images, complete)
        finally:
            reader.close()

    def _choose(self, images: Tensor, place: _Place) -> nn.Module:
        """The fastest variant of the network with the same outputs on these images."""
        home = next(self.model.parameters(), torch.empty(0)).device
        network = self.model.to(place.device)
        to_memory_format(network, place.memory_format)
        kind = place.device.type
        with _untouched_rng(place.device):
            with torch.autocast(kind, enabled=False), _no_tf32(kind):
                network = self._improved(network, self._fold, images, TOLERANCE)
            if place.dtype is not None:
                with torch.autocast(kind, place.dtype):
                    network = self._improved(network, _convert(place.dtype), images, tolerance=0)
        if network is not self.model:
            self.model.to(home)
        return network

    def _improved(
        self,
        network: nn.Module,
        improve: Callable[[nn.Module], int],
        images: Tensor,
        tolerance: float,
    ) -> nn.Module:
        """An optimised copy of a network, or the network itself if the copy's outputs differ."""
        try:
            better = copied(network)
            if not improve(better):
                return network
            before, after = (self._once(stand_in(n), images) for n in (network, better))
            return better if _same(before, after, tolerance) else network
        except Exception:  # the copy does not work
            return network

    def _fold(self, network: nn.Module) -> int:
        return fold_batchnorm(network, keep=self._layers)


def _convert(dtype: torch.dtype) -> Callable[[nn.Module], int]:
    def convert(network: nn.Module) -> int:
        """Convert the weights of plain convolutions and linear layers; return how many."""
        if any(has_hooks(module) for module in network.modules()):
            return 0
        plain = [m for m in network.modules() if type(m) in (nn.Conv2d, nn.Linear)]
        for module in plain:
            module.to(dtype)
        return len(plain)

    return convert


@contextmanager
def _untouched_rng(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


@contextmanager
def _no_tf32(kind: str) -> Iterator[None]:
    """Disable TF32, whose rounding errors would exceed the tolerance."""
    if kind != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    allowed, cudnn.allow_tf32 = cudnn.allow_tf32, False
    try:
        yield
    finally:
        cudnn.allow_tf32 = allowed


def _same(one: Output, other: Output, tolerance: float = TOLERANCE) -> bool:
    """Whether two outputs for the same images differ by no more than rounding."""
    pairs = [(one.logits, other.logits)]
    pairs += [(feature, other.features[name]) for name, feature in one.features.items()]
    return all(_close(*pair, tolerance) for pair in pairs)


def _close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    if not tolerance:
        return torch.equal(one, other)
    finite = one[one.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=tolerance * largest, equal_nan=True)
