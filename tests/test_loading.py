"""The loader of views: groups of batches, fetching ahead, and resuming within an epoch."""

import threading

import pytest
import torch

from kd_lightning.data.loading import AHEAD, PREFETCHED, ViewLoader, ViewSampler

IMAGES = torch.arange(100, 160)


class Recorder:
    """Fetches and renders: "images" are the indices times 10."""

    def __init__(self):
        self.fetched, self.cut, self.enough = [], [], threading.Event()

    def fetch(self, index, view):
        self.fetched.append(len(index))
        if len(self.fetched) > PREFETCHED:
            self.enough.set()
        return index * 10

    def render(self, index, view, pixels=None):
        self.cut.append(len(index))
        assert pixels is None or torch.equal(pixels, index * 10)
        return {"images": index * 10, "labels": index}


def loader(recorder, fetch=True, limit=None, batch_size=2, world=1):
    sampler = ViewSampler(IMAGES, batch_size, shuffle=True, world=world)
    return ViewLoader(
        sampler, recorder.render, lambda batch: batch, recorder.fetch if fetch else None, limit
    )


@pytest.mark.parametrize("fetch", [True, False])
@pytest.mark.parametrize("limit", [None, 6])
def test_batches_are_those_of_the_sampler(fetch, limit):
    batches = loader(Recorder(), fetch, limit)
    expected = [batch["shown"].index for batch in batches.sampler]
    found = list(batches)
    assert len(batches) == len(found) == len(expected) == 30
    for batch, index in zip(found, expected, strict=True):
        assert torch.equal(batch["shown"].index, index)
        assert torch.equal(batch["images"], index * 10)
        assert batch["loss_weight"] == 1


def test_next_groups_are_fetched_while_a_batch_is_in_use():
    recorder = Recorder()
    batches = iter(loader(recorder, limit=6))
    next(batches)
    assert recorder.enough.wait(10)
    assert recorder.cut == [6]
    for _ in range(3):
        next(batches)
    assert recorder.cut == [6, 6]
    batches.close()
    assert len(recorder.fetched) <= 2 + PREFETCHED


@pytest.mark.parametrize(
    ("limit", "batch_size", "world", "group"),
    [(None, 2, 1, AHEAD), (6, 2, 1, 3), (7, 2, 1, 3), (1, 2, 1, 1), (1000, 2, 1, AHEAD),
     (6, 4, 2, 3)],
)  # fmt: skip
def test_limit_of_images_rendered_at_once(limit, batch_size, world, group):
    recorder = Recorder()
    next(iter(loader(recorder, False, limit, batch_size, world)))
    assert recorder.cut == [group * batch_size // world]


def test_epoch_is_resumed_after_the_batches_given():
    whole = [batch["shown"].index for batch in loader(Recorder())]
    first = loader(Recorder())
    assert first.state_dict() == {"epoch": 0, "batches": 0}
    given = iter(first)
    for _ in range(11):
        next(given)
    state = first.state_dict()
    assert state == {"epoch": 0, "batches": 11}
    again = loader(Recorder())
    again.load_state_dict(state)
    rest = [batch["shown"].index for batch in again]
    assert torch.equal(torch.cat(rest), torch.cat(whole[11:]))
    assert again.state_dict() == {"epoch": 0, "batches": 30}
    assert len(list(again)) == 30  # only once
    other = loader(Recorder())
    other.load_state_dict(state)
    other.sampler.set_epoch(1)
    assert len(list(other)) == 30


@pytest.mark.parametrize(("smallest", "sizes"), [(1, [8] * 7 + [4]), (4, [8] * 7 + [4]),
                                                 (5, [8] * 6 + [12])])  # fmt: skip
def test_small_last_batch_is_merged_into_the_previous_one(smallest, sizes):
    sampler = ViewSampler(IMAGES, 8, shuffle=True, smallest=smallest)
    found = [len(batch["shown"].index) for batch in sampler]
    assert found == sizes
    assert len(sampler) == len(sizes)


def test_split_of_less_than_an_image_for_each_process_is_one_batch():
    """Which each of them takes part in."""
    for rank in range(4):
        sampler = ViewSampler(IMAGES[:3], 8, shuffle=False, rank=rank, world=4, smallest=4)
        (batch,) = sampler
        assert len(sampler) == len(batch["shown"].index) == 1
        assert batch["loss_weight"] == (4 / 3 if rank < 3 else 0)


def test_views_are_repeated_after_the_given_number():
    sampler = ViewSampler(IMAGES, 8, shuffle=True, views=3)
    found = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        found.append(int(next(iter(sampler))["shown"].view[0]))
    assert found == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(("images", "batch_size"), [(60, 8), (57, 8), (9, 4), (2, 4)])
def test_weighted_parts_of_all_processes_are_the_batch(images, batch_size):
    """The mean over the batch is the mean of the parts' means times their weights."""
    parts = [
        list(ViewSampler(IMAGES[:images], batch_size, shuffle=True, rank=rank, world=3))
        for rank in range(3)
    ]
    whole = list(ViewSampler(IMAGES[:images], batch_size, shuffle=True))
    for of_all, *of_each in zip(whole, *parts, strict=True):
        means = [part["shown"].index.double().mean() * part["loss_weight"] for part in of_each]
        assert float(sum(means)) / 3 == pytest.approx(float(of_all["shown"].index.double().mean()))
        assert all(len(part["shown"].index) for part in of_each)
