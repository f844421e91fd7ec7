"""Images per second of a whole training loop beside a bare PyTorch loop of the same mathematics.

    python scripts/benchmark.py
    python scripts/benchmark.py --students small --methods none logit --repetitions 9

The whole loop is what `train.py` runs: Lightning, torchmetrics, the data module rendering fresh
views of every batch, TensorBoard, callbacks. The bare loop takes ready-made batches and does
nothing but forward, loss, backward, clipping, optimizer and schedule. The two alternate in one
process; the figures are medians, the ratio is the median of the ratios of neighbours. Images and
weights are random: neither changes the time.
"""

import argparse
import logging
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor

from kd_lightning.cli import quiet_lightning
from kd_lightning.config import build_partial, plain, trainer_node, tree
from kd_lightning.data.loading import Batch
from kd_lightning.data.module import ImageDataModule, Images
from kd_lightning.distillation import AUTOCAST
from kd_lightning.losses.attention import attention_map
from kd_lightning.losses.logit import soft_target_loss
from kd_lightning.runs import device_name
from kd_lightning.training import (
    build_module,
    build_teacher,
    build_trainer,
    needs_teacher,
    resolve_precision,
)

METHODS = ("none", "logit", "attention", "combined")
STUDENTS = ("small", "medium", "large")
SECONDS = 3.0  # that one measurement should take


class RandomImages(ImageDataModule):
    """As many random images as fill the steps wanted."""

    def __init__(self, count: int, **settings: Any) -> None:
        super().__init__(name="random", **settings)
        self.count = count

    @property
    def classes(self) -> list[str]:
        """Ten."""
        return [str(number) for number in range(10)]

    def load(self) -> Images:
        """Noise."""
        total = self.count + 1000
        pixels = torch.randint(0, 256, (total, 32, 32, 3), dtype=torch.uint8)
        return Images(pixels, torch.arange(total) % 10, train_size=self.count)


def whole_loop(config: dict[str, Any], precision: str, steps: int, folder: Path) -> float:
    """Images per second of the second epoch of a training."""
    batch_size = config["data"]["batch_size"]
    data = RandomImages(2 * steps * batch_size, batch_size=batch_size, val_fraction=0.5)
    teacher = build_teacher(config) if needs_teacher(config) else None
    module = build_module(config, teacher, precision)
    settings = {**trainer_node(config), "max_epochs": 2}
    trainer = build_trainer(settings, precision, folder, "benchmark")
    trainer.fit(module, data)
    return float(trainer.callback_metrics["images_per_second"])


def bare_loop(config: dict[str, Any], precision: str, steps: int) -> float:
    """Images per second of nothing but the mathematics, on ready-made batches."""
    module = build_module(config, build_teacher(config), precision)
    terms = config["method"]["terms"]
    weights = {name: float(term["weight"]) for name, term in terms.items()}
    student, teacher = module.student.train(), module.teacher
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = AUTOCAST.get(precision)
    assert teacher is not None
    student.to(device)
    teacher.prepare(device, module.memory_format, dtype)
    optimizer = build_partial(config["optimizer"], "optimizer")(student.parameters())
    schedule = build_partial(config["scheduler"], "scheduler")(optimizer, total_steps=steps + 3)
    features: dict[str, Tensor] = {}
    student.get_submodule("stage2").register_forward_hook(
        lambda _module, _inputs, output: features.update(stage2=output)
    )
    teacher.read(["stage3"])
    batches = ready_made(4, config["data"]["batch_size"], device)

    def step(batch: Batch) -> None:
        images, labels = batch["images"], batch["labels"]
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            if len(weights) > 1:
                said = teacher(images)
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
        torch.nn.utils.clip_grad_norm_(student.parameters(), config["trainer"]["gradient_clip_val"])
        optimizer.step()
        schedule.step()

    for number in range(3):
        step(batches[number % 4])
    synchronize(device)
    began = time.perf_counter()
    for number in range(steps):
        step(batches[number % 4])
    synchronize(device)
    return steps * config["data"]["batch_size"] / (time.perf_counter() - began)


def ready_made(count: int, batch_size: int, device: torch.device) -> list[Batch]:
    """Rendered batches on their device."""
    data = RandomImages(2 * count * batch_size, batch_size=batch_size, val_fraction=0.5)
    data.setup()
    return [
        {key: value.to(device) for key, value in batch.items()} for batch in data.train_dataloader()
    ]


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(method: str, student: str, arguments: argparse.Namespace) -> None:
    """Measure one method and student, and print a line."""
    with initialize_config_dir(tree(), version_base="1.3"):
        overrides = [f"method={method}", f"student={student}", *arguments.overrides]
        config = plain(compose("train", overrides))
    config.setdefault("scheduler", None)
    precision = resolve_precision(trainer_node(config))
    # Short first, to know how many steps fill the time.
    speed = bare_loop(config, precision, steps=3)
    steps = max(5, round(SECONDS * speed / config["data"]["batch_size"]))
    whole, bare = [], []
    for _ in range(arguments.repetitions):
        bare.append(bare_loop(config, precision, steps))
        with tempfile.TemporaryDirectory() as folder:
            whole.append(whole_loop(config, precision, steps, Path(folder)))
    ratio = statistics.median(w / b for w, b in zip(whole, bare, strict=True))
    print(
        f"{method:10} {student:7} {statistics.median(whole):10,.0f} "
        f"{statistics.median(bare):10,.0f} {ratio:7.3f}",
        flush=True,
    )


def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--students", nargs="+", default=STUDENTS, choices=STUDENTS)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("overrides", nargs="*", help="configuration overrides, after --")
    arguments = parser.parse_args()
    quiet_lightning()
    logging.getLogger("lightning").setLevel(logging.WARNING)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}, torch {torch.__version__}; images per second, medians of "
          f"{arguments.repetitions} alternating repetitions")  # fmt: skip
    print(f"{'method':10} {'student':7} {'whole loop':>10} {'bare loop':>10} {'ratio':>7}")
    for student in arguments.students:
        for method in arguments.methods:
            compare(method, student, arguments)


if __name__ == "__main__":
    main()
