"""Where the channels and the positions are in what a layer puts out."""

from collections.abc import Iterator, Mapping
from math import isqrt
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kd_lightning.models.trial import blank, record, shapes_at

Shape = tuple[int, ...]

EXTRA_TOKENS = (0, 1, 2, 4, 5, 8, 9)
"""Class, distillation and register tokens beside a grid that no feature map before it shows."""
MOST_EXTRA_TOKENS = 16


class Layout(NamedTuple):
    """Where the positions of a feature map are in a layer's output.

    Attributes:
        kind: ``channels_first`` (B, C, H, W), ``channels_last`` (B, H, W, C), ``tokens`` (B, N, C)
            or ``tokens_last`` (B, C, N).
        height, width: of the map.
        start: the first token of the grid, which runs along rows; others are class or register
            tokens.
    """

    kind: str
    height: int
    width: int
    start: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

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
    """The layers that put out a map, or tokens that form a grid, and how.

    The axes of positions are those that grow with the image. Where a model takes only one size, a
    map is taken to be square, as the images are; what is still unclear is decided by what changes
    if a corner of an image does.

    Args:
        model: the model.
        shapes: layer name to the shape of its output (without the batch axis), in order of
            execution.
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
    """A layout, and what another layer of the same grid is recognised by.

    Attributes:
        grown: height and width in images of twice the size, if known.
        tokens: their number, with class and register tokens; 0 of a map.
    """

    layout: Layout
    channels: int
    grown: tuple[int, int] | None
    tokens: int = 0


def _maps(shape: Shape, grown: Shape) -> Iterator[_Grid]:
    """How three axes may be a map: as they grow, or else as they are square."""
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
            yield candidate  # either reading gives the same
            return
    if not grown and len(set(shape)) == 1:
        yield _Grid(Layout("channels_first", shape[1], shape[2]), shape[0], None)
        yield _Grid(Layout("channels_last", shape[0], shape[1]), shape[2], None)


def _doubled(size: int, larger: int) -> bool:
    """Whether a side has grown as those of maps do in images of twice the size."""
    # Convolutions without padding take as much from a larger image, so that more is left of it.
    return size < larger <= 2 * size + 4


def _token_axes(shape: Shape, grown: Shape) -> Iterator[tuple[str, int, int, int]]:
    """How two axes may be tokens: kind, their number, the same grown (or 0), and channels."""
    for kind, axis in (("tokens", 0), ("tokens_last", 1)):
        if not grown or (shape[axis] < grown[axis] and shape[1 - axis] == grown[1 - axis]):
            yield kind, shape[axis], grown[axis] if grown else 0, shape[1 - axis]


def _known_grids(shape: Shape, grown: Shape, grids: list[_Grid]) -> Iterator[_Grid]:
    """As many tokens as in a layer before, or as positions in a map of as many channels."""
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
    """Tokens that form a square once class and register tokens are taken away."""
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
    """What changes in the layers' outputs if a corner of an image does.

    The forward pass is run when it is first needed.
    """

    def __init__(self, model: nn.Module, image_size: int) -> None:
        self._model, self._image_size = model, image_size
        self._features: dict[str, Tensor] | None = None

    def of(self, name: str) -> Tensor:
        """Absolute changes (3, ...): for the upper left, upper right and lower right corner."""
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
            layout: a possible one.
            likely: whether the layout is to be believed if hardly anything moves.
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
        """The layout of tokens, with the class token last if that is where it is."""
        if not (layout.kind.startswith("tokens") and layout.start):
            return layout
        change = self.of(name).sum(dim=2 if layout.kind == "tokens" else 1)
        change = change / change.amax(dim=1, keepdim=True)
        at_the_end = bool(change[0, 0] > 2 * change[2, -1])
        return layout._replace(start=0) if at_the_end else layout
