"""Remembered teachers: what a frozen teacher says of a view never changes, so it is kept on disk.

A term's `remember` reduces the teacher's answer to one row of numbers for each view. The rows lie
in memory-mapped files, one for each term and view number, one row for each image:

    <root>/<teacher>-<term>-<hash>/key.json
    <root>/<teacher>-<term>-<hash>/view-00007.rows

The hash is that of everything the rows depend on: the teacher's weights, the images, the
augmentation, the precision, what the term takes from the teacher. Nothing of the student, the seed
or the rest of the method is in it, so all of these share what the teacher has said.

There are no locks and no markers of completeness. Every row carries a checksum of its numbers, its
image and its view. A row that was never written, half written, overwritten by two processes at
once, or lost with the end of a truncated file does not pass, and is computed again.
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
ODD = np.uint64(0x9E3779B97F4A7C15)  # multiplying by an odd number modulo 2^64 loses nothing

Words = npt.NDArray[np.uint32]
Compute = Callable[[], Mapping[str, Tensor]]
"""Computes what every term remembers of a batch, name to float32 (B, ...), where it is trained."""


class Rows:
    """The rows of one term: for every (image, view number), `width` numbers and a checksum.

    Args:
        folder: where the files are; made with the first of them.
        key: everything the rows depend on, for people to read; the folder's name has its hash.
        images: how many images there are.
        shape: of what the term remembers of one view.
        dtype: what it is stored in.
    """

    OPEN_FILES = 4  # pages of a mapped file count as this process's memory

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
        """Bytes of the file of one view number."""
        return self.images * (self.words + 2) * 4

    def path(self, view: int) -> Path:
        """The file of a view number."""
        name = "plain" if view == PLAIN else f"{view:05d}"
        return self.folder / f"view-{name}.rows"

    def read(self, index: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers (B, *shape), in `dtype`, and which of the rows are there, (B,) bool.

        Args:
            index: which images (B,), int64, on the CPU.
            view: which view of each (B,), int64, on the CPU.
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
        """Keep numbers (B, *shape) in `dtype`, where there is a file for them.

        A row that is not finite in `dtype` is not kept.
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
        """Make the file of a view number, its whole size allocated on the disk.

        Allocated, because a process that writes to a mapped page for which the disk has no room is
        killed without a chance to say why. A file that has become too short is made whole.

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
        """Bytes that the file of a view number still needs on the disk."""
        try:
            return max(0, self.file_size - self.path(view).stat().st_size)
        except OSError:
            return self.file_size

    def _files_of(self, view: Tensor) -> Iterator[tuple[Words, npt.NDArray[np.int64]]]:
        """Every file that holds some of these views, and the places of those in the batch."""
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
            return None  # numpy would make it longer, which is for `reserve` to do
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
        # Another number for every (image, view), never 0: neither a row of zeros nor the same
        # numbers in another place pass.
        place = (view.numpy() + 2).astype(np.uint64) << np.uint64(32) | index.numpy().astype(
            np.uint64
        )
        total += place * ODD
        # The low bits of a sum of products are the weakest: fold the high ones into them.
        total ^= total >> np.uint64(29)
        return total.view(np.uint32).reshape(-1, 2)


class TeacherCache:
    """Everything a teacher is remembered by in one training.

    Args:
        rows: those of every term that learns from the teacher.
        limit: bytes that may be used below `root`, by whoever wrote them. Several processes at
            once may overstep it by a file each.
        root: the folder of all remembered teachers.
    """

    def __init__(self, rows: Mapping[str, Rows], root: Path, limit: float) -> None:
        self.rows, self.root, self.limit = rows, root, limit
        self._seen: set[int] = set()  # view numbers that have their files, or cannot have them
        self._full = False
        self._unwritten: deque[_Unwritten] = deque()

    def fetch(
        self, index: Tensor, view: Tensor, device: torch.device, ask: Compute
    ) -> dict[str, Tensor]:
        """What each term remembers of a batch: name to float32 (B, ...), on the device.

        What is stored is read. If anything is not there, the teacher is asked about the whole
        batch, and that is stored too: about fewer images at once it would add in another order, and
        a training that was interrupted could end up elsewhere. Either way the numbers are rounded
        to what is stored, so that a result does not depend on who was here before.

        Args:
            index: which images (B,), int64, on the CPU.
            view: which view of each (B,), int64, on the CPU.
            device: where the images are.
            ask: computes what is not there, the whole batch of it.
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
        """Write what is not written yet, waiting for the device if need be."""
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
                    "no more of the teacher's answers are stored in %s (%s): training goes on "
                    "with the teacher computing. scripts/remembered.py shows and removes",
                    self.root, error.strerror or error,
                )  # fmt: skip


class _Unwritten:
    """Numbers on their way from the device to a file."""

    def __init__(self, rows: Rows, index: Tensor, view: Tensor, values: Tensor) -> None:
        self.rows, self.index, self.view = rows, index, view
        self.values = ToHost(values)

    def ready(self) -> bool:
        """Whether the numbers have arrived."""
        return self.values.ready()

    def write(self) -> None:
        """Write them, waiting for them if need be."""
        self.rows.write(self.index, self.view, self.values.wait())


class Stored(NamedTuple):
    """What is remembered in one folder: its bytes, its view numbers, and its key."""

    folder: Path
    bytes: int
    views: int
    key: dict[str, Any]


def stored(root: Path) -> list[Stored]:
    """All that is remembered below `root`, by name."""
    found = []
    for folder in sorted(path for path in root.glob("*") if path.is_dir()):
        files = [file.stat().st_size for file in folder.glob("view-*.rows")]
        found.append(Stored(folder, sum(files), len(files), read_json(folder / "key.json")))
    return found


def remove(folder: Path) -> None:
    """Forget what one folder holds. Trainings that have it open go on, and compute."""
    shutil.rmtree(folder)


def used_bytes(root: Path) -> int:
    """Bytes of everything remembered below `root`."""
    return sum(file.stat().st_size for file in root.glob("*/view-*.rows"))


def folder_name(teacher: str, term: str, key: Mapping[str, Any]) -> str:
    """`<teacher>-<term>-<hash>`."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{teacher}-{term}-{digest[:16]}"
