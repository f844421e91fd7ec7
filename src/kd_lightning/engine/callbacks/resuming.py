"""What a resumed training needs besides what Lightning restores by itself."""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kd_lightning.distill.module import DistillationModule


class ExactResume(Callback):
    """Random numbers go on as if the training had not stopped, and so does the epoch it was in.

    Views and the order of the images need no random state: they follow from their numbers. A
    network may draw while it is trained, as dropout does.
    """

    def __init__(self) -> None:
        self._generators: dict[str, Tensor] = {}
        self._loader: dict[str, int] = {}
        self._stopped = False

    def state_dict(self) -> dict[str, Any]:
        """The state of torch's generators: the CPU's and that of every GPU."""
        gpus = {
            f"cuda:{number}": torch.cuda.get_rng_state(number)
            for number in range(torch.cuda.device_count())
        }
        return {"cpu": torch.get_rng_state(), **gpus}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep them until training starts: what comes before may draw, too."""
        self._generators = state_dict

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save whether the training was told to stop, and the counts of the epoch so far."""
        checkpoint["should_stop"] = trainer.should_stop
        metrics = cast(DistillationModule, module).train_metrics
        checkpoint["train_metrics"] = {name: m.metric_state for name, m in metrics.items()}

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """A training that was stopped early is finished."""
        trainer.should_stop = trainer.should_stop or self._stopped

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the loader's place and whether training was told to stop; restore counts."""
        saved = checkpoint.get("train_metrics", {})
        for name, metric in cast(DistillationModule, module).train_metrics.items():
            for key, value in metric.metric_state.items():
                if isinstance(value, Tensor) and key in saved.get(name, {}):
                    setattr(metric, key, saved[name][key].to(value.device))
        self._stopped = checkpoint.get("should_stop", False)
        loaders = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        self._loader = loaders[0] if loaders else {}

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Go on drawing, and showing images, where it stopped."""
        for device, state in self._generators.items():
            if device == "cpu":
                torch.set_rng_state(state.cpu())
            elif torch.device(device).index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state.cpu(), device)
        if self._loader:
            # Lightning has made the loader to count its batches, and does not restore it then.
            loader: Any = trainer.train_dataloader
            loader.load_state_dict(self._loader)
