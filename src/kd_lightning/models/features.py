"""Reading features by layer name out of any model, without touching its code."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """What a model said of a batch: logits (B, num_classes) and the feature maps asked for.

    The logits are (B, 0) if they were not asked for.
    """

    logits: Tensor
    features: dict[str, Tensor]


class FeatureReader:
    """Calls a model and returns the outputs of named layers along with its logits.

    The layers are those of `model.named_modules()`. Forward hooks do the reading, so any
    `nn.Module` works. Not a module itself: it adds nothing to a state dict.

    Args:
        model: any network.
        layers: those to read.
        logits: whether the logits are wanted too; if not, a call ends with the last layer read.

    Raises:
        ValueError: a layer does not exist; the message lists those that do.
    """

    def __init__(self, model: nn.Module, layers: Collection[str] = (), logits: bool = True) -> None:
        self.model = model
        self.logits = logits or not layers
        self._features: dict[str, Tensor] = {}
        # A complete call counts the readings: a layer may be used more than once.
        self._readings, self._total, self._enough = 0, 0, 0
        modules = dict(model.named_modules())
        for layer in layers:
            if layer not in modules or not layer:
                raise ValueError(unknown_layer(layer, modules))
        self._handles = [
            modules[layer].register_forward_hook(self._keep(layer)) for layer in layers
        ]

    def close(self) -> None:
        """Take the hooks out of the model again."""
        for handle in self._handles:
            handle.remove()

    def _keep(self, layer: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._features[layer] = output
            self._readings += 1
            if self._readings == self._enough:
                raise _ReadAll

        return hook

    def __call__(self, images: Tensor, complete: bool = False) -> Output:
        """Images (B, C, H, W) to `Output`; complete: the logits too, whatever was asked for."""
        self._readings = 0
        self._enough = 0 if self.logits or complete else self._total
        try:
            logits = self.model(images)
            self._total = self._readings
        except _ReadAll:
            logits = images.new_empty(len(images), 0)
        features, self._features = self._features, {}
        return Output(logits, features)


class _ReadAll(Exception):  # noqa: N818, not an error
    """The last layer that was wanted has been read."""


def layer_shapes(model: nn.Module, image_size: int) -> dict[str, tuple[int, ...]]:
    """Shape without the batch axis of what each layer of `model` puts out, in order of execution.

    The model's own output has the name ``""``, as in `model.named_modules()`.
    Runs one blank image through the model in evaluation mode; the model is left as it was.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    handles = []
    for name, module in model.named_modules():

        def hook(_module: nn.Module, _inputs: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        handles.append(module.register_forward_hook(hook))
    training = {module: module.training for module in model.modules()}
    parameter = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, 3, image_size, image_size, device=parameter.device)
    try:
        with torch.inference_mode():
            model.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return shapes


def unknown_layer(layer: str, layers: Iterable[str]) -> str:
    """The sentence for a layer that does not exist."""
    return f"there is no layer '{layer}'; there are: {', '.join(name for name in layers if name)}"


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())


def map_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Height and width of every layer that puts out a map (C, H, W)."""
    return {name: (s[1], s[2]) for name, s in shapes.items() if len(s) == 3}
