"""Random operations and resized crops: reproducible, and equal to torchvision's functions."""

import math

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torchvision.transforms import InterpolationMode

from kd_lightning.data import Augmentation, RandomOperations, ResizedCrop
from kd_lightning.data.operations import LEVELS, OPERATIONS
from kd_lightning.data.views import GREY, PLAIN

TOP = LEVELS - 1


def natural(count=1, size=(32, 32)):
    """Smooth images with the whole range of values."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=generator) * 300 - 20
    fine = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return (fine + 8 * torch.randn(fine.shape, generator=generator)).clamp(0, 255).to(torch.uint8)


def affine(images, angle=0.0, translate=(0, 0), shear=(0.0, 0.0)):
    return reference.affine(
        images, angle, list(translate), 1.0, list(shear), InterpolationMode.NEAREST, [GREY] * 3
    )


def shear_angle(part):
    return math.degrees(math.atan(0.3 * part))


def pixels(part, length):
    return math.trunc(part * length * 150 / 331)


# Operation to torchvision's function of images and strength in [-1, 1].
REFERENCE = {
    "brightness": lambda x, s: reference.adjust_brightness(x, 1 + 0.9 * s),
    "contrast": lambda x, s: reference.adjust_contrast(x, 1 + 0.9 * s),
    "saturation": lambda x, s: reference.adjust_saturation(x, 1 + 0.9 * s),
    "posterize": lambda x, s: reference.posterize(x, 8 - math.floor(4 * abs(s) + 0.5)),
    "solarize": lambda x, s: reference.solarize(x, 255 - math.floor(255 * abs(s))),
    "equalize": lambda x, s: reference.equalize(x),
    "autocontrast": lambda x, s: reference.autocontrast(x),
    "translate_x": lambda x, s: affine(x, translate=(pixels(s, x.shape[3]), 0)),
    "translate_y": lambda x, s: affine(x, translate=(0, pixels(s, x.shape[2]))),
    "rotate": lambda x, s: affine(x, angle=30 * s),
    "shear_x": lambda x, s: reference.affine(
        x, 0.0, [0, 0], 1.0, [shear_angle(s), 0.0], InterpolationMode.NEAREST, [GREY] * 3
    ),
    "shear_y": lambda x, s: reference.affine(
        x, 0.0, [0, 0], 1.0, [0.0, shear_angle(s)], InterpolationMode.NEAREST, [GREY] * 3
    ),
}
EXACT = {"posterize", "solarize", "equalize", "translate_x", "translate_y"}
GEOMETRIC = {"rotate", "shear_x", "shear_y"}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("step", [0, 1, 7, -7, 15, 22, -22, TOP, -TOP])
@pytest.mark.parametrize("size", [(32, 32), (24, 40), (18, 14)])
def test_operation_agrees_with_torchvision(name, step, size):
    images = natural(4, size)
    got = OPERATIONS[name](images.permute(0, 2, 3, 1), torch.full((4,), step))
    expected = REFERENCE[name](images, step / TOP).permute(0, 2, 3, 1)
    difference = (got.int() - expected.int()).abs()
    if name in EXACT:
        assert not difference.any()
    elif name in GEOMETRIC:  # two pixels are equally near at some positions
        assert (difference > 0).any(dim=3).float().mean() < 0.02
    else:
        assert difference.max() <= 1


@pytest.mark.parametrize("name", sorted(EXACT - {"equalize"}))
def test_every_strength_agrees_with_torchvision(name):
    images = natural(1, (18, 14))
    steps = torch.arange(-TOP, TOP + 1)
    got = OPERATIONS[name](images.permute(0, 2, 3, 1).repeat(len(steps), 1, 1, 1), steps)
    for image, step in zip(got, steps.tolist(), strict=True):
        expected = REFERENCE[name](images, step / TOP)[0]
        assert torch.equal(image.permute(2, 0, 1), expected), step


def test_autocontrast_stretches_each_channel_to_the_whole_range():
    images = torch.stack([torch.arange(60) + 90, torch.arange(60) // 2, 255 - torch.arange(60)])
    images = images.T.reshape(1, 6, 10, 3)
    stretched = OPERATIONS["autocontrast"](images.to(torch.uint8), torch.zeros(1))
    low, high = images.amin(dim=(1, 2)), images.amax(dim=(1, 2))
    assert torch.equal(stretched, (images - low) * 255 // (high - low))


def test_constant_channels_survive_autocontrast_and_equalize():
    images = torch.full((1, 8, 8, 3), 77, dtype=torch.uint8)
    for name in ("autocontrast", "equalize"):
        assert torch.equal(OPERATIONS[name](images, torch.zeros(1, dtype=torch.long)), images)


@pytest.mark.parametrize(
    "views",
    [RandomOperations(), RandomOperations(number=3, strength=0.4, seed=2), ResizedCrop(seed=1)],
)
def test_view_depends_only_on_index_and_number(views):
    images = natural(40).permute(0, 2, 3, 1).contiguous()
    index, view = torch.arange(40), torch.arange(40) % 5
    together = views.render(images, index, view)
    assert together.dtype == torch.uint8
    assert together.is_contiguous(memory_format=torch.channels_last)
    for k in range(40):
        assert torch.equal(views.render(images, index[[k]], view[[k]])[0], together[k])
    plain = views.render(images, index, torch.full_like(index, PLAIN))
    assert torch.equal(plain.permute(0, 2, 3, 1), images)
    another = views.render(images, index, view + 5)
    assert (another != together).flatten(1).any(dim=1).float().mean() > 0.8


def test_each_operation_is_applied_to_its_views():
    images = natural(60).permute(0, 2, 3, 1).contiguous()
    index, view = torch.arange(60), torch.full((60,), 3)
    views = RandomOperations(of=Augmentation(padding=0, flip=False), number=2, seed=9)
    expected = images.clone()
    for number in range(2):
        chosen, strength = views.parameters(index, view, number)
        for k, (name, step) in enumerate(zip(chosen.tolist(), strength.tolist(), strict=True)):
            operation = list(OPERATIONS.values())[name]
            expected[[k]] = operation(expected[[k]], torch.tensor([step]))
    assert torch.equal(views.render(images, index, view).permute(0, 2, 3, 1), expected)


def test_square_is_grey_after_the_operations():
    images = torch.zeros(40, 32, 32, 3, dtype=torch.uint8)
    index, view = torch.arange(40), torch.zeros(40, dtype=torch.long)
    plain = Augmentation(padding=0, flip=False)
    views = RandomOperations(of=plain, operations=["brightness", "solarize"], cutout=6)
    rendered = views.render(images, index, view)
    square = Augmentation(padding=0, flip=False, cutout=6).render(images, index, view) == GREY
    assert (rendered[square] == GREY).all()
    assert square.any()


def test_operations_and_strengths_are_uniform():
    index = torch.arange(30_000)
    views = RandomOperations(probability=0.6)
    for number in (0, 1):
        chosen, strength = views.parameters(index, torch.full_like(index, 7), number)
        assert float((chosen < 0).float().mean()) == pytest.approx(0.4, abs=0.01)
        counts = torch.bincount(chosen[chosen >= 0], minlength=len(OPERATIONS)).double()
        assert (counts / counts.mean() - 1).abs().max() < 0.1
        steps = torch.bincount(strength.abs(), minlength=LEVELS).double()
        assert (steps / steps.mean() - 1).abs().max() < 0.15
        assert float((strength > 0).float().mean()) == pytest.approx(0.484, abs=0.01)
    first, second = (views.parameters(index, index, number)[0] for number in (0, 1))
    assert float((first == second).float().mean()) < 0.3


def test_strength_and_operations_limit_the_choice():
    index = torch.arange(2000)
    views = RandomOperations(strength=0.5, operations=["rotate", "posterize"])
    chosen, strength = views.parameters(index, index, 0)
    assert set(chosen.tolist()) == {0, 1}
    assert int(strength.abs().max()) == 15


@pytest.mark.parametrize("size", [(32, 32), (20, 36)])
def test_resized_crop_agrees_with_torchvision(size):
    images = natural(30, size).permute(0, 2, 3, 1).contiguous()
    views = ResizedCrop(flip=False)
    index, view = torch.arange(30), torch.ones(30, dtype=torch.long)
    got = views.render(images, index, view)
    for k, (top, left, height, width) in enumerate(views.boxes(index, view, size).tolist()):
        expected = reference.resized_crop(
            images[k].permute(2, 0, 1), top, left, height, width, list(size), antialias=False
        )
        assert (got[k].int() - expected.int()).abs().max() <= 2
        assert (got[k].int() - expected.int()).abs().float().mean() < 0.3
    flipped = ResizedCrop().render(images, index, view)
    mirrored = (flipped == got.flip(3)).flatten(1).all(dim=1)
    assert 0.2 < float(mirrored.float().mean()) < 0.8
    assert (mirrored | (flipped == got).flatten(1).all(dim=1)).all()


def test_resized_crops_have_the_given_areas_and_ratios():
    index = torch.arange(5000)
    boxes = (
        ResizedCrop(scale=(0.3, 0.9), ratio=(0.8, 1.25)).boxes(index, index, (100, 100)).double()
    )
    top, left, height, width = boxes.unbind(dim=1)
    area, ratio = height * width / 1e4, width / height
    assert area.min() > 0.29
    assert area.max() < 0.91
    assert float(area.mean()) == pytest.approx(0.6, abs=0.01)
    assert ratio.min() > 0.79
    assert ratio.max() < 1.27
    assert float(ratio.log().mean()) == pytest.approx(0, abs=0.01)
    assert (top + height).max() <= 100
    assert (left + width).max() <= 100
    assert float((top / (100 - height).clamp(min=1)).mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("kind", "wrong", "name"),
    [
        (RandomOperations, {"number": 0}, "number"),
        (RandomOperations, {"strength": 1.5}, "strength"),
        (RandomOperations, {"strength": 0.0}, "strength"),
        (RandomOperations, {"probability": -0.1}, "probability"),
        (RandomOperations, {"probability": 1.1}, "probability"),
        (RandomOperations, {"cutout": -1}, "cutout"),
        (RandomOperations, {"seed": -1}, "seed"),
        (RandomOperations, {"operations": ["blur"]}, "blur"),
        (RandomOperations, {"operations": []}, "operations"),
        (ResizedCrop, {"scale": (0.5, 0.2)}, "scale"),
        (ResizedCrop, {"scale": (0.0, 0.5)}, "scale"),
        (ResizedCrop, {"scale": (0.5, 1.5)}, "scale"),
        (ResizedCrop, {"scale": (0.5,)}, "scale"),
        (ResizedCrop, {"ratio": (2.0, 1.0)}, "ratio"),
        (ResizedCrop, {"ratio": (0.0, 1.0)}, "ratio"),
        (ResizedCrop, {"ratio": (1.0, math.inf)}, "ratio"),
        (ResizedCrop, {"ratio": (1.0, 1.5, 2.0)}, "ratio"),
        (ResizedCrop, {"seed": 2**32}, "seed"),
    ],
)
def test_invalid_settings_are_rejected(kind, wrong, name):
    with pytest.raises(ValueError, match=name):
        kind(**wrong)


@pytest.mark.parametrize(
    ("kind", "extreme"),
    [
        (RandomOperations, {"strength": 0.001, "probability": 0, "cutout": 0, "seed": 2**32 - 1}),
        (ResizedCrop, {"scale": (0.001, 0.001), "ratio": (1, 1)}),
        (ResizedCrop, {"scale": (1, 1), "ratio": (0.001, 1000)}),
    ],
)
def test_extreme_settings_are_accepted(kind, extreme):
    images = natural(9).permute(0, 2, 3, 1).contiguous()
    rendered = kind(**extreme).render(images, torch.arange(9), torch.arange(9))
    assert rendered.shape == (9, 3, 32, 32)


def test_smallest_and_largest_resized_crops():
    index = torch.arange(50)
    single = ResizedCrop(scale=(1e-6, 1e-6)).boxes(index, index, (30, 20))
    assert (single[:, 2:] == 1).all()
    assert single[:, 0].max() > 20  # anywhere in the image
    assert single[:, 1].max() > 10
    lines = ResizedCrop(scale=(1, 1), ratio=(900, 900)).boxes(index, index, (30, 20))
    assert lines[:, 1:].tolist() == [[0, 1, 20]] * 50
