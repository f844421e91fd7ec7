"""Benchmark of streamed images, compared with torchvision's ImageFolder and a DataLoader.

    python scripts/benchmark_streaming.py --root data/tiny-imagenet
    python scripts/benchmark_streaming.py --root data/imagenet --size 224 --workers 16

Images per second of training batches of an image folder:

- loading: batches alone. `plain` is an ImageFolder with a DataLoader (decoding, random crop, flip,
  normalisation in worker processes), `decoding` decodes every image as in the first epoch,
  `stored` reads the decoded images, as in the following ones.
- live: with the student's training step and the teacher computing. `plain` is a bare loop over
  the same loader, the others are the training of `train.py`.
- remembered: with cached teacher outputs, streamed and from memory.

Both have as many workers, plain processes and our threads. They alternate in one process. Figures
are medians; a ratio is the median of the ratios within a round.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from kd_lightning.api import compose
from kd_lightning.config.hardware import device_type
from kd_lightning.config.nodes import build_partial
from kd_lightning.config.plan import CachePlan, Plan
from kd_lightning.config.resolve import resolve
from kd_lightning.data import FolderDataModule
from kd_lightning.distill.caching import open_caches
from kd_lightning.distill.module import AUTOCAST
from kd_lightning.distill.optimizers import build_optimizer
from kd_lightning.engine.quiet import quiet_lightning
from kd_lightning.engine.trainer import build_trainer
from kd_lightning.losses.logit import soft_target_loss
from kd_lightning.storage.provenance import device_name
from kd_lightning.terminal import positive
from kd_lightning.transfer import synchronize
from kd_lightning.workflows.assembly import build_data, build_module, build_teacher


class Benchmark:
    """The compared ways to load and to train.

    Args:
        plan: of the run `method=logit`.
        batches: per measurement.
        workers: of each loader.
        folder: for caches and logs.
    """

    def __init__(self, plan: Plan, batches: int, workers: int, folder: Path) -> None:
        self.plan, self.batches, self.workers, self.folder = plan, batches, workers, folder
        self.device = torch.device(device_type(plan.student.trainer.arguments["accelerator"]))
        self.batch_size: int = plan.data.node["batch_size"]
        self.plain = self._plain_loader()
        self.stored = self._data(True, folder / "decoded")
        self.decoding = self._data(True, None)
        self.memory = self._data(False, folder / "decoded")

    def _data(self, streamed: bool, cache: Path | None) -> FolderDataModule:
        own = {"streamed": streamed, "cache_dir": str(cache) if cache else None, "views": 1}
        node = {**self.plan.data.node, **own, "workers": self.workers}
        data = build_data(node)
        assert isinstance(data, FolderDataModule)
        data.setup()
        # The images of a measurement: the same in every epoch, so that all are remembered.
        data.splits["train"] = data.splits["train"][: self.batches * self.batch_size]
        data.splits["val"] = data.splits["val"][: self.batch_size]
        return data

    def _plain_loader(self) -> DataLoader[Any]:
        node, size = self.plan.data.node, self.plan.data.image_size
        steps = [
            transforms.Resize((size, size)),
            transforms.RandomCrop(size, padding=node["padding"], padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(node["mean"], node["std"]),
        ]
        images = ImageFolder(str(Path(node["root"]) / "train"), transforms.Compose(steps))
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(len(images), generator=generator)[: self.batches * self.batch_size]
        return DataLoader(
            Subset(images, some.tolist()), self.batch_size, shuffle=True, drop_last=True,
            num_workers=self.workers, persistent_workers=True,
            pin_memory=self.device.type == "cuda",
        )  # fmt: skip

    def load(self, loader: Iterable[Any]) -> float:
        """Images per second of the batches alone, on their device."""
        began, count = time.perf_counter(), 0
        for batch in loader:
            images = batch["images"] if isinstance(batch, dict) else batch[0].to(self.device)
            count += len(images)
        synchronize(self.device)
        return count / (time.perf_counter() - began)

    def train_plain(self) -> float:
        """Images per second of a bare loop over the plain loader."""
        plan, precision = self.plan, self.plan.student.trainer.precision
        teacher = build_teacher(plan.teachers[0], plan.data)
        module = build_module(plan.student, plan.data, teacher)
        student = module.student.train().to(self.device)
        dtype = AUTOCAST.get(precision)
        teacher.read([], logits=True)
        teacher.prepare(self.device, module.memory_format, dtype)
        optimizer = build_optimizer(plan.student.optimizer, student.parameters(), precision)
        terms = plan.student.terms
        assert plan.student.scheduler is not None
        schedule = build_partial(plan.student.scheduler, "scheduler")(
            optimizer, total_steps=self.batches + 1
        )
        began, count = time.perf_counter(), 0
        for images, labels in self.plain:
            images = images.to(self.device, memory_format=module.memory_format, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            optimizer.zero_grad()
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                target = teacher.answer(images).logits.float().clone()
                logits = student(images)
                loss = terms["cross_entropy"]["weight"] * F.cross_entropy(logits.float(), labels)
                loss = loss + terms["logit"]["weight"] * soft_target_loss(
                    logits, target, terms["logit"]["temperature"]
                )
            loss.backward()
            optimizer.step()
            schedule.step()
            count += len(images)
        synchronize(self.device)
        return count / (time.perf_counter() - began)

    def train(self, data: FolderDataModule, remembered: bool = False) -> float:
        """Images per second of an epoch of `train.py`; the second if outputs are remembered."""
        plan = self.plan
        torch.manual_seed(0)  # the same teacher every time, so that cached outputs are found
        teacher = build_teacher(plan.teachers[0], plan.data)
        module = build_module(plan.student, plan.data, teacher)
        if remembered:
            assert plan.cache is not None
            cache = CachePlan(self.folder / "outputs", plan.cache.limit, plan.cache.dtype)
            open_caches(module, replace(plan, cache=cache), data, self.device)
        arguments = {**plan.student.trainer.arguments, "max_epochs": 1 + remembered}
        with tempfile.TemporaryDirectory() as logs:
            trainer = build_trainer(
                replace(plan.student.trainer, arguments=arguments), Path(logs), "benchmark",
                pictures=False,
            )  # fmt: skip
            trainer.fit(module, data)
        gc.collect()  # trainers have reference cycles
        return float(trainer.callback_metrics["images_per_second"])

    def round(self, turn: int) -> dict[tuple[str, str], float]:
        """Images per second of everything, in alternating order."""
        ways = {
            ("loading", "plain"): lambda: self.load(self.plain),
            ("loading", "decoding"): lambda: self.load(self.decoding.train_dataloader()),
            ("loading", "stored"): lambda: self.load(self.stored.train_dataloader()),
            ("live", "plain"): self.train_plain,
            ("live", "decoding"): lambda: self.train(self.decoding),
            ("live", "stored"): lambda: self.train(self.stored),
            ("remembered", "memory"): lambda: self.train(self.memory, remembered=True),
            ("remembered", "stored"): lambda: self.train(self.stored, remembered=True),
        }
        order = list(ways) if turn % 2 else list(reversed(ways))
        return {way: ways[way]() for way in order}


def main() -> None:
    """Measure, and print a row per comparison."""
    parser = argparse.ArgumentParser(description="Benchmark of streamed images.")
    parser.add_argument("--root", required=True, help="image folder, as data.root")
    parser.add_argument("--size", type=positive, default=64, help="data.image_size")
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--batches", type=positive, default=32, help="per measurement")
    parser.add_argument("--workers", type=positive, default=2, help="of each loader")
    parser.add_argument("--repetitions", type=positive, default=5)
    parser.add_argument("overrides", nargs="*", help="after --: as for train.py")
    given = parser.parse_args()
    quiet_lightning()
    config = compose(
        "method=logit", "data=folder", f"data.root={given.root}", f"data.image_size={given.size}",
        f"data.batch_size={given.batch_size}", *given.overrides,
    )  # fmt: skip
    plan = resolve(config, build_data(config["data"]))
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(plan, given.batches, given.workers, Path(folder))
        benchmark.round(0)  # starts the workers, fills the caches
        rounds = [benchmark.round(turn) for turn in range(given.repetitions)]
    print(f"{given.workers} workers, {given.size} pixels, {device_name(benchmark.device)}")
    print(f"{'':12}{'':10}{'images/s':>10}{'ratio':>8}")
    for what, way in rounds[0]:
        other = (what, "memory" if what == "remembered" else "plain")
        speed = statistics.median(found[what, way] for found in rounds)
        ratio = statistics.median(found[what, way] / found[other] for found in rounds)
        print(f"{what:12}{way:10}{speed:10.0f}{ratio:8.2f}")


if __name__ == "__main__":
    main()
