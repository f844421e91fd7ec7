"""Trainings whose speed `benchmark.py` measures: whole, and only their computation."""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from random_images import RandomImages, random_batches
from torch import Tensor

from kd_lightning.api import compose
from kd_lightning.config.hardware import device_type
from kd_lightning.config.nodes import build, build_partial
from kd_lightning.config.plan import CachePlan, Plan
from kd_lightning.config.resolve import resolve
from kd_lightning.data.loading import Batch
from kd_lightning.distill.caching import open_caches
from kd_lightning.distill.module import AUTOCAST
from kd_lightning.distill.optimizers import build_optimizer
from kd_lightning.engine.trainer import build_trainer
from kd_lightning.losses.attention import attention_map
from kd_lightning.losses.logit import soft_target_loss
from kd_lightning.transfer import synchronize
from kd_lightning.workflows.assembly import build_module, build_teacher

SCALARS = ("padding", "flip", "cutout")


def device_of(plan: Plan) -> torch.device:
    """The device of a plan's student."""
    return torch.device(device_type(plan.student.trainer.arguments["accelerator"]))


def whole_loop(plan: Plan, steps: int, cache: Path | None = None, epochs: int = 2) -> float:
    """Images per second of the last epoch of a training, as `Speed` logs it: the device is waited
    for when the clock is read.

    Args:
        plan: plan of the run.
        steps: steps per epoch.
        cache: folder of the teacher-output cache; None: live teacher.
        epochs: number of epochs.
    """
    node = plan.data.node
    views = {
        key: node[key] if key in SCALARS else build(node[key], f"data.{key}")
        for key in (*SCALARS, "augmentation", "mixing")
        if node[key] is not None
    }
    data = random_batches(steps, node["batch_size"], **views)
    torch.manual_seed(0)  # the same teacher every time, so that cached outputs are found
    teacher = build_teacher(plan.teachers[0], plan.data) if plan.teachers else None
    module = build_module(plan.student, plan.data, teacher)
    arguments = {**plan.student.trainer.arguments, "max_epochs": epochs}
    if cache is not None:
        assert plan.cache is not None
        plan = replace(plan, cache=CachePlan(cache, plan.cache.limit, plan.cache.dtype))
        open_caches(module, plan, data, device_of(plan))
    with tempfile.TemporaryDirectory() as folder:
        trainer_plan = replace(plan.student.trainer, arguments=arguments)
        trainer = build_trainer(trainer_plan, Path(folder), "benchmark")
        trainer.fit(module, data)
    return float(trainer.callback_metrics["images_per_second"])


def bare_loop(plan: Plan, steps: int) -> float:
    """Images per second of the bare computation, on prepared batches."""
    precision, batch_size = plan.student.trainer.precision, plan.data.node["batch_size"]
    teacher = build_teacher(plan.teachers[0], plan.data) if plan.teachers else None
    module = build_module(plan.student, plan.data, teacher)
    terms = plan.student.terms
    weights = {name: float(term["weight"]) for name, term in terms.items()}
    student = module.student.train()
    device = device_of(plan)
    dtype = AUTOCAST.get(precision)
    student.to(device)
    if teacher is not None:
        layers = ["stage3"] if "attention" in terms else []
        teacher.read(layers, logits="logit" in terms)
        teacher.prepare(device, module.memory_format, dtype)
    optimizer = build_optimizer(plan.student.optimizer, student.parameters(), precision)
    assert plan.student.scheduler is not None
    schedule = build_partial(plan.student.scheduler, "scheduler")(optimizer, total_steps=steps + 3)
    clip = plan.student.trainer.arguments["gradient_clip_val"]
    features: dict[str, Tensor] = {}
    student.get_submodule("stage2").register_forward_hook(
        lambda _module, _inputs, output: features.update(stage2=output)
    )
    batches = ready_made(4, batch_size, device)

    def step(batch: Batch) -> None:
        images, labels = batch["images"], batch["labels"]
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            if teacher is not None:
                said = teacher.answer(images)
            logits = student(images)
            loss = weights["cross_entropy"] * torch.nn.functional.cross_entropy(
                logits.float(), labels
            )
            if "logit" in weights:
                target = said.logits.float().clone()
                temperature = terms["logit"]["temperature"]
                loss = loss + weights["logit"] * soft_target_loss(logits, target, temperature)
            if "attention" in weights:
                map_ = attention_map(said.features["stage3"]).clone()
                difference = torch.nn.functional.mse_loss(attention_map(features["stage2"]), map_)
                loss = loss + weights["attention"] * difference
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
        optimizer.step()
        schedule.step()

    for number in range(3):
        step(batches[number % 4])
    synchronize(device)
    began = time.perf_counter()
    for number in range(steps):
        step(batches[number % 4])
    synchronize(device)
    return steps * batch_size / (time.perf_counter() - began)


def ready_made(count: int, batch_size: int, device: torch.device) -> list[Batch]:
    """Rendered batches on their device."""
    data = random_batches(count, batch_size)
    return [
        {key: batch[key].to(device) for key in ("images", "labels")}
        for batch in data.train_dataloader()
    ]


def configuration(method: str, student: str, overrides: list[str]) -> Plan:
    """The plan of the corresponding `train.py` command."""
    config = compose(f"method={method}", f"student={student}", *overrides)
    return resolve(config, RandomImages(name="random"))
