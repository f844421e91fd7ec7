"""Measure a training step in float32 and in bfloat16 on this CPU, for several model families.

    python scripts/precision.py --size 32 --rounds 7

What `trainer.precision=auto` chooses on a CPU rests on this: see `kd_lightning.hardware`. The two
precisions alternate; shown are medians in milliseconds, and the median of the ratios of a round.
"""

import argparse
import statistics
import time
from typing import Any

import torch
import torchvision

from kd_lightning.config.hardware import choose_precision, has_groups, keep_freed_memory
from kd_lightning.config.nodes import build
from kd_lightning.terminal import positive

OURS: dict[str, dict[str, Any]] = {
    "ConvNet": {"channels": [16, 32], "hidden": 64},
    "ResNet9": {"width": 32},
    "CifarResNet": {"depth": 20},
}
THEIRS = (
    "resnet18", "squeezenet1_1", "mobilenet_v3_small", "mobilenet_v2", "shufflenet_v2_x0_5",
    "mnasnet0_5", "efficientnet_b0", "regnet_y_400mf", "resnext50_32x4d", "convnext_tiny",
)  # fmt: skip


def seconds(model: torch.nn.Module, images: torch.Tensor, bfloat16: bool) -> float:
    """Seconds of one forward and backward pass."""
    began = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        loss = model(images).float().logsumexp(1).mean()
    model.zero_grad()
    loss.backward()
    return time.perf_counter() - began


def main() -> None:
    """Read the command line, measure, print a row for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=[*OURS, *THEIRS], help="ours, torchvision's")
    parser.add_argument("--size", type=positive, default=32, help="of the images, in pixels")
    parser.add_argument("--batch", type=positive, default=64)
    parser.add_argument("--rounds", type=positive, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    best = choose_precision("cpu")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, best: {best}")
    print("| model | grouped | float32 | bfloat16 | ratio |\n|---|---|---|---|---|")
    for name in arguments.models:
        ours = name in OURS
        package = "kd_lightning.models" if ours else torchvision.models.__name__
        node = {"_target_": f"{package}.{name}", "num_classes": 10, **OURS.get(name, {})}
        if name == "ConvNet":
            node["image_size"] = arguments.size
        model = build(node, name).to(memory_format=torch.channels_last)
        images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
        images = images.contiguous(memory_format=torch.channels_last)
        seconds(model, images, False), seconds(model, images, True)
        rounds = [
            (seconds(model, images, False), seconds(model, images, True))
            for _ in range(arguments.rounds)
        ]
        plain, half = (1000 * statistics.median(times) for times in zip(*rounds, strict=True))
        ratio = statistics.median(second / first for first, second in rounds)
        grouped = "yes" if has_groups(model) else "no"
        print(f"| {name} | {grouped} | {plain:.1f} | {half:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
