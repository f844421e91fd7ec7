"""Data modules: image format, stratified and disjoint splits."""

import errno
import hashlib
import io
import os
import pickle
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from test_faults import Disk
from torch.distributed.utils import _recursive_to
from torchvision.datasets import CIFAR10

from kd_lightning.data import CIFAR10DataModule, DigitsDataModule, FolderDataModule, digits
from kd_lightning.data.splits import stratified_split
from kd_lightning.errors import InputError


def folder_data(root: Path, **settings) -> FolderDataModule:
    settings = {"batch_size": 8, "image_size": 16, "padding": 2, **settings}
    return FolderDataModule(str(root), name="folder", **settings)


def test_folder_decodes_every_image(folder):
    data = folder_data(folder)
    data.setup()
    assert data.classes == ["class0", "class1", "class2"]
    assert {name: len(index) for name, index in data.splits.items()} == {
        "train": 33,
        "val": 3,
        "test": 12,
    }
    (batch,) = folder_data_batches(data, "test")
    with Image.open(folder / "test" / "class0" / "0.jpg") as file:
        expected = torch.from_numpy(np.array(file)).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(batch["images"][0], expected)
    assert batch["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4


def folder_data_batches(data, split):
    loader = getattr(data, f"{split}_dataloader")()
    return list(loader)


def test_images_of_any_size_and_mode_are_converted(folder):
    Image.new("L", (40, 25), 128).save(folder / "test" / "class0" / "grey.png")
    Image.new("RGBA", (16, 16), (0, 0, 255, 255)).save(folder / "test" / "class1" / "alpha.png")
    data = folder_data(folder)
    data.setup()
    (batch,) = folder_data_batches(data, "test")
    assert batch["images"].shape == (14, 3, 16, 16)


def test_decoded_images_are_cached_until_a_file_changes(folder, tmp_path, monkeypatch):
    cache = tmp_path / "decoded"
    first = folder_data(folder, cache_dir=str(cache))
    first.setup()
    (stored,) = cache.iterdir()
    monkeypatch.setattr(FolderDataModule, "_decode", lambda *_: pytest.fail("decoded again"))
    second = folder_data(folder, cache_dir=str(cache))
    second.setup()
    assert first.fingerprint() == second.fingerprint()
    monkeypatch.undo()
    Image.new("RGB", (16, 16)).save(folder / "train" / "class0" / "1.png")
    third = folder_data(folder, cache_dir=str(cache))
    third.setup()
    assert third.fingerprint() != first.fingerprint()
    assert len(list(cache.iterdir())) == 2
    # A damaged cache is not used.
    whole = stored.read_bytes()
    stored.write_bytes(whole[: len(whole) // 2])
    assert third._read_stored(stored, 48) is None


def test_an_image_replaced_by_one_of_equal_size_and_time_is_decoded_again(tmp_path):
    for part, name, number in product(("train", "test"), "ab", range(5)):
        path = tmp_path / part / name / f"{number}.bmp"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
        os.utime(path, (1e9, 1e9))
    folder_data(tmp_path, cache_dir=str(tmp_path / "decoded")).setup()
    Image.new("RGB", (16, 16), "white").save(path)
    os.utime(path, (1e9, 1e9))
    data = folder_data(tmp_path, cache_dir=str(tmp_path / "decoded"))
    data.setup()
    assert data.pixel_source.pixels[-1].min() == 255


def test_normalisation_is_configurable(folder):
    plain = folder_data(folder, mean=[0, 0, 0], std=[1, 1, 1])
    other = folder_data(folder, mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])
    for data in (plain, other):
        data.setup()
    pixels, normalised = (folder_data_batches(data, "val")[0]["images"] for data in (plain, other))
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    std = torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(normalised, (pixels - mean) / std)


def test_default_normalisation_is_minus_one_to_one(folder):
    data = folder_data(folder)
    data.setup()
    images = torch.cat([batch["images"] for batch in folder_data_batches(data, "train")])
    assert images.dtype == torch.float32
    assert -1 <= images.min() < -0.9
    assert 0.5 < images.max() <= 1


def test_training_views_are_augmented_and_evaluation_is_not(folder):
    data = folder_data(folder)
    data.setup()
    loader = data.train_dataloader()
    images = {}
    for epoch in (0, 1):
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            for index, image in zip(batch["shown"].index.tolist(), batch["images"], strict=True):
                images[index, epoch] = image
    assert any(not torch.equal(images[i, 0], images[i, 1]) for i in data.splits["train"].tolist())
    first, second = (folder_data_batches(data, "val")[0]["images"] for _ in range(2))
    assert torch.equal(first, second)


def test_views_stay_on_the_host_when_a_strategy_copies_the_batch(folder):
    """As `DistributedDataParallel` on a GPU does with the arguments of a step."""
    data = folder_data(folder)
    data.setup()
    batch = folder_data_batches(data, "train")[0]
    (copied,) = _recursive_to(batch, torch.device("meta"), False)
    assert copied["images"].is_meta
    assert copied["shown"].index.tolist() == batch["shown"].index.tolist()
    assert copied["shown"].view.device.type == "cpu"
    assert copied["loss_weight"] == 1


def test_prefetched_batches_match_the_sampler(folder):
    """Several batches are rendered at once; each must equal a separately rendered one."""
    data = folder_data(folder, batch_size=2)  # 33 images: 17 batches, the last with one image
    data.setup()
    loader = data.train_dataloader()
    loader.sampler.set_epoch(3)
    asked, got = list(loader.sampler), list(loader)
    assert len(asked) == len(got) == len(loader) == 17
    for views, batch in zip(asked, got, strict=True):
        shown = views["shown"]
        alone = data.render(shown.index, shown.view)
        assert set(batch) == {"images", "labels", "shown", "loss_weight"}
        assert batch["loss_weight"] == 1
        assert torch.equal(batch["shown"].index, shown.index)
        assert torch.equal(batch["shown"].view, shown.view)
        for key in ("images", "labels"):
            assert torch.equal(batch[key], alone[key]), key
        assert batch["images"].is_contiguous(memory_format=torch.channels_last)


def test_splits_are_disjoint(folder):
    data = folder_data(folder)
    data.setup()
    parts = [set(data.splits[name].tolist()) for name in ("train", "val", "test")]
    assert set.union(*parts) == set(range(48))
    assert sum(len(part) for part in parts) == 48
    seen = {i for batch in data.train_dataloader() for i in batch["shown"].index.tolist()}
    assert seen == parts[0]


def test_split_is_stratified_and_depends_on_its_seed():
    labels = torch.arange(1000) % 10
    classes = [str(number) for number in range(10)]
    train, val = stratified_split(labels, 0.1, 0, classes)
    assert torch.bincount(labels[val]).tolist() == [10] * 10
    assert sorted(train.tolist() + val.tolist()) == list(range(1000))
    assert torch.equal(stratified_split(labels, 0.1, 0, classes)[1], val)
    assert not torch.equal(stratified_split(labels, 0.1, 1, classes)[1], val)


def test_split_rejects_a_class_with_one_image():
    with pytest.raises(InputError, match="class 'rare' has 1"):
        stratified_split(torch.tensor([0, 0, 0, 1]), 0.5, 0, ["common", "rare"])


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_every_class_keeps_images_in_both_parts(fraction):
    train, val = stratified_split(torch.tensor([0, 0, 1, 1]), fraction, 0, ["a", "b"])
    assert len(train) == len(val) == 2


@pytest.mark.parametrize(("images", "held_out"), [(14, 1), (15, 2), (24, 2), (25, 3)])
def test_validation_part_of_a_class_is_rounded(images, held_out):
    labels = torch.zeros(images, dtype=torch.int64)
    assert len(stratified_split(labels, 0.1, 0, ["a"])[1]) == held_out


def test_digits_need_no_download():
    data = DigitsDataModule(name="digits", batch_size=64)
    data.setup()
    assert sum(len(part) for part in data.splits.values()) == 1797
    (batch,) = folder_data_batches(data, "test")
    assert batch["images"].shape[1:] == (3, 32, 32)
    assert len(batch["labels"].unique()) == 10
    assert batch["images"].max() > 0.9


@pytest.mark.parametrize("elsewhere", [False, True])
def test_digits_are_those_of_scikit_learn(monkeypatch, elsewhere):
    if elsewhere:  # in a version that keeps the file in another place
        monkeypatch.setattr(Path, "exists", lambda path: False)
    values = digits._values()
    expected = load_digits()
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values[:, :-1], expected.data)
    np.testing.assert_array_equal(values[:, -1], expected.target)


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(InputError, match="scikit-learn"):
        DigitsDataModule(name="digits", batch_size=64).load()


def test_variant_shares_the_images(folder):
    data = folder_data(folder)
    data.setup()
    other = data.variant(seed=9)
    assert other.pixel_source is data.pixel_source
    orders = [torch.cat([b["shown"].index for b in d.train_dataloader()]) for d in (data, other)]
    assert not torch.equal(*orders)


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 0},
        {"batch_size": -1},
        {"eval_batch_size": 0},
        {"val_fraction": 0},
        {"val_fraction": 1},
        {"std": [0.5, 0, 0.5]},
        {"mean": ["a", "b", "c"]},
        {"mean": [0.5]},
        {"padding": 16},
        {"padding": -1},
        {"image_size": 0},
        {"num_classes": 4},
    ],
)
def test_invalid_settings_are_rejected(folder, settings):
    with pytest.raises(ValueError, match=next(iter(settings)).split("_")[0]):
        folder_data(folder, **settings)


# --- CIFAR-10: torchvision's own code, with a small archive in place of the real one -------------


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """An archive of the official layout with 100 images, and torchvision pointed at it."""
    generator = np.random.default_rng(0)

    def batch(count):
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        return {"data": data, "labels": [number % 10 for number in range(count)]}

    contents = {f"data_batch_{number}": batch(16) for number in range(1, 6)}
    contents |= {"test_batch": batch(20)}
    contents |= {"batches.meta": {"label_names": [str(number) for number in range(10)]}}
    path = tmp_path / "server" / CIFAR10.filename
    path.parent.mkdir()
    sums = {}
    with tarfile.open(path, "w:gz") as tar:
        for name, content in contents.items():
            raw = pickle.dumps(content)
            sums[name] = hashlib.md5(raw).hexdigest()
            entry = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    handler = partial(SimpleHTTPRequestHandler, directory=str(path.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}"
    monkeypatch.setattr(CIFAR10, "url", url)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    train_list = [[name, md5] for name, md5 in sums.items() if name.startswith("data_batch")]
    monkeypatch.setattr(CIFAR10, "train_list", train_list)
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]})
    yield path
    server.shutdown()
    server.server_close()


def cifar10(root) -> CIFAR10DataModule:
    return CIFAR10DataModule(str(root), name="cifar10", batch_size=8)


def test_cifar10_downloads_and_checks_the_archive(archive, tmp_path):
    data = cifar10(tmp_path / "data")
    data.setup()
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [70, 10, 20]
    assert (tmp_path / "data" / CIFAR10.filename).read_bytes() == archive.read_bytes()


def test_cifar10_images_can_be_rendered_and_hashed(archive):
    """Upright, and contiguous in memory, which the arrays of torchvision are not."""
    data = cifar10(archive.parent)
    data.setup()
    assert len(data.fingerprint()) == 64
    (batch,) = data.test_dataloader()
    with tarfile.open(archive) as tar:
        raw = pickle.load(tar.extractfile(f"{CIFAR10.base_folder}/test_batch"))
    expected = torch.from_numpy(raw["data"]).view(20, 3, 32, 32) / 127.5 - 1
    torch.testing.assert_close(batch["images"], expected)
    assert batch["labels"].tolist() == raw["labels"]
    assert len(next(iter(data.train_dataloader()))["images"]) == 8


def test_truncated_archive_is_downloaded_again(archive, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / CIFAR10.filename).write_bytes(archive.read_bytes()[:1000])
    cifar10(tmp_path / "data").setup()
    assert (tmp_path / "data" / CIFAR10.filename).read_bytes() == archive.read_bytes()


def test_damaged_archive_without_network_is_reported_and_kept(archive, tmp_path):
    copy = tmp_path / "data" / CIFAR10.filename
    copy.parent.mkdir()
    copy.write_bytes(archive.read_bytes()[:1000])
    archive.unlink()
    with pytest.raises(InputError, match=r"is damaged \(wrong checksum\).*data=digits"):
        cifar10(tmp_path / "data").setup()
    assert copy.stat().st_size == 1000


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path / "disk")
    yield disk
    disk.remove()


def read_only(monkeypatch, folder):
    """Simulated permission errors, as root may write anywhere."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    monkeypatch.setattr("kd_lightning.data.cifar.FileLock", refuse)
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.mark.parametrize("unpacked", [True, False])
def test_cifar10_in_a_read_only_folder(archive, tmp_path, monkeypatch, unpacked):
    place = tmp_path / "data"
    if unpacked:
        cifar10(place).setup()
        (place / CIFAR10.filename).unlink()  # no longer needed
    else:
        place.mkdir()
        (place / CIFAR10.filename).write_bytes(archive.read_bytes())
    before = sorted(place.rglob("*"))
    read_only(monkeypatch, place)
    data = cifar10(place)
    data.setup()
    assert [len(data.splits[name]) for name in ("train", "val", "test")] == [70, 10, 20]
    assert sorted(place.rglob("*")) == before


def test_cifar10_on_a_read_only_file_system(archive, disk):
    (disk.place / CIFAR10.filename).write_bytes(archive.read_bytes())
    disk.mount("ro")
    data = cifar10(disk.place)
    data.setup()
    assert len(data.splits["test"]) == 20


def test_read_only_folder_without_archive_is_reported(archive, tmp_path, monkeypatch):
    read_only(monkeypatch, tmp_path)
    with pytest.raises(InputError, match=r"cannot be written: Read-only file system"):
        cifar10(tmp_path / "data").setup()


def test_missing_archive_without_network_is_reported(archive, tmp_path):
    archive.unlink()
    with pytest.raises(InputError, match="could not be downloaded"):
        cifar10(tmp_path / "data").setup()
