"""Pack what stands for a teacher: its outputs in finished runs, and its description."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from kd_lightning.config.hardware import device_type
from kd_lightning.config.packed import is_name, read_packed
from kd_lightning.data.views import PLAIN
from kd_lightning.distill.caching import open_caches, used_views
from kd_lightning.engine.quiet import quiet_lightning
from kd_lightning.errors import InputError
from kd_lightning.models.features import LayerShapes
from kd_lightning.models.roles import find_roles
from kd_lightning.storage.packing import pack_teacher
from kd_lightning.storage.rows import Rows
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows.check_cache import with_stored_weights
from kd_lightning.workflows.jobs import Job, prepare_again

log = logging.getLogger(__name__)


def pack_runs(run_dirs: Sequence[Path], file: Path, trust: Iterable[str] = ()) -> dict[str, int]:
    """Write the outputs of a teacher that finished runs used, and its description, to one file.

    With the file, `teacher=packed` trains the same students without the teacher. Only complete
    views are packed, those with an output for every training image.

    Args:
        run_dirs: folders of runs with the same teacher; its weights must still exist.
        file: the file; replaced atomically.
        trust: your own packages that the runs may import; see `config.trust.check_trusted`.

    Returns:
        Name of each cache to its number of views.

    Raises:
        InputError: a run is not finished, has no single teacher of its own, or its outputs are
            incomplete; or the runs have different teachers, images or precisions, or refer to
            untrusted code.
        OSError: the file cannot be written.
    """
    quiet_lightning()
    trust = tuple(trust)
    teacher: dict[str, Any] = {}
    caches: dict[Path, list[str]] = {}
    evaluation: Path | None = None
    for run_dir in run_dirs:
        metrics = RunDirectory(run_dir).read_metrics()
        job = _opened(run_dir, metrics, trust)
        described = _described(job, metrics)
        for name, rows in _all_rows(job):
            caches[rows.folder] = _complete(rows, name, job)
            if name == "evaluation":
                evaluation = evaluation or rows.folder
                if rows.folder != evaluation:
                    raise InputError(f"{run_dir} has another teacher, other images or precision")
        teacher = teacher or described
    pack_teacher(teacher, caches, file)
    read_packed(file)
    return {folder.name: len(names) for folder, names in caches.items()}


def _opened(run_dir: Path, metrics: Mapping[str, Any], trust: Iterable[str]) -> Job:
    """The job of a run, with the weights of its teacher and its caches."""
    if metrics.get("status") != "finished" or metrics.get("test_accuracy") is None:
        raise InputError(f"{run_dir} contains no finished run: finish it, to record all outputs")
    job = prepare_again(RunDirectory(run_dir), trust)
    if changes := job.contents.changes(metrics):
        raise InputError(f"{' and '.join(changes)} changed since {run_dir} was finished")
    if len(job.plan.teachers) > 1:
        raise InputError(f"the teacher of {run_dir} is an ensemble, which cannot be packed")
    job = with_stored_weights(job)
    device = torch.device(device_type(job.plan.student.trainer.arguments["accelerator"]))
    open_caches(job.module, job.plan, job.data, device)
    if job.module.cache is None or job.module.evaluation_cache is None:
        raise InputError(f"the teacher's outputs in {run_dir} are not cached")
    return job


def _all_rows(job: Job) -> Iterator[tuple[str, Rows]]:
    assert job.module.cache is not None
    assert job.module.evaluation_cache is not None
    yield from job.module.cache.rows.items()
    yield "evaluation", job.module.evaluation_cache.rows["0"]


def _complete(rows: Rows, name: str, job: Job) -> list[str]:
    """Names of the files of the complete views, from the first one on."""
    split, views = ("test", iter([PLAIN])) if name == "evaluation" else ("train", count())
    found = []
    for view in views:
        index = job.data.splits[split]
        if not rows.has_all(index, view):
            break
        found.append(rows.path(view).name)
    if not found:
        raise InputError(
            f"{rows.folder} has no complete view ({name}): compute it with scripts/cache.py fill "
            "and the overrides of the run, with enough room in remember.disk_gb, and a "
            "remember.dtype of sufficient range"
        )
    wanted = len(used_views(job.plan, job.data))
    if name != "evaluation" and len(found) < wanted:
        log.warning(
            "%d of %d views of %s are packed, the others are incomplete: scripts/cache.py fill "
            "computes as many as trainer.max_epochs and data.views say",
            len(found), wanted, rows.folder.name,
        )  # fmt: skip
    return found


def _described(job: Job, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.packed` reads about a teacher, as plain values."""
    (teacher,) = job.teachers
    shapes = teacher.shapes(job.plan.data.image_size)
    layers = list(job.plan.config["teacher"]["layers"] or ())
    for key, name in [("name", metrics["teacher"]), *(("layers", layer) for layer in layers)]:
        if not is_name(name):
            raise InputError(
                f"teacher.{key}: {name!r} cannot be packed; use up to 100 ASCII letters, digits, "
                "underscores, dots, hyphens, colons and plus signs"
            )
    return {
        "name": metrics["teacher"],
        "parameters": metrics["teacher_parameters"],
        "layers": layers,
        "val_accuracy": metrics["teacher_val_accuracy"],
        "test_accuracy": metrics["teacher_test_accuracy"],
        "shapes": _plain_shapes(shapes, job.plan.data.num_classes),
    }


def _plain_shapes(shapes: LayerShapes, classes: int) -> dict[str, Any]:
    try:
        roles = find_roles(shapes, classes)
    except ValueError:  # then methods need the names of layers
        roles = None
    return {
        "shapes": {**shapes, "": (classes,)},
        "inputs": shapes.inputs,
        "layouts": shapes.layouts,
        "input_layouts": shapes.input_layouts,
        "modified": sorted(shapes.modified),
        "roles": roles,
    }
