"""A teacher whose outputs were recorded and packed; its network is not available.

Its outputs are in the teacher-output caches of the file, which are verified and unpacked to

    <output_dir>/teachers/packed/<teacher>-<hash of the file>/<cache>/view-00007.rows

apart from the caches of teachers that exist, so that a file cannot add wrong rows to these.
"""

import contextlib
import itertools
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_lightning.config.nodes import Node
from kd_lightning.config.packed import PackedLayers, read_packed
from kd_lightning.data.views import PLAIN, Normalization
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.errors import InputError, RunError
from kd_lightning.files import hold, readable
from kd_lightning.models.features import LayerShapes, Output
from kd_lightning.models.layouts import Layout
from kd_lightning.models.roles import Roles
from kd_lightning.storage.identity import file_sha256
from kd_lightning.storage.packing import unpack
from kd_lightning.storage.rows import DTYPES, Rows

_SETTINGS = {
    "precision": "trainer.precision",
    "dtype": "remember.dtype",
    "split[0]": "data.val_fraction",
    "split[1]": "data.split_seed",
    "normalization[2]": "data.mean",
    "normalization[3]": "data.std",
    "augmentation.padding": "data.padding",
    "augmentation.flip": "data.flip",
    "augmentation.cutout": "data.cutout",
    "augmentation.seed": "data.view_seed",
    "augmentation": "data.augmentation",
    "mixing": "data.mixing",
    "term.top_k": "remember.top_k",
}
"""Parts of a cache's key, and the settings that they come from."""


class RecordedNetwork(nn.Module):
    """Stands for the network of a packed teacher in a configuration.

    Args:
        outputs: the packed file.
    """

    def __init__(self, outputs: str) -> None:
        super().__init__()
        self.packed = read_packed(outputs)
        # Counted, but not allocated.
        weights = torch.empty(self.packed.parameters, device="meta")
        self.weights = nn.Parameter(weights, requires_grad=False)


class RecordedShapes(LayerShapes):
    """The recorded shapes of the layers of a network."""

    def __init__(self, layers: PackedLayers) -> None:
        dict.__init__(self, layers.shapes)
        self.model, self.image_size = nn.Module(), 0  # without layers
        if layers.roles is not None:
            self.model.roles = Roles(*layers.roles)  # type: ignore[assignment]
        self.output = torch.zeros(1, *layers.shapes[""])
        self.others: dict[str, str] = {}
        self.inputs = layers.inputs
        self.modified = frozenset(layers.modified)
        self.layouts = {name: Layout(*layout) for name, layout in layers.layouts.items()}
        self.input_layouts = {n: Layout(*layout) for n, layout in layers.input_layouts.items()}


class RecordedTeacher(FrozenTeacher):
    """A teacher that only knows its recorded outputs; satisfies `Teacher`.

    Args:
        network: from the configuration.
        given: the normalisation of the images.
    """

    def __init__(self, network: RecordedNetwork, given: Normalization) -> None:
        super().__init__(network, given, given)
        self.packed = network.packed
        self._unpacked: Path | None = None

    def shapes(self, image_size: int) -> LayerShapes:
        """Recorded layer shapes; the cache's key says for which images."""
        return RecordedShapes(self.packed.shapes)

    def fingerprint(self) -> str:
        """SHA-256 of the file, in hex."""
        return file_sha256(self.packed.file)

    def why_not_stored(self, images: Tensor) -> str:
        """Empty: the outputs are stored already."""
        return ""

    def _ask(self, images: Tensor, complete: bool) -> Output:
        """Before `prepare`, NaN in the recorded shapes, which show the shapes of the targets.

        Raises:
            RunError: after `prepare`: an output that a training needs is missing.
        """
        if self._place is not None:
            raise RunError(
                f"an output of the teacher {self.packed.name} is missing in {self.packed.file}, or "
                f"has been damaged since it was unpacked: remove {self._unpacked} and run the same "
                "command again"
            )
        layers = self.packed.shapes
        shapes = layers.shapes | layers.inputs
        unknown = torch.tensor(torch.nan)
        features = {name: unknown.expand(len(images), *shapes[name]) for name in self._layers}
        return Output(unknown.expand(len(images), *layers.shapes[""]), features)

    def folder(self, root: Path) -> Path:
        """Where the file is unpacked, below a folder."""
        return root / f"{self.packed.name.replace(' ', '_')}-{self.fingerprint()[:16]}"

    def key(self, images: str, precision: str, given: Normalization) -> Node:
        """What the outputs depend on besides the views, if they were computed for this run."""
        recorded = self.packed.key
        return {
            **recorded,
            "images": images,
            "precision": precision,
            "normalization": [*recorded["normalization"][:2], *given],
        }

    def check(self, rows: Mapping[str, Rows], views: Collection[int]) -> None:
        """Check that the file has the rows that a run needs.

        Args:
            rows: the rows, by the name of the term, or ``evaluation``.
            views: the view numbers.

        Raises:
            InputError: it has not; the message says what differs and what to do.
        """
        file = self.packed.file
        for name, part in rows.items():
            cache = self.packed.caches.get(part.folder.name)
            if cache is None:
                raise InputError(self._why_not(name, part))
            shape = [part.images, *part.shape]
            if [cache.rows["images"], *cache.rows["shape"]] != shape or (
                DTYPES.get(cache.rows["dtype"]) != part.dtype
            ):
                raise InputError(f"{file} is damaged: the rows of {name} have a wrong shape")
            if all(part.path(view).name in cache.files for view in views):
                continue
            if PLAIN in views:
                raise InputError(f"{file} has no outputs on the test images: pack a finished run")
            there = next(
                number for number in itertools.count() if part.path(number).name not in cache.files
            )
            hint = f"use data.views={there}, or " if there else ""
            raise InputError(
                f"{file} has {there} views of each image for {name}, but this run needs "
                f"{len(views)}: {hint}a file with more views"
            )

    def unpack(self, root: Path) -> None:
        """Verify and unpack the file below a folder, unless it has been.

        Raises:
            InputError: the file is damaged; nothing is added then.
            OSError: the folder cannot be written.
        """
        place = self.folder(root)
        try:
            lock = place.with_name(f"{place.name}.lock")
            held = hold(lock, f"another process unpacks {place.name}")
        except OSError:  # a folder of other users: it can be used if nothing is missing in it
            held = contextlib.nullcontext()
        with held:
            unpack(self.packed.file, place)
        self._unpacked = place

    def _why_not(self, name: str, rows: Rows) -> str:
        """Why no cache in the file has the key of these rows."""
        file, wanted = self.packed.file, json.loads(json.dumps(rows.key))
        caches = self.packed.caches.values()
        near = [cache.key for cache in caches if _kind(cache.key) == _kind(wanted)]
        if not near:
            known = {str(_kind(cache.key)[0]).rpartition(".")[2] for cache in caches}
            return readable(
                f"{file} has no outputs for the term {name}, only those of "
                f"{', '.join(sorted(known - {'None'}))}: choose another method, or pack a run of "
                "this one"
            )
        found = min((list(_differences(key, wanted)) for key in near), key=len)
        return readable(
            f"{file} does not fit this run: {', '.join(found) or 'its names are wrong'}; "
            "use the settings of the file, or one that was packed for these"
        )


def _kind(key: Node) -> tuple[Any, Any]:
    """The kind of the targets in a cache: the term that they are for, and which part of it."""
    term = key.get("term", {})
    return term.get("class"), term.get("part")


def _differences(recorded: Any, wanted: Any, path: str = "") -> Iterator[str]:
    """What differs between the key of a cache and that of a run, in words."""
    if recorded == wanted:
        return
    if path in ("images", "code"):
        yield {"images": "the images or labels differ", "code": "your own code differs"}[path]
    elif _are(dict, recorded, wanted) and recorded.get("_target_") == wanted.get("_target_"):
        for key in sorted(recorded.keys() | wanted.keys()):
            yield from _differences(
                recorded.get(key), wanted.get(key), f"{path}.{key}" if path else key
            )
    elif path in ("split", "normalization") and _are(list, recorded, wanted):
        for number, pair in enumerate(zip(recorded, wanted, strict=False)):
            yield from _differences(*pair, f"{path}[{number}]")
    else:
        yield f"{_SETTINGS.get(path, path)} is {recorded} in the file and {wanted} here"


def _are(kind: type, *values: Any) -> bool:
    return all(isinstance(value, kind) for value in values)
