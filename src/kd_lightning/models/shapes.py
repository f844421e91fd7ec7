"""Output shapes of the layers of a model."""

from collections.abc import Mapping
from functools import cached_property

from torch import nn

from kd_lightning.models.layouts import Layout, Shape, find_layouts
from kd_lightning.models.trial import INPUT, blank, record

Shapes = Mapping[str, Shape]
"""Layer name to the shape of its output without the batch axis; see `LayerShapes`."""


class LayerShapes(dict[str, Shape]):
    """Layer name to output shape without the batch axis, in order of execution.

    The model's own output has the name ``""``, as in `model.named_modules()`.

    Args:
        model: the model. Runs on blank images in evaluation mode and is left unchanged.
        image_size: height and width of the images, in pixels.

    Attributes:
        model, image_size: as given.
        output: the model's output.
        others: layers without such a shape, with a description of their output.
        inputs: ``"layer:input"`` to the input shape of the layer, without the batch axis.
        modified: layers whose output is modified in place by later operations.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        super().__init__()
        images = blank(model, image_size)
        self.output, features, self.others, self.modified = record(model, images)
        self.inputs: dict[str, Shape] = {}
        for name, feature in features.items():
            if feature.shape[:1] == images.shape[:1]:
                shapes = self.inputs if name.endswith(INPUT) else self
                shapes[name] = tuple(feature.shape[1:])
            else:
                what = f"a tensor {tuple(feature.shape)} for {len(images)} images"
                self.others[name] = f"{what}, whose first axis is not the batch"
        for name, _ in model.named_modules(remove_duplicate=False):
            if name not in self:
                self.others.setdefault(name, "nothing, because it is not used in evaluation mode")
        self.model, self.image_size = model, image_size

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Layouts of the layers whose output is a map, or tokens that form a grid."""
        return find_layouts(self.model, self, self.image_size)

    @cached_property
    def input_layouts(self) -> dict[str, Layout]:
        """The same for layer inputs, by ``"layer:input"``."""
        return find_layouts(self.model, self.inputs, self.image_size)


def layer_shapes(model: nn.Module, image_size: int) -> LayerShapes:
    """Output shape of each layer of `model`, without the batch axis; see `LayerShapes`."""
    return LayerShapes(model, image_size)
