"""Prediction of many image files: decoding in threads, the network in batches."""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from kd_lightning.data.decoding import is_image_name
from kd_lightning.data.scanning import is_hidden
from kd_lightning.errors import InputError
from kd_lightning.files import readable
from kd_lightning.inference.images import Pixels, to_pixels
from kd_lightning.inference.student import BATCH, Student

AHEAD = 2
"""Number of batches that are decoded while the network processes another."""


class Prediction(NamedTuple):
    """The most probable classes of one image file, best first.

    Attributes:
        file: path of the image.
        classes: their names; empty if the file is not readable.
        probabilities: their probabilities, in [0, 1].
        error: why the file is not readable.
    """

    file: Path
    classes: Sequence[str] = ()
    probabilities: Sequence[float] = ()
    error: str | None = None


def find_images(places: Iterable[str | Path]) -> list[Path]:
    """Files as given, and the image files in and below folders, in alphabetical order.

    In folders, hidden entries, those of file managers, and files whose names are not those of
    images are ignored. A folder that cannot be read is among the files, to be reported as one.

    Raises:
        InputError: there is no image at all.
    """
    found: list[Path] = []
    for place in map(Path, places):
        # Unlike `Path.is_dir`, False if a folder above cannot be searched.
        found += _below(place) if os.path.isdir(place) else [place]  # noqa: PTH112
    if not found:
        raise InputError(f"there is no image in {', '.join(map(readable, places))}")
    return found


def _below(root: Path) -> list[Path]:
    """The images below a folder, and in folders that links lead to; each folder is read once."""
    found: list[Path] = []
    entered: set[Path] = set()
    outside = set(root.resolve().parents)
    waiting = [root]  # links last, so that a folder below `root` has its own name

    def unreadable(error: OSError) -> None:
        found.append(Path(error.filename))

    for start in waiting:
        for folder, below, files in os.walk(start, onerror=unreadable):
            real = Path(folder).resolve()
            if real in entered or real in outside:
                below.clear()
                continue
            entered.add(real)
            below[:] = [name for name in sorted(below) if not is_hidden(name)]
            waiting += [link for name in below if (link := Path(folder, name)).is_symlink()]
            names = (name for name in files if is_image_name(name) and not is_hidden(name))
            found += [Path(folder, name) for name in names]
    return sorted(found, key=_place)


def _place(file: Path) -> list[tuple[int, str]]:
    """Sort key: by folder, its files before the folders in it."""
    *folders, name = file.parts
    return [*((1, folder) for folder in folders), (0, name)]


def predict_files(
    student: Student,
    files: Iterable[Path],
    top: int = 1,
    batch_size: int = BATCH,
    workers: int | None = None,
) -> Iterator[Prediction]:
    """Predict image files, in their order.

    At most three batches of decoded images are held in memory.

    Args:
        student: the student.
        files: the image files.
        top: number of classes per image.
        batch_size: images per batch.
        workers: number of decoding threads; None: chosen by Python.

    Raises:
        InputError: `top` or `batch_size` is below 1.
    """
    if top < 1 or batch_size < 1:
        raise InputError("the number of classes and the batch size must be at least 1")
    remaining = iter(files)
    waiting: deque[list[tuple[Path, Future[Pixels]]]] = deque()
    pool = ThreadPoolExecutor(workers)  # Pillow releases the GIL while decoding

    def decode_next() -> None:
        if batch := list(islice(remaining, batch_size)):
            description = student.description
            waiting.append([(file, pool.submit(to_pixels, file, description)) for file in batch])

    try:
        for _ in range(AHEAD):
            decode_next()
        while waiting:
            batch = waiting.popleft()
            decode_next()
            yield from _predict(student, batch, top)
    finally:
        pool.shutdown(cancel_futures=True)


def _predict(
    student: Student, batch: Sequence[tuple[Path, "Future[Pixels]"]], top: int
) -> Iterator[Prediction]:
    decoded: dict[int, Pixels] = {}
    errors: dict[int, str] = {}
    for number, (_, future) in enumerate(batch):
        try:
            decoded[number] = future.result()
        except InputError as error:
            errors[number] = str(error)
    best: dict[int, tuple[list[float], list[int]]] = {}
    if decoded:
        # Not `student.probabilities`, which would resize and crop the pixels once more if the
        # student's images are stored larger.
        with torch.inference_mode():
            logits = student.run(torch.from_numpy(np.stack(list(decoded.values()))))
        probabilities = student.calibrated(logits)
        values, labels = probabilities.topk(min(top, probabilities.shape[1]))
        best = dict(zip(decoded, zip(values.tolist(), labels.tolist(), strict=True), strict=True))
    for number, (file, _) in enumerate(batch):
        if number in errors:
            yield Prediction(file, error=errors[number])
        else:
            values_of, labels_of = best[number]
            yield Prediction(file, [student.class_name(label) for label in labels_of], values_of)
