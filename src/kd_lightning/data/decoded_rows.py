"""A file of decoded images, written image by image as they are first needed.

There are no locks and no completeness markers: every image has a checksum. One that was never
written, partially written or lost in a truncated file fails the check. Processes that write the
same image at once write the same bytes.

Images are copied with `preadv`, not mapped: pages of a mapped file count as memory of the process.
"""

import logging
import os
import shutil
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kd_lightning.files import readable

log = logging.getLogger(__name__)

MAGIC = 0x4B444C31  # in every tail, so that a row of zeros is not valid
RESERVE = 2**30
"""Bytes that are left free on the disk."""

Bytes = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.int64]


class DecodedRows:
    """N rows of decoded pixels in a sparse file, each followed by its checksum.

    If the disk is full or read-only, rows are not stored; a warning says so.

    Args:
        path: the file, created if it is missing. Its name must depend on everything that the rows
            depend on.
        count: number of rows.
        size: bytes of a row.
    """

    def __init__(self, path: Path, count: int, size: int) -> None:
        self.path, self.count, self.size = path, count, size
        self._stride = size + 8
        self._writable = True
        self._file = self._open()

    def _open(self) -> int | None:
        total, file = self.count * self._stride, None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            except OSError:  # somebody else's, or a read-only file system
                if not self.path.is_file():
                    raise
                self._writable = False
                return os.open(self.path, os.O_RDONLY)
            if os.fstat(file).st_size != total:
                os.ftruncate(file, total)
            missing = total - os.fstat(file).st_blocks * 512
            free = shutil.disk_usage(self.path.parent).free - RESERVE
        except OSError as error:
            if file is not None:
                os.close(file)
            self._give_up(str(error))
            return None
        if missing > free:
            self._give_up(f"{missing / 1e9:.3g} GB are needed, {max(0, free) / 1e9:.3g} GB free")
        return file

    def read(self, index: Numbers, into: Bytes) -> npt.NDArray[np.bool_]:
        """Read rows.

        Args:
            index: their numbers (B,).
            into: (B, size), overwritten; rows that are not valid have undefined contents.

        Returns:
            Which rows are valid (B,).
        """
        valid = np.zeros(len(index), np.bool_)
        if self._file is None:
            return valid
        tails = np.zeros((len(index), 2), np.uint32)
        for number, row in enumerate(index.tolist()):
            try:
                got = os.preadv(
                    self._file, [into[number].data, tails[number].data], row * self._stride
                )
            except OSError:
                continue
            if got == self._stride and tails[number, 0] == MAGIC:
                valid[number] = tails[number, 1] == _checksum(row, into[number])
        return valid

    def write(self, index: Numbers, rows: Bytes) -> None:
        """Write rows (B, size), numbered `index` (B,)."""
        if self._file is None or not self._writable:
            return
        tail = np.zeros(2, np.uint32)
        for number, row in zip(index.tolist(), rows, strict=True):
            tail[:] = MAGIC, _checksum(number, row)
            try:
                os.pwritev(self._file, [row.data, tail.data], number * self._stride)
            except OSError as error:
                self._give_up(str(error))
                return

    def _give_up(self, why: str) -> None:
        if self._writable:
            log.warning(
                "decoded images cannot be stored in %s (%s), so they are decoded in every epoch; "
                "to avoid this, free disk space or choose another data_dir",
                readable(self.path.parent), why,
            )  # fmt: skip
        self._writable = False

    def __del__(self) -> None:
        file = getattr(self, "_file", None)
        if file is not None:
            os.close(file)


def _checksum(number: int, row: Bytes) -> int:
    return zlib.crc32(row.data, number & 0xFFFFFFFF)
