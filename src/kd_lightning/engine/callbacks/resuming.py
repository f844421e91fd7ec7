"""State needed for an exact resume beyond what Lightning restores."""

import random
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from kd_lightning.distill.module import DistillationModule


class ExactResume(Callback):
    """Restores the random state and the position within the epoch.

    Views and image order need no random state, as they are functions of index, seed and epoch; but
    layers such as dropout draw random numbers during training.
    """

    def __init__(self) -> None:
        self._generators: dict[str, Any] = {}
        self._loader: dict[str, int] = {}
        self._stopped = False
        self._device = torch.device("cpu")

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's generators, of the CPU and of the GPU if it trains on one, whatever
        its number, and of those of Python and NumPy, from which users' code may draw; of every
        process.
        """
        state: Any = np.random.get_state()
        kind, keys, *rest = state
        own: dict[str, Any] = {
            "cpu": torch.get_rng_state(),
            "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        }
        if self._device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self._device)
        if not distributed.is_available() or not distributed.is_initialized():
            return own
        ranks: list[dict[str, Any]] = [{}] * distributed.get_world_size()
        distributed.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Defer restoring until training starts, as setup may draw random numbers, too."""
        self._generators = state_dict

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save `should_stop` and the training metrics of the epoch so far."""
        checkpoint["should_stop"] = trainer.should_stop
        metrics = cast(DistillationModule, module).train_metrics
        checkpoint["train_metrics"] = {
            name: {key: _total(value, trainer) for key, value in metric.metric_state.items()}
            for name, metric in metrics.items()
        }

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Note the device. Do not continue a training that early stopping has ended."""
        self._device = module.device
        trainer.should_stop = trainer.should_stop or self._stopped

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore the training metrics, in rank 0 the totals of all processes; keep the loader
        state and `should_stop` for later.
        """
        saved = checkpoint.get("train_metrics", {})
        for name, metric in cast(DistillationModule, module).train_metrics.items():
            for key, value in metric.metric_state.items():
                if isinstance(value, Tensor) and key in saved.get(name, {}):
                    total = saved[name][key].to(value.device)
                    setattr(metric, key, total if trainer.is_global_zero else value * 0)
        self._stopped = checkpoint.get("should_stop", False)
        loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        self._loader = loaders[0] if loaders else {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore the random generators and the position in the data loader."""
        states = self._generators.get("ranks", [self._generators])
        own = states[trainer.global_rank % len(states)]
        if "cpu" in own:
            torch.set_rng_state(own["cpu"].cpu())
        if "python" in own:  # not in earlier checkpoints
            random.setstate(own["python"])
            kind, keys, *rest = own["numpy"]
            np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        # Earlier checkpoints have the states of all GPUs by their names.
        gpu = own.get("cuda", own.get(str(self._device)))
        if gpu is not None and self._device.type == "cuda":
            torch.cuda.set_rng_state(gpu.cpu(), self._device)
        if self._loader:
            # Lightning does not restore a loader that it has already created to count batches.
            loader: Any = trainer.train_dataloader
            loader.load_state_dict(self._loader)


def _total(value: Any, trainer: Trainer) -> Any:
    """The sum of a metric's counts over all processes."""
    if trainer.world_size == 1 or not isinstance(value, Tensor):
        return value
    return trainer.strategy.reduce(value.clone(), reduce_op="sum")
