"""Compute a teacher's outputs before the trainings that use them."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd_lightning.config.checks import check_sections, of_one_process
from kd_lightning.config.hardware import device_type
from kd_lightning.config.nodes import Node
from kd_lightning.distill.caching import open_caches, used_views
from kd_lightning.errors import InputError
from kd_lightning.reports.summary import about
from kd_lightning.storage.teacher_cache import TeacherCache
from kd_lightning.terminal import say
from kd_lightning.workflows.check_cache import ask_on_device, check_has_network
from kd_lightning.workflows.jobs import Job, prepare
from kd_lightning.workflows.teacher import find_teachers

SECONDS = 5.0
"""Minimum interval between lines about the progress, in seconds."""


class Filled(NamedTuple):
    """How many of the views that a training uses are complete in a cache.

    Attributes:
        name: name of the cache.
        views: number of views with an output for every training image.
        wanted: number of views that the training uses.
    """

    name: str
    views: int
    wanted: int


def fill_cache(config: Node) -> list[Filled]:
    """Compute and store the teacher's outputs that a training would use, without training.

    The teacher is trained first if it is not stored. Complete views are left as they are, so that
    an interrupted call can be repeated. Batches have `data.eval_batch_size` images.

    Args:
        config: the complete configuration of the training, as plain dictionaries.

    Raises:
        InputError: the configuration is invalid, or the outputs cannot be cached.
        Stopped: a signal arrived while the teacher was trained.
    """
    check_sections(config)
    job = prepare({**config, "trainer": of_one_process(config["trainer"])})
    check_has_network(job.plan)
    if job.plan.cache is None:
        raise InputError("remember.disk_gb=0 disables the cache, so that nothing can be stored")
    job = job.with_teachers(find_teachers(job.plan, job.data, job.teachers))
    device = torch.device(device_type(job.plan.student.trainer.arguments["accelerator"]))
    open_caches(job.module, job.plan, job.data, device)
    cache = job.module.cache
    if cache is None or job.module.evaluation_cache is None:
        raise InputError(f"the outputs of {job.plan.teacher_name} cannot be cached")
    views = used_views(job.plan, job.data)
    source = job.data.pixel_source.to(device)
    job.data.pixel_source, job.data.labels = source, job.data.labels.to(device)
    # Nothing is computed for targets that do not fit on the disk.
    fitting = {name: rows for name, rows in cache.rows.items() if name not in cache.live}
    _fill(job, TeacherCache(fitting, cache.root, cache.limit), device, views)
    images = job.data.splits["train"]
    found = [
        Filled(rows.folder.name, sum(rows.has_all(images, view) for view in views), len(views))
        for rows in {rows.folder: rows for rows in cache.rows.values()}.values()
    ]
    job.data.forget()
    return found


def _fill(job: Job, cache: TeacherCache, device: torch.device, views: range) -> None:
    module, data = job.module, job.data
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert module.evaluation_cache is not None
        _fetch_all(job, module.evaluation_cache, device, loader, module.ask_logits)
    parts = cache.rows.values()
    images = data.splits["train"]
    missing = [view for view in views if not all(rows.has_all(images, view) for rows in parts)]
    loader = data.variant(batch_size=data.eval_batch_size).train_dataloader()
    began = told = time.monotonic()
    for number, view in enumerate(missing, start=1):
        loader.sampler.set_epoch(view)
        _fetch_all(job, cache, device, loader, module.ask_teacher)
        if any(rows.missing(view) for rows in parts):
            return  # no room is left, as a warning has said
        now = time.monotonic()
        if now - told >= SECONDS and number < len(missing):
            each = (now - began) / number
            say(
                f"view {number}/{len(missing)}, {len(images) / each:,.0f} images/s, "
                f"{about(each * (len(missing) - number))} left",
                error=True,
            )
            told = now


def _fetch_all(
    job: Job,
    cache: TeacherCache,
    device: torch.device,
    batches: Iterable[Mapping[str, Any]],
    ask: Callable[[Tensor], dict[str, Tensor]],
) -> None:
    for batch in batches:
        shown, images = batch["shown"], batch["images"]

        def compute(images: Tensor = images) -> dict[str, Tensor]:
            return ask_on_device(job, device, ask, images)

        cache.fetch(shown.index, shown.view, device, compute)
    cache.flush()
