"""Names and shapes of the parameters in the CIFAR checkpoints of RepDistiller and mdistiller.

Derived from the public sources (RepDistiller: ``models/*.py``; mdistiller:
``mdistiller/models/cifar/*.py``, with the same names), independently of our networks.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Shapes = Iterator[tuple[str, tuple[int, ...]]]

WEIGHTS = ("weight", "bias", "running_mean", "running_var")


def conv(name: str, inputs: int, outputs: int, kernel: int = 3, bias: bool = False) -> Shapes:
    yield f"{name}.weight", (outputs, inputs, kernel, kernel)
    if bias:
        yield f"{name}.bias", (outputs,)


def norm(name: str, channels: int) -> Shapes:
    yield from ((f"{name}.{part}", (channels,)) for part in WEIGHTS)
    yield f"{name}.num_batches_tracked", ()


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    yield from ((f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,)))


def conv_norm(place: str, number: int, inputs: int, outputs: int, kernel: int = 3) -> Shapes:
    """``conv1`` and ``bn1``, or those of another number."""
    yield from conv(f"{place}conv{number}", inputs, outputs, kernel)
    yield from norm(f"{place}bn{number}", outputs)


def pair(name: str, inputs: int, outputs: int, kernel: int) -> Shapes:
    """A convolution and BatchNorm in an `nn.Sequential`."""
    yield from conv(f"{name}.0", inputs, outputs, kernel)
    yield from norm(f"{name}.1", outputs)


def resnet(depth: int, widths: tuple[int, ...] = (16, 16, 32, 64), classes: int = 100) -> Shapes:
    yield from conv_norm("", 1, 3, widths[0])
    inputs = widths[0]
    for stage, width in enumerate(widths[1:], start=1):
        for block in range((depth - 2) // 6):
            place = f"layer{stage}.{block}."
            yield from conv_norm(place, 1, inputs, width)
            yield from conv_norm(place, 2, width, width)
            if block == 0 and (stage > 1 or inputs != width):
                yield from pair(f"{place}downsample", inputs, width, 1)
            inputs = width
    yield from linear("fc", inputs, classes)


def resnet50(classes: int = 100) -> Shapes:
    yield from conv_norm("", 1, 3, 64)
    inputs = 64
    for stage, (width, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=1):
        for block in range(blocks):
            place = f"layer{stage}.{block}."
            yield from conv_norm(place, 1, inputs, width, 1)
            yield from conv_norm(place, 2, width, width)
            yield from conv_norm(place, 3, width, 4 * width, 1)
            if block == 0:
                yield from pair(f"{place}shortcut", inputs, 4 * width, 1)
            inputs = 4 * width
    yield from linear("linear", inputs, classes)


def wrn(depth: int, width: int, classes: int = 100) -> Shapes:
    yield from conv("conv1", 3, 16)
    inputs = 16
    for stage, outputs in enumerate((16 * width, 32 * width, 64 * width), start=1):
        for block in range((depth - 4) // 6):
            place = f"block{stage}.layer.{block}."
            yield from norm(f"{place}bn1", inputs)
            yield from conv(f"{place}conv1", inputs, outputs)
            yield from norm(f"{place}bn2", outputs)
            yield from conv(f"{place}conv2", outputs, outputs)
            if inputs != outputs:
                yield from conv(f"{place}convShortcut", inputs, outputs, 1)
            inputs = outputs
    yield from norm("bn1", inputs)
    yield from linear("fc", inputs, classes)


def vgg(repeats: int, classes: int = 100) -> Shapes:
    inputs = 3
    for block, width in enumerate((64, 128, 256, 512, 512)):
        for number in range(repeats):  # convolution, BatchNorm, ReLU
            yield from conv(f"block{block}.{3 * number}", inputs, width, bias=True)
            yield from norm(f"block{block}.{3 * number + 1}", width)
            inputs = width
    yield from linear("classifier", inputs, classes)


def mobilenetv2(classes: int = 100) -> Shapes:
    yield from pair("conv1", 3, 16, 3)
    inputs = 16
    widths = ((8, 1), (12, 2), (16, 3), (32, 4), (48, 3), (80, 3), (160, 1))
    for stage, (outputs, blocks) in enumerate(widths):
        for block in range(blocks):
            place, inner = f"blocks.{stage}.{block}.conv.", inputs * (6 if stage else 1)
            yield from conv(f"{place}0", inputs, inner, 1)
            yield from norm(f"{place}1", inner)
            yield from conv(f"{place}3", 1, inner)
            yield from norm(f"{place}4", inner)
            yield from conv(f"{place}6", inner, outputs, 1)
            yield from norm(f"{place}7", outputs)
            inputs = outputs
    yield from pair("conv2", inputs, 1280, 1)
    yield from linear("classifier.0", 1280, classes)


def shufflenetv1(classes: int = 100) -> Shapes:
    yield from conv_norm("", 1, 3, 24, 1)
    inputs = 24
    for stage, (outputs, blocks) in enumerate([(240, 4), (480, 8), (960, 4)], start=1):
        for block in range(blocks):
            place, added = f"layer{stage}.{block}.", outputs - (0 if block else inputs)
            groups = 1 if inputs == 24 else 3
            yield from conv_norm(place, 1, inputs // groups, added // 4, 1)
            yield from conv_norm(place, 2, 1, added // 4)
            yield from conv_norm(place, 3, added // 4 // 3, added, 1)
            inputs = outputs
    yield from linear("linear", inputs, classes)


def shufflenetv2(classes: int = 100) -> Shapes:
    yield from conv_norm("", 1, 3, 24, 1)
    inputs = 24
    for stage, (outputs, blocks) in enumerate([(116, 3), (232, 7), (464, 3)], start=1):
        half = outputs // 2
        yield from conv_norm(f"layer{stage}.0.", 1, 1, inputs)
        yield from conv_norm(f"layer{stage}.0.", 2, inputs, half, 1)
        yield from conv_norm(f"layer{stage}.0.", 3, inputs, half, 1)
        yield from conv_norm(f"layer{stage}.0.", 4, 1, half)
        yield from conv_norm(f"layer{stage}.0.", 5, half, half, 1)
        for block in range(1, blocks + 1):
            yield from conv_norm(f"layer{stage}.{block}.", 1, half, half, 1)
            yield from conv_norm(f"layer{stage}.{block}.", 2, 1, half)
            yield from conv_norm(f"layer{stage}.{block}.", 3, half, half, 1)
        inputs = outputs
    yield from conv_norm("", 2, inputs, 1024, 1)
    yield from linear("linear", 1024, classes)


WIDE = (32, 64, 128, 256)
PUBLISHED: dict[str, Callable[[int], Shapes]] = {
    **{
        f"resnet{depth}": lambda classes, depth=depth: resnet(depth, classes=classes)
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    "resnet8x4": lambda classes: resnet(8, WIDE, classes),
    "resnet32x4": lambda classes: resnet(32, WIDE, classes),
    "wrn_16_1": lambda classes: wrn(16, 1, classes),
    "wrn_16_2": lambda classes: wrn(16, 2, classes),
    "wrn_40_1": lambda classes: wrn(40, 1, classes),
    "wrn_40_2": lambda classes: wrn(40, 2, classes),
    "vgg8": lambda classes: vgg(1, classes),
    "vgg13": lambda classes: vgg(2, classes),
    "mobilenetv2": mobilenetv2,
    "shufflenetv1": shufflenetv1,
    "shufflenetv2": shufflenetv2,
    "resnet50_cifar": resnet50,
}
"""Name in our configuration to the parameters for a number of classes."""


def state(name: str, classes: int, seed: int = 0) -> dict[str, Tensor]:
    """Random weights as in a checkpoint of this network; activations keep their magnitude."""
    generator = torch.Generator().manual_seed(seed)

    def value(key: str, shape: tuple[int, ...]) -> Tensor:
        if not shape:
            return torch.tensor(5)  # num_batches_tracked
        centred = torch.rand(shape, generator=generator) - 0.5
        if len(shape) > 1:
            return centred * 2 * math.sqrt(6 / math.prod(shape[1:]))
        return centred + (key.endswith(("weight", "running_var")))

    return {key: value(key, shape) for key, shape in PUBLISHED[name](classes)}
