"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the official archives, downloaded and checksummed by
torchvision.
"""

import errno
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, extract_archive

from kd_lightning.data.module import ImageDataModule, Images
from kd_lightning.errors import InputError
from kd_lightning.files import readable

CIFAR10_CLASSES = [
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
]  # fmt: skip
CIFAR100_CLASSES = [
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle",
    "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle",
    "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch",
    "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox",
    "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom",
    "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree",
    "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
    "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
    "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle",
    "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
]  # fmt: skip
TRAIN_SIZE = 50_000
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.ENOSPC)


class CifarDataModule(ImageDataModule):
    """50,000 training and 10,000 test images of 32x32 pixels.

    Attributes:
        source: torchvision's class of the data set.
        class_names: in the order of the labels in the archive.

    Args:
        root: folder with the archive, which is downloaded if missing.
        settings: see `ImageDataModule`.
    """

    source: ClassVar[type[CIFAR10]]
    class_names: ClassVar[list[str]]

    def __init__(self, root: str, **settings: Any) -> None:
        super().__init__(**settings)
        if self.image_size != 32:
            raise ValueError(f"image_size of CIFAR is 32, not {self.image_size}")
        self.root = Path(root).expanduser()

    @property
    def classes(self) -> list[str]:
        """The class names."""
        return self.class_names

    def count(self) -> int:
        """50,000."""
        return TRAIN_SIZE

    def load(self) -> Images:
        """Read the images; download and unpack the archive if necessary."""
        parts = self._read() or self._fetch()
        # torchvision's arrays are transposed views, and concatenation keeps their memory order.
        pixels = np.ascontiguousarray(np.concatenate([part.data for part in parts]))
        labels = torch.tensor([label for part in parts for label in part.targets])
        return Images(torch.from_numpy(pixels), labels, train_size=len(parts[0].data))

    def _read(self) -> list[CIFAR10]:
        """Training and test part, if the archive is completely unpacked."""
        try:
            return [self.source(str(self.root), train=train) for train in (True, False)]
        except (OSError, RuntimeError):
            return []

    def _fetch(self) -> list[CIFAR10]:
        archive = self.root / self.source.filename
        whole = self._is_whole(archive)
        damaged = archive.exists() and not whole
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # Concurrent runs must not write the same archive.
            with FileLock(self.root / f"{self.source.filename}.lock"):
                return [self.source(str(self.root), train=t, download=True) for t in (True, False)]
        except Exception as error:
            # torchvision passes on any exception of the network, tar or pickle.
            if whole:
                return self._unpack_elsewhere(archive)
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                raise InputError(
                    f"data_dir={readable(self.root)} cannot be written: {error.strerror}"
                ) from error
            what = "is damaged (wrong checksum) and" if damaged else "is missing and"
            raise InputError(
                f"{readable(archive)} {what} could not be downloaded from "
                f"{self.source.url} ({error}); put the file there by hand, or use data=digits, "
                "which needs no download, or data=folder with your own images"
            ) from error

    def _unpack_elsewhere(self, archive: Path) -> list[CIFAR10]:
        """Read an intact archive whose folder is read-only or full, via a temporary folder."""
        try:
            with TemporaryDirectory() as folder:
                extract_archive(str(archive), folder)
                return [self.source(folder, train=train) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            raise InputError(f"{readable(archive)} cannot be unpacked: {error}") from error

    def _is_whole(self, archive: Path) -> bool:
        try:
            return bool(check_integrity(str(archive), self.source.tgz_md5))
        except OSError:
            return False


class CIFAR10DataModule(CifarDataModule):
    """CIFAR-10: ten classes; 170 MB to download."""

    source = CIFAR10
    class_names = CIFAR10_CLASSES


class CIFAR100DataModule(CifarDataModule):
    """CIFAR-100, with its 100 fine labels; 169 MB to download."""

    source = CIFAR100
    class_names = CIFAR100_CLASSES
