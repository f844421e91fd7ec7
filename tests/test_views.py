"""Views: functions of index and number only, equal to a reference implementation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from kd_lightning.data.loading import ViewSampler
from kd_lightning.data.views import PLAIN, Augmentation, counter_random

MASK = 0xFFFFFFFF


def slow_random(index, view, seed):
    """The counter-based hash with Python's unbounded integers."""

    def mix(x):
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
        return x ^ (x >> 16)

    state = mix(mix((seed ^ 0x9E3779B9) & MASK) ^ (index & MASK))
    return mix((state + (view & MASK) * 0x9E3779B1) & MASK)


def slow_view(image, index, view, augmentation):
    """Pad by reflection, crop, flip: one image at a time."""
    pad = augmentation.padding
    if view == PLAIN:
        return image
    bits = slow_random(index, view, augmentation.seed)
    top, left = divmod((bits >> 1) % (2 * pad + 1) ** 2, 2 * pad + 1)
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    crop = padded[top : top + image.shape[0], left : left + image.shape[1]]
    crop = (crop[:, ::-1] if augmentation.flip and bits & 1 else crop).copy()
    side = augmentation.cutout
    centre = slow_random(index, view, augmentation.seed ^ 0x5BD1E995) % (
        crop.shape[0] * crop.shape[1]
    )
    row, column = (x - side // 2 for x in divmod(centre, crop.shape[1]))
    if side:
        crop[max(0, row) : row + side, max(0, column) : column + side] = 128
    return crop


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(-1, 2**31), st.integers(0, 2**32 - 1))
def test_counter_hash_matches_unbounded_arithmetic(index, view, seed):
    got = counter_random(torch.tensor([index]), torch.tensor([view]), seed)
    assert int(got) == slow_random(index, view, seed)


@pytest.mark.parametrize("cutout", [0, 1, 4, 5])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("padding", [0, 3, 4])
def test_rendered_views_match_reference(padding, flip, cutout):
    images = torch.randint(0, 256, (7, 12, 10, 3), dtype=torch.uint8)
    augmentation = Augmentation(padding=padding, flip=flip, cutout=cutout, seed=5)
    index = torch.tensor([0, 6, 3, 3, 3, 1, 0])
    view = torch.tensor([0, 1, 2, 3, PLAIN, 10**9, PLAIN])
    rendered = augmentation.render(images, index, view)
    assert rendered.is_contiguous(memory_format=torch.channels_last)
    for got, i, v in zip(rendered, index.tolist(), view.tolist(), strict=True):
        expected = slow_view(images[i].numpy(), i, v, augmentation)
        np.testing.assert_array_equal(got.permute(1, 2, 0).numpy(), expected)


def test_view_does_not_depend_on_its_batch():
    images = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8)
    augmentation = Augmentation()
    index, view = torch.arange(50), torch.arange(50) % 7
    together = augmentation.render(images, index, view)
    for k in range(50):
        alone = augmentation.render(images, index[k : k + 1], view[k : k + 1])
        assert torch.equal(alone[0], together[k])


def test_views_are_uniformly_distributed():
    index = torch.arange(5000).repeat_interleave(20)
    view = torch.arange(20).repeat(5000)
    rows, columns, flip = Augmentation(padding=4).parameters(index, view)
    cells = torch.bincount((rows * 9 + columns) * 2 + flip, minlength=162).double()
    expected = len(index) / 162
    chi_square = float(((cells - expected) ** 2 / expected).sum())
    assert chi_square < 231  # 161 degrees of freedom: exceeded by chance once in 4,000 times
    # The same for the views of one image, and for the first view of all images.
    assert 0.45 < flip[view == 0].double().mean() < 0.55
    assert len({(int(r), int(c)) for r, c in zip(rows[:20], columns[:20], strict=True)}) > 10


def test_more_pixels_than_int32_max(tmp_path):
    """In a sparse file with only the last image."""
    count = 2**31 // 64 + 3
    with (tmp_path / "images").open("wb") as file:
        file.seek((count - 1) * 64)
        file.write(bytes(range(64)))
    images = torch.from_file(
        str(tmp_path / "images"), shared=True, size=count * 64, dtype=torch.uint8
    ).view(count, 8, 8, 1)
    view = torch.tensor([PLAIN, PLAIN])
    last, first = Augmentation(padding=1).render(images, torch.tensor([count - 1, 0]), view)
    assert last.flatten().tolist() == list(range(64))
    assert not first.any()


def test_views_are_rendered_on_the_device_of_the_images():
    """On the meta device, as no GPU is needed."""
    augmentation = Augmentation(padding=2, cutout=3)
    try:
        with FakeTensorMode():
            images = torch.zeros(5, 8, 8, 3, dtype=torch.uint8, device="cuda")
            index = torch.zeros(2, dtype=torch.int64, device="cuda")
            rendered = augmentation.render(images, index, torch.ones_like(index))
    except RuntimeError as error:
        if "CUDA driver" not in str(error):
            raise
        pytest.skip("this version of torch wants a driver all the same")
    assert rendered.device.type == "cuda"
    assert rendered.shape == (2, 3, 8, 8)


def test_views_depend_on_the_seed():
    index, view = torch.arange(200), torch.zeros(200, dtype=torch.long)
    first = Augmentation(seed=0).parameters(index, view)[0]
    assert not torch.equal(first, Augmentation(seed=1).parameters(index, view)[0])


@pytest.mark.parametrize("name", ["padding", "cutout"])
def test_negative_sizes_are_rejected(name):
    with pytest.raises(ValueError, match=name):
        Augmentation(**{name: -1})


def test_training_order_depends_on_seed_and_epoch():
    images = torch.arange(100, 123)
    sampler = ViewSampler(images, batch_size=5, shuffle=True, seed=3)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == 5
        order = torch.cat([batch["shown"].index for batch in batches])
        assert torch.equal(order.sort().values, images)
        assert all((batch["shown"].view == epoch).all() for batch in batches)
        orders.append(order)
    assert not torch.equal(*orders)
    again = ViewSampler(images, batch_size=5, shuffle=True, seed=3)
    again.set_epoch(1)
    assert torch.equal(torch.cat([batch["shown"].index for batch in again]), orders[1])
    other = ViewSampler(images, batch_size=5, shuffle=True, seed=4)
    assert not torch.equal(torch.cat([batch["shown"].index for batch in other]), orders[0])


def test_evaluation_uses_plain_images_in_order():
    (batch,) = ViewSampler(torch.arange(4), batch_size=10, shuffle=False)
    assert batch["shown"].index.tolist() == [0, 1, 2, 3]
    assert (batch["shown"].view == PLAIN).all()
