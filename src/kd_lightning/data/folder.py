"""Image folders: train/<class>/*.png, test/<class>/*.png and, optionally, val/<class>/*.png."""

import hashlib
import logging
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kd_lightning.data.decoding import RESIZE, read_image
from kd_lightning.data.listing import Files, FolderListing
from kd_lightning.data.machine import memory_limit, processes_here
from kd_lightning.data.module import ImageDataModule, Images
from kd_lightning.data.streamed import StreamedImages
from kd_lightning.files import readable, replacing

log = logging.getLogger(__name__)

DECODER = "2"  # part of the names of cached decoded images; increment when decoding changes

SHARE = 0.5
"""Share of the memory that decoded images may need before they are streamed."""


class FolderDataModule(ImageDataModule):
    """Images in class sub-folders, decoded once and cached.

    The classes are the sub-folders of ``train``, in alphabetical order. Every file is decoded to
    RGB, upright, and resized to `stored_size`. The result is cached in `cache_dir`, keyed by the
    names, sizes and times of the last change of all files.

    If they do not fit into memory, images are streamed: decoded when they are first needed, and
    kept in a file in `cache_dir`; see `streamed`.

    A folder ``val`` (or ``valid``, ``validation``) next to them is the validation set: all of
    ``train`` is then used for training, and `val_fraction` and `split_seed` have no effect. In
    ImageNet and Tiny ImageNet it is the test set, since they publish no labels of their test
    images. See `listing` for the layouts.

    Args:
        root: folder that contains ``train`` and ``test``.
        cache_dir: folder for decoded images; None disables the cache.
        resize: ``squash``, ``crop`` or ``pad``; see `decoding.to_square`.
        test_folder: name of the folder with the test images; None: ``test``, or the above.
        stored_size: height and width that images are decoded to, in pixels; None: `image_size`. If
            it is larger, views are crops, and images without augmentation are the centre.
        streamed: whether images are streamed; ``auto``: if they would need more than half of the
            memory of the machine or container, together with those of its other processes of this
            training.
        workers: number of threads that decode streamed images; None: as many as processor cores.
        settings: see `ImageDataModule`.

    Raises:
        InputError: a folder is missing or empty, the parts have different classes, or a symbolic
            link points outside `root`.
    """

    def __init__(
        self,
        root: str,
        cache_dir: str | None = None,
        resize: str = "squash",
        test_folder: str | None = None,
        stored_size: int | None = None,
        streamed: bool | str = "auto",
        workers: int | None = None,
        **settings: Any,
    ) -> None:
        if streamed not in (True, False, "auto"):
            raise ValueError(f"streamed must be true, false or auto, not {streamed}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be null or at least 1, not {workers}")
        if resize not in RESIZE:
            raise ValueError(f"resize must be one of {', '.join(RESIZE)}, not {resize}")
        self.root = Path(root).expanduser()
        self.resize = resize
        self.listing = FolderListing(self.root, test_folder)
        super().__init__(**settings)
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None
        self.streamed, self.workers = streamed, workers
        if stored_size is not None and stored_size < self.image_size:
            raise ValueError(
                f"stored_size must be null or at least image_size={self.image_size}, "
                f"not {stored_size}"
            )
        self.stored_size = stored_size or self.image_size
        if self.stored_size > self.image_size:
            self.view_size = self.image_size
            if why := self.cannot_render("size"):
                raise ValueError(f"stored_size must be null: {why}")
        if streamed is True and (why := self.cannot_render("rows")):
            raise ValueError(f"streamed must be false or auto: {why}")

    @property
    def classes(self) -> list[str]:
        """The names of the class folders, or of what their WordNet ids stand for."""
        return self.listing.classes

    def count(self) -> int:
        """Number of training and validation images, without opening them."""
        return self.listing.count()

    def load(self) -> Images:
        """Decode every image, or read the decoded images from the cache."""
        self.listing.describe()
        files = self.listing.files(self._decoded_as())
        if self._is_streamed(len(files.paths)):
            return Images(self._stream(files), files.labels, files.train_size, files.val_size)
        stored = self.cache_dir / f"{files.digest[:32]}.safetensors" if self.cache_dir else None
        pixels = self._read_stored(stored, len(files.paths)) if stored else None
        if pixels is None:
            pixels = self._decode(files.paths)
            if stored:
                self._store(pixels, stored)
        return Images(pixels, files.labels, files.train_size, files.val_size)

    def _is_streamed(self, count: int) -> bool:
        if self.streamed != "auto":
            return bool(self.streamed)
        needed, limit = count * 3 * self.stored_size**2 * processes_here(), memory_limit()
        if needed <= SHARE * limit:
            return False
        what = f"{needed / 1e9:.3g} GB of decoded images for {limit / 1e9:.3g} GB of memory"
        if why := self.cannot_render("rows"):
            log.warning("%s, but they cannot be streamed: %s", what, why)
            return False
        log.info("%s: they are streamed", what)
        return True

    def _stream(self, files: Files) -> StreamedImages:
        place = hashlib.sha256(os.fsencode(self.root.resolve())).hexdigest()[:32]
        return StreamedImages(
            files.paths, self.stored_size, self.resize, DECODER, self.cache_dir, place, self.workers
        )

    def _decoded_as(self) -> str:
        """What decoded images depend on besides the files."""
        key = f"{DECODER} {self.stored_size} {self.listing.names}"
        return key if self.resize == "squash" else f"{key} {self.resize}"

    def _decode(self, paths: list[str]) -> torch.Tensor:
        pixels = np.empty((len(paths), self.stored_size, self.stored_size, 3), dtype=np.uint8)

        # Several files per task: for a small file the overhead of a task is as large as decoding.
        chunk = max(1, min(64, len(paths) // 64))

        def decode_chunk(first: int) -> None:
            for number in range(first, min(first + chunk, len(paths))):
                pixels[number] = read_image(Path(paths[number]), self.stored_size, self.resize)

        # Pillow releases the GIL while decoding.
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            warnings.filterwarnings("ignore", module="PIL")  # about unused metadata
            for _ in pool.map(decode_chunk, range(0, len(paths), chunk)):
                pass
        return torch.from_numpy(pixels)

    def _read_stored(self, stored: Path, count: int) -> torch.Tensor | None:
        try:
            content = load_file(stored)
            pixels, digest = content["pixels"], content["sha256"]
        except (OSError, SafetensorError, KeyError):
            return None  # missing or damaged: decode again
        shape = (count, self.stored_size, self.stored_size, 3)
        if pixels.shape != shape or pixels.dtype != torch.uint8:
            return None
        return pixels if torch.equal(digest, _sha256(pixels)) else None

    def _store(self, pixels: torch.Tensor, stored: Path) -> None:
        """Cache the decoded images; a failure is not an error, as the cache only saves time."""
        try:
            with replacing(stored) as partial:
                save_file({"pixels": pixels, "sha256": _sha256(pixels)}, partial)
        except (OSError, SafetensorError) as error:
            log.warning(
                "decoded images cannot be cached in %s (%s), so the next run decodes them again; "
                "to avoid this, free disk space or choose another data_dir",
                readable(stored.parent), error,
            )  # fmt: skip


def _sha256(pixels: torch.Tensor) -> torch.Tensor:
    """The SHA-256 of pixels (32,), uint8."""
    digest = hashlib.sha256(pixels.contiguous().numpy().data).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
