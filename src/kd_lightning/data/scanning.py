"""Entries of the folders of a data set, without those of file managers and links to elsewhere."""

import functools
import os
from pathlib import Path

from kd_lightning.data.decoding import is_image_name
from kd_lightning.errors import InputError
from kd_lightning.files import readable

# Files and folders created by file managers and file systems, in lower case.
DROPPINGS = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "#recycle",
    "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip


class Scanner:
    """Reads folders below a root.

    Attributes:
        ignored: paths of the files that `images` left out.

    Args:
        root: folder of the data set.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.ignored: list[str] = []

    def visible(self, folder: Path) -> list[os.DirEntry[str]]:
        """Entries of a folder, by name, without hidden ones and those of file managers.

        Raises:
            InputError: it cannot be read, or contains a link to outside `root`.
        """
        try:
            with os.scandir(folder) as entries:
                visible = sorted((e for e in entries if not is_hidden(e.name)), key=_name)
        except OSError as error:
            raise InputError(f"{readable(folder)} cannot be read: {error.strerror}") from error
        for entry in visible:
            if entry.is_symlink():
                self.check_link(Path(entry.path))
        return visible

    def images(self, folder: Path) -> list[os.DirEntry[str]]:
        """Image files of a folder, by name; other files are ignored.

        Raises:
            InputError: there is a folder, or something else that is not a file.
        """
        found = []
        for entry in self.visible(folder):
            if is_image_name(entry.name) or entry.is_dir():
                if not entry.is_file():
                    raise InputError(
                        f"{readable(entry.path)} is not an image file; remove it from the folder "
                        "of its class"
                    )
                found.append(entry)
            else:
                self.ignored.append(entry.path)
        return found

    @functools.cached_property
    def _real_root(self) -> str:
        return os.path.join(os.path.realpath(self.root), "")  # noqa: PTH118 (ends with a separator)

    def check_link(self, link: Path) -> None:
        """Reject links to outside `root`, so that untrusted data cannot read other files."""
        try:
            inside = os.path.realpath(link, strict=True).startswith(self._real_root)
        except (OSError, RuntimeError) as error:  # a broken link or a loop
            raise InputError(f"{readable(link)} is a broken link; remove it") from error
        if not inside:
            raise InputError(
                f"{readable(link)} is a link to outside data.root={readable(self.root)}; "
                "copy the files there, or use the folder that contains them as data.root"
            )


def _name(entry: os.DirEntry[str]) -> str:
    return entry.name


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or of a file manager."""
    return name.startswith(".") or name.lower() in DROPPINGS
