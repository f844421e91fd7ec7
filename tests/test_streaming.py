"""Images that are decoded when they are first needed: the same views as in memory."""

import errno
import logging
import os
import tarfile
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, in_a_new_process, write_folder
from streamed_folder import module

from kd_lightning.data import (
    CutMix,
    Mixup,
    RandomOperations,
    ResizedCrop,
    decoded_rows,
    streamed,
)
from kd_lightning.data import folder as folder_module
from kd_lightning.data.decoded_rows import DecodedRows
from kd_lightning.data.loading import PREFETCHED
from kd_lightning.data.sources import InMemoryImages
from kd_lightning.data.streamed import StreamedImages
from kd_lightning.errors import InputError

VIEWS = {
    "standard": {},
    "cutout": {"cutout": 5},
    "resized crop": {"augmentation": ResizedCrop()},
    "operations": {"augmentation": RandomOperations(of=ResizedCrop())},
    "mixup": {"mixing": Mixup()},
    "cutmix": {"mixing": CutMix(probability=0.7)},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 36 training and 12 test images, which tests do not change."""
    return write_folder(tmp_path_factory.mktemp("streaming") / "images")


def batches(data, epoch=0):
    found = []
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        loader.sampler.set_epoch(epoch)
        found += list(loader)
    return found


def assert_same_batches(some, others):
    assert len(some) == len(others) > 0
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        assert torch.equal(one["shown"].index, other["shown"].index)
        assert torch.equal(one["shown"].view, other["shown"].view)
        for key in one.keys() - {"shown"}:
            assert torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])), key


def count_decodes(monkeypatch):
    """A list that grows by the path of every image that is decoded."""
    paths = []
    original = streamed.read_image
    monkeypatch.setattr(
        streamed, "read_image", lambda path, *rest: [paths.append(path), original(path, *rest)][1]
    )
    return paths


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("group", [1, 2**23], ids=["single batches", "grouped"])
def test_batches_are_those_of_images_in_memory(images, tmp_path, settings, group, monkeypatch):
    monkeypatch.setattr(streamed, "GROUP", group)
    memory = module(images, streamed=False, **settings)
    assert isinstance(memory.pixel_source, InMemoryImages)
    stored, decoded = module(images, tmp_path, **settings), module(images, **settings)
    assert isinstance(stored.pixel_source, StreamedImages)
    for epoch in (0, 1):  # decodes and stores, then reads
        expected = batches(memory, epoch)
        assert_same_batches(batches(stored, epoch), expected)
        assert_same_batches(batches(decoded, epoch), expected)


def test_an_epoch_is_resumed(images, tmp_path):
    data = module(images, tmp_path)
    whole = list(data.train_dataloader())
    loader = data.train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 2})
    assert_same_batches(list(loader), whole[2:])


def test_a_loader_may_be_left_early(images):
    data = module(images)
    before = threading.active_count()
    for _ in range(20):
        for _ in data.train_dataloader():
            break
    assert threading.active_count() < before + 20


class Renderer:
    """A user's renderer that was written for images in memory."""

    def render(self, images, index, view):
        return images[index].permute(0, 3, 1, 2)


def test_a_renderer_for_images_in_memory_is_refused(images, monkeypatch, caplog):
    with pytest.raises(ValueError, match=r"Renderer\.render has no parameter 'rows'"):
        module(images, augmentation=Renderer())
    data = module(images)
    with pytest.raises(InputError, match="has no parameter 'rows'"):
        next(iter(data.variant(augmentation=Renderer()).train_dataloader()))
    monkeypatch.setattr(folder_module, "memory_limit", lambda: 100)
    data = module(images, streamed="auto", augmentation=Renderer())
    assert isinstance(data.pixel_source, InMemoryImages)
    assert "cannot be streamed" in caplog.text


# --- the file of decoded images -------------------------------------------------------------------


def test_every_image_is_decoded_once(images, tmp_path, monkeypatch):
    decoded = count_decodes(monkeypatch)
    for _ in range(2):
        data = module(images, tmp_path)
        for epoch in (0, 1):
            batches(data, epoch)
    assert len(decoded) == len(set(decoded)) == 48


def test_only_needed_images_are_decoded(images, tmp_path, monkeypatch):
    decoded = count_decodes(monkeypatch)
    monkeypatch.setattr(streamed, "GROUP", 1)
    next(iter(module(images, tmp_path).test_dataloader()))
    assert len(decoded) <= 15


@pytest.mark.parametrize("damage", ["zeros", "bit", "truncated", "other position"])
def test_damaged_rows_are_decoded_again(images, tmp_path, monkeypatch, damage):
    expected = batches(module(images, streamed=False))
    batches(module(images, tmp_path))
    (file,) = tmp_path.glob("*.rows")
    content = bytearray(file.read_bytes())
    stride = len(content) // 48
    place = slice(3 * stride, 4 * stride)
    if damage == "zeros":
        content[place] = bytes(stride)
    elif damage == "bit":
        content[3 * stride + 100] ^= 1
    elif damage == "truncated":
        del content[47 * stride + 10 :]
    else:
        content[place] = content[5 * stride : 6 * stride]
    file.write_bytes(content)
    decoded = count_decodes(monkeypatch)
    assert_same_batches(batches(module(images, tmp_path)), expected)
    assert len(decoded) == 1
    assert_same_batches(batches(module(images, tmp_path)), expected)
    assert len(decoded) == 1


def test_processes_may_share_the_file(images, tmp_path):
    first, second = module(images, tmp_path), module(images, tmp_path)
    expected = batches(module(images, streamed=False))
    loaders = [data.train_dataloader() for data in (first, second)]
    for one, other, right in zip(*loaders, expected, strict=False):
        assert torch.equal(one["images"], right["images"])
        assert torch.equal(other["images"], right["images"])


def test_images_are_decoded_every_time_if_they_cannot_be_stored(
    images, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(decoded_rows, "RESERVE", 2**60)  # too little space is left
    expected = batches(module(images, streamed=False))
    for cache in (tmp_path / "file", tmp_path / "full"):
        caplog.clear()
        assert_same_batches(batches(module(images, cache)), expected)
        assert "cannot be stored" in caplog.text


def test_a_full_disk_is_not_an_error(tmp_path, monkeypatch, caplog):
    rows = DecodedRows(tmp_path / "x.rows", 3, 5)
    pixels = np.arange(15, dtype=np.uint8).reshape(3, 5)
    rows.write(np.array([0]), pixels[:1])

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", full)
        rows.write(np.array([1, 2]), pixels[1:])
        rows.write(np.array([1, 2]), pixels[1:])
    assert caplog.text.count("No space left") == 1
    into = np.zeros((3, 5), np.uint8)
    assert rows.read(np.array([2, 0, 1]), into).tolist() == [False, True, False]
    assert into[1].tolist() == [0, 1, 2, 3, 4]


def test_rows_on_a_read_only_file_system_are_read(tmp_path, monkeypatch, caplog):
    pixels = np.arange(15, dtype=np.uint8).reshape(3, 5)
    DecodedRows(tmp_path / "x.rows", 3, 5).write(np.arange(3), pixels)
    usual = os.open

    def read_only(path, flags, *others):
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system")
        return usual(path, flags, *others)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        rows, nothing = (DecodedRows(tmp_path / name, 3, 5) for name in ("x.rows", "y.rows"))
    into = np.zeros((3, 5), np.uint8)
    assert rows.read(np.arange(3), into).all()
    assert np.array_equal(into, pixels)
    assert not nothing.read(np.arange(3), into).any()
    assert caplog.text.count("Read-only file system") == 1


# --- choice ---------------------------------------------------------------------------------------


def test_auto_streams_what_does_not_fit_into_memory(images, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    needed = 48 * 16 * 16 * 3
    assert isinstance(module(images, streamed="auto").pixel_source, InMemoryImages)
    monkeypatch.setattr(folder_module, "memory_limit", lambda: 2 * needed)
    assert isinstance(module(images, streamed="auto").pixel_source, InMemoryImages)
    assert not caplog.text
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert isinstance(module(images, streamed="auto").pixel_source, StreamedImages)
    assert "they are streamed" in caplog.text
    assert isinstance(module(images, streamed=False).pixel_source, InMemoryImages)


@pytest.mark.parametrize("settings", [{"streamed": "yes"}, {"workers": 0}])
def test_settings_are_checked(images, settings):
    with pytest.raises(ValueError, match="|".join(settings)):
        module(images, **settings)


# --- images that are stored larger than their views ---------------------------------------------


def larger(images, size, **settings):
    return module(images, streamed=False, image_size=size, **settings)


def test_crops_are_anywhere_in_a_larger_image(images):
    data = larger(images, 8, stored_size=16, padding=0, flip=False)
    index = torch.tensor([5]).repeat(200)
    views = data.render(index, torch.arange(200))["images"]
    whole = larger(images, 16, padding=0).render(index[:1], torch.tensor([-1]))["images"][0]
    windows = whole.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 3, 4).reshape(81, 3, 8, 8)
    same = (views[:, None] == windows[None]).flatten(2).all(dim=2)
    assert same.any(dim=1).all()
    assert same.any(dim=0).sum() > 60


@pytest.mark.parametrize("name", ["standard", "resized crop", "operations"])
def test_without_augmentation_a_larger_image_is_its_centre(images, name):
    data = larger(images, 8, stored_size=16, **VIEWS[name])
    plain = torch.tensor([-1, -1])
    views = data.render(torch.tensor([4, 7]), plain)["images"]
    whole = larger(images, 16).render(torch.tensor([4, 7]), plain)["images"]
    assert torch.equal(views, whole[:, :, 4:12, 4:12])


def test_resized_crops_of_a_larger_image_keep_its_details(images):
    """They are interpolated once: a quarter of the image at half its size is not interpolated."""
    crop = ResizedCrop(scale=(0.25, 0.25), ratio=(1, 1), flip=False)
    data = larger(images, 8, stored_size=16, augmentation=crop)
    index, view = torch.tensor([3, 11, 20]), torch.tensor([0, 1, 2])
    views = data.render(index, view)["images"]
    whole = larger(images, 16).render(index, torch.full_like(view, -1))["images"]
    for image, got, box in zip(whole, views, crop.boxes(index, view, (16, 16)), strict=True):
        top, left, tall, wide = box.tolist()
        assert (tall, wide) == (8, 8)
        assert torch.equal(got, image[:, top : top + 8, left : left + 8])


def test_larger_images_are_streamed_too(images, tmp_path):
    settings = {"image_size": 8, "stored_size": 12, "mixing": CutMix()}
    memory = module(images, streamed=False, **settings)
    for _ in range(2):
        assert_same_batches(batches(module(images, tmp_path, **settings)), batches(memory))
    assert memory.fingerprint() != module(images, streamed=False, image_size=12).fingerprint()
    other = module(images, streamed=False, **(settings | {"image_size": 9}))
    assert memory.fingerprint() != other.fingerprint()


def test_stored_size_is_checked(images):
    with pytest.raises(ValueError, match="stored_size must be null or at least image_size=16"):
        module(images, stored_size=15)
    with pytest.raises(ValueError, match="stored_size must be null: Renderer"):
        module(images, stored_size=20, streamed=False, augmentation=Renderer())


# --- memory ---------------------------------------------------------------------------------------


def test_only_the_batches_that_are_being_prepared_are_in_memory(images, monkeypatch):
    monkeypatch.setattr(streamed, "GROUP", 1)
    original, buffers, alive = streamed._buffer, [], []

    def counted(*given):
        buffer = original(*given)
        buffers.append(weakref.ref(buffer))
        alive.append(sum(one() is not None for one in buffers))
        return buffer

    monkeypatch.setattr(streamed, "_buffer", counted)
    assert len(list(module(images, batch_size=2).train_dataloader())) == 17
    assert len(alive) == 17
    # Those that are fetched, and the one that is rendered.
    assert max(alive) <= PREFETCHED + 2


@pytest.mark.slow
def test_memory_does_not_depend_on_the_number_of_images(tmp_path):
    """Part of Tiny ImageNet, ten times over."""
    archive = Path(os.environ.get("KD_TEST_DATA", "nowhere")) / "tiny-imagenet-part.tar.gz"
    if not archive.exists():
        pytest.skip(f"KD_TEST_DATA is not a folder that contains {archive.name}")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "ten", filter="data")
    for path in list((tmp_path / "ten").glob("t*/*/*")):
        for copy in range(9):
            path.with_name(f"{copy}-{path.name}").symlink_to(path.name)
    done = in_a_new_process(
        "-c", "import resource, sys; from kd_lightning import cli; sys.argv = sys.argv[1:]\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)",
        "train.py", "data=folder", f"data.root={tmp_path / 'ten'}", "data.image_size=64",
        "data.streamed=true", f"output_dir={tmp_path / 'out'}", f"data_dir={tmp_path}",
        "method=none", "+trainer.limit_train_batches=100", *TINY, "trainer.max_epochs=1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert int(done.out.split("peak ")[1]) * 1024 < 1.5e9
