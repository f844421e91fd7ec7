r"""Estimate time, disk and memory of a distillation before it is started.

    python scripts/estimate.py --images 1281167 data=imagenet data.root=. data.num_classes=1000 \
        student=timm student.model.model_name=resnet18 teacher=timm \
        teacher.model.model_name=resnet50 method=logit data.views=50 trainer.max_epochs=100

Arguments other than options are those of `train.py`. The speed of both networks is measured on this
machine, for a few seconds each, on random images; no data is read. Only logits are considered:
methods that read features store more, or compute them live. Members of an ensemble are added up.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from kd_lightning import api
from kd_lightning.config.checks import check, of_one_process, single_teachers
from kd_lightning.config.hardware import device_type
from kd_lightning.config.nodes import Node, build
from kd_lightning.config.pretrained import with_own_input
from kd_lightning.config.resolve import resolve_trainer
from kd_lightning.distill.module import AUTOCAST
from kd_lightning.distill.top_k import chosen_k
from kd_lightning.engine.quiet import quiet_lightning
from kd_lightning.errors import InputError
from kd_lightning.files import find_own_packages
from kd_lightning.models.preparing import materialize
from kd_lightning.reports.summary import about
from kd_lightning.startup import run_script
from kd_lightning.storage.rows import Rows
from kd_lightning.terminal import positive

GIGABYTE = 1e9
GROUPS, GROUP = 3, 2**23  # batches that are being prepared, see data/streamed.py
PER_IMAGE = 250  # bytes of paths, labels, splits, order and digests


def main() -> None:
    """Read the command line, measure both networks, and print the estimate."""
    find_own_packages()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--images", type=positive, required=True, help="training and validation images"
    )
    parser.add_argument(
        "--decoded-per-second", type=float, default=300,
        help="image files decoded per second, in the first epoch (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=5, help="length of each measurement")
    parser.add_argument(
        "--devices", type=positive, default=1, help="devices like that of this machine"
    )
    arguments, overrides = parser.parse_known_args()
    if arguments.decoded_per_second <= 0 or arguments.seconds < 0:
        raise InputError("--decoded-per-second must be positive, and --seconds at least 0")

    quiet_lightning()
    config = api.compose(*overrides)
    data, epochs = config["data"], config["trainer"]["max_epochs"]
    if data["num_classes"] is None:
        raise InputError("data.num_classes must be given, as no data is read")
    check(config)
    members = single_teachers(config)
    for key, why in (("outputs", "has no network"), ("decay", "has no outputs to store")):
        if any(part["teacher"].get(key) is not None for part in members):
            raise InputError(f"teacher.{key}: a teacher that {why} cannot be estimated")
    views = min(epochs, data["views"] or epochs)
    student = speed(config, "student", arguments.seconds, train=True) * arguments.devices
    each = [speed(part, "teacher", arguments.seconds, train=False) for part in members]
    teacher = arguments.devices / sum(1 / images for images in each)
    per_epoch = arguments.images / student
    per_view = arguments.images / teacher
    outputs = bytes_per_view(config, arguments.images) * len(members)
    edge = data.get("stored_size") or data["image_size"]
    decoded = arguments.images * (edge**2 * 3 + 8)
    batch = data["batch_size"] * edge**2 * 3
    memory = GROUPS * max(batch, GROUP) + PER_IMAGE * arguments.images + outputs

    print(f"student: {student:,.0f} images/s in training; teacher: {teacher:,.0f} images/s")
    rows = (
        ("decoding, once", about(arguments.images / arguments.decoded_per_second)),
        (f"teacher, {views} views, once for all students", about(views * per_view)),
        (f"student, {epochs} epochs", about(epochs * per_epoch)),
        (f"the same with a live teacher, {epochs} epochs", about(epochs * (per_epoch + per_view))),
        ("disk: decoded images", f"{decoded / GIGABYTE:,.2f} GB"),
        (f"disk: logits on {views} views", f"{views * outputs / GIGABYTE:,.2f} GB"),
        ("memory of a process, beside networks and libraries", f"{memory / GIGABYTE:,.2f} GB"),
    )
    for name, value in rows:
        print(f"{name:55} {value:>12}")


def speed(config: Node, part: str, seconds: float, train: bool) -> float:
    """Images per second of a network on this machine, with a batch of the configured size."""
    accelerator = config["trainer"]["accelerator"]
    device = torch.device(device_type(accelerator))
    section = with_own_input(config[part], part, config["data"])
    size = section.get("image_size") or config["data"]["image_size"]  # a teacher may have its own
    torch.manual_seed(0)
    model = build(config[part]["model"], f"{part}.model")
    materialize(model, size, f"{part}.model")
    # Of the run: a teacher computes in the precision of its student.
    plan = resolve_trainer(of_one_process(config["trainer"]), config["student"]["model"])
    layout = torch.channels_last if plan.channels_last else torch.contiguous_format
    model.to(device, memory_format=layout).train(train)
    images = torch.randn(config["data"]["batch_size"], 3, size, size, device=device)
    images = images.contiguous(memory_format=layout)
    dtype = AUTOCAST.get(plan.precision)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> None:
        with (
            torch.set_grad_enabled(train),
            torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None),
        ):
            logits = model(images)
        if train:
            nn.functional.cross_entropy(logits.float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    labels = torch.zeros(len(images), dtype=torch.int64, device=device)
    return len(images) / _duration(step, seconds, device)


def _duration(step: Callable[[], None], seconds: float, device: torch.device) -> float:
    """Median duration of a step, in seconds, after a first one."""

    def timed() -> float:
        start = time.perf_counter()
        step()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    timed()
    found, end = [timed()], time.perf_counter() + seconds
    while time.perf_counter() < end:
        found.append(timed())
    return sorted(found)[len(found) // 2]


def bytes_per_view(config: Node, images: int) -> int:
    """Bytes of the teacher's logits on a view of all images."""
    classes, remember = config["data"]["num_classes"], config["remember"]
    k = chosen_k(remember["top_k"], classes)
    values = classes if k is None else 3 * k + 4
    return Rows(Path(), {}, images, (values,), getattr(torch, remember["dtype"])).file_size


if __name__ == "__main__":
    run_script(main)
