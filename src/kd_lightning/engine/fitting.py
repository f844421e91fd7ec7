"""Fit, validate and test a module, and collect the results."""

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed, nn

from kd_lightning.data.module import ImageDataModule
from kd_lightning.distill.batchnorm import measure_lag, reestimate, trained_batchnorms
from kd_lightning.distill.calibration import fit_temperature
from kd_lightning.distill.module import DistillationModule
from kd_lightning.engine.callbacks.divergence import StopWhenDiverged
from kd_lightning.engine.callbacks.history import History
from kd_lightning.engine.callbacks.pictures import Pictures
from kd_lightning.engine.callbacks.speed import Speed
from kd_lightning.engine.checkpointing import remove_partial
from kd_lightning.errors import RunError
from kd_lightning.storage.run_directory import Checkpoint, RunDirectory

log = logging.getLogger(__name__)

Kind = TypeVar("Kind", bound=Callback)


def fit(
    trainer: Trainer,
    module: DistillationModule,
    data: ImageDataModule,
    directory: RunDirectory,
    weights: str,
    resume: Checkpoint | None = None,
    update_bn: bool = False,
    revalidate: bool = False,
) -> dict[str, Any]:
    """Train, save the weights of the last epoch, and validate them.

    Args:
        trainer: from `build_trainer`.
        module: the module to train.
        data: the images.
        directory: where weights and tables are written.
        weights: name of the weights file.
        resume: checkpoint to resume from.
        update_bn: whether to re-estimate BatchNorm's running statistics after the last epoch.
        revalidate: whether a callback may have changed the weights at the end of the training.

    Raises:
        RunError: the training diverged.
    """
    if resume is not None:
        log.warning("resuming %s from %s", directory.path, resume.place)
    if trainer.is_global_zero:
        remove_partial(directory.path / "checkpoints")
    trainer.fit(module, data, ckpt_path=resume.path if resume else None, weights_only=True)
    speed, history = _callback(trainer, Speed), _callback(trainer, History)
    _callback(trainer, StopWhenDiverged).check(module)
    if not speed.images:
        raise RunError("a callback stopped the training before its first step")
    # `StochasticWeightAveraging` runs one more epoch without training.
    epochs = min(cast(Any, trainer.fit_loop.epoch_progress.current).processed, trainer.max_epochs)
    has_batchnorm = bool(trained_batchnorms(module.student))
    has_new_statistics = update_bn and has_batchnorm
    if has_new_statistics:
        reestimate(trainer, module, data, epochs)
    directory.save_weights(module.student, weights)
    directory.write_table("history", history.rows)
    # Training may have stopped between validations, or the weights may have changed since.
    if history.validated_at != trainer.global_step or revalidate or has_new_statistics:
        trainer.validate(module, data, verbose=False)
    if not math.isfinite(metric(trainer, "val/loss")):
        raise RunError(
            "the loss on the validation images is not finite after the last epoch; "
            "lower the learning rate"
        )
    _place(trainer, module.val_logits)
    temperature = fit_temperature(*module.val_logits.compute())
    module.val_logits.reset()
    module.quality.calibrate(temperature)
    results: dict[str, Any] = {"val_accuracy": metric(trainer, "val/accuracy")}
    if has_batchnorm:
        lag = measure_lag(trainer, module, data)
        results["val_accuracy_batch_statistics"] = lag.val_accuracy
        if lag.significant:
            log.warning(lag.sentence(weights, update_bn))
    best = _best(trainer)
    if best.best_model_score is None or best.best_model_score < results["val_accuracy"]:
        results |= {"best_val_accuracy": results["val_accuracy"], "best_epoch": epochs}
    else:
        results["best_val_accuracy"] = float(best.best_model_score)
        results["best_epoch"] = min(_load(best)["epoch"] + 1, epochs)
    return {
        **results,
        "temperature": temperature,
        "epochs": epochs,
        "train_seconds": round(speed.fit_seconds, 2),
        "images_per_second": round(speed.images_per_second, 1),
    }


def test(
    trainer: Trainer,
    module: DistillationModule,
    data: ImageDataModule,
    directory: RunDirectory,
    fitted: Mapping[str, Any],
    update_bn: bool,
) -> dict[str, Any]:
    """Test the weights of the last epoch and of the best epoch.

    The best epoch is selected on the validation images only.

    Args:
        trainer: the trainer of the module.
        module: with the weights of the last epoch.
        data: the images.
        directory: where the confusion matrix and the tables of `Quality` are written.
        fitted: results of `fit`.
        update_bn: as in `fit`; the best epoch is selected without it, but tested with it.
    """
    results = {}
    if _best_is_earlier(trainer, fitted["val_accuracy"]):
        last = copy.deepcopy(module.state_dict())  # of a user's module, it may have any values
        module.load_state_dict(_load(_best(trainer))["state_dict"])
        if update_bn and trained_batchnorms(module.student):
            reestimate(trainer, module, data, fitted["best_epoch"])
        with _without_pictures(trainer):
            trainer.test(module, data, verbose=False)
        results["test_accuracy_at_best"] = metric(trainer, "test/accuracy")
        module.load_state_dict(last)
    # The last epoch is the reported result: test it last, with pictures.
    trainer.test(module, data, verbose=False)
    results["test_accuracy"] = metric(trainer, "test/accuracy")
    _place(trainer, module.confusion, module.quality)
    names, counts = _columns(data.classes), module.confusion.compute()
    rows = [dict(zip(names, row, strict=True)) for row in counts.tolist()]
    directory.write_table("confusion", rows)
    directory.write_table("per_class", module.quality.per_class(counts, names))
    directory.write_table("reliability", module.quality.reliability())
    results.setdefault("test_accuracy_at_best", results["test_accuracy"])
    figures = module.quality.figures()
    for logger in trainer.loggers:
        logger.log_metrics(
            {f"test/{name.removeprefix('test_')}": value for name, value in figures.items()},
            step=trainer.global_step,
        )
    return results | figures


@contextmanager
def _without_pictures(trainer: Trainer) -> Iterator[None]:
    """Detach the callback that draws figures."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [c for c in callbacks if not isinstance(c, Pictures)]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]


def _place(trainer: Trainer, *metrics: nn.Module) -> None:
    """Move metrics back to the training device, if processes exchange them.

    Lightning moves a module to the CPU after every pass, and NCCL exchanges tensors on GPUs only.
    """
    if distributed.is_available() and distributed.is_initialized():
        for part in metrics:
            part.to(trainer.strategy.root_device)


def _columns(classes: Sequence[str]) -> list[str]:
    """Class names as unique column names in valid UTF-8."""
    names: dict[str, None] = {}
    for label, name in enumerate(classes):
        column = str(name).encode("utf-8", "backslashreplace").decode()
        while column in names:
            column = f"{column} (class {label})"
        names[column] = None
    return list(names)


def _callback(trainer: Trainer, kind: type[Kind]) -> Kind:
    callbacks: list[Callback] = cast(Any, trainer).callbacks
    return next(callback for callback in callbacks if isinstance(callback, kind))


def _best(trainer: Trainer) -> ModelCheckpoint:
    best = trainer.checkpoint_callback
    assert isinstance(best, ModelCheckpoint)
    return best


def _best_is_earlier(trainer: Trainer, val_accuracy: float) -> bool:
    """Whether the best weights are not the last ones, which have this validation accuracy; earlier
    ones may be of the same epoch, with several validations in it.
    """
    best = _best(trainer)
    if best.best_model_score is None or best.best_model_score < val_accuracy:
        return False
    return bool(_load(best)["global_step"] < trainer.global_step)


def _load(best: ModelCheckpoint) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(
        best.best_model_path, map_location="cpu", weights_only=True
    )
    return content


def metric(trainer: Trainer, name: str) -> float:
    """The last logged value of a metric."""
    return float(trainer.callback_metrics[name])
