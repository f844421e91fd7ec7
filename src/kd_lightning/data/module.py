"""The data module: uint8 images, batches of views rendered on the model's device."""

import copy
import functools
import hashlib
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from kd_lightning.data.loading import Batch, Shown, ViewLoader, ViewSampler
from kd_lightning.data.mixing import Mixing, Mixture, blend
from kd_lightning.data.sources import Fetched, InMemoryImages, PixelSource
from kd_lightning.data.splits import evaluation_order, stratified_split
from kd_lightning.data.views import PLAIN, Augmentation, Views, check_seed
from kd_lightning.errors import InputError
from kd_lightning.transfer import to_device


class Images(NamedTuple):
    """Images: training images first, test images last.

    Attributes:
        pixels: (N, H, W, 3), uint8, or a source that delivers them by batches.
        labels: (N,), int64.
        train_size: number of training and validation images.
        val_size: how many of these, at the end, are the source's own validation set; 0: the
            validation set is split off the training images.
    """

    pixels: Tensor | PixelSource
    labels: Tensor
    train_size: int
    val_size: int = 0


class ImageDataModule(LightningDataModule):
    """Base class of data sets of uint8 images, in memory or streamed.

    A batch is a set of (index, view) pairs. Its pixels are rendered on the training device: crop,
    flip and normalisation of whole batches in a few tensor operations. Indices cover the training
    images, then the test images; unless the source has its own validation set, it is split off the
    training images, stratified by class.

    A subclass provides `classes` and `load`.

    Attributes:
        labels: labels of all images (N,), int64, after `setup`.
        reproducible: whether a view is the same every time it is rendered. A subclass with other
            random augmentation sets it to False, so that teacher outputs are not cached.

    Args:
        name: name of the data set.
        batch_size: images per training batch.
        eval_batch_size: images per validation or test batch.
        val_fraction: fraction of the training images held out for validation, in (0, 1).
        split_seed: seed of the validation split, 0 to 2^32 - 1.
        mean: per-channel mean of pixel values scaled to [0, 1].
        std: per-channel standard deviation; mean and std of 0.5 normalise to [-1, 1].
        padding: maximum shift of a training crop, in pixels.
        flip: whether half of the training views are flipped horizontally.
        cutout: side of a grey square in every training view, in pixels; 0: none.
        view_seed: seed of the crops and flips, 0 to 2^32 - 1.
        views: number of views per image, repeated cyclically; None: a new view every epoch.
        seed: seed of the order of the training images, 0 to 2^32 - 1.
        image_size: height and width of the images, in pixels.
        num_classes: number of classes; None: as many as the source has.
        augmentation: renders the student's training views instead of padding, flip and cutout; see
            `Views`.
        mixing: mixes the student's training views; see `Mixing`.

    Raises:
        ValueError: an argument is out of range.
    """

    reproducible: ClassVar[bool] = True

    def __init__(
        self,
        *,
        name: str,
        batch_size: int = 256,
        eval_batch_size: int = 500,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        std: Sequence[float] = (0.5, 0.5, 0.5),
        padding: int = 4,
        flip: bool = True,
        cutout: int = 0,
        view_seed: int = 0,
        views: int | None = None,
        seed: int = 0,
        image_size: int = 32,
        num_classes: int | None = None,
        augmentation: Views | None = None,
        mixing: Mixing | None = None,
    ) -> None:
        super().__init__()
        for key, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{key} must be a whole number of at least 1, not {size}")
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be above 0 and below 1, not {val_fraction}")
        for key, number in (("split_seed", split_seed), ("view_seed", view_seed), ("seed", seed)):
            check_seed(key, number)
        if views is not None and (not isinstance(views, int) or views < 1):
            raise ValueError(f"views must be null or a whole number of at least 1, not {views}")
        numbers = all(isinstance(value, int | float) for value in (*mean, *std))
        if not numbers or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError("mean and std need three numbers each, those of std above 0")
        if not isinstance(image_size, int) or image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, not {image_size}")
        if padding >= image_size:
            raise ValueError(f"padding must be below the image size {image_size}, not {padding}")
        self.name = name
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.mean, self.std = tuple(mean), tuple(std)
        self.padding, self.flip = padding, flip
        self.augmentation: Views = augmentation or Augmentation(
            padding, flip, cutout, seed=view_seed
        )
        for key, value, method in (
            ("augmentation", augmentation, "render"),
            ("mixing", mixing, "mixture"),
        ):
            if value is not None and not callable(getattr(value, method, None)):
                raise ValueError(
                    f"{key} must be an object with a method {method}, as the choices of the group "
                    f"augmentation, not {value!r}"
                )
        self.mixing = mixing
        self.views, self.seed = views, seed
        self.image_size = image_size
        if num_classes is not None and num_classes != len(self.classes):
            raise ValueError(
                f"num_classes is {num_classes}, but {name} has {len(self.classes)} classes"
            )
        self.splits: dict[str, Tensor] = {}
        self._val_size = 0
        self._fingerprint = ""
        # Height and width of the views, if those of the loaded images are larger.
        self.view_size: int | None = None

    @property
    def classes(self) -> list[str]:
        """Class names, in label order; available without decoding an image."""
        raise NotImplementedError

    def load(self) -> Images:
        """Fetch and decode the images.

        Raises:
            InputError: they are missing, damaged or invalid.
        """
        raise NotImplementedError

    def count(self) -> int:
        """Number of training and validation images; subclasses may return it without decoding.

        Raises:
            InputError: as `load`.
        """
        self.setup()
        return self.train_size

    def setup(self, stage: str | None = None) -> None:
        """Load and split the images; later calls do nothing.

        Raises:
            InputError: as `load`, or the training part is smaller than a batch, or there are no
                test images.
        """
        if self.splits:
            return
        images = Images(*self.load())
        pixels, self.labels, train_size = images.pixels, images.labels, images.train_size
        self.pixel_source: PixelSource = (
            InMemoryImages(pixels) if isinstance(pixels, Tensor) else pixels
        )
        self._val_size, self._fingerprint = images.val_size, ""
        if images.val_size:
            train, val = torch.arange(train_size).split(
                [train_size - images.val_size, images.val_size]
            )
        else:
            train, val = stratified_split(
                self.labels[:train_size], self.val_fraction, self.split_seed, self.classes
            )
        if self.batch_size > len(train):
            raise InputError(
                f"data.batch_size={self.batch_size} is larger than the {len(train)} training "
                f"images of {self.name}; use at most {len(train)}"
            )
        test = torch.arange(train_size, len(self.labels))
        if not len(test):
            raise InputError(f"{self.name} has no test images, with which every run ends")
        self.splits = {"train": train, "val": val, "test": test}

    def cannot_render(self, *parameters: str) -> str:
        """Why the renderer of the views cannot be used; empty if it can.

        Args:
            parameters: optional parameters of `Views.render` that are needed.
        """
        renderer: Any = self.augmentation
        while hasattr(renderer, "render"):
            known = inspect.signature(renderer.render).parameters
            if missing := [name for name in parameters if name not in known]:
                return f"{type(renderer).__name__}.render has no parameter '{missing[0]}'"
            renderer = getattr(renderer, "of", None)  # whose views it modifies
        return ""

    def variant(self, **attributes: Any) -> "ImageDataModule":
        """A copy that shares the images but has another seed, mean, std or augmentation."""
        twin = copy.copy(self)
        twin.trainer = None
        for name, value in attributes.items():
            setattr(twin, name, value)
        return twin

    def forget(self) -> None:
        """Release the images; `setup` loads them again.

        Trainer, module and data refer to each other: without this, the images of finished runs stay
        in memory until Python's garbage collector looks for such cycles, which is rare.
        """
        self.splits = {}
        for name in ("pixel_source", "labels"):
            vars(self).pop(name, None)

    def fingerprint(self) -> str:
        """SHA-256 of all pixels (of all files if they are streamed), labels and the sizes of the
        test set and of the source's own validation set.
        """
        if not self._fingerprint:
            sizes: tuple[Any, ...] = (tuple(self.pixel_source.shape), len(self.splits["test"]))
            if self._val_size:
                sizes = (*sizes, self._val_size)
            if self.view_size is not None:
                sizes = (*sizes, f"views of {self.view_size}")
            digest = hashlib.sha256(str(sizes).encode())
            for part in self.pixel_source.contents():
                digest.update(part)
            digest.update(self.labels.cpu().numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    @property
    def train_size(self) -> int:
        """Number of training and validation images; their indices come first."""
        return len(self.labels) - len(self.splits["test"])

    def _loader(self, split: str, shuffle: bool = False) -> ViewLoader:
        size = self.batch_size if shuffle else self.eval_batch_size
        rank, world, needed = 0, 1, 1
        if self.trainer is not None:
            rank, world = self.trainer.global_rank, self.trainer.world_size
            needed = getattr(self.trainer.lightning_module, "min_batch_size", 1) if shuffle else 1
            device = self.trainer.strategy.root_device
            self.pixel_source, self.labels = self.pixel_source.to(device), self.labels.to(device)
        images = self.splits[split]
        if shuffle:
            self.check_batch_size(needed * world)
        else:
            part = getattr(self.trainer, f"limit_{split}_batches", 1.0)
            images = evaluation_order(images, size, part)
        sampler = ViewSampler(
            images, size, shuffle, self.seed, self.views, rank, world, needed * world
        )
        limit = self.pixel_source.batch_limit
        fetch = None if limit is None else self._fetch_pixels
        return ViewLoader(sampler, self._cut, self._finish, fetch, limit)

    def check_batch_size(self, needed: int) -> None:
        """Check that a training batch is large enough for BatchNorm.

        Args:
            needed: minimum batch size over all processes.

        Raises:
            InputError: it is too small.
        """
        if self.batch_size < needed:
            raise InputError(
                f"data.batch_size={self.batch_size} is too small: BatchNorm over one value per "
                f"channel and image needs at least {needed} images per batch"
            )

    def train_dataloader(self) -> ViewLoader:
        """Views of the training images, in a new order every epoch."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> ViewLoader:
        """The validation images, without augmentation."""
        return self._loader("val")

    def test_dataloader(self) -> ViewLoader:
        """The test images, without augmentation."""
        return self._loader("test")

    def render(self, index: Tensor, view: Tensor) -> Batch:
        """Render a batch of views.

        Args:
            index: image indices (B,), int64.
            view: view numbers (B,), int64.

        Returns:
            ``images`` (B, 3, H, W), float32, normalised, channels-last; ``labels`` (B,), int64;
            ``shown``, the arguments. If images are mixed, also ``partner_labels`` (B,), int64, and
            ``ratio`` (B,), float32: the share of ``labels``.
        """
        return self._finish({"shown": Shown(index, view), **self._cut(index, view)})

    def _fetch_pixels(self, index: Tensor, view: Tensor) -> list[Fetched]:
        """The pixels of a batch and, if it is mixed, of the partners."""
        fetched = [self.pixel_source.fetch(index)]
        if self._is_mixed(view):
            size = (self.image_size, self.image_size)
            partner = self._mixture(index, view, size).partner
            fetched.append(self.pixel_source.fetch(partner))
        return fetched

    def _is_mixed(self, view: Tensor) -> bool:
        return self.mixing is not None and bool((view != PLAIN).any())

    def _mixture(self, index: Tensor, view: Tensor, size: tuple[int, int]) -> Mixture:
        assert self.mixing is not None
        return self.mixing.mixture(index, view, self.splits["train"], size)

    def _cut(self, index: Tensor, view: Tensor, fetched: list[Fetched] | None = None) -> Batch:
        """Render views.

        Args:
            index: image indices (B,), int64.
            view: view numbers (B,), int64.
            fetched: result of `_fetch_pixels`.
        """
        own, *others = self._fetch_pixels(index, view) if fetched is None else fetched
        device = self.pixel_source.device
        images = self._render(own, index, view)
        batch = {"labels": self.labels[to_device(index, device)]}
        if others:
            mixture = self._mixture(index, view, (images.shape[2], images.shape[3]))
            images = blend(images, self._render(others[0], mixture.partner, view), mixture)
            batch |= {
                "partner_labels": self.labels[to_device(mixture.partner, device)],
                "ratio": to_device(mixture.ratio, device),
            }
        return {"images": images, **batch}

    def _render(self, fetched: Fetched, index: Tensor, view: Tensor) -> Tensor:
        images, rows = fetched
        optional: dict[str, Any] = {"rows": rows, "size": self.view_size}
        given = {name: value for name, value in optional.items() if value is not None}
        if given and (why := self.cannot_render(*given)):
            raise InputError(f"images of {self.name} cannot be streamed or stored larger: {why}")
        return self.augmentation.render(images, index, view, **given)

    def _finish(self, batch: Batch) -> Batch:
        return {**batch, "images": self._normalize(batch["images"])}

    def transfer_batch_to_device(self, batch: Batch, device: Any, dataloader_idx: int) -> Batch:
        """No-op: pixels and labels are created on the device, and view numbers stay on the CPU,
        where cached teacher outputs are looked up without synchronising.
        """
        return batch

    def _normalize(self, views: Tensor) -> Tensor:
        """(B, 3, H, W) uint8, channels-last, to float32."""
        pixels = views.permute(0, 2, 3, 1)
        count = views.shape[2] * views.shape[3]
        shift, scale = _shift_and_scale(self.mean, self.std, count, views.device)
        flat = torch.addcmul(shift, pixels.view(len(pixels), -1), scale)
        return flat.view(pixels.shape).permute(0, 3, 1, 2)

    def state_dict(self) -> dict[str, Any]:
        """Empty: views and order are functions of indices, seed and epoch."""
        return {}


@functools.lru_cache(maxsize=8)
def _shift_and_scale(
    mean: tuple[float, ...], std: tuple[float, ...], pixels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Shift and scale that normalise the values 0 to 255 of an image.

    Repeated for every pixel, so that the inner loop is long and contiguous; broadcasting over
    three channels is slower.
    """
    average, deviation = torch.tensor((mean, std)).double()  # on the CPU: not all GPUs have float64
    shift, scale = -average / deviation, 1 / (255 * deviation)
    return shift.float().repeat(pixels).to(device), scale.float().repeat(pixels).to(device)
