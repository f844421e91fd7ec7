"""What the machine at hand computes fast: precision and memory format."""

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def choose_precision(accelerator: str = "auto") -> str:
    """Lightning's name of the fastest precision that trains well here.

    bfloat16 autocast where CPU or GPU has bfloat16 instructions, float16 autocast on CUDA cards
    that have only those (Turing, such as a free Colab's T4), float32 elsewhere.

    Args:
        accelerator: Lightning's accelerator: ``auto``, ``cpu``, ``gpu``, ``cuda``, ``mps``.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        # Without emulation: a T4 claims bfloat16 and computes it many times slower than float16.
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16-mixed" if fast else "16-mixed"
    if accelerator in ("auto", "gpu", "mps") and torch.backends.mps.is_available():
        return "32-true"
    return "bf16-mixed" if _cpu_has_bf16() else "32-true"


def _cpu_has_bf16() -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    # torch before 2.12 has no public way to ask; there, ask for the two x86 extensions.
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return any(present and name.endswith("bf16") for name, present in capabilities().items())


def choose_memory_format(precision: str) -> torch.memory_format:
    """Channels-last where convolutions run on it natively: any CPU, and tensor cores.

    Args:
        precision: Lightning's name, as from `choose_precision`.
    """
    if torch.backends.mps.is_available() or (torch.cuda.is_available() and precision == "32-true"):
        return torch.contiguous_format
    return torch.channels_last


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
