"""The files of an image folder: parts, classes and labels, without opening an image.

    root/train/<class>/*.png    class folders, as torchvision's ImageFolder
    root/train/<class>/images/  the same, as in Tiny ImageNet
    root/val/images/            with root/val/val_annotations.txt, as in Tiny ImageNet

Parts are ``train``, ``test`` and, optionally, ``val``. ImageNet and Tiny ImageNet publish no labels
of their test images: there, ``val`` is the test set.
"""

import hashlib
import logging
import os
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from kd_lightning.data.annotations import WORDNET, read_annotations, readable_names
from kd_lightning.data.decoding import is_image_name
from kd_lightning.data.scanning import Scanner, is_hidden
from kd_lightning.errors import InputError
from kd_lightning.files import readable

log = logging.getLogger(__name__)

VALIDATION = ("val", "valid", "validation")
IMAGES = "images"  # a folder between class and images, in Tiny ImageNet


class Files(NamedTuple):
    """Image files: training images first, then validation, then test; each by class, then name.

    Attributes:
        paths: of N files; plain strings, which take a third of the memory of `Path`.
        labels: (N,), int64.
        train_size: number of training and validation images.
        val_size: how many of these are the source's own validation set; 0: there is none.
        digest: SHA-256, in hex, of names, labels, sizes, and times of the last change of content
            and of metadata.
    """

    paths: list[str]
    labels: torch.Tensor
    train_size: int
    val_size: int
    digest: str


class FolderListing:
    """Finds parts and classes of an image folder; `files` lists the images.

    Attributes:
        folders: part (``train``, ``val``, ``test``, in this order) to its folder.
        names: names of the class folders, in label order: alphabetical.
        classes: readable names of the classes; see `annotations.readable_names`.

    Args:
        root: folder that contains ``train``.
        test_folder: name of the folder with the test images; None: ``test``, or the only validation
            folder if these are (Tiny) ImageNet.

    Raises:
        InputError: a folder is missing or empty, the parts have different classes, or a symbolic
            link points outside `root`.
    """

    def __init__(self, root: Path, test_folder: str | None = None) -> None:
        self.root = root
        self._reason = ""  # why a validation folder is the test set
        self._scanner = Scanner(root)
        if not (root / "train").is_dir():
            raise self._missing("train")
        train = _ClassFolders(root / "train", self._scanner)
        self.folders = self._find_folders(train.names, test_folder)
        self._parts: dict[str, _Part] = {"train": train} | {
            part: self._part(folder) for part, folder in self.folders.items() if part != "train"
        }
        self._check_classes()
        self.names = sorted(train.names)
        self.classes = readable_names(root, self.names)

    def count(self) -> int:
        """Number of training and validation images, without reading sizes or times."""
        return sum(
            len(self._parts[part].images(name))
            for part in self._parts
            if part != "test"
            for name in self.names
        )

    def files(self, key: str = "") -> Files:
        """List all images; logs a warning if there are other files.

        Args:
            key: included in the digest: what else a product of the images depends on.

        Raises:
            InputError: a class has no images, a file is empty, or labels are missing.
        """
        digest = hashlib.sha256(key.encode())
        paths: list[str] = []
        labels: list[int] = []
        sizes: dict[str, int] = {}
        self._scanner.ignored.clear()
        for role, part in self._parts.items():
            before = len(paths)
            for label, name in enumerate(self.names):
                members = part.images(name)
                if not members:
                    raise InputError(part.without_images(name))
                for entry in members:
                    _add_to(digest, entry)
                    paths.append(entry.path)
                labels += [label] * len(members)
            sizes[role] = len(paths) - before
            digest.update(part.annotations)
        if ignored := self._scanner.ignored:
            log.warning(
                "not used, because the names in class folders are not those of images: %s%s",
                readable(ignored[0]), f" and {len(ignored) - 1} more" if len(ignored) > 1 else "",
            )  # fmt: skip
        return Files(
            paths,
            torch.tensor(labels),
            train_size=len(paths) - sizes["test"],
            val_size=sizes.get("val", 0),
            digest=digest.hexdigest(),
        )

    def describe(self) -> None:
        """Log which folder is used for what, and which folders and images are not used."""
        if self._reason:
            log.info(
                "%s is the test set, because %s; validation images are split off train",
                readable(self.folders["test"]), self._reason,
            )  # fmt: skip
        if "val" in self.folders:
            log.info(
                "%s is the validation set: all of train is used for training, data.val_fraction "
                "and data.split_seed have no effect", readable(self.folders["val"]),
            )  # fmt: skip
        used = {folder.name for folder in self.folders.values()}
        if self._reason:
            used.add("test")  # explained above
        with os.scandir(self.root) as entries:
            others = [
                entry.name
                for entry in entries
                if entry.is_dir() and entry.name not in used and not is_hidden(entry.name)
            ]
        if others:
            log.warning(
                "the images in %s are not used: expected folders of data.root are train, test and, "
                "optionally, val",
                ", ".join(readable(self.root / name) for name in sorted(others)),
            )
        for folder in self.folders.values():
            loose = [entry.name for entry in self._scanner.visible(folder) if _is_image(entry)]
            if loose:
                log.warning(
                    "%d images in %s are not used, because they are not in a class folder: e.g. %s",
                    len(loose), readable(folder), readable(loose[0]),
                )  # fmt: skip

    def _find_folders(self, names: Mapping[str, Path], test: str | None) -> dict[str, Path]:
        root = readable(self.root)
        # Include broken links, which are rejected later instead of being ignored.
        own = [
            place.name for place in (self.root / name for name in VALIDATION)
            if place.name != test and (place.is_dir() or place.is_symlink())
        ]  # fmt: skip
        if len(own) > 1:
            raise InputError(
                f"data.root={root} has the folders '{own[0]}' and '{own[1]}', but only one can be "
                "the validation set; remove or rename the other"
            )
        if test is not None:
            wrong = not test or test in ("train", ".", "..") or os.sep in test
            if wrong or not (self.root / test).is_dir():
                raise InputError(
                    f"data.test_folder={test} is not a folder of data.root={root} besides 'train'"
                )
        elif self._has_labels(self.root / "test", names):
            test = "test"
        elif own and (reason := self._published_as(own[0], names)):
            test, self._reason = own.pop(), reason
        elif own and not (self.root / "test").is_dir():
            raise InputError(
                f"data.root={root} has no folder 'test', only 'train' and '{own[0]}'; choose "
                f"data.test_folder={own[0]} (validation images are then split off 'train'), or add "
                f"test images as {root}/test/<class>/*.png"
            )
        elif not (self.root / "test").is_dir():
            raise self._missing("test")
        folders = {"train": "train", **dict.fromkeys(["val"][: len(own)], *own), "test": test}
        return {part: self.root / (name or "test") for part, name in folders.items()}

    def _has_labels(self, folder: Path, names: Mapping[str, Path]) -> bool:
        """Whether a folder has class folders or annotations."""
        if not folder.is_dir():
            return False
        if _annotations(folder).is_file():
            return True
        inside = [entry.name for entry in self._scanner.visible(folder) if entry.is_dir()]
        return bool(inside) and (inside != [IMAGES] or IMAGES in names)

    def _published_as(self, own: str, names: Mapping[str, Path]) -> str:
        """Why a validation folder is known to be the labelled test set; empty if it is not."""
        if _annotations(self.root / own).is_file():
            return "Tiny ImageNet has no labels of its test images"
        if all(WORDNET.fullmatch(name) for name in names):
            return "ImageNet has no labels of its test images"
        return ""

    def _missing(self, part: str) -> InputError:
        root = readable(self.root)
        return InputError(
            f"data.root={root} has no folder '{part}'; expected {root}/train/<class>/*.png "
            f"and {root}/test/<class>/*.png{self._hint() if part == 'train' else ''}"
        )

    def _hint(self) -> str:
        """What to do with class folders that are not split; empty if there are none."""
        for entry in self._scanner.visible(self.root) if self.root.is_dir() else ():
            if entry.is_dir() and any(
                is_image_name(file.name) for file in self._scanner.visible(Path(entry.path))
            ):
                return (
                    f". {readable(entry.name)} looks like a class: move the class folders into "
                    "train, and a part of each one's images into test"
                )
        return ""

    def _part(self, folder: Path) -> "_Part":
        # A copy that has been rearranged to class folders may still have the file.
        if _annotations(folder).is_file() and (folder / IMAGES).is_dir():
            return _AnnotatedFolder(folder, self._scanner)
        return _ClassFolders(folder, self._scanner)

    def _check_classes(self) -> None:
        train = self._parts["train"].names.keys()
        root = readable(self.root)
        if len(train) < 2:
            raise InputError(f"{root}/train needs at least two class folders")
        for role, part in self._parts.items():
            if not part.names:
                folder = readable(self.folders[role])
                raise InputError(
                    f"{folder} has no class folders; expected {folder}/<class>/*.png, with the "
                    "classes of train"
                )
            if different := sorted(part.names.keys() ^ train):
                raise InputError(
                    f"{root}/train and {readable(self.folders[role])} must have the same classes; "
                    f"only one of them has: {_few(different)}"
                )


class _Part(Protocol):
    """Images of one part, by the name of their class."""

    names: dict[str, Path]
    annotations: bytes

    def images(self, name: str) -> list[os.DirEntry[str]]: ...

    def without_images(self, name: str) -> str: ...


class _ClassFolders:
    """A folder per class."""

    def __init__(self, folder: Path, scanner: Scanner) -> None:
        self._scanner = scanner
        self.annotations = b""
        if folder.is_symlink():
            scanner.check_link(folder)
        self.names: dict[str, Path] = {}
        for entry in scanner.visible(folder):
            if not entry.is_dir():
                continue
            # The same name may be composed (Linux) or decomposed (macOS) Unicode.
            name = unicodedata.normalize("NFC", readable(entry.name))
            if name in self.names:
                raise InputError(
                    f"{readable(folder)} has two folders for the class '{name}', whose names "
                    "differ only in Unicode normalization; merge or rename them"
                )
            self.names[name] = Path(entry.path)

    def images(self, name: str) -> list[os.DirEntry[str]]:
        """By file name; those of a folder `IMAGES`, if there is one."""
        folder = self.names[name]
        inner = folder / IMAGES
        if not os.path.isdir(inner):  # noqa: PTH112 (also if the folder cannot be searched)
            return self._scanner.images(folder)
        for entry in self._scanner.visible(folder):
            if entry.name != IMAGES and (entry.is_dir() or is_image_name(entry.name)):
                raise InputError(
                    f"{readable(folder)} has a folder '{IMAGES}', and '{readable(entry.name)}' "
                    "beside it; move all images of the class to one folder"
                )
        return self._scanner.images(inner)

    def without_images(self, name: str) -> str:
        """Error message."""
        return f"class folder {readable(self.names[name])} holds no images"


class _AnnotatedFolder:
    """All images in one folder, and their classes in a text file."""

    def __init__(self, folder: Path, scanner: Scanner) -> None:
        self._scanner, self._folder = scanner, folder
        if folder.is_symlink():
            scanner.check_link(folder)
        scanner.visible(folder)  # checks links
        self._file = _annotations(folder)
        self.annotations, self._class_of = read_annotations(self._file)
        self.names = dict.fromkeys(self._class_of.values(), folder)
        self._by_class: dict[str, list[os.DirEntry[str]]] | None = None

    def images(self, name: str) -> list[os.DirEntry[str]]:
        """By file name."""
        if self._by_class is None:
            self._by_class = self._sort()
        return self._by_class[name]

    def _sort(self) -> dict[str, list[os.DirEntry[str]]]:
        found = {entry.name: entry for entry in self._scanner.images(self._folder / IMAGES)}
        if different := sorted(found.keys() ^ self._class_of.keys()):
            raise InputError(
                f"{readable(self._file)} must name each image of {readable(self._folder / IMAGES)} "
                f"once; not in both are: {_few(different)}"
            )
        by_class: dict[str, list[os.DirEntry[str]]] = {name: [] for name in self.names}
        for file, entry in found.items():
            by_class[self._class_of[file]].append(entry)
        return by_class

    def without_images(self, name: str) -> str:
        """Error message."""
        return f"{readable(self._file)} names no images of the class {name}"


def _annotations(folder: Path) -> Path:
    return folder / f"{folder.name}_annotations.txt"


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(map(readable, names[:5])) + more


def _add_to(digest: "hashlib._Hash", entry: os.DirEntry[str]) -> None:
    try:
        status = entry.stat()
    except OSError as error:
        raise InputError(f"{readable(entry.path)} cannot be read: {error.strerror}") from error
    if not status.st_size:
        raise InputError(f"{readable(entry.path)} is empty; repair or remove it")
    digest.update(os.fsencode(entry.path))
    # The last one, unlike the one before, is not preserved by `cp -p` and archives.
    digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}\n".encode())


def _is_image(entry: os.DirEntry[str]) -> bool:
    return is_image_name(entry.name) and entry.is_file()
