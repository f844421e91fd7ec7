"""What the machine at hand computes fast: precision and memory format; is a device there at all."""

import ctypes

import torch
from lightning.pytorch.accelerators import AcceleratorRegistry
from torch import nn

from kd_lightning.errors import InputError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def check_accelerator(accelerator: str, devices: int | str, path: str) -> None:
    """Check that the devices which are asked for exist; costs nothing.

    Args:
        accelerator: Lightning's name: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps``, ``tpu``.
        devices: how many, or ``auto``. On a CPU any number: they are processes.
        path: of the trainer in the configuration, for the message.

    Raises:
        InputError: there is no such accelerator, or there are fewer devices.
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
            "leave trainer=auto to take what there is, or choose trainer=cpu"
        )
    there = AcceleratorRegistry[kind]["accelerator"].auto_device_count()
    if kind != "cpu" and isinstance(devices, int) and devices > there:
        raise InputError(f"{path}.devices={devices}, but the number of devices here is {there}")


def is_available(accelerator: str) -> bool:
    """Whether this machine has such a device."""
    kind = device_type(accelerator)
    return kind in AcceleratorRegistry and bool(
        AcceleratorRegistry[kind]["accelerator"].is_available()
    )


def device_type(accelerator: str) -> str:
    """What an accelerator's name means here: ``cuda``, ``mps``, ``cpu`` or the name itself; of
    ``gpu`` itself if there is none.
    """
    if accelerator in ("auto", "gpu"):
        if torch.cuda.is_available():
            return "cuda"
        if torch.backends.mps.is_available():
            return "mps"
        return "cpu" if accelerator == "auto" else accelerator
    return accelerator


def choose_precision(accelerator: str = "auto", model: nn.Module | None = None) -> str:
    """Lightning's name of the fastest precision that trains well here.

    bfloat16 autocast where CPU or GPU has bfloat16 instructions, float16 autocast on CUDA cards
    that have only those (Turing, such as a free Colab's T4), float32 elsewhere, and on a CPU for
    any model with grouped convolutions. A depthwise convolution has nothing for the bfloat16
    instructions to multiply, so that there only the conversions remain: a step of MobileNetV3-small
    is slower than in float32. A rule and not a measurement: the precision is part of a
    run's identity and must be the same on a busy machine.

    Args:
        accelerator: Lightning's accelerator: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps``.
        model: that is trained.
    """
    device = device_type(accelerator)
    if device == "cuda" and torch.cuda.is_available():
        # Without emulation: a T4 claims bfloat16 and computes it many times slower than float16.
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if fast else "16-mixed"
    if device != "cpu" or not _cpu_has_bf16() or (model is not None and has_groups(model)):
        return "32-true"
    return "bf16-mixed"


def has_groups(model: nn.Module) -> bool:
    """Whether any of its convolutions is grouped; depthwise ones are."""
    convolutions = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d
    return any(isinstance(part, convolutions) and part.groups > 1 for part in model.modules())


def _cpu_has_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    # torch before 2.12 has no public way to ask; there, ask for the two x86 extensions.
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return any(present and name.endswith("bf16") for name, present in capabilities().items())


def choose_memory_format(precision: str, accelerator: str = "auto") -> torch.memory_format:
    """Channels-last where convolutions run on it natively: any CPU, and tensor cores in 16 bits.

    Args:
        precision: Lightning's name, as from `choose_precision`.
        accelerator: that trains, see there.
    """
    device = device_type(accelerator)
    tensor_cores = device == "cuda" and precision != "32-true"
    return torch.channels_last if device == "cpu" or tensor_cores else torch.contiguous_format


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for the next step to use again.

    By default glibc returns large blocks to the kernel as they are freed and is given them back
    page by page, each zeroed, a moment later. With another C library nothing happens.
    """
    try:
        library = ctypes.CDLL("libc.so.6")
        for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**29)):
            library.mallopt(parameter, value)
    except (OSError, AttributeError):
        pass  # another C library, another habit
