"""Measure prediction against a bare loop of the network over ready tensors.

    python scripts/inference_speed.py outputs/runs/SETTING/RUN
    python scripts/inference_speed.py student.onnx --images photos/

Without --images, 10,000 random images of the student's size are predicted, which are decoded
already; with it, files are decoded too. A bare loop is only measured for the folder of a run or a
.safetensors file. Rates are images per second, the best of several rounds; the progress is on
standard error.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from kd_lightning import api
from kd_lightning.errors import InputError
from kd_lightning.files import find_own_packages, home
from kd_lightning.startup import run_script
from kd_lightning.terminal import positive, say


def main() -> None:
    """Read the command line, print the rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", type=home, help="folder of a run, or an exported file")
    parser.add_argument("--images", type=home, nargs="+", default=[], help="files or folders")
    parser.add_argument("--count", type=positive, default=10_000, help="number of random images")
    parser.add_argument("--batch-size", type=positive, default=256)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--trust", nargs="+", default=[], metavar="PACKAGE")
    arguments = parser.parse_args()
    if arguments.trust:
        find_own_packages()
    for place in arguments.images:
        if not Path(place).exists():
            raise InputError(f"{place} does not exist")
    student = api.load_student(arguments.student, arguments.trust)
    files = api.find_images(arguments.images) if arguments.images else []
    size, batch = student.image_size, arguments.batch_size
    shape = (arguments.count, size, size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    measured: dict[str, tuple[int, Callable[[], object]]] = {}
    if student.network is not None:
        ready = [student.network.normalize(part) for part in torch.from_numpy(pixels).split(batch)]
        measured["bare loop"] = len(pixels), lambda: bare_loop(student.model, ready)
    measured["decoded images"] = len(pixels), lambda: student.probabilities(pixels, batch)
    if files:
        measured["files"] = (
            len(files),
            lambda: list(api.predict_files(student, files, batch_size=batch)),
        )
    rates = best_rates(measured, arguments.rounds)
    for name, rate in rates.items():
        ratio = f", {rate / rates['bare loop']:.2f} of it" if "bare loop" in rates else ""
        print(f"{name}: {rate:,.0f} images/s{ratio if name != 'bare loop' else ''}")


@torch.inference_mode()
def bare_loop(model: torch.nn.Module, ready: list[torch.Tensor]) -> None:
    """The network on batches that are ready."""
    for images in ready:
        model(images)


def best_rates(
    measured: dict[str, tuple[int, Callable[[], object]]], rounds: int
) -> dict[str, float]:
    """Images per second of each, the best of several rounds that alternate between them."""
    rates = dict.fromkeys(measured, 0.0)
    for number in range(1, rounds + 1):
        for name, (count, work) in measured.items():
            began = time.perf_counter()
            work()
            seconds = time.perf_counter() - began
            rates[name] = max(rates[name], count / seconds)
            say(f"round {number}/{rounds}: {name}, {seconds:.1f} s", error=True)
    return rates


if __name__ == "__main__":
    run_script(main)
