"""Teacher-output caches as one portable file: a single cache, or all that stand for a teacher."""

import contextlib
import errno
import glob
import hashlib
import json
import math
import re
import secrets
import shutil
import zipfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kd_lightning.config.packed import DAMAGED, MANIFEST, TEACHER_FORMAT, read_manifest
from kd_lightning.data.views import PLAIN
from kd_lightning.errors import InputError
from kd_lightning.files import hold, read_json, replacing
from kd_lightning.storage.rows import DTYPES, MOST_ROWS, Rows
from kd_lightning.storage.teacher_cache import folder_name, stored

FORMAT = 1
_VIEW = re.compile(r"view-(plain|\d{5,})\.rows")
_BLOCK = 2**20  # bytes


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
    shape = entry.geometry
    rows = Rows(folder, entry.key, shape["images"], tuple(shape["shape"]), DTYPES[shape["dtype"]])
    views = sorted(
        path
        for path in folder.iterdir()
        if _VIEW.fullmatch(path.name) and path.stat().st_size == rows.file_size  # not truncated
    )
    with _archive(file) as archive:
        digests = {path.name: _add(archive, path, path.name) for path in views}
        manifest = {
            "format": FORMAT, "name": folder.name, "key": entry.key, "rows": entry.geometry,
            "files": digests,
        }  # fmt: skip
        archive.writestr(_member(MANIFEST), json.dumps(manifest, indent=2))
    return len(views)


def pack_teacher(
    teacher: Mapping[str, Any], caches: Mapping[Path, Collection[str]], file: Path
) -> None:
    """Write caches of one teacher, and its description, to a zip file as `pack` does.

    Args:
        teacher: the description, as plain values; see `config.packed.PackedTeacher`.
        caches: folder of a cache to the names of the view files that are packed.
        file: the file; replaced atomically.

    Raises:
        OSError: the file cannot be written.
    """
    described = {
        entry.folder: entry for root in {f.parent for f in caches} for entry in stored(root)
    }
    with _archive(file) as archive:
        parts = [
            {
                "name": folder.name,
                "key": described[folder].key,
                "rows": described[folder].geometry,
                "files": {
                    name: _add(archive, folder / name, f"{folder.name}/{name}")
                    for name in sorted(names)
                },
            }
            for folder, names in sorted(caches.items(), key=lambda item: item[0].name)
        ]
        manifest = {"format": TEACHER_FORMAT, "teacher": teacher, "caches": parts}
        archive.writestr(_member(MANIFEST), json.dumps(manifest, indent=2))


def _member(name: str) -> zipfile.ZipInfo:
    """A file in an archive, without its time: equal contents make equal archives."""
    part = zipfile.ZipInfo(name)
    part.compress_type, part.create_system = zipfile.ZIP_DEFLATED, 3  # 3: Unix, on every system
    part.external_attr = 0o600 << 16
    return part


def _add(archive: zipfile.ZipFile, path: Path, name: str) -> str:
    """Add a file to an archive; its SHA-256, in hex."""
    digest = hashlib.sha256()
    part = _member(name)
    with path.open("rb") as source, archive.open(part, "w", force_zip64=True) as target:
        while block := source.read(_BLOCK):
            digest.update(block)
            target.write(block)
    return digest.hexdigest()


class Unpacked(NamedTuple):
    """The folder of a cache, how many views were added, and how many rows of others restored."""

    folder: Path
    views: int
    rows: int = 0


def unpack(file: Path, root: Path, restore: bool = False) -> list[Unpacked]:
    """Add the caches in a packed file to a folder of caches, after verifying all of them.

    Valid rows that a cache has already are kept. Single rows are verified whenever they are read.

    Args:
        file: written by `pack` or `pack_teacher`; may be from an untrusted source.
        root: the folder of all caches.
        restore: read the views that exist already, and add the rows that are missing or damaged.

    Raises:
        InputError: the file is damaged or no packed cache; nothing has been added then.
        OSError: the folder cannot be written.
    """
    try:
        with contextlib.ExitStack() as held, zipfile.ZipFile(file) as archive:
            largest = max(part.file_size for part in archive.infolist())
            caches = [
                (_rows(cache, root, largest), prefix, dict(cache["files"]))
                for prefix, cache in _caches(read_manifest(archive))
            ]
            new = [[name for name in files if _is_new(name, rows)] for rows, _, files in caches]
            differ = [
                [n for n in files if restore and n not in names and _differs(rows, n, files[n])]
                for (rows, _, files), names in zip(caches, new, strict=True)
            ]
            if any(new) or any(differ):
                held.enter_context(_alone(root / ".unpack.lock", ".*.unpacked"))
            partials = [_partial(rows.folder) for rows, _, _ in caches]
            for partial in partials:
                held.callback(shutil.rmtree, partial, ignore_errors=True)
            parts = list(zip(caches, new, differ, partials, strict=True))
            for (rows, prefix, files), names, others, partial in parts:
                if names or others:
                    partial.mkdir(parents=True)
                for name in names + others:
                    target = partial / name
                    _extract(archive, prefix + name, files[name], rows.file_size, target)
            found = []
            for (rows, _, _), names, others, partial in parts:
                if names:
                    rows.create()
                for name in names:
                    (partial / name).replace(rows.folder / name)
                restored = sum(_restore(rows, name, partial) for name in others)
                found.append(Unpacked(rows.folder, len(names), restored))
    except DAMAGED as error:
        raise InputError(f"{file} is damaged, or not a packed cache: {error}") from error
    return found


@contextlib.contextmanager
def _alone(lock: Path, leftovers: str) -> Iterator[None]:
    """Hold a lock, and remove what killed processes that held it have left in its folder."""
    with hold(lock, f"another process is writing to {lock.parent}"):
        for path in lock.parent.glob(leftovers):
            with contextlib.suppress(OSError):  # of another user
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _archive(file: Path) -> Iterator[zipfile.ZipFile]:
    """Write a zip file, which replaces another one atomically."""
    lock = file.with_name(f".{file.name}.lock")
    with (
        _alone(lock, f".{glob.escape(file.name)}.*.partial"),
        replacing(file) as partial,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        yield archive


def _partial(folder: Path) -> Path:
    # Of this process alone: others may unpack the same cache.
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.unpacked")


def _caches(manifest: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The description of each cache, and the prefix of its files in the archive.

    Raises:
        KeyError, ValueError, TypeError: the manifest is invalid.
    """
    if manifest["format"] == FORMAT:
        yield "", manifest
    elif manifest["format"] == TEACHER_FORMAT:
        for cache in manifest["caches"]:
            yield f"{cache['name']}/", cache
    else:
        raise ValueError(f"its format {manifest['format']} is not known to this version")


def _rows(manifest: Mapping[str, Any], root: Path, largest: int) -> Rows:
    """The rows that a manifest describes, if the largest part has this size in bytes.

    Raises:
        KeyError, ValueError, TypeError: it is invalid.
    """
    name, key, rows = manifest["name"], manifest["key"], manifest["rows"]
    teacher, term, _ = name.rsplit("-", 2)
    if name != folder_name(teacher, term, key):  # which is no path
        raise ValueError("its name does not match its key")
    numbers = [rows["images"], *rows["shape"]]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError("the number or the shape of its rows is wrong")
    if math.prod(numbers) > largest:
        raise ValueError("its rows are larger than the file")
    if read_json(root / name / "rows.json") not in ({}, rows):
        raise ValueError(f"its rows have another shape than those in {root / name}")
    return Rows(root / name, key, rows["images"], tuple(rows["shape"]), DTYPES[rows["dtype"]])


def _is_new(name: str, rows: Rows) -> bool:
    if not _VIEW.fullmatch(name):
        raise ValueError(f"it contains {name}")
    path = rows.folder / name
    return not path.exists() or path.stat().st_size < rows.file_size


def _differs(rows: Rows, name: str, sha256: str) -> bool:
    with (rows.folder / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() != sha256


def _restore(rows: Rows, name: str, partial: Path) -> int:
    """Add the valid rows of an unpacked view that are not valid in the cache; their number.

    Raises:
        OSError: the cache is read only.
    """
    number = name.removeprefix("view-").removesuffix(".rows")
    source, restored = Rows(partial, rows.key, rows.images, rows.shape, rows.dtype), 0
    for index in torch.arange(rows.images).split(MOST_ROWS):
        view = torch.full_like(index, PLAIN if number == "plain" else int(number))
        values, valid = source.read(index, view)
        missing = valid & ~rows.read(index, view)[1]
        if missing.any() and rows.write(index[missing], view[missing], values[missing]):
            raise OSError(errno.EACCES, "the cache is read only", str(rows.folder / name))
        restored += int(missing.sum())
    return restored


def _extract(archive: zipfile.ZipFile, name: str, sha256: str, size: int, target: Path) -> None:
    if archive.getinfo(name).file_size != size:  # before it fills the disk
        raise ValueError(f"the size of {name} is wrong")
    digest = hashlib.sha256()
    try:
        with archive.open(name) as source, target.open("wb") as file:
            while block := source.read(_BLOCK):
                digest.update(block)
                file.write(block)
    except OSError as error:
        error.filename = error.filename or str(target)  # a failed write has none
        raise
    if digest.hexdigest() != sha256:
        raise ValueError(f"the content of {name} is damaged")
