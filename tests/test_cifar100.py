"""CIFAR-100: a small archive of the official layout in place of the real one."""

import hashlib
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import CIFAR100

from kd_lightning import api
from kd_lightning.data import CIFAR100DataModule
from kd_lightning.errors import InputError


def rows(count, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    fine = [number % 100 for number in range(count)]
    return {"data": pixels, "fine_labels": fine, "coarse_labels": [label // 5 for label in fine]}


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """In the data folder, with two training images and one test image per class."""
    contents = {"train": rows(200, 0), "test": rows(100, 1)}
    raw = {name: pickle.dumps(content) for name, content in contents.items()}
    raw["meta"] = pickle.dumps({"fine_label_names": [f"name{n}" for n in range(100)]})
    path = tmp_path / "data" / CIFAR100.filename
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, content in raw.items():
            entry = tarfile.TarInfo(f"{CIFAR100.base_folder}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    sums = {name: hashlib.md5(content).hexdigest() for name, content in raw.items()}
    monkeypatch.setattr(CIFAR100, "url", "http://127.0.0.1:9/none")
    monkeypatch.setattr(CIFAR100, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    return path


def test_official_checksum():
    """As published at https://www.cs.toronto.edu/~kriz/cifar.html."""
    assert CIFAR100DataModule.source.tgz_md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert CIFAR100DataModule.source.filename == "cifar-100-python.tar.gz"


def test_images_and_fine_labels_of_the_archive(archive):
    module = CIFAR100DataModule(str(archive.parent), name="cifar100", batch_size=8)
    module.setup()
    assert {name: len(index) for name, index in module.splits.items()} == {
        "train": 100, "val": 100, "test": 100,
    }  # fmt: skip
    assert module.labels.tolist() == list(range(100)) * 3
    batch = module.render(*(module.splits["test"][:1], module.splits["test"][:1] * 0 - 1))
    expected = rows(100, 1)["data"][0].reshape(3, 32, 32) / 127.5 - 1
    assert np.allclose(batch["images"][0].numpy(), expected, atol=1e-6)


def test_damaged_archive_is_rejected(archive):
    archive.write_bytes(archive.read_bytes()[:-10])
    module = CIFAR100DataModule(str(archive.parent), name="cifar100", batch_size=8)
    with pytest.raises(InputError, match=r"cifar-100-python\.tar\.gz is damaged"):
        module.setup()


def test_choice_of_the_command_line(archive):
    config = api.compose("data=cifar100", f"data_dir={archive.parent}", "teacher=resnet20")
    assert config["data"]["num_classes"] == 100
    assert config["student"]["model"]["num_classes"] == 100
    assert config["teacher"]["model"]["num_classes"] == 100


def test_class_names():
    names = CIFAR100DataModule.class_names
    assert len(set(names)) == 100
    assert names == sorted(names)
    folder = Path(os.environ.get("KD_TEST_DATA", "nowhere")) / "cifar100" / "test"
    if folder.exists():
        assert set(names) == {sheet.stem.rsplit("-", 1)[0] for sheet in folder.glob("*.webp")}
