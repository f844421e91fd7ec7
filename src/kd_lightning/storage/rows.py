"""The rows of the teacher-output cache: numbers with checksums, in memory-mapped files.

There are no locks and no completeness markers. Every row has a checksum of its numbers, image and
view. A row that was never written, partially written, overwritten concurrently or lost in a
truncated file fails the check.
"""

import json
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_lightning.data.views import PLAIN, counter_random
from kd_lightning.files import write_text
from kd_lightning.transfer import ToHost, to_device

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
ODD = 0x9E3779B97F4A7C15 - 2**64  # multiplication by an odd number modulo 2^64 is invertible
# What is checked at once: temporary tensors have 8 bytes per word.
MOST_ROWS, MOST_WORDS = 8192, 2**22

Words = npt.NDArray[np.int32]


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
        high, low = (counter_random(position, position, seed) for seed in (1, 2))
        self._factors = high << 32 | low
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
        rows = np.zeros((len(index), self.words + 2), np.int32)
        for file, places in self._files_of(view):
            rows[places] = file[index.numpy()[places]]
        found = torch.from_numpy(rows)
        return self.values(found), self.valid(found, index, view)

    def has_all(self, index: Tensor, view: int) -> bool:
        """Whether the rows of images (B,), int64, on the CPU, are valid for a view number."""
        return bool(self.read(index, torch.full_like(index, view))[1].all())

    def damaged(self, view: int) -> int:
        """Number of rows of a view number that were written and are not valid."""
        lost = self.missing(view)
        file = self._open(view)
        if file is None:  # never written, or truncated
            return 0 if lost == self.file_size else -(-lost // (4 * (self.words + 2)))
        rows, index = torch.from_numpy(np.array(file)), torch.arange(self.images)
        return int((rows.any(dim=1) & ~self.valid(rows, index, torch.full_like(index, view))).sum())

    def values(self, rows: Tensor) -> Tensor:
        """The targets (B, *shape), in `dtype`, of rows (B, words + 2), int32, on any device."""
        size = math.prod(self.shape) * self.dtype.itemsize
        raw = rows[:, 2:].contiguous().view(torch.uint8)[:, :size]
        return raw.contiguous().view(self.dtype).view(len(rows), *self.shape)

    def valid(self, rows: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """Whether rows (B, words + 2), int32, have the checksum of their image and view, (B,).

        Args:
            rows: on any device.
            index: image indices (B,), int64, on the same device.
            view: view numbers (B,), int64, on the same device.
        """
        low, high = rows[:, 0].long() & 0xFFFFFFFF, rows[:, 1].long()
        stored = high << 32 | low
        return self._checksum(rows[:, 2:], index, view) == stored

    def load(self, view: int, device: torch.device) -> "LoadedView | None":
        """Start to load all rows of a view number to the device and to check them there.

        None if there is no complete file.
        """
        file = self._open(view)
        if file is None:
            return None
        rows = to_device(torch.from_numpy(np.array(file)), device)
        index = torch.arange(self.images, device=device)
        views = torch.full_like(index, view)
        size = max(1, min(MOST_ROWS, MOST_WORDS // rows.shape[1]))
        parts = zip(*(part.split(size) for part in (rows, index, views)), strict=True)
        known = torch.cat([self.valid(*part) for part in parts])
        return LoadedView(self, rows, ToHost(known))

    def write(self, index: Tensor, view: Tensor, values: Tensor) -> str:
        """Write targets (B, *shape), in `dtype`, to the existing files.

        Returns:
            Why some are skipped: a file is read only, or they are not finite in `dtype`.
        """
        finite = values.flatten(1).isfinite().all(dim=1)
        index, view, values = index[finite], view[finite], values[finite]
        rows = torch.zeros(len(index), self.words + 2, dtype=torch.int32)
        numbers = values.flatten(1).contiguous().view(torch.uint8)
        rows[:, 2:].view(torch.uint8)[:, : numbers.shape[1]] = numbers
        rows[:, :2] = self._checksum(rows[:, 2:], index, view)[:, None].view(torch.int32)
        written = rows.numpy()
        files = list(self._files_of(view))
        for file, places in files:
            if file.flags.writeable:
                file[index.numpy()[places]] = written[places]
        if not all(file.flags.writeable for file, _ in files):
            return "its files are read only"
        name = str(self.dtype).removeprefix("torch.")
        if finite.all():
            return ""
        return f"they are beyond the range of {name} (remember.dtype, or dtype= of TeacherCache.of)"

    def create(self) -> None:
        """Create the folder, with the key and the geometry of the rows.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        (dtype,) = [name for name, dtype in DTYPES.items() if dtype == self.dtype]
        geometry = {"images": self.images, "shape": list(self.shape), "dtype": dtype}
        for name, content in (("key", self.key), ("rows", geometry)):
            if not (self.folder / f"{name}.json").exists():
                text = json.dumps(content, indent=2)  # a setting may be infinite
                write_text(self.folder / f"{name}.json", f"{text}\n")

    def reserve(self, view: int) -> None:
        """Create the file of a view number, or extend a truncated one, allocated on the disk.

        Allocated, because writing to a mapped page without disk space kills the process (SIGBUS).

        Raises:
            OSError: the disk is full, or the folder cannot be written.
        """
        self.create()
        self.path(view).touch()
        # Not in append mode, in which file systems without `fallocate` (NFS 3, some of FUSE), where
        # the C library writes to every block, refuse it with EBADF.
        with self.path(view).open("rb+") as file:
            before = file.seek(0, os.SEEK_END)
            if before >= self.file_size:
                return
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.file_size)
                else:
                    file.truncate(self.file_size)
            except OSError:
                file.truncate(before)
                if not before:
                    self.path(view).unlink(missing_ok=True)
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
            try:
                file: Words = np.memmap(self.path(view), np.int32, mode="r+", shape=shape)
            except OSError:  # a file of another user, or on a read-only file system
                file = np.memmap(self.path(view), np.int32, mode="r", shape=shape)
        except OSError:
            return None
        self._files[view] = file
        if len(self._files) > self.OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def _checksum(self, words: Tensor, index: Tensor, view: Tensor) -> Tensor:
        """Multilinear hash modulo 2^64 (Carter & Wegman 1979) of words (B, words), int32; (B,),
        int64: sums and products wrap around.
        """
        factors = to_device(self._factors, words.device)
        total = ((words.long() & 0xFFFFFFFF) * factors).sum(dim=1)
        # Unique for every image and view from -1, and never 0, so that neither a row of zeros nor
        # the same numbers at another position are valid.
        total += ((view + 2) << 32 | index) * ODD
        # The low bits of a sum of products are the weakest; fold the high ones into them.
        return total ^ (total >> 29 & (2**35 - 1))


class LoadedView(NamedTuple):
    """All rows of a view number on the device.

    Attributes:
        rows: what they belong to.
        words: (images, words + 2), int32, on the device.
        known: which of them are valid (images,), bool.
    """

    rows: Rows
    words: Tensor
    known: ToHost

    def has(self, index: Tensor) -> bool:
        """Whether the rows of images (B,), int64, on the CPU, are known to be valid by now."""
        return self.known.ready() and bool(self.known.wait()[index].all())

    def values(self, index: Tensor) -> Tensor:
        """The targets (B, *shape) of images (B,), int64, on the device."""
        return self.rows.values(self.words.index_select(0, index))
