"""Data sets, augmented views, and batching."""

from kd_lightning.data.cifar import CIFAR10DataModule, CIFAR100DataModule
from kd_lightning.data.digits import DigitsDataModule
from kd_lightning.data.folder import FolderDataModule
from kd_lightning.data.mixing import CutMix, Mixing, Mixup
from kd_lightning.data.module import ImageDataModule, Images
from kd_lightning.data.operations import RandomOperations
from kd_lightning.data.resized_crop import ResizedCrop
from kd_lightning.data.views import Augmentation, Views
from kd_lightning.data.zero_padding import ZeroPadding

__all__ = [
    "Augmentation",
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CutMix",
    "DigitsDataModule",
    "FolderDataModule",
    "ImageDataModule",
    "Images",
    "Mixing",
    "Mixup",
    "RandomOperations",
    "ResizedCrop",
    "Views",
    "ZeroPadding",
]
