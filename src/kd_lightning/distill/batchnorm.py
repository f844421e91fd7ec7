"""BatchNorm running statistics: detect whether they lag behind the weights, and re-estimate them.

Running statistics average over roughly the last 1 / momentum training batches. After few steps, or
with a small momentum (0.01 in torchvision's MobileNetV3), they still reflect outdated weights, and
the model fails in evaluation mode although it is well trained.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import NamedTuple, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_lightning.data.module import ImageDataModule
from kd_lightning.data.views import PLAIN

ENOUGH = 256
"""Number of images sufficient to detect a lag."""


def trained_batchnorms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorm layers with running statistics, except those frozen in evaluation mode.

    Args:
        model: in training mode.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.training and module.running_mean is not None
    }


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[dict[str, _BatchNorm]]:
    """Context with BatchNorm in training mode and everything else, such as dropout, in evaluation.

    On exit, running statistics and the modes of all modules are restored.

    Args:
        model: in training mode.
    """
    layers = trained_batchnorms(model)
    modes = {module: module.training for module in model.modules()}
    buffers = [buffer for layer in layers.values() for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        model.eval()
        for layer in layers.values():
            layer.training = True
        yield layers
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        for module, mode in modes.items():
            module.training = mode


@torch.no_grad()
def update_bn(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Re-estimate the running statistics as the cumulative average over some batches.

    Like `torch.optim.swa_utils.update_bn`, except that dropout etc. are off, as in evaluation, and
    that layers without input keep their statistics.

    Args:
        model: in training mode.
        batches: images (B, 3, H, W), on the model's device.
    """
    estimated = []
    with batch_statistics(model) as layers:
        momenta = [layer.momentum for layer in layers.values()]
        try:
            for layer in layers.values():
                layer.reset_running_stats()
                layer.momentum = None  # a cumulative average
            for images in batches:
                model(images)
        finally:
            for layer, momentum in zip(layers.values(), momenta, strict=True):
                layer.momentum = momentum
        for layer in layers.values():
            if layer.num_batches_tracked:
                estimated += [(buffer, buffer.clone()) for buffer in layer.buffers()]
    for buffer, value in estimated:
        buffer.copy_(value)


def min_batch_size(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Minimum batch size for training: 2 if a BatchNorm layer sees a single value per channel and
    image, else 1.

    Args:
        model: in training mode.
        shapes: layer name to output shape without the batch axis. A missing layer, used in training
            only, is assumed to need 2.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training:
            values = torch.Size(shapes.get(name, (1,))[1:]).numel()
            if values == 1:
                return 2
    return 1


class Lag(NamedTuple):
    """Correctness of the predictions in evaluation mode and with batch statistics.

    Attributes:
        evaluation, batch: (N,), bool.
        validation: number of validation images; these come first.
    """

    evaluation: Tensor
    batch: Tensor
    validation: int

    @property
    def accuracies(self) -> tuple[float, float]:
        """Accuracy on all images, in evaluation mode and with batch statistics."""
        return float(self.evaluation.float().mean()), float(self.batch.float().mean())

    @property
    def val_accuracy(self) -> float:
        """Accuracy on the validation images, with batch statistics."""
        return float(self.batch[: self.validation].float().mean())

    @property
    def significant(self) -> bool:
        """Whether evaluation mode is worse by 5 points and 3 standard errors (McNemar's test)."""
        better = int((self.batch & ~self.evaluation).sum())
        worse = int((self.evaluation & ~self.batch).sum())
        excess = better - worse
        return excess > 0.05 * len(self.batch) and excess**2 > 9 * (better + worse)

    def sentence(self, role: str, updated: bool) -> str:
        """The warning for a significant difference.

        Args:
            role: ``student`` or ``teacher``.
            updated: whether the statistics were re-estimated.
        """
        if updated:
            remedy = "re-estimating them did not help"
        elif role == "student":
            remedy = "re-estimate them with update_bn=true"
        else:
            remedy = f"train longer, or raise the momentum of BatchNorm in {role}.model"
        evaluation, batch = (f"{100 * accuracy:.1f} %" for accuracy in self.accuracies)
        return (
            f"the {role} classifies {evaluation} of {len(self.batch)} images correctly in "
            f"evaluation mode, but {batch} with batch statistics: the running statistics of its "
            f"BatchNorm layers lag behind its weights; {remedy}"
        )


def reestimate(
    trainer: Trainer, module: LightningModule, data: ImageDataModule, epochs: int
) -> None:
    """Run `update_bn` on the student, with one pass over the training views of the last epoch.

    Every process uses all of them, so that the statistics are identical.

    Args:
        trainer: the trainer of the module.
        module: its `student` is updated.
        data: the images.
        epochs: number of trained epochs.
    """
    loader = data.variant().train_dataloader()
    loader.sampler.set_epoch(epochs - 1)
    limit = trainer.num_training_batches
    batches = loader if math.isinf(limit) else islice(loader, int(limit))
    images = (data.on_after_batch_transfer(batch, 0)["images"] for batch in batches)
    with _placed(trainer, module) as student:
        update_bn(student, (x.contiguous(memory_format=module.memory_format) for x in images))


@torch.no_grad()
def measure_lag(trainer: Trainer, module: LightningModule, data: ImageDataModule) -> Lag:
    """Compare evaluation mode with batch statistics on the validation images.

    If there are fewer than `ENOUGH` validation images, unaugmented training images are added.

    Args:
        trainer: the trainer of the module.
        module: its `student` is evaluated and left unchanged.
        data: the images.
    """
    val = data.val_dataloader().sampler.images
    limit = sum(trainer.num_val_batches)
    if not math.isinf(limit):
        val = val[: int(limit) * data.eval_batch_size]
    train = _shuffled(data.splits["train"])[: max(0, ENOUGH - len(val))]
    images = torch.cat([val, train])
    # Shuffled, because batch statistics depend on the mix of classes in a batch.
    order = _shuffled(torch.arange(len(images)))
    answers = {}
    with _placed(trainer, module) as student:
        for mode in ("evaluation", "batch"):
            correct = torch.zeros(len(images), dtype=torch.bool)
            with batch_statistics(student):
                if mode == "evaluation":
                    student.eval()
                for part in order.tensor_split(-(-len(order) // max(64, data.eval_batch_size))):
                    view = torch.full_like(part, PLAIN)
                    batch = data.on_after_batch_transfer(data.render(images[part], view), 0)
                    right = module(batch["images"]).argmax(dim=1) == batch["labels"]
                    correct[part] = right.cpu()
            answers[mode] = correct
    return Lag(**answers, validation=len(val))


@contextmanager
def _placed(trainer: Trainer, module: LightningModule) -> Iterator[nn.Module]:
    """The student on its device, in the training precision."""
    module.to(trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context():
        yield cast(nn.Module, module.student)


def _shuffled(numbers: Tensor) -> Tensor:
    return numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))]
