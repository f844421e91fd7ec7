"""The teacher-output cache: the output of a frozen teacher on a view is constant, so it is stored
on disk.

A term's `remember` reduces the teacher's output to one row of numbers per view. The rows are stored
in memory-mapped files, one per term and view number, with one row per image:

    <root>/<teacher>-<term>-<hash>/key.json
    <root>/<teacher>-<term>-<hash>/view-00007.rows

The hash covers everything the rows depend on: the teacher's weights, the images, the augmentation,
the precision, and the term's targets. It does not include the student, the seed or the rest of the
method, so that all of these share the cached outputs.

There are no locks and no completeness markers. Every row has a checksum of its numbers, image and
view. A row that was never written, partially written, overwritten concurrently or lost in a
truncated file fails the check and is recomputed.
"""

import hashlib
import json
import logging
import math
import os
import shutil
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_lightning.data.transfer import ToHost, to_device
from kd_lightning.data.views import PLAIN, counter_random
from kd_lightning.files import read_json, write_json

log = logging.getLogger(__name__)

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
GIGABYTE = 10**9
ODD = np.uint64(0x9E3779B97F4A7C15)  # multiplication by an odd number modulo 2^64 is invertible

Words = npt.NDArray[np.uint32]
Compute = Callable[[], Mapping[str, Tensor]]
"""Computes the targets of every term for a batch, name to float32 (B, ...), on the device."""


class Rows:
    """The rows of one term: the targets of every (image, view number), with a checksum.

    Args:
        folder: folder of the files; created with the first file.
        key: everything the rows depend on, human-readable; its hash is in the folder name.
        images: number of images.
        shape: shape of the term's targets for one view.
        dtype: storage dtype.
    """

    OPEN_FILES = 4  # pages of a mapped file count as memory of this process

    def __init__(
        self,
        folder: Path,
        key: Mapping[str, Any],
        images: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.folder, self.key, self.images = folder, key, images
        self.shape, self.dtype = shape, dtype
        self.words = -(-math.prod(shape) * dtype.itemsize // 4)
        position = torch.arange(self.words)
        high, low = (counter_random(position, position, seed).numpy() for seed in (1, 2))
        self._factors = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
        self._files: OrderedDict[int, Words] = OrderedDict()

    @property
    def file_size(self) -> int:
        """Size of the file of one view number, in bytes."""
        return self.images * (self.words + 2) * 4

    def path(self, view: int) -> Path:
        """Path of the file of a view number."""
        name = "plain" if view == PLAIN else f"{view:05d}"
        return self.folder / f"view-{name}.rows"

    def read(self, index: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """Read the targets (B, *shape), in `dtype`, and a mask of valid rows, (B,) bool.

        Args:
            index: image indices (B,), int64, on the CPU.
            view: view numbers (B,), int64, on the CPU.
        """
        rows = np.zeros((len(index), self.words + 2), np.uint32)
        for file, places in self._files_of(view):
            rows[places] = file[index.numpy()[places]]
        words = np.ascontiguousarray(rows[:, 2:])
        known = (self._checksum(words, index, view) == rows[:, :2]).all(axis=1)
        size = math.prod(self.shape) * self.dtype.itemsize
        raw = torch.from_numpy(words.view(np.uint8)[:, :size])
        values = raw.contiguous().view(self.dtype).view(len(index), *self.shape)
        return values, torch.from_numpy(known)

    def write(self, index: Tensor, view: Tensor, values: Tensor) -> None:
        """Write targets (B, *shape), in `dtype`, to the existing files.

        Rows that are not finite in `dtype` are skipped.
        """
        finite = values.flatten(1).isfinite().all(dim=1)
        index, view, values = index[finite], view[finite], values[finite]
        rows = np.zeros((len(index), self.words + 2), np.uint32)
        numbers = values.flatten(1).contiguous().view(torch.uint8).numpy()
        words = np.zeros((len(index), self.words), np.uint32)
        words.view(np.uint8)[:, : numbers.shape[1]] = numbers
        rows[:, :2], rows[:, 2:] = self._checksum(words, index, view), words
        for file, places in self._files_of(view):
            file[index.numpy()[places]] = rows[places]

    def reserve(self, view: int) -> None:
        """Create the file of a view number, or extend a truncated one, allocated on the disk.

        Allocated, because writing to a mapped page without disk space kills the process (SIGBUS).

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "key.json").exists():
            write_json(self.folder / "key.json", self.key)
        with self.path(view).open("ab") as file:
            before = file.tell()
            if before >= self.file_size:
                return
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.file_size)
                else:
                    file.truncate(self.file_size)
            except OSError:
                file.truncate(before)
                raise

    def missing(self, view: int) -> int:
        """Number of bytes still to be allocated for the file of a view number."""
        try:
            return max(0, self.file_size - self.path(view).stat().st_size)
        except OSError:
            return self.file_size

    def _files_of(self, view: Tensor) -> Iterator[tuple[Words, npt.NDArray[np.int64]]]:
        """Every file that contains some of these views, and their positions in the batch."""
        numbers = view.numpy()
        for number in np.unique(numbers):
            file = self._open(int(number))
            if file is not None:
                yield file, np.flatnonzero(numbers == number)

    def _open(self, view: int) -> Words | None:
        if view in self._files:
            self._files.move_to_end(view)
            return self._files[view]
        if self.missing(view):
            return None  # numpy would extend it without allocating; see `reserve`
        shape = (self.images, self.words + 2)
        try:
            file: Words = np.memmap(self.path(view), np.uint32, mode="r+", shape=shape)
        except OSError:
            return None
        self._files[view] = file
        if len(self._files) > self.OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def _checksum(self, words: Words, index: Tensor, view: Tensor) -> Words:
        """Multilinear hash modulo 2^64 (Carter & Wegman 1979), (B, 2): two words of 32 bits."""
        total = words.astype(np.uint64) @ self._factors
        # Unique for every (image, view) and never 0, so that neither a row of zeros nor the same
        # numbers at another position are valid.
        place = (view.numpy() + 2).astype(np.uint64) << np.uint64(32) | index.numpy().astype(
            np.uint64
        )
        total += place * ODD
        # The low bits of a sum of products are the weakest; fold the high ones into them.
        total ^= total >> np.uint64(29)
        return total.view(np.uint32).reshape(-1, 2)


class TeacherCache:
    """The cached teacher outputs used in one training.

    Args:
        rows: the rows of every term that needs the teacher.
        limit: maximum total size of all caches below `root`, in bytes. Each concurrent process may
            exceed it by one file.
        root: the folder of all caches.
    """

    def __init__(self, rows: Mapping[str, Rows], root: Path, limit: float) -> None:
        self.rows, self.root, self.limit = rows, root, limit
        self._seen: set[int] = set()  # view numbers whose files exist or cannot be created
        self._full = False
        self._unwritten: deque[_Unwritten] = deque()

    def fetch(
        self, index: Tensor, view: Tensor, device: torch.device, ask: Compute
    ) -> dict[str, Tensor]:
        """The targets of each term for a batch: name to float32 (B, ...), on the device.

        Cached rows are read. If any row is missing, the teacher's output is computed for the whole
        batch and stored: a smaller batch could change the order of floating-point additions, so
        that a resumed training would differ. Computed rows are rounded to the storage dtype, so
        that the result does not depend on the state of the cache.

        Args:
            index: image indices (B,), int64, on the CPU.
            view: view numbers (B,), int64, on the CPU.
            device: device of the images.
            ask: computes the targets of the whole batch.
        """
        self._make_room(view)
        self._write_finished()
        stored, there = {}, {}
        for name, rows in self.rows.items():
            stored[name], there[name] = rows.read(index, view)
        if all(known.all() for known in there.values()):
            return {name: to_device(values, device).float() for name, values in stored.items()}
        computed = ask()
        result = {}
        for name, rows in self.rows.items():
            rounded = computed[name].to(rows.dtype)
            result[name] = torch.where(rounded.isfinite(), rounded.float(), computed[name])
            known = there[name]
            if known.any():
                where = known.nonzero().flatten()
                recalled = to_device(stored[name][where], device).float()
                result[name][to_device(where, device)] = recalled
            new = (~known).nonzero().flatten()
            if len(new) < len(index):
                rounded = rounded[to_device(new, device)]
            self._unwritten.append(_Unwritten(rows, index[new], view[new], rounded))
        if device.type == "cpu":
            self.flush()
        return result

    def flush(self) -> None:
        """Write all pending rows, waiting for the device if necessary."""
        while self._unwritten:
            self._unwritten.popleft().write()

    def _write_finished(self) -> None:
        while self._unwritten and self._unwritten[0].ready():
            self._unwritten.popleft().write()

    def _make_room(self, view: Tensor) -> None:
        for number in set(view.unique().tolist()) - self._seen:
            self._seen.add(number)
            missing = [rows for rows in self.rows.values() if rows.missing(number)]
            if not missing or self._full:
                continue
            try:
                wanted = used_bytes(self.root) + sum(rows.missing(number) for rows in missing)
                if wanted > self.limit:
                    raise OSError(f"remember.disk_gb={self.limit / GIGABYTE:g} is reached")
                for rows in missing:
                    rows.reserve(number)
            except OSError as error:
                self._full = True
                log.warning(
                    "no further teacher outputs are cached in %s (%s); they are computed instead. "
                    "scripts/remembered.py lists and removes caches",
                    self.root, error.strerror or error,
                )  # fmt: skip


class _Unwritten:
    """Rows that are being copied from the device and then written to a file."""

    def __init__(self, rows: Rows, index: Tensor, view: Tensor, values: Tensor) -> None:
        self.rows, self.index, self.view = rows, index, view
        self.values = ToHost(values)

    def ready(self) -> bool:
        """Whether the copy is complete."""
        return self.values.ready()

    def write(self) -> None:
        """Write the rows, waiting for the copy if necessary."""
        self.rows.write(self.index, self.view, self.values.wait())


class Stored(NamedTuple):
    """One cache folder: its size in bytes, number of views, and key."""

    folder: Path
    bytes: int
    views: int
    key: dict[str, Any]


def stored(root: Path) -> list[Stored]:
    """All caches below `root`, sorted by name."""
    found = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        files = [file.stat().st_size for file in folder.glob("view-*.rows")]
        found.append(Stored(folder, sum(files), len(files), read_json(folder / "key.json")))
    return found


def remove(folder: Path) -> None:
    """Remove a cache. Trainings that use it continue and compute the outputs."""
    shutil.rmtree(folder)


def used_bytes(root: Path) -> int:
    """Total size of all caches below `root`, in bytes."""
    return sum(file.stat().st_size for file in root.glob("*/view-*.rows"))


def folder_name(teacher: str, term: str, key: Mapping[str, Any]) -> str:
    """`<teacher>-<term>-<hash>`."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{teacher}-{term}-{digest[:16]}"
