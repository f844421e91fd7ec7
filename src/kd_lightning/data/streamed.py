"""Images of a set that does not fit into memory: decoded when they are first needed."""

import base64
import copy
import functools
import hashlib
import math
import mmap
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kd_lightning.data.decoded_rows import DecodedRows
from kd_lightning.data.decoding import decode, read_image
from kd_lightning.data.file_digests import digest_of, file_digests
from kd_lightning.data.machine import available_cores
from kd_lightning.data.sources import Fetched
from kd_lightning.errors import InputError
from kd_lightning.files import readable
from kd_lightning.transfer import copies_in_background

GROUP = 2**23
"""Bytes that are fetched at once: large enough for small images, whose batches are grouped."""

CHUNK = 16  # images per task of a worker

PROBE = (
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQ"
    "c1tdhbWGkJ6jq62rZ4C8ybqmx5moq6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
    "pKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKT/wAARCAAUABoDASIAAhEBAxEB/8QAFwABAQEBAAAAAAAAAAAAAAAA"
    "AwQABf/EACMQAAIBAwMEAwAAAAAAAAAAAAABAgMRIQQTQRIxUZFScYH/xAAYAQADAQEAAAAAAAAAAAAAAAACAwUB"
    "Bv/EAB4RAAICAgIDAAAAAAAAAAAAAAABAgMRMRIhQWHw/9oADAMBAAIRAxEAPwDiU9Pfgphpla7KqNDF2h4UOWsm"
    "xceKbAqvJYadcRuJsL4r2WxoeV+CbK8L0DKa9FKu7oOnBdK+yiEVl27YMYRl4X3g52oaEFlWwhVFWMYS5NaZTho/"
    "/9k="
)
"""A JPEG image with subsampled colours, which libraries decode to different pixels."""

Bytes = npt.NDArray[np.uint8]


class StreamedImages:
    """Images that are decoded when they are first needed, and then kept in a file.

    Only the batches that are being prepared are in memory. The identity of the images is that of
    the contents of their files, together with the behaviour of the decoder; every file is compared
    with it when it is decoded.

    Args:
        paths: the files.
        size: height and width that they are decoded to, in pixels.
        resize: see `decoding.decode`.
        decoder: version of the decoding.
        cache_dir: folder of the files of decoded images and of the digests of their contents; None:
            images are decoded every time.
        name: name of the file of the digests: one for each folder of images.
        workers: number of threads that decode; None: as many as processor cores.

    Raises:
        InputError: a file cannot be read.
    """

    def __init__(
        self,
        paths: Sequence[str],
        size: int,
        resize: str,
        decoder: str,
        cache_dir: Path | None,
        name: str = "images",
        workers: int | None = None,
    ) -> None:
        self.paths, self.size, self.resize = paths, size, resize
        self.device = torch.device("cpu")
        workers = workers or available_cores()
        memo = cache_dir / f"{name}.digests" if cache_dir else None
        self._digests = file_digests(paths, memo, workers)
        self._decoder = f"{decoder} {size} {resize} {_decoder_behaviour(size, resize)}"
        row = size * size * 3
        self.batch_limit: int | None = max(1, GROUP // row)
        self._rows = None
        if cache_dir:
            digest = hashlib.sha256()
            for part in self.contents():
                digest.update(part)
            stored = cache_dir / f"{digest.hexdigest()[:32]}.rows"
            self._rows = DecodedRows(stored, len(paths), row)
        warnings.filterwarnings("ignore", module="PIL")  # about unused metadata
        self._pool = ThreadPoolExecutor(workers, "decode")  # starts threads when they are needed

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, 3)."""
        return len(self.paths), self.size, self.size, 3

    def to(self, device: torch.device) -> "StreamedImages":
        """Deliver to another device."""
        other = copy.copy(self)
        other.device = device
        return other

    def fetch(self, index: Tensor) -> Fetched:
        """Read or decode images (B,), int64.

        Raises:
            InputError: an image is damaged, or has changed since the start.
        """
        pinned = copies_in_background(self.device)
        pixels = _buffer((len(index), *self.shape[1:]), pinned)
        numbers, rows = index.numpy(), pixels.view(len(index), -1).numpy()

        def fill(first: int) -> None:
            part = slice(first, first + CHUNK)
            self._fill(numbers[part], rows[part])

        for _ in self._pool.map(fill, range(0, len(index), CHUNK)):
            pass
        images = pixels.to(self.device, non_blocking=pinned)
        return Fetched(images, torch.arange(len(index)))

    def contents(self) -> Iterator[Any]:
        """The decoder and the digests of all files."""
        yield self._decoder.encode()
        yield self._digests.data

    def _fill(self, index: npt.NDArray[np.int64], rows: Bytes) -> None:
        valid = self._rows.read(index, rows) if self._rows else np.zeros(len(index), np.bool_)
        missing = np.flatnonzero(~valid)
        for number in missing:
            rows[number] = self._decode(int(index[number])).reshape(-1)
        if self._rows and len(missing):
            self._rows.write(index[missing], rows[missing])

    def _decode(self, number: int) -> Bytes:
        path = self.paths[number]
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise InputError(f"{readable(path)} cannot be read: {error.strerror}") from error
        if digest_of(content) != self._digests[number].tobytes():
            raise InputError(
                f"{readable(path)} has changed since the start of the run; run the command again"
            )
        return read_image(Path(path), self.size, self.resize, content)


def _buffer(shape: tuple[int, ...], pinned: bool) -> Tensor:
    """An uninitialised tensor, uint8.

    Mapped: freed memory of a thread's own heap, as that of the thread that fetches, is not returned
    to the system and not used by other threads.
    """
    if pinned:
        return torch.empty(shape, dtype=torch.uint8, pin_memory=True)
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape)), dtype=torch.uint8).view(shape)


@functools.lru_cache(maxsize=8)
def _decoder_behaviour(size: int, resize: str) -> str:
    """SHA-256, in hex, of the pixels that this machine's libraries decode `PROBE` to."""
    pixels = decode(BytesIO(base64.b64decode(PROBE)), size, resize)
    return hashlib.sha256(pixels.tobytes()).hexdigest()
