"""The machine's matrix-product rate and memory, for `benchmark.py`."""

import contextlib
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.config.plan import Plan
from kd_lightning.config.resolve import SUPERVISED
from kd_lightning.distill.module import AUTOCAST
from kd_lightning.transfer import synchronize
from kd_lightning.workflows.assembly import build_module


class Peak:
    """The machine's matrix-product rate, and the fraction of it that a training reaches."""

    def __init__(self, device: torch.device, precision: str) -> None:
        dtype = AUTOCAST.get(precision, torch.float32)
        a, b = (torch.randn(4096, 4096, device=device).to(dtype) for _ in range(2))
        rates = []
        for _ in range(5):
            synchronize(device)
            began = time.perf_counter()
            a @ b
            synchronize(device)
            rates.append(2 * 4096**3 / (time.perf_counter() - began))
        self.rate = max(rates)

    def share(self, plan: Plan, images_per_second: float) -> float:
        """Fraction of the peak for the student's forward and backward pass at this speed."""
        student = build_module(replace(plan.student, terms=SUPERVISED), plan.data).student
        images = torch.randn(2, 3, 32, 32)
        with FlopCounterMode(display=False) as counter:
            student(images).sum().backward()
        return counter.get_total_flops() / 2 * images_per_second / self.rate


def forget_peak_memory() -> None:
    """Reset this process's peak memory counter, where supported."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> float:
    """Peak resident memory of this process, in GB."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9
    except (OSError, IndexError):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9
