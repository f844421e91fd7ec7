"""Image folders: train/<class>/*.png|jpg and test/<class>/*.png|jpg."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kd_lightning.data.module import ImageDataModule, Images
from kd_lightning.errors import InputError
from kd_lightning.files import replacing

SUFFIXES = {".png", ".jpg", ".jpeg"}
DECODER = "1"  # part of the name of a stored decoding; raise it when decoding changes


class FolderDataModule(ImageDataModule):
    """Images in class sub-folders, decoded once and kept decoded.

    The classes are the sub-folders of ``train``, in alphabetical order. Every file is decoded,
    converted to RGB and resized to `image_size`. The result is stored in `cache_dir` under the
    names, sizes and times of all files, so that the next run starts at once.

    Args:
        root: folder that holds ``train`` and ``test``.
        cache_dir: folder for decoded images; None decodes every time.
        settings: see `ImageDataModule`.

    Raises:
        InputError: a folder is missing or empty, ``train`` and ``test`` differ in classes, or a
            symbolic link leads out of `root`.
    """

    def __init__(self, root: str, cache_dir: str | None = None, **settings: Any) -> None:
        self.root = Path(root).expanduser()
        self._classes = self._find_classes()
        super().__init__(**settings)
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None

    def _find_classes(self) -> list[str]:
        found = {}
        for part in ("train", "test"):
            folder = self.root / part
            if not folder.is_dir():
                raise InputError(
                    f"data.root={self.root} has no folder '{part}'; expected are "
                    f"{self.root}/train/<class>/*.png and {self.root}/test/<class>/*.png"
                )
            if folder.is_symlink():
                self._check_link(folder)
            found[part] = sorted(e.name for e in self._visible(folder) if e.is_dir())
        if len(found["train"]) < 2:
            raise InputError(f"{self.root / 'train'} needs at least two class folders")
        if found["train"] != found["test"]:
            different = sorted(set(found["train"]) ^ set(found["test"]))
            raise InputError(
                f"{self.root}/train and {self.root}/test must have the same class folders; "
                f"only one of them has: {', '.join(different)}"
            )
        return found["train"]

    @property
    def classes(self) -> list[str]:
        """The names of the class folders."""
        return self._classes

    def load(self) -> Images:
        """Decode every image, or read what an earlier run decoded."""
        files: list[tuple[Path, int]] = []
        digest = hashlib.sha256(f"{DECODER} {self.image_size} {self._classes}".encode())
        train_size = 0
        for part in ("train", "test"):
            for label, name in enumerate(self._classes):
                members = list(self._files(self.root / part / name, digest))
                if not members:
                    raise InputError(f"class folder {self.root / part / name} holds no images")
                files += ((path, label) for path in members)
            train_size = train_size or len(files)
        labels = torch.tensor([label for _, label in files])
        stored = (
            self.cache_dir / f"{digest.hexdigest()[:32]}.safetensors" if self.cache_dir else None
        )
        pixels = self._read_stored(stored, len(files)) if stored else None
        if pixels is None:
            pixels = self._decode([path for path, _ in files])
            if stored:
                self._store(pixels, stored)
        return Images(pixels, labels, train_size)

    def _files(self, folder: Path, digest: "hashlib._Hash") -> Iterator[Path]:
        for entry in self._visible(folder):
            if Path(entry.name).suffix.lower() not in SUFFIXES:
                raise InputError(
                    f"{entry.path} is not an image (png or jpg); remove it from the class folder"
                )
            status = entry.stat()
            digest.update(f"{entry.path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
            yield Path(entry.path)

    def _visible(self, folder: Path) -> list[os.DirEntry[str]]:
        with os.scandir(folder) as entries:
            visible = sorted((e for e in entries if e.name[0] != "."), key=lambda e: e.name)
        for entry in visible:
            if entry.is_symlink():
                self._check_link(Path(entry.path))
        return visible

    def _check_link(self, link: Path) -> None:
        """A stranger's folder must not make other files of this machine training data."""
        try:
            inside = link.resolve(strict=True).is_relative_to(self.root.resolve())
        except (OSError, RuntimeError) as error:  # it leads nowhere, or round in circles
            raise InputError(f"{link} is a link that leads nowhere; remove it") from error
        if not inside:
            raise InputError(
                f"{link} is a link that leads out of data.root={self.root}; put the files "
                "themselves there, or choose the folder that has them as data.root"
            )

    def _decode(self, paths: list[Path]) -> torch.Tensor:
        pixels = np.empty((len(paths), self.image_size, self.image_size, 3), dtype=np.uint8)

        def decode(number: int) -> None:
            try:
                with Image.open(paths[number]) as file:
                    image = file.convert("RGB")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                raise InputError(
                    f"{paths[number]} is not an image that can be read ({error}); "
                    "repair or remove it"
                ) from error
            if image.size != (self.image_size, self.image_size):
                image = image.resize(
                    (self.image_size, self.image_size), Image.Resampling.BILINEAR, reducing_gap=3
                )
            pixels[number] = np.asarray(image)

        # Pillow decodes without the interpreter lock.
        with ThreadPoolExecutor() as pool:
            for _ in pool.map(decode, range(len(paths)), chunksize=64):
                pass
        return torch.from_numpy(pixels)

    def _read_stored(self, stored: Path, count: int) -> torch.Tensor | None:
        try:
            pixels = load_file(stored)["pixels"]
        except (OSError, SafetensorError, KeyError):
            return None  # absent or damaged: decode again
        shape = (count, self.image_size, self.image_size, 3)
        return pixels if pixels.shape == shape and pixels.dtype == torch.uint8 else None

    def _store(self, pixels: torch.Tensor, stored: Path) -> None:
        try:
            with replacing(stored) as partial:
                save_file({"pixels": pixels}, partial)
        except OSError as error:
            raise InputError(
                f"decoded images cannot be stored in {stored.parent} ({error.strerror}); free some "
                "space, choose another data_dir, or set data.cache_dir=null"
            ) from error
