"""CIFAR-10 (Krizhevsky 2009): the official archive, downloaded and checksummed by torchvision."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

from kd_lightning.data.module import ImageDataModule, Images
from kd_lightning.errors import InputError

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class CIFAR10DataModule(ImageDataModule):
    """50,000 training and 10,000 test images of 32x32 pixels in ten classes.

    Args:
        root: folder that holds the archive, or that it is downloaded to (170 MB).
        settings: see `ImageDataModule`.
    """

    def __init__(self, root: str, **settings: Any) -> None:
        super().__init__(**settings)
        if self.image_size != 32:
            raise ValueError(f"image_size of CIFAR-10 is 32, not {self.image_size}")
        self.root = Path(root).expanduser()

    @property
    def classes(self) -> list[str]:
        """The ten names."""
        return CLASSES

    def load(self) -> Images:
        """Download the archive unless it is there and whole, and read it."""
        archive = self.root / CIFAR10.filename
        damaged = archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # Two runs started together must not write the same archive at once.
            with FileLock(self.root / f"{CIFAR10.filename}.lock"):
                parts = [CIFAR10(str(self.root), train=t, download=True) for t in (True, False)]
        except PermissionError as error:
            raise InputError(f"data_dir={self.root} cannot be written: {error.strerror}") from error
        except Exception as error:
            # torchvision raises whatever the network, tar or pickle raised.
            what = "is damaged (wrong checksum) and" if damaged else "is not there and"
            raise InputError(
                f"{archive} {what} could not be downloaded from {CIFAR10.url} ({error}); "
                "put the file there by hand, or use data=digits, which needs no download, "
                "or data=folder with images of your own"
            ) from error
        pixels = torch.from_numpy(np.concatenate([part.data for part in parts]))
        labels = torch.tensor([label for part in parts for label in part.targets])
        return Images(pixels, labels, train_size=len(parts[0].data))
