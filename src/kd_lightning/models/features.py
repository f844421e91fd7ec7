"""Reading features by layer name out of any model, without touching its code."""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

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
    """What a model said of a batch: logits (B, num_classes) and the feature maps asked for.

    The logits are (B, 0) if they were not asked for.
    """

    logits: Tensor
    features: dict[str, Tensor]


class _Mode(NamedTuple):
    """What decides how a model computes, and so which outputs it modifies in place."""

    training: bool
    gradients: bool
    autocast: bool


class _Habits(NamedTuple):
    """What a complete call in one mode has shown.

    Attributes:
        readings: how often the layers were used.
        modified: those whose output was modified in place afterwards.
    """

    readings: int
    modified: frozenset[str]


class FeatureReader:
    """Calls a model and returns the outputs of named layers along with its logits.

    The layers are those of `model.named_modules()`. Forward hooks do the reading, so any
    `nn.Module` works. Not a module itself: it adds nothing to a state dict.

    What is returned is exactly what the layer put out, even if the model modifies it in place
    later (``nn.ReLU(inplace=True)``, ``x += shortcut``). The first call in each mode (training,
    gradients, autocast) copies every output and finds out which are modified; later calls copy
    only those. Of a layer that is used several times, the last use is read.

    Args:
        model: any network; for its outputs see `find_logits`.
        layers: those to read; ``"layer:input"`` is what a layer is given.
        logits: whether the logits are wanted too; if not, a call ends with the last layer read.
        num_classes: number of classes, to find the logits by; None: whatever looks like logits.

    Raises:
        ValueError: a layer does not exist; the message lists those that do.
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
        modules = dict(model.named_modules(remove_duplicate=False))
        self._handles = []
        for layer in layers:
            name = layer.removesuffix(INPUT)
            if name not in modules or not name:
                raise ValueError(unknown_layer(layer, modules))
            hook: Any = _InputHook(self, layer) if name != layer else _Hook(self, layer)
            register = (
                modules[name].register_forward_pre_hook
                if name != layer
                else modules[name].register_forward_hook
            )
            self._handles.append(register(hook))

    def close(self) -> None:
        """Take the hooks out of the model again."""
        for handle in self._handles:
            handle.remove()

    def keep(self, layer: str, output: object) -> None:
        """Keep what a layer put out, if this reader is calling the model."""
        if self._reading is not None:
            self._reading.keep(layer, output)

    def __call__(self, images: Tensor, complete: bool = False) -> Output:
        """Images (B, C, H, W) to `Output`; complete: the logits too, whatever was asked for.

        Raises:
            InputError: the model's output holds no logits.
            RunError: a layer was not used, or not as in the first call in this mode.
        """
        autocast = torch.is_autocast_enabled(images.device.type)
        mode = _Mode(self.model.training, torch.is_grad_enabled(), autocast)
        habits = self._habits.get(mode)
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
            # Too late for what it put out. The next call copies it.
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
    """The outputs that are kept during one call.

    Args:
        habits: what is known of the mode; None in the first call.
        early: whether to end the call with the last reading.
    """

    def __init__(self, habits: _Habits | None, early: bool) -> None:
        self.habits, self.count = habits, 0
        self.end = habits.readings if habits and early else 0
        self.outputs: dict[str, Tensor] = {}
        self.copies: dict[str, Tensor] = {}
        self.versions: dict[str, int] = {}

    def keep(self, layer: str, output: object) -> None:
        """Keep what a layer put out.

        Raises:
            RunError: it is not a tensor.
        """
        if not isinstance(output, Tensor):
            raise RunError(
                f"the layer '{layer}' puts out {describe(output)}, but only the output of a layer "
                "that puts out a tensor can be read"
            )
        self.outputs[layer], self.versions[layer] = output, version(output)
        self.count += 1
        if self.count == self.end:
            raise _ReadAll  # nothing runs any more that could modify the output
        if self.habits is None or layer in self.habits.modified or output.is_inference():
            self.copies[layer] = output.clone()

    def modified(self) -> list[str]:
        """Layers whose output is no longer what they put out."""
        return [
            layer
            for layer, output in self.outputs.items()
            if version(output) != self.versions[layer]
            # In the first call by value too: `x.data` and others do not count their versions.
            or (self.habits is None and not torch.equal(output, self.copies[layer]))
        ]

    def features(self, modified: Collection[str]) -> dict[str, Tensor]:
        """Layer name to what the layer put out."""
        if self.habits is None:  # everything was copied: gradients must flow as in later calls
            return {
                layer: self.copies[layer] if layer in modified else output
                for layer, output in self.outputs.items()
            }
        return self.outputs | self.copies


class _ReadAll(BaseException):  # not an error, and nothing that a model may catch
    """The last layer that was wanted has been read."""


def unknown_layer(layer: str, layers: Iterable[str]) -> str:
    """The sentence for a layer that does not exist."""
    return f"there is no layer '{layer}'; there are: {', '.join(name for name in layers if name)}"


def count_parameters(model: nn.Module) -> int:
    """Number of trainable and frozen parameters; buffers do not count."""
    return sum(parameter.numel() for parameter in model.parameters())
