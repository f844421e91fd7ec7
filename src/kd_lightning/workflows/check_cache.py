"""Check cached teacher outputs against the teacher."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from kd_lightning.config.hardware import device_type
from kd_lightning.config.plan import Plan
from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import PLAIN
from kd_lightning.distill.caching import open_caches
from kd_lightning.distill.module import AUTOCAST
from kd_lightning.distill.top_k import restore
from kd_lightning.engine.quiet import quiet_lightning
from kd_lightning.errors import InputError
from kd_lightning.storage.rows import Rows
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_store import TeacherStore, teacher_key
from kd_lightning.workflows.jobs import Job, prepare_again

TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float32: 1e-3}
"""Largest accepted difference, relative to the largest value: rounding by the stored data type and
by another batch size."""


class Checked(NamedTuple):
    """How many rows of a cache were recomputed, how many others are damaged, and the largest
    relative difference found.
    """

    name: str
    rows: int
    damaged: int
    difference: float
    tolerance: float


def check_cache(
    run_dir: str | Path, count: int, seed: int = 0, trust: Iterable[str] = ()
) -> list[Checked]:
    """Recompute random rows of the caches that a run uses, and compare.

    Args:
        run_dir: folder of the run; its images and its teacher must still exist.
        count: number of rows of each cache.
        seed: seed of the choice.
        trust: your own packages that the run may import; see `config.trust.check_trusted`.

    Raises:
        InputError: the run has no teacher, nothing is cached for it, or it refers to untrusted
            code.
    """
    quiet_lightning()
    job = with_stored_weights(prepare_again(RunDirectory(run_dir), trust))
    module, plan = job.module, job.plan
    # Of the kind that trained: the cache of another kind is another one.
    device = torch.device(device_type(plan.student.trainer.arguments["accelerator"]))
    open_caches(module, plan, job.data, device)
    generator = torch.Generator().manual_seed(seed)
    found = []
    classes = plan.data.num_classes
    for cache, ask in (
        (module.cache, module.ask_teacher),
        (module.evaluation_cache, module.ask_logits),
    ):
        for name, rows in cache.rows.items() if cache is not None else ():
            recompute = partial(_recompute, job, device, ask, name)
            reduced = cache is module.cache and module.is_reduced(name)
            values = partial(_probabilities, classes) if reduced else torch.Tensor.float
            checked = _check(rows, job.data, recompute, values, count, generator)
            if checked is not None:
                found.append(checked)
    if not found:
        raise InputError(f"nothing is cached for {run_dir}")
    return found


def with_stored_weights(job: Job) -> Job:
    """The job with its teachers' weights, without training a teacher.

    Raises:
        InputError: the run has no teacher, or none with weights, or they are not stored.
    """
    plan = job.plan
    check_has_network(plan)
    store, images = TeacherStore(plan.output_dir / "teachers"), job.data.fingerprint()

    def missing(folder: Path) -> dict[str, float]:
        raise InputError(f"the teacher {plan.teacher_name} is not stored in {store.root}")

    return job.with_teachers(
        tuple(
            None
            if part.weights is not None
            else store.obtain(part.name, teacher_key(part, images, teacher.initial_sha256), missing)
            for part, teacher in zip(plan.teachers, job.teachers, strict=True)
        )
    )


def check_has_network(plan: Plan) -> None:
    """Check that there is a teacher whose outputs can be computed and stored.

    Raises:
        InputError: there is none.
    """
    if not plan.teachers:
        raise InputError(f"the method {plan.method} has no teacher")
    for part in plan.teachers:
        if part.outputs is not None:
            raise InputError(
                f"the teacher {part.name} is packed in {part.outputs}, without weights"
            )
        if part.decay is not None:
            raise InputError(f"the teacher {part.name} follows the student: it is not cached")


def _check(
    rows: Rows,
    data: ImageDataModule,
    recompute: Callable[[Tensor], Tensor],
    values: Callable[[Tensor], Tensor],
    count: int,
    generator: torch.Generator,
) -> Checked | None:
    views = [
        PLAIN if path.stem == "view-plain" else int(path.stem.removeprefix("view-"))
        for path in sorted(rows.folder.glob("view-*.rows"))
    ]
    places, damaged = [torch.empty(0, 2, dtype=torch.int64)], sum(map(rows.damaged, views))
    for number in views:
        index = torch.arange(rows.images)
        valid = index[rows.read(index, torch.full_like(index, number))[1]]
        places.append(torch.stack([valid, torch.full_like(valid, number)], dim=1))
    known = torch.cat(places)
    if not len(known):
        return (
            Checked(rows.folder.name, 0, damaged, 0.0, TOLERANCE[rows.dtype]) if damaged else None
        )
    chosen = torch.randperm(len(known), generator=generator)[:count]
    index, view = known[chosen].unbind(dim=1)
    difference = 0.0
    for part, numbers in zip(index.split(256), view.split(256), strict=True):
        cached = values(rows.read(part, numbers)[0])
        computed = values(recompute(data.render(part, numbers)["images"]))
        scale = float(computed.abs().max().clamp(min=1e-12))
        found = float((cached - computed).abs().max()) / scale
        difference = max(difference, found if math.isfinite(found) else math.inf)
    return Checked(rows.folder.name, len(chosen), damaged, difference, TOLERANCE[rows.dtype])


def _probabilities(classes: int, rows: Tensor) -> Tensor:
    """Class probabilities (B, C) of reduced rows, whose numbers are not of one kind."""
    return restore(rows, classes, 1.0).softmax(dim=1)


def _recompute(
    job: Job,
    device: torch.device,
    ask: Callable[[Tensor], dict[str, Tensor]],
    name: str,
    images: Tensor,
) -> Tensor:
    return ask_on_device(job, device, ask, images)[name].cpu()


def ask_on_device(
    job: Job, device: torch.device, ask: Callable[[Tensor], dict[str, Tensor]], images: Tensor
) -> dict[str, Tensor]:
    """The teacher's outputs on images (B, 3, H, W), computed as in training: (B, ...) by target.

    Args:
        job: with the weights of its teachers.
        device: the training device.
        ask: `ask_teacher` or `ask_logits` of the job's module.
        images: normalised as the student's.
    """
    module = job.module
    assert module.teacher is not None
    dtype = AUTOCAST.get(job.plan.student.trainer.precision)
    module.teacher.prepare(device, module.memory_format, dtype)
    images = images.to(device).contiguous(memory_format=module.memory_format)
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        return ask(images)
