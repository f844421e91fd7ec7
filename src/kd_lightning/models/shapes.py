"""The shapes of what the layers of a model put out."""

from functools import cached_property

from torch import nn

from kd_lightning.models.layouts import Layout, Shape, find_layouts
from kd_lightning.models.trial import INPUT, blank, record


class LayerShapes(dict[str, Shape]):
    """Layer name to the shape of its output without the batch axis, in order of execution.

    The model's own output has the name ``""``, as in `model.named_modules()`.

    Args:
        model: the model. Blank images run through it in evaluation mode; it is left as it was.
        image_size: height and width of the images, in pixels.

    Attributes:
        output: what the model returned.
        others: layers without such a shape, with what they put out in words.
        inputs: ``"layer:input"`` to the shape of what the layer is given, without the batch axis.
        modified: layers whose output is modified in place by what follows.
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
                self.others[name] = f"{what}, whose first axis does not count the images"
        for name, _ in model.named_modules(remove_duplicate=False):
            if name not in self:
                self.others.setdefault(name, "nothing, because evaluation does not use it")
        self._model, self._image_size = model, image_size

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """The layers that put out a map, or tokens that form a grid, and how."""
        return find_layouts(self._model, self, self._image_size)

    @cached_property
    def input_layouts(self) -> dict[str, Layout]:
        """The same of what layers are given, by ``"layer:input"``."""
        return find_layouts(self._model, self.inputs, self._image_size)


def layer_shapes(model: nn.Module, image_size: int) -> LayerShapes:
    """Shape without the batch axis of what each layer of `model` puts out; see `LayerShapes`."""
    return LayerShapes(model, image_size)
