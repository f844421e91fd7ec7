"""Integration of an `EmulatedDevice` with Lightning and torch's optimizers."""

import importlib
from contextlib import nullcontext

import torch
from emulated_device import DEVICE
from lightning.fabric.utilities import apply_func
from lightning.pytorch import Callback
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors import accelerator_connector

from kd_lightning import transfer


class CountSteps(Callback):
    """Tells the device the current phase. A step starts when its batch is fetched."""

    def __init__(self, device):
        self._device, self._step = device, 0

    def on_train_epoch_start(self, trainer, module):
        self._device.during = self._step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self._step += 1
        self._device.during = "between" if trainer.is_last_batch else self._step

    def on_train_end(self, trainer, module):
        self._device.during = None


class EmulatedAccelerator(Accelerator):
    """Lightning's accelerator interface."""

    def setup_device(self, device):
        pass

    def teardown(self):
        pass

    @staticmethod
    def parse_devices(devices):
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices):
        return [DEVICE]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "emulated"


def install(monkeypatch, device):
    """Let Lightning, torch's optimizers and our copies take the device for an accelerator.

    `trainer.accelerator=emulated` trains on it; it need not be active yet.
    """
    entry = {"accelerator": EmulatedAccelerator, "description": "", "init_params": {}}
    monkeypatch.setitem(AcceleratorRegistry, "emulated", entry)

    class Strategy(SingleDeviceStrategy):
        @property
        def root_device(self):
            there = isinstance(self.accelerator, EmulatedAccelerator)
            return DEVICE if there else super().root_device

    monkeypatch.setattr(accelerator_connector, "SingleDeviceStrategy", Strategy)
    optimizer = importlib.import_module("torch.optim.optimizer")
    fused = optimizer._get_fused_kernels_supported_devices()
    monkeypatch.setattr(
        optimizer, "_get_fused_kernels_supported_devices", lambda: [*fused, DEVICE.type]
    )
    # torch has no autocast for this type of device.
    autocast, enabled = torch.autocast, torch.is_autocast_enabled

    def switch(kind, *args, **kwargs):
        return nullcontext() if kind == DEVICE.type else autocast(kind, *args, **kwargs)

    monkeypatch.setattr(torch, "autocast", switch)
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda kind: kind != DEVICE.type and enabled(kind)
    )
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    if device.apple:
        # Lightning knows that such copies must be waited for.
        blocking = (*apply_func._BLOCKING_DEVICE_TYPES, DEVICE.type)
        monkeypatch.setattr(apply_func, "_BLOCKING_DEVICE_TYPES", blocking)
    else:
        background = transfer.copies_in_background
        monkeypatch.setattr(
            transfer,
            "copies_in_background",
            lambda where: where.type == DEVICE.type or background(where),
        )
