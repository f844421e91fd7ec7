"""Feature extraction by layer name from any model, without changing its code."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_lightning.errors import RunError
from kd_lightning.models.outputs import describe, find_logits
from kd_lightning.models.shapes import LayerShapes, layer_shapes
from kd_lightning.models.trial import INPUT, Onlooker, version

__all__ = [
    "FeatureReader",
    "LayerShapes",
    "Output",
    "count_parameters",
    "layer_shapes",
    "unknown_layer",
]


class Output(NamedTuple):
    """A model's output for a batch: logits (B, num_classes) and the requested feature maps.

    The logits are (B, 0) if they were not requested.
    """

    logits: Tensor
    features: dict[str, Tensor]

    def named(self, layers: Mapping[str, str]) -> "Output":
        """With the features also under other names: name to layer."""
        named = {name: self.features[layer] for name, layer in layers.items()}
        return self._replace(features=self.features | named)


class _Mode(NamedTuple):
    """The state that determines which outputs a model modifies in place."""

    training: bool
    gradients: bool
    autocast: bool


class _Habits(NamedTuple):
    """Observations from a complete call in one mode.

    Attributes:
        readings: total number of calls of the layers.
        modified: layers whose output was modified in place afterwards.
    """

    readings: int
    modified: frozenset[str]


class FeatureReader:
    """Calls a model and returns the outputs of named layers along with its logits.

    Layer names are those of `model.named_modules()`. Uses forward hooks, so any `nn.Module` works.
    Not a module itself: it does not change the state dict.

    The returned features are exactly the outputs of the layers, even if the model modifies them in
    place later (``nn.ReLU(inplace=True)``, ``x += shortcut``). The first call in each mode
    (training, gradients, autocast) copies every output and detects which are modified; later calls
    copy only those. For a layer that is called several times, the last call is read.

    Args:
        model: any network; for its outputs see `find_logits`.
        layers: layers to read; ``"layer:input"`` is the input of a layer.
        logits: whether to return the logits too; if not, a call ends at the last layer read.
        num_classes: number of classes, to identify the logits; None: whatever looks like logits.

    Raises:
        ValueError: a layer does not exist; the message lists the existing ones.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Collection[str] = (),
        logits: bool = True,
        num_classes: int | None = None,
    ) -> None:
        self.model = model
        self.layers = layers
        self.logits = logits or not layers
        self.num_classes = num_classes
        self._habits: dict[_Mode, _Habits] = {}
        self._reading: _Reading | None = None
        self._hooked: dict[str, tuple[nn.Module, RemovableHandle]] = {}
        self._attach()

    def _attach(self) -> None:
        """Add hooks to the layers, or to those that have replaced them since: with
        ``sync_batchnorm=True`` Lightning replaces all BatchNorm layers.
        """
        modules = dict(self.model.named_modules(remove_duplicate=False))
        for layer in self.layers:
            name = layer.removesuffix(INPUT)
            if name not in modules or not name:
                raise ValueError(unknown_layer(layer, modules))
            module = modules[name]
            if layer in self._hooked:
                hooked, handle = self._hooked[layer]
                if hooked is module:
                    continue
                handle.remove()
            hook: Any = _InputHook(self, layer) if name != layer else _Hook(self, layer)
            register = (
                module.register_forward_pre_hook if name != layer else module.register_forward_hook
            )
            self._hooked[layer] = module, register(hook)

    def close(self) -> None:
        """Remove the hooks from the model."""
        for _, handle in self._hooked.values():
            handle.remove()

    def keep(self, layer: str, output: object) -> None:
        """Store a layer's output, if this reader is calling the model."""
        if self._reading is not None:
            self._reading.keep(layer, output)

    def __call__(self, images: Tensor, complete: bool = False) -> Output:
        """Images (B, C, H, W) to `Output`; with `complete`, always including the logits.

        Raises:
            InputError: the model's output contains no logits.
            RunError: a layer was not used, or not as in the first call in this mode.
        """
        autocast = torch.is_autocast_enabled(images.device.type)
        mode = _Mode(self.model.training, torch.is_grad_enabled(), autocast)
        habits = self._habits.get(mode)
        if habits is None:
            self._attach()
        reading = self._reading = _Reading(habits, early=not (self.logits or complete))
        try:
            logits = find_logits(self.model(images), self.num_classes)
        except _ReadAll:
            logits = images.new_empty(len(images), 0)
        finally:
            self._reading = None
        for layer in self.layers:
            if layer not in reading.outputs:
                raise RunError(
                    f"the layer '{layer}' was not used in a forward pass in "
                    f"{'training' if mode.training else 'evaluation'} mode"
                )
        modified = frozenset(reading.modified())
        if habits is None:
            self._habits[mode] = _Habits(reading.count, modified)
        elif modified - habits.modified:
            # Too late for this output; the next call copies it.
            self._habits[mode] = _Habits(habits.readings, habits.modified | modified)
            if mode.training or mode.gradients:
                raise RunError(
                    f"the output of the layer '{min(modified - habits.modified)}' was modified in "
                    "place, but not when it was read for the first time; read another layer"
                )
            return self(images, complete)
        return Output(logits, reading.features(modified))


class _Hook(Onlooker):
    def __init__(self, reader: FeatureReader, layer: str) -> None:
        self.reader, self.layer = reader, layer

    def __call__(self, _module: nn.Module, _inputs: object, output: object) -> None:
        self.reader.keep(self.layer, output)


class _InputHook(Onlooker):
    def __init__(self, reader: FeatureReader, layer: str) -> None:
        self.reader, self.layer = reader, layer

    def __call__(self, _module: nn.Module, inputs: tuple[object, ...]) -> None:
        self.reader.keep(self.layer, inputs[0] if inputs else None)


class _Reading:
    """The outputs stored during one call.

    Args:
        habits: observations in this mode; None in the first call.
        early: whether to end the call at the last reading.
    """

    def __init__(self, habits: _Habits | None, early: bool) -> None:
        self.habits, self.count = habits, 0
        self.end = habits.readings if habits and early else 0
        self.outputs: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}

    def keep(self, layer: str, output: object) -> None:
        """Store a layer's output.

        Raises:
            RunError: it is not a tensor.
        """
        if not isinstance(output, Tensor):
            raise RunError(
                f"the layer '{layer}' outputs {describe(output)}, but only layers that output a "
                "tensor can be read"
            )
        self.outputs[layer], self.versions[layer] = output, version(output)
        self.count += 1
        if self.count == self.end:
            raise _ReadAll  # nothing runs afterwards that could modify the output
        if self.habits is None or layer in self.habits.modified or output.is_inference():
            self.copies[layer] = output.clone()

    def modified(self) -> list[str]:
        """Layers whose output has been modified."""
        return [
            layer
            for layer, output in self.outputs.items()
            if version(output) != self.versions[layer]
            # In the first call compare values too: `x.data` etc. do not increment the version.
            or (self.habits is None and not torch.equal(output, self.copies[layer]))
        ]

    def features(self, modified: Collection[str]) -> dict[str, Tensor]:
        """Layer name to the layer's output."""
        if self.habits is None:  # everything was copied; let gradients flow as in later calls
            return {
                layer: self.copies[layer] if layer in modified else output
                for layer, output in self.outputs.items()
            }
        return self.outputs | self.copies


class _ReadAll(BaseException):  # not an Exception, which the model might catch
    """Ends the forward pass after the last requested layer."""


def unknown_layer(layer: str, layers: Iterable[str]) -> str:
    """Error message for a layer that does not exist."""
    return f"there is no layer '{layer}'; layers: {', '.join(name for name in layers if name)}"


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters, without buffers."""
    return sum(parameter.numel() for parameter in model.parameters())
