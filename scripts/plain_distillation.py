"""A common implementation of distillation, as a baseline for `benchmark.py`.

float32 in the default memory format, Pillow images augmented one by one in a `DataLoader`, the
teacher asked in every step.
"""

import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from kd_lightning.config.hardware import device_type
from kd_lightning.config.nodes import build, build_partial
from kd_lightning.config.plan import Plan
from kd_lightning.transfer import synchronize


class Pictures(Dataset[tuple[Tensor, int]]):
    """Random images with torchvision's transforms."""

    def __init__(self, count: int, size: int) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
        self.images = [Image.fromarray(image) for image in pixels]
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(size, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image and its label."""
        return self.transform(self.images[index]), index % 10


def attention(feature_map: Tensor) -> Tensor:
    """Attention map, as in the code of the paper's authors."""
    return F.normalize(feature_map.pow(2).mean(1).view(feature_map.size(0), -1))


def plain_loop(plan: Plan, steps: int) -> float:
    """Images per second.

    Args:
        plan: of the run.
        steps: that are measured, after one that is not.
    """
    device = torch.device(device_type(plan.student.trainer.arguments["accelerator"]))
    terms, batch_size = plan.student.terms, plan.data.node["batch_size"]
    student: nn.Module = build(plan.student.model, "student.model").to(device)
    teacher: nn.Module = build(plan.teacher_models[0], "teacher.model").to(device).eval()
    features: dict[str, Tensor] = {}
    layers = student.get_submodule("stage2"), teacher.get_submodule("stage3")
    for name, layer in zip(("student", "teacher"), layers, strict=True):
        layer.register_forward_hook(lambda _m, _i, output, n=name: features.update({n: output}))
    optimizer = build_partial(plan.student.optimizer, "optimizer")(student.parameters())
    loader = DataLoader(
        Pictures((steps + 1) * batch_size, plan.data.image_size),
        batch_size, shuffle=True, num_workers=1,
    )  # fmt: skip
    began = 0.0
    for number, (images, labels) in enumerate(loader):
        if number == 1:  # skip the startup of the loader
            synchronize(device)
            began = time.perf_counter()
        images, labels = images.to(device), labels.to(device)
        logits = student(images)
        loss = terms["cross_entropy"]["weight"] * F.cross_entropy(logits, labels)
        if len(terms) > 1:
            with torch.no_grad():
                said = teacher(images)
        if "logit" in terms:
            t = terms["logit"]["temperature"]
            soft = F.kl_div(
                F.log_softmax(logits / t, 1), F.softmax(said / t, 1), reduction="batchmean"
            )
            loss = loss + terms["logit"]["weight"] * t * t * soft
        if "attention" in terms:
            difference = attention(features["student"]) - attention(features["teacher"])
            loss = loss + terms["attention"]["weight"] * difference.pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # as is common, for the progress bar
    synchronize(device)
    return steps * batch_size / (time.perf_counter() - began)
