"""Asynchronous copies between host and device, where that is safe."""

import torch
from torch import Tensor


def copies_in_background(device: torch.device) -> bool:
    """Whether copies from and to pinned memory may run asynchronously.

    On other devices (Apple GPUs) an asynchronous copy may read memory that has been freed.
    """
    return device.type == "cuda"


def synchronize(device: torch.device) -> None:
    """Wait for all pending work on a device; no-op for a CPU.

    Args:
        device: the device; only CUDA and Apple GPUs are synchronised.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy to the device, asynchronously if possible.

    Args:
        values: on the CPU, or already on the device.
        device: the target device.
    """
    if values.device.type == "cpu" and copies_in_background(device):
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class ToHost:
    """An asynchronous copy of a tensor from the device to the host.

    Args:
        values: on any device.
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._copied = values, None
        if copies_in_background(values.device):
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def ready(self) -> bool:
        """Whether the copy is complete."""
        return self._copied is None or self._copied.query()

    def wait(self) -> Tensor:
        """Wait for the copy and return the tensor on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.cpu()
