"""Errors of a device that has too little memory, in one sentence."""

from kd_lightning.errors import RunError

# torch's own, of the driver, of cuBLAS, and of an Apple GPU; only the first has a class of its own.
_SIGNS = ("out of memory", "ALLOC_FAILED")


def explained(error: BaseException) -> BaseException:
    """A `RunError` that says what to do, if a device has too little memory; else the error."""
    if not isinstance(error, RuntimeError) or not any(sign in str(error) for sign in _SIGNS):
        return error
    # Requested and available memory, without the advice on torch's allocator that follows.
    parts = str(error).splitlines()[0].split(". ")[:3]
    return RunError(
        f"the device has too little memory ({'; '.join(parts).rstrip('.')}): reduce "
        "data.batch_size, or the number of runs at a time"
    )
