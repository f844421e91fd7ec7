"""Software versions and device of a run."""

import functools
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch


def versions() -> dict[str, str]:
    """Versions of Python, torch and Lightning, and the git commit if this is a checkout."""
    packages = {"torch": torch.__version__, "lightning": _lightning()}
    return {"git_commit": _git_commit(), "python": platform.python_version(), **packages}


@functools.cache
def _lightning() -> str:
    return version("lightning")


def _git_commit() -> str:
    """The commit of the checkout, with ``-dirty`` if modified; empty outside a checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip()


def device_name(device: torch.device) -> str:
    """Human-readable device name: of the GPU, or of the CPU with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as info:
            name = next(line.split(":")[1].strip() for line in info if "model name" in line)
    except (OSError, StopIteration):
        pass  # not Linux
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
