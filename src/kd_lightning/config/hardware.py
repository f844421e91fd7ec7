"""Hardware defaults: device checks, and the fastest precision and memory format."""

import ctypes

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from torch import nn

from kd_lightning.errors import InputError

chosen_card: int | None = None
"""The GPU for trainings on one, if chosen (`workflows.cards`); None: Lightning's choice."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def check_accelerator(accelerator: str, devices: int | str | list[int], path: str) -> None:
    """Check that the requested devices exist.

    Args:
        accelerator: Lightning's name: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps``, ``tpu``.
        devices: number of devices, their numbers, or ``auto``. On a CPU any number, as devices are
            processes.
        path: path of the trainer section in the configuration, for the message.

    Raises:
        InputError: the accelerator is unknown or unavailable, or has too few devices.
    """
    choices = ("auto", "gpu", *AcceleratorRegistry)
    if accelerator not in choices:
        raise InputError(
            f"{path}.accelerator must be one of {', '.join(choices)}, not {accelerator}"
        )
    kind = device_type(accelerator)
    if not is_available(accelerator):
        name = {"gpu": "GPU", "cuda": "CUDA GPU", "mps": "Apple GPU", "tpu": "TPU"}.get(kind, kind)
        raise InputError(
            f"{path}.accelerator={accelerator}: torch {torch.__version__} finds no {name} here; "
            "use trainer=auto to select an available device, or trainer=cpu"
        )
    there = AcceleratorRegistry[kind]["accelerator"].auto_device_count()
    if isinstance(devices, list):
        if kind == "cpu":
            raise InputError(f"{path}.devices={devices} selects GPUs by their numbers, not CPUs")
        if max(devices) >= there:
            raise InputError(
                f"{path}.devices={devices}, but the available devices are 0 to {there - 1}"
            )
    elif kind != "cpu" and isinstance(devices, int) and devices > there:
        raise InputError(
            f"{path}.devices={devices}, but the number of available devices is {there}"
        )


def is_available(accelerator: str) -> bool:
    """Whether such a device is available."""
    kind = device_type(accelerator)
    return kind in AcceleratorRegistry and bool(
        AcceleratorRegistry[kind]["accelerator"].is_available()
    )


def device_type(accelerator: str) -> str:
    """Resolve ``auto`` and ``gpu`` to ``cuda``, ``mps`` or ``cpu``; ``gpu`` stays if there is none,
    as does any other name.
    """
    if accelerator in ("auto", "gpu"):
        if torch.cuda.is_available():
            return "cuda"
        if torch.backends.mps.is_available():
            return "mps"
        return "cpu" if accelerator == "auto" else accelerator
    return accelerator


def choose_precision(accelerator: str = "auto", model: nn.Module | None = None) -> str:
    """The fastest precision that trains reliably on this hardware, by Lightning's name.

    bfloat16 autocast where CPU or GPU has bfloat16 instructions, float16 autocast on CUDA GPUs
    with float16 only (Turing, such as a free Colab's T4), float32 elsewhere, and on a CPU for any
    model with grouped convolutions. Depthwise convolutions do not benefit from the bfloat16
    instructions, only the conversion cost remains: a step of MobileNetV3-small is slower than in
    float32. A fixed rule rather than a measurement, because the precision is part of a run's
    identity and must not depend on the load of the machine.

    Args:
        accelerator: Lightning's accelerator: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps``.
        model: the model to train.
    """
    device = device_type(accelerator)
    if device == "cuda" and torch.cuda.is_available():
        # A T4 reports bfloat16, but emulates it, many times slower than float16.
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if fast else "16-mixed"
    if device != "cpu" or not _cpu_has_bf16() or (model is not None and has_groups(model)):
        return "32-true"
    return "bf16-mixed"


def has_groups(model: nn.Module) -> bool:
    """Whether the model has grouped (e.g. depthwise) convolutions."""
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d
    return any(isinstance(part, convolutions) and part.groups > 1 for part in model.modules())


def _cpu_has_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    # torch before 2.12 has no public API for this; check the two x86 extensions.
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return any(present and name.endswith("bf16") for name, present in capabilities().items())


def choose_memory_format(precision: str, accelerator: str = "auto") -> torch.memory_format:
    """Channels-last where convolutions support it natively: CPUs, and tensor cores in 16 bits.

    Args:
        precision: Lightning's name, see `choose_precision`.
        accelerator: Lightning's accelerator, see `choose_precision`.
    """
    device = device_type(accelerator)
    tensor_cores = device == "cuda" and precision != "32-true"
    return torch.channels_last if device == "cpu" or tensor_cores else torch.contiguous_format


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for reuse in the next step.

    By default glibc returns large blocks to the kernel as soon as they are freed, so that every
    step pays for page faults and zeroed pages. No effect with another C library.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**29)):
            library.mallopt(parameter, value)
    except (OSError, AttributeError):
        pass  # not glibc
