"""Image folders: train/<class>/*.png, test/<class>/*.png and, optionally, val/<class>/*.png."""

import hashlib
import logging
import os
import unicodedata
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kd_lightning.data.decoding import SUFFIXES, decode
from kd_lightning.data.module import ImageDataModule, Images
from kd_lightning.errors import InputError
from kd_lightning.files import readable, replacing

log = logging.getLogger(__name__)

DECODER = "2"  # part of the names of cached decoded images; increment when decoding changes
VALIDATION = ("val", "valid", "validation")

# Files and folders created by file managers and file systems, in lower case.
DROPPINGS = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle",
    "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip


class FolderDataModule(ImageDataModule):
    """Images in class sub-folders, decoded once and cached.

    The classes are the sub-folders of ``train``, in alphabetical order. Every file is decoded to
    RGB, upright, and resized to `image_size`. The result is cached in `cache_dir`, keyed by the
    names, sizes and modification times of all files.

    A folder ``val`` (or ``valid``, ``validation``) next to them is the validation set: all of
    ``train`` is then used for training, and `val_fraction` and `split_seed` have no effect.

    Args:
        root: folder that contains ``train`` and ``test``.
        cache_dir: folder for decoded images; None disables the cache.
        settings: see `ImageDataModule`.

    Raises:
        InputError: a folder is missing or empty, the parts have different classes, or a symbolic
            link points outside `root`.
    """

    def __init__(self, root: str, cache_dir: str | None = None, **settings: Any) -> None:
        self.root = Path(root).expanduser()
        # Per part, in the order of the indices: class name -> folder.
        self._folders = {part: self._class_folders(part) for part in self._find_parts()}
        self._classes = self._check_classes()
        super().__init__(**settings)
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else None

    def _find_parts(self) -> list[str]:
        root = readable(self.root)
        places = [self.root / name for name in VALIDATION]
        # Include broken links, which are rejected later instead of being ignored.
        own = [place.name for place in places if place.is_dir() or place.is_symlink()]
        if len(own) > 1:
            raise InputError(
                f"data.root={root} has the folders '{own[0]}' and '{own[1]}', but only one can be "
                "the validation set; remove or rename the other"
            )
        for part in ("train", "test"):
            if (self.root / part).is_dir():
                continue
            if part == "test" and own:
                raise InputError(
                    f"data.root={root} has no folder 'test', only 'train' and '{own[0]}'; rename "
                    f"'{own[0]}' to 'test' (validation images are then split off 'train'), or add "
                    f"test images as {root}/test/<class>/*.png"
                )
            raise InputError(
                f"data.root={root} has no folder '{part}'; expected are {root}/train/<class>/*.png "
                f"and {root}/test/<class>/*.png"
            )
        return ["train", *own, "test"]

    def _class_folders(self, part: str) -> dict[str, Path]:
        """Class name to folder, in alphabetical order."""
        folder = self.root / part
        if folder.is_symlink():
            self._check_link(folder)
        found: dict[str, Path] = {}
        for entry in self._visible(folder):
            if not entry.is_dir():
                continue
            # The same name may be composed (Linux) or decomposed (macOS) Unicode.
            name = unicodedata.normalize("NFC", readable(entry.name))
            if name in found:
                raise InputError(
                    f"{readable(folder)} has two folders for the class '{name}', whose names "
                    "differ only in Unicode normalization; merge or rename them"
                )
            found[name] = Path(entry.path)
        return dict(sorted(found.items()))

    def _check_classes(self) -> list[str]:
        train = self._folders["train"]
        if len(train) < 2:
            raise InputError(f"{readable(self.root / 'train')} needs at least two class folders")
        for part, folders in self._folders.items():
            if different := sorted(folders.keys() ^ train.keys()):
                root = readable(self.root)
                raise InputError(
                    f"{root}/train and {root}/{part} must have the same class folders; "
                    f"only one of them has: {', '.join(different)}"
                )
        return list(train)

    @property
    def classes(self) -> list[str]:
        """The names of the class folders."""
        return self._classes

    def count(self) -> int:
        """Number of files, without opening them."""
        folders = [
            folder for part in self._folders if part != "test"
            for folder in self._folders[part].values()
        ]  # fmt: skip
        return sum(len(self._visible(folder)) for folder in folders)

    def load(self) -> Images:
        """Decode every image, or read the decoded images from the cache."""
        self._tell_what_is_ignored()
        files: list[tuple[Path, int]] = []
        sizes: dict[str, int] = {}
        digest = hashlib.sha256(f"{DECODER} {self.image_size} {self._classes}".encode())
        for part, folders in self._folders.items():
            before = len(files)
            for label, folder in enumerate(folders.values()):
                members = list(self._files(folder, digest))
                if not members:
                    raise InputError(f"class folder {readable(folder)} holds no images")
                files += ((path, label) for path in members)
            sizes[part] = len(files) - before
        labels = torch.tensor([label for _, label in files])
        stored = (
            self.cache_dir / f"{digest.hexdigest()[:32]}.safetensors" if self.cache_dir else None
        )
        pixels = self._read_stored(stored, len(files)) if stored else None
        if pixels is None:
            pixels = self._decode([path for path, _ in files])
            if stored:
                self._store(pixels, stored)
        train_size = len(files) - sizes["test"]
        return Images(pixels, labels, train_size, val_size=train_size - sizes["train"])

    def _tell_what_is_ignored(self) -> None:
        for part in self._folders.keys() & set(VALIDATION):
            log.info(
                "%s is the validation set: all of train is used for training, data.val_fraction "
                "and data.split_seed have no effect", readable(self.root / part),
            )  # fmt: skip
        with os.scandir(self.root) as entries:
            others = [
                entry.name
                for entry in entries
                if entry.is_dir() and entry.name not in self._folders and not _is_hidden(entry.name)
            ]
        if others:
            log.warning(
                "the images in %s are not used: expected folders of data.root are train, test and, "
                "optionally, val",
                ", ".join(readable(self.root / name) for name in sorted(others)),
            )
        for part in self._folders:
            loose = [entry.name for entry in self._visible(self.root / part) if _is_image(entry)]
            if loose:
                log.warning(
                    "%d images in %s are not used, because they are not in a class folder: e.g. %s",
                    len(loose), readable(self.root / part), readable(loose[0]),
                )  # fmt: skip

    def _files(self, folder: Path, digest: "hashlib._Hash") -> Iterator[Path]:
        for entry in self._visible(folder):
            if not _is_image(entry):
                raise InputError(
                    f"{readable(entry.path)} is not an image file "
                    f"({', '.join(sorted(SUFFIXES))}); remove it from the class folder"
                )
            status = entry.stat()
            if not status.st_size:
                raise InputError(f"{readable(entry.path)} is empty; repair or remove it")
            digest.update(os.fsencode(entry.path))
            digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
            yield Path(entry.path)

    def _visible(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                visible = sorted((e for e in entries if not _is_hidden(e.name)), key=_name)
        except OSError as error:
            raise InputError(f"{readable(folder)} cannot be read: {error.strerror}") from error
        for entry in visible:
            if entry.is_symlink():
                self._check_link(Path(entry.path))
        return visible

    def _check_link(self, link: Path) -> None:
        """Reject links to outside `root`, so that untrusted data cannot read other files."""
        try:
            inside = link.resolve(strict=True).is_relative_to(self.root.resolve())
        except (OSError, RuntimeError) as error:  # a broken link or a loop
            raise InputError(f"{readable(link)} is a broken link; remove it") from error
        if not inside:
            raise InputError(
                f"{readable(link)} is a link to outside data.root={readable(self.root)}; "
                "copy the files there, or use the folder that contains them as data.root"
            )

    def _decode(self, paths: list[Path]) -> torch.Tensor:
        pixels = np.empty((len(paths), self.image_size, self.image_size, 3), dtype=np.uint8)

        def decode_one(number: int) -> None:
            try:
                pixels[number] = decode(paths[number], self.image_size)
            except MemoryError:
                raise
            except Exception as error:  # Pillow may raise anything on damaged files
                raise InputError(
                    f"{readable(paths[number])} is not a readable image ({error}); "
                    "repair or remove it"
                ) from error

        # Pillow releases the GIL while decoding.
        with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
            warnings.filterwarnings("ignore", module="PIL")  # about unused metadata
            for _ in pool.map(decode_one, range(len(paths))):
                pass
        return torch.from_numpy(pixels)

    def _read_stored(self, stored: Path, count: int) -> torch.Tensor | None:
        try:
            pixels = load_file(stored)["pixels"]
        except (OSError, SafetensorError, KeyError):
            return None  # missing or damaged: decode again
        shape = (count, self.image_size, self.image_size, 3)
        return pixels if pixels.shape == shape and pixels.dtype == torch.uint8 else None

    def _store(self, pixels: torch.Tensor, stored: Path) -> None:
        """Cache the decoded images; a failure is not an error, as the cache only saves time."""
        try:
            with replacing(stored) as partial:
                save_file({"pixels": pixels}, partial)
        except (OSError, SafetensorError) as error:
            log.warning(
                "decoded images cannot be cached in %s (%s), so the next run decodes them again; "
                "to avoid this, free disk space or choose another data_dir",
                readable(stored.parent), error,
            )  # fmt: skip


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in DROPPINGS


def _is_image(entry: os.DirEntry[str]) -> bool:
    return entry.is_file() and Path(entry.name).suffix.lower() in SUFFIXES
