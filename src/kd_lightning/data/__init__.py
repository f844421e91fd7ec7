"""Data sets, augmented views, and batching."""

from kd_lightning.data.cifar10 import CIFAR10DataModule
from kd_lightning.data.digits import DigitsDataModule
from kd_lightning.data.folder import FolderDataModule
from kd_lightning.data.module import ImageDataModule, Images
from kd_lightning.data.views import Augmentation, Views

__all__ = [
    "Augmentation",
    "CIFAR10DataModule",
    "DigitsDataModule",
    "FolderDataModule",
    "ImageDataModule",
    "Images",
    "Views",
]
