"""Copies between host and device that do not wait where that is safe."""

import torch
from torch import Tensor


def copies_in_background(device: torch.device) -> bool:
    """Whether copies from and to pinned memory go on beside the computation.

    Elsewhere (Apple GPUs) an asynchronous copy may read memory that has been freed since.
    """
    return device.type == "cuda"


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that it was told to; nothing to do for a CPU.

    Args:
        device: CUDA's or Apple's; any other is not waited for.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting for it if possible.

    Args:
        values: on the CPU, or on the device already.
        device: where to.
    """
    if values.device.type == "cpu" and copies_in_background(device):
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class ToHost:
    """A tensor on its way from the device to the host, without anyone waiting for it.

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
        """Whether it has arrived."""
        return self._copied is None or self._copied.query()

    def wait(self) -> Tensor:
        """The tensor on the CPU, waiting for it if need be."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.cpu()
