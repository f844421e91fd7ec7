"""An emulated accelerator, to detect device errors on a CPU.

While an `EmulatedDevice` is active, tensors sent to `DEVICE` report it as their device. Their
values are on the CPU, so that a training on it gives the same weights as on a CPU, bit by bit. The
differences of an accelerator are emulated:

- an operation on a tensor of the device and one of the CPU raises an error;
- an asynchronous copy arrives late. Until then its target on the CPU contains garbage, and its
  source must not be written to;
- whatever makes the host wait for the device is recorded in `waits`, with the place in the code.

`apple=True` is an Apple GPU: float64 is refused on the device, and so is an asynchronous copy of
memory that is not pinned. Limits: one device, float32 (no autocast), no kernel of an accelerator.
"""

import copy
import sys
from collections import Counter
from functools import cache
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

aten = torch.ops.aten

# Of torch's own device types the one whose gradients are computed in the calling thread, where the
# modes below are active.
DEVICE = torch.device("meta")
GARBAGE = 77  # in the target of a copy that has not arrived
DOUBLE = (torch.float64, torch.complex128)

# What needs the numbers, or how many there are, before the host can go on.
WAITS = {
    aten._local_scalar_dense: "a number is looked at (item, float, bool, if)",
    aten.equal: "torch.equal",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten.bincount: "bincount",
    aten._unique2: "unique",
    aten.unique_dim: "unique",
    aten.unique_consecutive: "unique",
    aten.repeat_interleave: "repeat_interleave",
}
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
# What takes single numbers of the CPU besides operations on each element.
TAKES_SCALARS = (*INDEXING, aten.fill_, aten.masked_fill, aten.masked_fill_, aten._fused_sgd_)


# Functions that `_Functions` replaces, or completes.
REPLACED = {
    torch.tensor, torch.as_tensor, torch.Tensor.new_tensor, torch.Tensor.tolist,
    torch.Tensor.data.__set__, torch.Tensor.is_pinned, torch.Tensor.pin_memory,
}  # fmt: skip


class Remote(torch.Tensor):
    """A tensor on the emulated device; `numbers` is where they are in truth."""

    @staticmethod
    def __new__(cls, numbers):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, layout=numbers.layout, device=DEVICE,
        )  # fmt: skip

    def __init__(self, numbers):
        self.numbers = numbers

    def __repr__(self):
        return f"Remote({tuple(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol):
        """Saved as torch saves a tensor of any device, and loaded on the CPU."""
        return self.numbers.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        twin = Remote(copy.deepcopy(self.numbers.detach()))
        if isinstance(self, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, self.requires_grad)
        return memo.setdefault(id(self), twin)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"the emulated device is not active: {func}")


class Wait(NamedTuple):
    """The host synchronised with the device.

    `during` is None before and after the training, the number of the training step, or ``between``:
    validation and what is done once an epoch.
    """

    during: int | str | None
    what: str
    where: str


class EmulatedDevice:
    """The device, active as a context manager.

    Attributes:
        waits: what made the host wait, in order.
        background: copies that it did not wait for, by ``to device`` and ``to host``.
        during: what goes on, see `Wait`.
    """

    def __init__(self, apple=False):
        self.apple = apple
        self.waits, self.background = [], Counter()
        self.during = None
        self._uploads, self._downloads = [], []
        self._modes = (_Functions(self), _Operations(self))

    def __enter__(self):
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def wait(self, what):
        """The host waits, so that all copies arrive."""
        self.waits.append(Wait(self.during, what, _where()))
        self.arrive(self._uploads, self._downloads)

    def upload(self, source):
        """An asynchronous copy from pinned memory."""
        self.background["to device"] += 1
        self._uploads.append((source, source.clone()))

    def download(self, source, target):
        """An asynchronous copy to pinned memory."""
        self.background["to host"] += 1
        self._downloads.append((target, source.clone()))
        target.fill_(GARBAGE)

    def arrive(self, uploads, downloads):
        """These copies are done."""
        for target, numbers in downloads:
            target.copy_(numbers)
        for source, numbers in uploads:
            if not torch.equal(source, numbers):
                raise RuntimeError("the source of a copy was written to before the copy was done")
        for pending, done in ((self._uploads, uploads), (self._downloads, downloads)):
            arrived = {id(entry) for entry in done}
            pending[:] = [entry for entry in pending if id(entry) not in arrived]

    def event(self):
        """Replacement of `torch.cuda.Event`."""
        return _Event(self)

    def waits_by_step(self):
        """The waits of every training step: its number to them, steps without any left out."""
        steps = {}
        for wait in self.waits:
            if isinstance(wait.during, int):
                steps.setdefault(wait.during, []).append(wait)
        return steps


class _Event:
    """Answers that its copies are done when it is asked for the third time, or waited for."""

    def __init__(self, device):
        self._device, self._asked, self._copies = device, 0, ([], [])

    def record(self):
        self._copies = list(self._device._uploads), list(self._device._downloads)

    def query(self):
        self._asked += 1
        if self._asked > 2:
            self._device.arrive(*self._copies)
        pending = {id(entry) for entry in self._device._downloads}
        return not any(id(entry) in pending for entry in self._copies[1])

    def synchronize(self):
        if not self.query():
            self._device.wait("Event.synchronize")


class _Operations(TorchDispatchMode):
    """Every operation on tensors of the device."""

    def __init__(self, device):
        super().__init__()
        self._device = device

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # nothing is compiled; skipping it takes a tenth of the time

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [*_tensors(args), *_tensors(kwargs.values())]
        remote = [tensor for tensor in tensors if isinstance(tensor, Remote)]
        asked = kwargs.get("device")
        made_there = asked is not None and torch.device(asked).type == DEVICE.type
        if not remote and not made_there:
            return func(*args, **kwargs)
        if func.overloadpacket is aten._to_copy:
            return self._to(made_there or asked is None, *args, **kwargs)
        if func.overloadpacket is aten.copy_:
            return self._copy(*args, **kwargs)
        self._check(func, args, tensors, remote)
        kwargs.pop("pin_memory", None)
        if made_there:
            kwargs.pop("device")
        there = {key: _each(_numbers, value) for key, value in kwargs.items()}
        wrapped = _each(self._wrap, func(*_each(_numbers, args), **there))
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if remote else wrapped

    def _check(self, func, args, tensors, remote):
        """Nothing meets what is elsewhere; note what makes the host wait."""
        packet = func.overloadpacket
        elsewhere = [tensor for tensor in tensors if not isinstance(tensor, Remote)]
        if packet in INDEXING:
            indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
            for index in indices:
                if not isinstance(index, Remote):
                    self._device.wait("an index that is on the CPU")
                elif index.dtype in (torch.bool, torch.uint8):
                    self._device.wait("an index that is a mask")
            elsewhere = [t for t in elsewhere if not any(t is index for index in indices)]
        single = torch.Tag.pointwise in func.tags or packet in TAKES_SCALARS
        wrong = [tensor for tensor in elsewhere if tensor.dim() or not single]
        if wrong and remote:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} was given "
                f"{[(t.device.type, tuple(t.shape)) for t in tensors]} at {_where()}"
            )
        if packet in WAITS:
            self._device.wait(WAITS[packet])

    def _wrap(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        if self._device.apple and value.dtype in DOUBLE:
            raise TypeError(f"an Apple GPU has no {value.dtype}: at {_where()}")
        return Remote(value)

    def _to(self, goes_there, source, *, non_blocking=False, pin_memory=None, **settings):
        settings.pop("device", None)
        numbers = aten._to_copy.default(_numbers(source), **settings)
        if isinstance(source, Remote) and goes_there:
            return self._wrap(numbers)
        if goes_there:
            self._to_device(source, non_blocking)
            return self._wrap(numbers)
        self._to_host(numbers, torch.empty_like(numbers), non_blocking, fresh=True)
        return numbers

    def _copy(self, target, source, non_blocking=False):
        if isinstance(target, Remote):
            if not isinstance(source, Remote):
                self._to_device(source, non_blocking)
            target.numbers.copy_(_numbers(source))
        else:
            target.copy_(source.numbers)
            self._to_host(source.numbers, target, non_blocking)
        return target

    def _to_device(self, source, non_blocking):
        if non_blocking and is_pinned(source):
            self._device.upload(source)
        elif non_blocking and self._device.apple:
            raise RuntimeError(f"an asynchronous copy of memory that is not pinned: at {_where()}")
        else:
            self._device.wait("a copy to the device")

    def _to_host(self, numbers, target, non_blocking, fresh=False):
        """torch itself pins what it makes for an asynchronous copy from the device (`fresh`)."""
        if non_blocking and self._device.apple:
            raise RuntimeError(f"an asynchronous copy to the host: at {_where()}")
        if non_blocking and fresh:
            target = numbers
        if non_blocking and (fresh or is_pinned(target)):
            self._device.download(numbers.to(target.dtype), target)
        else:
            self._device.wait("a copy to the host")


class _Functions(TorchFunctionMode):
    """Functions that would look at a tensor's memory, or at that of an accelerator."""

    def __init__(self, device):
        super().__init__()
        self._device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in REPLACED and "pin_memory" not in kwargs:
            return func(*args, **kwargs)
        kwargs = dict(kwargs)
        first = args[0] if args else None
        if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            return self._make(func, args, kwargs)
        if func is torch.Tensor.tolist and isinstance(first, Remote):
            return first.cpu().tolist()
        if func is torch.Tensor.data.__set__ and isinstance(first, Remote):
            first.numbers = args[1].numbers
        if func is torch.Tensor.is_pinned:
            return is_pinned(first)
        if func is torch.Tensor.pin_memory:
            return self._pin(first.clone())
        if kwargs.pop("pin_memory", False):
            return self._pin(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _pin(self, tensor):
        if self._device.apple:
            raise RuntimeError(f"an Apple GPU has no use of pinned memory: at {_where()}")
        tensor._pinned = True
        return tensor

    @staticmethod
    def _make(func, args, kwargs):
        """Made on the CPU and copied, as torch does."""
        device = kwargs.pop("device", None)
        if isinstance(args[0], Remote):
            if func is not torch.Tensor.new_tensor:
                return args[0].to(device or args[0].device, kwargs.get("dtype"))
            kwargs.setdefault("dtype", args[0].dtype)
            func, args, device = torch.tensor, args[1:], device or DEVICE
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def is_pinned(tensor):
    """Whether the emulator has pinned it."""
    return getattr(tensor, "_pinned", False)


def _numbers(value):
    return value.numbers if isinstance(value, Remote) else value


# As torch's pytree, which knows more containers and takes a third of a training's time.
def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _each(function, value):
    """Of a value, or of all in (nested) lists and tuples."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(function, one) for one in value)
    return function(value)


PACKAGES = ("kd_lightning/", "lightning/", "torchmetrics/", "torch/optim/", "torch/nn/utils/")


def _where():
    """The innermost places of the code that led here, the innermost first."""
    places, frame = [], sys._getframe(1)
    while frame is not None and len(places) < 4:
        if path := _in_package(frame.f_code.co_filename):
            places.append(f"{path}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " < ".join(places)


@cache
def _in_package(filename):
    """The path from the package on; empty if it is another one's."""
    name = next((package for package in PACKAGES if f"/{package}" in filename), None)
    return name + filename.rpartition(f"/{name}")[2] if name else ""
