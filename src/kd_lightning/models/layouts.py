"""Detection of the channel and spatial axes of layer outputs."""

from collections.abc import Iterator, Mapping
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.models.trial import blank, record, shapes_at

Shape = tuple[int, ...]

EXTRA_TOKENS = (0, 1, 2, 4, 5, 8, 9)
"""Possible numbers of class, distillation and register tokens, if the grid is not known from an
earlier feature map."""
MOST_EXTRA_TOKENS = 16


class Layout(NamedTuple):
    """The axes of a feature map in a layer's output.

    Attributes:
        kind: ``channels_first`` (B, C, H, W), ``channels_last`` (B, H, W, C), ``tokens`` (B, N, C)
            or ``tokens_last`` (B, C, N).
        height, width: size of the map.
        start: index of the first token of the grid, in row-major order; tokens outside the grid are
            class or register tokens.
    """

    kind: str
    height: int
    width: int
    start: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    def channels(self, shape: Shape) -> int:
        """Number of channels in an output of this shape, without the batch axis."""
        return shape[0] if self.kind in ("channels_first", "tokens_last") else shape[-1]

    def to_map(self, output: Tensor) -> Tensor:
        """A layer's output as a map (B, C, H, W), without a copy."""
        if self.kind == "channels_first":
            return output
        if self.kind == "tokens_last":
            output = output.transpose(1, 2)
        if self.kind != "channels_last":
            output = output[:, self.start : self.start + self.height * self.width]
            output = output.unflatten(1, self.size)
        return output.permute(0, 3, 1, 2)


def find_layouts(
    model: nn.Module, shapes: Mapping[str, Shape], image_size: int
) -> dict[str, Layout]:
    """Find the layers whose output is a map, or tokens that form a grid, and their layouts.

    Spatial axes are those that grow with the image. If a model accepts only one image size, maps
    are assumed to be square, like the images; remaining ambiguities are resolved by observing the
    effect of changes in a corner of an image.

    Args:
        model: the model.
        shapes: layer name to output shape (without the batch axis), in order of execution.
        image_size: height and width of the images, in pixels.
    """
    larger = shapes_at(model, blank(model, 2 * image_size, batch=1))
    changes = _Changes(model, image_size)
    layouts: dict[str, Layout] = {}
    grids: list[_Grid] = []
    for name, shape in shapes.items():
        grown = larger.get(name, ())[1:]
        if len(grown) != len(shape) or grown == shape:
            grown = ()
        if len(shape) == 3:
            found = list(_maps(shape, grown))
            sure = len(found) == 1
        elif len(shape) == 2:
            found = list(_known_grids(shape, grown, grids))
            sure = len(found) == 1
            found = found or list(_square_grids(shape, grown))
        else:
            continue
        if not sure or len(shape) == 2:
            found = [grid._replace(layout=changes.place(name, grid.layout)) for grid in found]
            found = [grid for grid in found if changes.agree(name, grid.layout, sure)]
        if found:
            grids.append(found[0])
            layouts[name] = found[0].layout
    return layouts


class _Grid(NamedTuple):
    """A layout, with features that identify other layers of the same grid.

    Attributes:
        grown: height and width for images of twice the size, if known.
        tokens: number of tokens, including class and register tokens; 0 for a map.
    """

    layout: Layout
    channels: int
    grown: tuple[int, int] | None
    tokens: int = 0


def _maps(shape: Shape, grown: Shape) -> Iterator[_Grid]:
    """Possible layouts of a 3-D output as a map, by growth or else by squareness."""
    for kind, height, width, channels in (
        ("channels_first", 1, 2, 0),
        ("channels_last", 0, 1, 2),
    ):
        size = shape[height], shape[width]
        candidate = _Grid(Layout(kind, *size), shape[channels], None)
        if grown:
            larger = grown[height], grown[width]
            moved = {axis for axis in range(3) if shape[axis] != grown[axis]}
            if moved == {height, width} and all(map(_doubled, size, larger)):
                yield candidate._replace(grown=larger)
        elif size[0] == size[1] != shape[channels]:
            yield candidate
            return
        elif set(shape) == {1}:
            yield candidate  # both layouts are equivalent
            return
    if not grown and len(set(shape)) == 1:
        yield _Grid(Layout("channels_first", shape[1], shape[2]), shape[0], None)
        yield _Grid(Layout("channels_last", shape[0], shape[1]), shape[2], None)


def _doubled(size: int, larger: int) -> bool:
    """Whether a side has grown as expected for images of twice the size."""
    # Convolutions without padding remove a constant border, so that a side may more than double.
    return size < larger <= 2 * size + 4


def _token_axes(shape: Shape, grown: Shape) -> Iterator[tuple[str, int, int, int]]:
    """Possible layouts of a 2-D output as tokens: kind, tokens, grown tokens (or 0), channels."""
    for kind, axis in (("tokens", 0), ("tokens_last", 1)):
        if not grown or (shape[axis] < grown[axis] and shape[1 - axis] == grown[1 - axis]):
            yield kind, shape[axis], grown[axis] if grown else 0, shape[1 - axis]


def _known_grids(shape: Shape, grown: Shape, grids: list[_Grid]) -> Iterator[_Grid]:
    """Layouts with the token count of an earlier layer, or the grid and channels of a map."""
    for grid in reversed(grids):
        found = []
        for kind, tokens, more, channels in _token_axes(shape, grown):
            height, width = grid.layout.size
            extra = tokens - height * width
            same = grid.channels == channels or grid.tokens == tokens
            fits = same and 0 <= extra <= MOST_EXTRA_TOKENS
            if more and (grid.grown is None or more - extra != grid.grown[0] * grid.grown[1]):
                fits = False
            if fits:
                layout = Layout(kind, height, width, extra)
                found.append(_Grid(layout, channels, grid.grown, tokens))
        if found:
            yield from found
            return


def _square_grids(shape: Shape, grown: Shape) -> Iterator[_Grid]:
    """Layouts with a square grid after removing class and register tokens."""
    for kind, tokens, more, channels in _token_axes(shape, grown):
        for extra in EXTRA_TOKENS:
            side, larger = isqrt(max(0, tokens - extra)), isqrt(max(0, more - extra))
            if side == 0 or side**2 != tokens - extra:
                continue
            if more and (larger**2 != more - extra or not 2 * side - 1 <= larger <= 2 * side + 2):
                continue
            layout = Layout(kind, side, side, extra)
            yield _Grid(layout, channels, (larger, larger) if more else None, tokens)


class _Changes:
    """Changes in the layers' outputs caused by changes in a corner of an image.

    The forward pass is run on first use.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        self._model, self._image_size = model, image_size
        self._features: dict[str, Tensor] | None = None

    def of(self, name: str) -> Tensor:
        """Absolute changes (3, ...), for the upper left, upper right and lower right corner."""
        if self._features is None:
            size, corner = self._image_size, max(1, self._image_size // 4)
            generator = torch.Generator().manual_seed(0)
            image = torch.randn(3, size, size, generator=generator)
            images = blank(self._model, size, batch=4)
            images[:] = image.to(images)
            images[1, :, :corner, :corner] += 2
            images[2, :, :corner, -corner:] += 2
            images[3, :, -corner:, -corner:] += 2
            self._features = record(self._model, images).features
        feature = self._features[name].cpu().double()  # not all GPUs have float64
        return (feature[1:] - feature[:1]).abs()

    def agree(self, name: str, layout: Layout, likely: bool) -> bool:
        """Whether the changes move along the width, then along the height, as the corners do.

        Args:
            name: the layer.
            layout: the candidate layout.
            likely: whether to accept the layout if hardly anything moves.
        """
        change = layout.to_map(self.of(name))
        centres = []
        for axis in (1, 2, 3):
            profile = change.sum(dim=[other for other in (1, 2, 3) if other != axis])
            places = torch.arange(profile.shape[1], device=profile.device) / profile.shape[1]
            centres.append((profile * places).sum(1) / profile.sum(1))
        channel, down, right = (centre.diff().tolist() for centre in centres)
        in_order = right[0] > abs(down[0]) and down[1] > abs(right[1])
        if likely:
            return in_order or not max(map(abs, right + down)) > 0.02
        least = max(0.02, 2 * abs(channel[0]), 2 * abs(channel[1]))
        return in_order and right[0] > least and down[1] > least

    def place(self, name: str, layout: Layout) -> Layout:
        """Adjust the layout of tokens if the class token comes last."""
        if not (layout.kind.startswith("tokens") and layout.start):
            return layout
        change = self.of(name).sum(dim=2 if layout.kind == "tokens" else 1)
        change = change / change.amax(dim=1, keepdim=True)
        at_the_end = bool(change[0, 0] > 2 * change[2, -1])
        return layout._replace(start=0) if at_the_end else layout
