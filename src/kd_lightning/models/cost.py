"""What a network costs: operations, bytes, latency, memory."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kd_lightning.models.trial import blank, evaluation_mode, no_gradients, stand_in

WARM_UP = 0.2  # seconds
FEWEST_CALLS = 5


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-accumulates of a forward pass for one image, by `torch.utils.flop_counter`.

    Convolutions, matrix products and attention are counted; element-wise operations, pooling and
    normalisation are not.

    Args:
        model: runs once in evaluation mode and is left unchanged.
        image_size: height and width of the image, in pixels.
    """
    network = stand_in(model)
    with evaluation_mode(network), _separate_operations(), torch.random.fork_rng(devices=[]):
        image = blank(network, image_size, batch=1)
        with (
            torch.autocast(image.device.type, enabled=False),
            FlopCounterMode(display=False) as counter,
        ):
            network(image)
    return int(counter.get_total_flops()) // 2  # a multiplication and an addition each


def count_bytes(model: nn.Module) -> int:
    """Size of a model's weights and buffers, in bytes."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


@contextmanager
def _separate_operations() -> Iterator[None]:
    """Without fused attention, which the counter does not know, or not in every version."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


class Latency(NamedTuple):
    """Times of the calls of a network, in milliseconds.

    Attributes:
        p50: median.
        p95: 95th percentile.
        calls: number of calls.
    """

    p50: float
    p95: float
    calls: int


def measure_latency(
    model: nn.Module, images: Tensor, threads: int, seconds: float = 1.0
) -> Latency:
    """Time forward passes in inference mode, after a warm-up.

    Args:
        model: in evaluation mode, on the device of the images.
        images: (B, 3, H, W).
        threads: number of CPU threads within an operation; without effect on a GPU.
        seconds: time limit, but at least `FEWEST_CALLS` calls.
    """
    before, times = torch.get_num_threads(), []
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            _call_for(model, images, min(WARM_UP, seconds))
            times = _call_for(model, images, seconds)
    finally:
        torch.set_num_threads(before)
    p50, p95 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.5, 0.95]).double())
    return Latency(1000 * float(p50), 1000 * float(p95), len(times))


def _call_for(model: nn.Module, images: Tensor, seconds: float) -> list[float]:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST_CALLS or time.perf_counter() < end:
        _wait(images.device)
        began = time.perf_counter()
        model(images)
        _wait(images.device)
        times.append(time.perf_counter() - began)
    return times


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak_memory(model: nn.Module, images: Tensor) -> int:
    """Peak memory of a forward pass in bytes: weights, buffers, images and all intermediate tensors
    that exist at the same time.

    Memory of the process, of libraries and, on a CPU, of temporary buffers inside an operation is
    not included; so on a CPU it is the same in every pass.

    Args:
        model: in evaluation mode, on the device of the images.
        images: (B, 3, H, W).
    """
    fixed = count_bytes(model) + images.numel() * images.element_size()
    with no_gradients():
        model(images)  # what is allocated once does not count
        if images.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(images.device)
            before = torch.cuda.memory_allocated(images.device)
            model(images)
            return fixed + torch.cuda.max_memory_allocated(images.device) - before
        with _separate_operations(), _LiveTensors() as tensors:
            model(images)
    return fixed + tensors.highest


class _LiveTensors(TorchDispatchMode):
    """Adds up the memory of the tensors that operations create, as long as they are referenced.

    Attributes:
        highest: the largest sum so far, in bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.highest = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._alive = {k: entry for k, entry in self._alive.items() if not entry[0].expired()}
        given = {_address(value) for value in tree_leaves((args, kwargs))}
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor) and _address(value) not in given:  # no view
                storage = value.untyped_storage()
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.highest = max(self.highest, sum(number for _, number in self._alive.values()))
        return output


def _address(value: Any) -> int | None:
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
