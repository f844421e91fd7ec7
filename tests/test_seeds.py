"""Seeds: any number of 32 bits works; others are rejected, never truncated."""

import pytest
import torch
from image_folders import folder_data

from kd_lightning.data.loading import ViewSampler
from kd_lightning.data.views import Augmentation


@pytest.mark.parametrize("key", ["view_seed", "split_seed", "seed"])
@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**64 + 1, 1.5])
def test_seeds_beyond_32_bits_are_rejected(folder, key, seed):
    with pytest.raises(ValueError, match=f"^{key} must be a whole number from 0 to 2"):
        folder_data(folder, **{key: seed})


@pytest.mark.parametrize("key", ["view_seed", "split_seed", "seed"])
def test_the_largest_seed_works(folder, key):
    data, other = folder_data(folder, **{key: 2**32 - 1}), folder_data(folder)
    for each in (data, other):
        each.setup()
        each.loader = each.train_dataloader()
        each.loader.sampler.set_epoch(10**6)
    one, two = (torch.cat([batch["images"] for batch in each.loader]) for each in (data, other))
    assert not torch.equal(one, two)


def test_largest_seed_shuffles_every_epoch():
    sampler = ViewSampler(torch.arange(50), 50, shuffle=True, seed=2**32 - 1)
    orders = set()
    for epoch in (0, 1, 10**6, 2**31):
        sampler.set_epoch(epoch)
        (batch,) = sampler
        orders.add(tuple(batch["shown"].index.tolist()))
    assert len(orders) == 4


def test_seeds_do_not_wrap_around():
    with pytest.raises(ValueError, match="seed"):
        Augmentation(seed=2**32)
