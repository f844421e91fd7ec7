"""The teacher-output cache: the output of a frozen teacher on a view is constant, so it is stored
on disk.

A term's `remember` reduces the teacher's output to one row of numbers per view. The rows are stored
in memory-mapped files, one per term and view number, with one row per image:

    <root>/<teacher>-<term>-<hash>/key.json
    <root>/<teacher>-<term>-<hash>/view-00007.rows

The hash covers everything the rows depend on: the teacher's weights, the images, the augmentation,
the precision, and the term's targets. It does not include the student, the seed or the rest of the
method, so that all of these share the cached outputs.

Rows that are missing or damaged are recomputed; see `rows`.
"""

import hashlib
import json
import logging
import re
import shutil
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd_lightning.data.views import PLAIN
from kd_lightning.errors import InputError
from kd_lightning.files import read_json, tidy
from kd_lightning.storage.rows import DTYPES, LoadedView, Rows
from kd_lightning.transfer import ToHost, to_device

log = logging.getLogger(__name__)

GIGABYTE = 10**9
LARGEST_VIEW = GIGABYTE
"""Largest size of the rows of a view number that are loaded as a whole, in bytes."""

NO_VIEW = PLAIN - 1
LAST_VIEW = 2**31 - 1

Compute = Callable[[], Mapping[str, Tensor]]
"""Computes the targets of every term for a batch, name to float32 (B, ...), on the device."""


class TeacherCache:
    """The cached teacher outputs used in one training.

    Args:
        rows: the rows of every term that needs the teacher.
        limit: maximum total size of all caches below `root`, in bytes. Each concurrent process may
            exceed it by one file. 0: the caches are read only.
        root: the folder of all caches.
        live: names of terms that are not stored, but computed for every batch and rounded as if
            they were; see `too_large`.
    """

    def __init__(
        self, rows: Mapping[str, Rows], root: Path, limit: float, live: Collection[str] = ()
    ) -> None:
        self.rows, self.root, self.limit = rows, root, limit
        self.live = live
        self._cached = {name: part for name, part in rows.items() if name not in live}
        self._seen: set[int] = set()  # view numbers whose files exist or cannot be created
        self._full = limit <= 0
        self._told: set[str] = set()
        self._loaded: tuple[int, dict[str, LoadedView]] = (NO_VIEW, {})
        self._unwritten: deque[_Unwritten] = deque()

    @classmethod
    def of(
        cls,
        root: str | Path,
        key: Mapping[str, Any],
        images: int,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: str = "float16",
        limit: float = 5 * GIGABYTE,
    ) -> "TeacherCache":
        """A cache for any training loop.

        Args:
            root: the folder of all caches.
            key: everything that the outputs depend on, as plain values: a hash of the teacher's
                weights, of the images, the settings of the augmentation, the precision.
            images: number of images; upper bound of the indices.
            shapes: name of an output to its shape for one image. A name is part of the name of a
                folder: letters, digits, ``_``, ``.`` and ``-``.
            dtype: storage dtype: float16, bfloat16 or float32.
            limit: maximum total size, in bytes.

        Raises:
            InputError: a name, shape or dtype is invalid.
        """
        root = Path(root)
        rows = {}
        if dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype}")
        for name, shape in shapes.items():
            if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
                raise InputError(
                    f"the name of an output must consist of letters, digits, _, . and -, not {name}"
                )
            if not isinstance(shape, tuple | list) or not shape or min(shape) < 1:
                raise InputError(
                    f"the shape of {name} must contain at least one positive number, not {shape}"
                )
            own = {"output": name, "shape": list(shape), "images": images, "dtype": dtype}
            whole = {"key": dict(key), **own}
            folder = root / folder_name("teacher", name, whole)
            rows[name] = Rows(folder, whole, images, tuple(shape), DTYPES[dtype])
        return cls(rows, root, limit)

    def fetch(
        self, index: Tensor, view: Tensor, device: torch.device | str, ask: Compute
    ) -> dict[str, Tensor]:
        """The targets of each term for a batch: name to float32 (B, ...), on the device.

        Cached rows are read. If any row is missing, the teacher's output is computed for the whole
        batch and stored: a smaller batch could change the order of floating-point additions, so
        that a resumed training would differ. Computed rows are rounded to the storage dtype, so
        that the result does not depend on the state of the cache.

        Args:
            index: image indices (B,), int64, on the CPU.
            view: view numbers (B,), int64, on the CPU; from 0, or -1 for the image itself.
            device: device of the images.
            ask: computes the targets of the whole batch; gradients are not propagated.

        Raises:
            InputError: an index or a view number is out of range, or an output is missing or has
                another shape.
        """
        device = torch.device(device)
        if not len(index):
            shapes = {name: (0, *rows.shape) for name, rows in self.rows.items()}
            return {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        last = index.max()
        known_images = index.min() >= 0 and all(last < rows.images for rows in self.rows.values())
        known_views = len(view) == len(index) and view.min() >= PLAIN and view.max() <= LAST_VIEW
        if not (known_images and known_views):
            raise InputError(
                "a batch needs one view number for each index, from -1 on, and indices from 0 to "
                "the number of images - 1"
            )
        result = {}
        if loaded := self._load(index, view, device):
            there = to_device(index, device)
            result = {name: part.values(there).float() for name, part in loaded.items()}
            if not self.live:
                return result
        self._make_room(view)
        self._write_finished()
        stored, known = {}, {}
        for name, rows in self._cached.items():
            if name not in result:
                stored[name], known[name] = rows.read(index, view)
        if not self.live and all(valid.all() for valid in known.values()):
            return {name: to_device(values, device).float() for name, values in stored.items()}
        computed = ask()
        for name in (*self.live, *known):
            rows = self.rows[name]
            exact = _of_shape((len(index), *rows.shape), computed, name)
            rounded = exact.to(rows.dtype)
            result[name] = torch.where(rounded.isfinite(), rounded.float(), exact)
            if name in self.live:
                continue
            valid = known[name]
            if valid.any():
                where = valid.nonzero().flatten()
                recalled = to_device(stored[name][where], device).float()
                result[name][to_device(where, device)] = recalled
            new = (~valid).nonzero().flatten()
            if len(new) < len(index):
                rounded = rounded[to_device(new, device)]
            self._unwritten.append(_Unwritten(rows, index[new], view[new], rounded))
        if device.type == "cpu":
            self._write_all()
        return result

    def _load(self, index: Tensor, view: Tensor, device: torch.device) -> dict[str, LoadedView]:
        """The rows of the batch's view number, on the device; empty if not all are valid.

        Loading starts with the first batch of a view number; until it is complete, and if the rows
        were not, they are read one by one.
        """
        number = int(view[0])
        if number != self._loaded[0]:
            self._loaded = (number, {})  # release the previous rows first
            cached = self._cached
            size = sum(rows.file_size for rows in cached.values())
            if size <= LARGEST_VIEW and not any(rows.missing(number) for rows in cached.values()):
                parts = {name: rows.load(number, device) for name, rows in cached.items()}
                self._loaded = (number, {name: part for name, part in parts.items() if part})
        loaded = self._loaded[1]
        complete = loaded.keys() == self._cached.keys() and bool((view == number).all())
        return loaded if complete and all(part.has(index) for part in loaded.values()) else {}

    def flush(self) -> None:
        """Write all pending rows, waiting for the device if necessary; release loaded rows."""
        self._write_all()
        self._loaded = (NO_VIEW, {})

    def _write_all(self) -> None:
        while self._unwritten:
            self._write_next()

    def _write_finished(self) -> None:
        while self._unwritten and self._unwritten[0].ready():
            self._write_next()

    def _write_next(self) -> None:
        part = self._unwritten.popleft()
        why = part.write()
        if why and why not in self._told and self.limit > 0:
            self._told.add(why)
            log.warning(
                "teacher outputs that are missing in %s cannot be cached, as %s; they are computed "
                "instead", part.rows.folder, why,
            )  # fmt: skip

    def _make_room(self, view: Tensor) -> None:
        for number in set(view.unique().tolist()) - self._seen:
            self._seen.add(number)
            missing = [rows for rows in self._cached.values() if rows.missing(number)]
            if not missing or self._full:
                continue
            try:
                wanted = used_bytes(self.root) + sum(
                    {rows.folder: rows.missing(number) for rows in missing}.values()
                )  # terms with the same rows share a folder
                if wanted > self.limit:
                    raise OSError(
                        f"the limit of {self.limit / GIGABYTE:g} GB is reached: remember.disk_gb, "
                        "or limit= of TeacherCache.of"
                    )
                for rows in missing:
                    rows.reserve(number)
            except OSError as error:
                self._full = True
                log.warning(
                    "no further teacher outputs are cached in %s (%s); they are computed instead. "
                    "scripts/cache.py lists and removes caches",
                    self.root, error.strerror or error,
                )  # fmt: skip


def _of_shape(shape: tuple[int, ...], computed: Mapping[str, Tensor], name: str) -> Tensor:
    found = computed.get(name)
    if not isinstance(found, Tensor) or found.shape != shape:
        given = f"has the shape {tuple(found.shape)}" if isinstance(found, Tensor) else "is missing"
        raise InputError(
            f"the teacher's output {name} must be a tensor of shape {shape} for this batch, "
            f"but {given}"
        )
    return found.detach()


def too_large(
    rows: Mapping[str, Rows], views: Collection[int], root: Path, limit: float
) -> dict[str, int]:
    """The terms whose rows do not fit on the disk, and the sizes that they would need.

    Smaller rows take precedence.

    Args:
        rows: the rows of every term.
        views: the view numbers that will be used.
        root: the folder of all caches.
        limit: maximum total size of all caches below `root`, in bytes.

    Returns:
        Name to size, in bytes.
    """
    place = root
    while not place.exists():
        place = place.parent
    free = max(0, min(limit - used_bytes(root), shutil.disk_usage(place).free))
    large: dict[str, int] = {}
    fitting: set[Path] = set()
    for name, part in sorted(rows.items(), key=lambda item: item[1].file_size):
        if part.folder in fitting:  # of another term with the same targets
            continue
        needed = sum(part.missing(view) for view in views)
        if needed > free:
            large[name] = part.file_size * len(views)
        else:
            free -= needed
            fitting.add(part.folder)
    return large


class _Unwritten:
    """Rows that are being copied from the device and then written to a file."""

    def __init__(self, rows: Rows, index: Tensor, view: Tensor, values: Tensor) -> None:
        self.rows, self.index, self.view = rows, index, view
        self.values = ToHost(values)

    def ready(self) -> bool:
        """Whether the copy is complete."""
        return self.values.ready()

    def write(self) -> str:
        """Write the rows, waiting for the copy if necessary; see `Rows.write`."""
        return self.rows.write(self.index, self.view, self.values.wait())


class Stored(NamedTuple):
    """One cache folder: its size in bytes, number of views, key, and geometry of its rows."""

    folder: Path
    bytes: int
    views: int
    key: dict[str, Any]
    geometry: dict[str, Any]


def stored(root: Path) -> list[Stored]:
    """All caches below `root`, sorted by name."""
    found = []
    for folder in sorted(path for path in root.glob("[!.]*") if path.is_dir()):
        files = [_size(file) for file in folder.glob("view-*.rows")]
        key, geometry = (read_json(folder / f"{name}.json") for name in ("key", "rows"))
        found.append(Stored(folder, sum(files), len(files), key, geometry))
    return found


def remove(folder: Path) -> None:
    """Remove a cache. Trainings that use it continue and compute the outputs."""
    shutil.rmtree(folder)


def used_bytes(root: Path) -> int:
    """Total size of all caches below `root`, in bytes."""
    return sum(_size(file) for file in root.glob("[!.]*/view-*.rows"))


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # removed in the meantime
        return 0


def folder_name(teacher: str, term: str, key: Mapping[str, Any]) -> str:
    """`<teacher>-<term>-<hash>`."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{tidy(teacher)}-{tidy(term)}-{digest[:16]}"
