"""SHA-256 of the contents of many files, remembered as long as the files are unchanged."""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kd_lightning.errors import InputError
from kd_lightning.files import hold, readable, replacing

log = logging.getLogger(__name__)

SIZE = 16
"""Bytes of a digest: the first half of SHA-256."""

RECENT = 2 * 10**9
"""Nanoseconds: a file modified so recently could change again with the same timestamp, whose
resolution is limited. Git calls such files racily clean."""

CHUNK = 256  # files per task

Bytes = npt.NDArray[np.uint8]
_MEMO = np.dtype([("stamp", "u8"), ("digest", "u1", SIZE)])


def digest_of(content: bytes) -> bytes:
    """Digest of the content of a file, `SIZE` bytes."""
    return hashlib.sha256(content).digest()[:SIZE]


def file_digests(paths: Sequence[str], memo: Path | None, workers: int) -> Bytes:
    """Digests of the contents of all files, (N, `SIZE`).

    Args:
        paths: the files.
        memo: remembers the digests of unchanged files: those of the same path, inode, size, and
            times of the last change of content and of metadata. The last one cannot be set, as
            that of the content can. Written if missing; None: all files are read.
        workers: number of threads.

    Raises:
        InputError: a file cannot be read.
    """
    if memo is None:
        return _read_digests(paths, np.arange(len(paths)), workers)
    lock: AbstractContextManager[Any] = nullcontext()
    with contextlib.suppress(OSError):  # a full or read-only disk
        lock = hold(memo.with_suffix(".lock"), f"{memo.parent}: another process reads the images")
    with lock:
        return _remembered_digests(paths, memo, workers)


def _remembered_digests(paths: Sequence[str], memo: Path, workers: int) -> Bytes:
    now = time.time_ns()
    stamps, recent = _stamps(paths, now)
    known = _read_memo(memo)
    digests = np.zeros((len(paths), SIZE), np.uint8)
    place = np.searchsorted(known["stamp"], stamps)
    found = place < len(known)
    found[found] = known["stamp"][place[found]] == stamps[found]
    digests[found] = known["digest"][place[found]]
    missing = np.flatnonzero(~found)
    if len(missing):
        digests[missing] = _read_digests(paths, missing, workers)
        kept = np.zeros(len(paths), _MEMO)
        kept["stamp"], kept["digest"] = stamps, digests
        _write_memo(memo, np.sort(kept[~recent], order="stamp"))
    return digests


def _stamps(paths: Sequence[str], now: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """Hashes of the paths, inodes, sizes and times of all files (N,), and which are recent (N,)."""
    stamps = np.zeros(len(paths), np.uint64)
    recent = np.zeros(len(paths), np.bool_)
    for number, path in enumerate(paths):
        try:
            status = os.stat(path)  # noqa: PTH116 (twice as fast)
        except OSError as error:
            raise _unreadable(path, error) from error
        what = (path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        digest = hashlib.blake2b(repr(what).encode("utf-8", "surrogateescape"), digest_size=8)
        stamps[number] = int.from_bytes(digest.digest(), "little")
        recent[number] = status.st_ctime_ns > now - RECENT
    return stamps, recent


def _read_digests(paths: Sequence[str], numbers: npt.NDArray[np.int64], workers: int) -> Bytes:
    """Digests of some files, given by their numbers."""
    digests = np.zeros((len(numbers), SIZE), np.uint8)

    def read(first: int) -> None:
        for number in range(first, min(first + CHUNK, len(numbers))):
            path = paths[numbers[number]]
            try:
                with Path(path).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
            except OSError as error:
                raise _unreadable(path, error) from error
            digests[number] = np.frombuffer(digest, np.uint8)[:SIZE]

    with ThreadPoolExecutor(workers) as pool:  # hashing releases the GIL
        for _ in pool.map(read, range(0, len(numbers), CHUNK)):
            pass
    return digests


def _read_memo(memo: Path) -> npt.NDArray[np.void]:
    """The remembered digests, by stamp; none if they are missing or damaged."""
    nothing = np.zeros(0, _MEMO)
    try:
        content = memo.read_bytes()
    except OSError:
        return nothing
    check, body = content[:SIZE], content[SIZE:]
    if digest_of(body) != check or len(body) % _MEMO.itemsize:
        return nothing
    return np.frombuffer(body, _MEMO)


def _write_memo(memo: Path, kept: npt.NDArray[np.void]) -> None:
    body = kept.tobytes()
    try:
        with replacing(memo) as partial:
            partial.write_bytes(digest_of(body) + body)
    except OSError as error:
        log.warning(
            "the digests of the images cannot be stored in %s (%s), so the next run reads all "
            "files again", readable(memo.parent), error,
        )  # fmt: skip


def _unreadable(path: str, error: OSError) -> InputError:
    return InputError(f"{readable(path)} cannot be read: {error.strerror}")
