r"""Negative control: answer for every view of an image with the outputs on its first view, as a
cache that is keyed by the image alone does.

    PYTHONPATH=scripts python train.py method=logit \
        '+callbacks.control={_target_: image_keyed.KeyByImage}'

What it costs in accuracy is in docs/further-trainings.md.
"""

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kd_lightning.distill.module import DistillationModule
from kd_lightning.errors import InputError

Compute = Callable[[], Mapping[str, Tensor]]


class KeyByImage(Callback):
    """Replaces the view number by 0 wherever the training looks up outputs of the teacher."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the teacher-output cache of training views; a module without a teacher has none.

        Raises:
            InputError: outputs on training views are not cached.
        """
        assert isinstance(pl_module, DistillationModule)
        cache = pl_module.cache
        if cache is None:
            if pl_module.teacher is None:
                return
            raise InputError("the control needs cached outputs: remember.disk_gb must be above 0")
        look_up = cache.fetch

        def fetch(
            index: Tensor, view: Tensor, device: torch.device | str, ask: Compute
        ) -> dict[str, Tensor]:
            def ask_about_the_first_view() -> Mapping[str, Tensor]:
                if view.any():  # these images are of another view, and must not be stored as it
                    raise InputError("the outputs on the first view are not stored completely")
                return ask()

            return look_up(index, torch.zeros_like(view), device, ask_about_the_first_view)

        cache.fetch = fetch  # type: ignore[method-assign]
