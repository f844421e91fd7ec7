"""A teacher-output cache as one portable file."""

import hashlib
import json
import math
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_lightning.errors import InputError
from kd_lightning.files import replacing
from kd_lightning.storage.rows import DTYPES, Rows
from kd_lightning.storage.teacher_cache import folder_name, stored

FORMAT = 1
MANIFEST = "manifest.json"
_VIEW = re.compile(r"view-(plain|\d{5,})\.rows")
_BLOCK = 2**20  # bytes
DAMAGED = (
    zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError,
    KeyError, ValueError, TypeError, AttributeError, EOFError,
)  # fmt: skip
"""Errors of the standard library for a damaged archive or manifest."""


def pack(folder: Path, file: Path) -> int:
    """Write a cache to a zip file with the SHA-256 of every part.

    Args:
        folder: folder of the cache; it may be in use.
        file: the file; replaced atomically.

    Returns:
        The number of views.

    Raises:
        InputError: the folder is no cache, or was written by an older version.
        OSError: the file cannot be written.
    """
    entry = next((entry for entry in stored(folder.parent) if entry.folder == folder), None)
    if entry is None or not entry.key or not entry.geometry:
        raise InputError(
            f"{folder} cannot be packed: it is no cache, or of an older version, which did not "
            "record the size of its rows"
        )
    views = sorted(path for path in folder.iterdir() if _VIEW.fullmatch(path.name))
    digests = {}
    with replacing(file) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in views:
            digest = hashlib.sha256()
            with (
                path.open("rb") as source,
                archive.open(path.name, "w", force_zip64=True) as target,
            ):
                while block := source.read(_BLOCK):
                    digest.update(block)
                    target.write(block)
            digests[path.name] = digest.hexdigest()
        manifest = {
            "format": FORMAT, "name": folder.name, "key": entry.key, "rows": entry.geometry,
            "files": digests,
        }  # fmt: skip
        archive.writestr(MANIFEST, json.dumps(manifest, indent=2))
    return len(views)


def unpack(file: Path, root: Path) -> tuple[Path, int]:
    """Add a packed cache to a folder of caches, after verifying it.

    Views that the cache has already are kept. Single rows are verified whenever they are read.

    Args:
        file: written by `pack`; may be from an untrusted source.
        root: the folder of all caches.

    Returns:
        The folder of the cache, and the number of new views.

    Raises:
        InputError: the file is damaged or no packed cache; nothing has been added then.
        OSError: the folder cannot be written.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            manifest = json.loads(archive.read(MANIFEST))
            rows = _rows(manifest, root, max(part.file_size for part in archive.infolist()))
            new = {name: sha for name, sha in manifest["files"].items() if _is_new(name, rows)}
            partial = rows.folder.with_name(f".{rows.folder.name}.unpacked")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            try:
                for name, sha256 in new.items():
                    _extract(archive, name, sha256, rows.file_size, partial / name)
                rows.create()
                for name in new:
                    (partial / name).replace(rows.folder / name)
            finally:
                shutil.rmtree(partial)
    except DAMAGED as error:
        raise InputError(f"{file} is damaged, or not a packed cache: {error}") from error
    return rows.folder, len(new)


def _rows(manifest: Mapping[str, Any], root: Path, largest: int) -> Rows:
    """The rows that a manifest describes, whose largest part has this size in bytes.

    Raises:
        KeyError, ValueError, TypeError: it is invalid.
    """
    if manifest["format"] != FORMAT:
        raise ValueError(f"its format {manifest['format']} is not known to this version")
    name, key, rows = manifest["name"], manifest["key"], manifest["rows"]
    teacher, term, _ = name.rsplit("-", 2)
    if name != folder_name(teacher, term, key) or Path(name).name != name:
        raise ValueError("its name does not match its key")
    numbers = [rows["images"], *rows["shape"]]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("the number or the shape of its rows is wrong")
    if math.prod(numbers) > largest:
        raise ValueError("its rows are larger than the file")
    return Rows(root / name, key, rows["images"], tuple(rows["shape"]), DTYPES[rows["dtype"]])


def _is_new(name: str, rows: Rows) -> bool:
    if not _VIEW.fullmatch(name):
        raise ValueError(f"it contains {name}")
    path = rows.folder / name
    return not path.exists() or path.stat().st_size < rows.file_size


def _extract(archive: zipfile.ZipFile, name: str, sha256: str, size: int, target: Path) -> None:
    if archive.getinfo(name).file_size != size:  # before it fills the disk
        raise ValueError(f"the size of {name} is wrong")
    digest = hashlib.sha256()
    with archive.open(name) as source, target.open("wb") as file:
        while block := source.read(_BLOCK):
            digest.update(block)
            file.write(block)
    if digest.hexdigest() != sha256:
        raise ValueError(f"the content of {name} is damaged")
