"""Lightning's Trainer as every training here uses it, student's and teacher's alike."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from kd_lightning.batchnorm import measure_lag, reestimate, trained_batchnorms
from kd_lightning.config import Node, build_partial, without
from kd_lightning.curves import Curves
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distillation import DistillationModule
from kd_lightning.errors import InputError, RunError
from kd_lightning.files import replacing
from kd_lightning.hardware import keep_freed_memory
from kd_lightning.pictures import Pictures
from kd_lightning.progress import ProgressBar
from kd_lightning.resuming import ExactResume
from kd_lightning.runs import LAST, Checkpoint, RunDirectory
from kd_lightning.stopping import StopWhenAsked

log = logging.getLogger(__name__)


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that are whole or not there: the one before stays until then."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write beside its place, then move there in one step."""
        # Into a file that Python opened: torch's own does not say why it could not be written.
        with replacing(Path(path)) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # of torch's, about what came of it
                raise error.__context__ or error from None


def build_trainer(
    settings: Node,
    precision: str,
    folder: Path,
    name: str,
    resume: Checkpoint | None = None,
    callbacks: Sequence[Callback] = (),
    pictures: bool = True,
) -> Trainer:
    """Lightning's Trainer with what every training of ours has: logs, checkpoints, a bar.

    Args:
        settings: arguments of Lightning's Trainer.
        precision: as Lightning calls it.
        folder: where logs and checkpoints go.
        name: what is trained, for people.
        resume: from where the training will go on; what was logged beyond that is left out.
        callbacks: further ones.
        pictures: whether TensorBoard gets pictures.
    """
    checkpoints = folder / "checkpoints"
    steps = resume.steps if resume else None
    own_bar = any(isinstance(callback, LightningProgressBar) for callback in callbacks)
    fixed = {
        "precision": precision,
        "default_root_dir": str(folder),
        "logger": TensorBoardLogger(
            folder, name="", version="", default_hp_metric=False, purge_step=steps
        ),
        # Whoever starts processes, it is not the cluster: kd_lightning.ranks.
        "plugins": [WholeCheckpoints(), LightningEnvironment()],
        "callbacks": [
            ModelCheckpoint(
                checkpoints, "best", monitor="val/accuracy", mode="max",
                save_weights_only=True, enable_version_counter=False,
            ),
            ModelCheckpoint(
                checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False
            ),
            Curves(),
            *([Pictures()] if pictures else []),
            *([] if own_bar else [ProgressBar(name)]),
            ExactResume(),
            StopWhenAsked(name, checkpoints / LAST),
            *callbacks,
        ],
        "enable_progress_bar": own_bar,
        "enable_model_summary": False,
        # The sampler shards and shuffles by itself; the networks are checked before training.
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        # What a model makes and keeps during validation must be of use in training.
        "inference_mode": False,
    }  # fmt: skip
    if settings.get("fast_dev_run"):
        raise InputError(
            "trainer.fast_dev_run leaves nothing to report; for a quick look use "
            "trainer.max_epochs=1 +trainer.limit_train_batches=5"
        )
    for part in ("train", "val", "test"):
        if settings.get(f"limit_{part}_batches") in (0, 0.0):
            raise InputError(f"trainer.limit_{part}_batches=0 leaves nothing to report")
    for key in fixed.keys() - {"precision"}:
        if key in settings:
            raise InputError(f"trainer.{key} cannot be set: this project sets it itself")
    keep_freed_memory()
    try:
        return build_partial(without(settings, "memory_format", "precision"), "trainer")(**fixed)
    except MisconfigurationException as error:
        raise InputError(f"trainer: {str(error).splitlines()[0]}") from error


def try_trainer(settings: Node, precision: str) -> None:
    """Build a trainer of one process, so that a bad argument shows before anything is written.

    Raises:
        InputError: Lightning refuses an argument, or it cannot be set here.
    """
    build_trainer({**settings, "devices": 1, "strategy": "auto"}, precision, Path("unused"), "")


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
    """Train, keep the last epoch's weights, and validate them.

    Args:
        trainer: from `build_trainer`.
        module: what is trained.
        data: the images.
        directory: where the weights and tables go.
        weights: what to call the file of weights.
        resume: from where to go on.
        update_bn: whether to re-estimate BatchNorm's running statistics after the last epoch.
        revalidate: whether a callback may have changed the weights when the training ended.

    Raises:
        RunError: the training diverged.
    """
    if resume is not None:
        log.warning("%s goes on after %s", directory.path, resume.place)
    trainer.fit(module, data, ckpt_path=resume.path if resume else None, weights_only=True)
    module.check_finite()
    if not module.images_trained:
        raise RunError("a callback stopped the training before its first step")
    # `StochasticWeightAveraging` goes through one epoch more without training.
    epochs = min(cast(Any, trainer.fit_loop.epoch_progress.current).processed, trainer.max_epochs)
    has_batchnorm = bool(trained_batchnorms(module.student))
    has_new_statistics = update_bn and has_batchnorm
    if has_new_statistics:
        reestimate(trainer, module, data, epochs)
    directory.save_weights(module.student, weights)
    directory.write_table("history", module.history)
    # It may have stopped between two validations, or the weights have changed since.
    if module.validated_at != trainer.global_step or revalidate or has_new_statistics:
        trainer.validate(module, data, verbose=False)
    if not math.isfinite(metric(trainer, "val/loss")):
        raise RunError(
            "the loss on the validation images is not finite after the last epoch; "
            "lower the learning rate"
        )
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
        "epochs": epochs,
        "train_seconds": round(module.fit_seconds, 2),
        "images_per_second": round(module.images_trained / module.training_seconds, 1),
    }


def test(
    trainer: Trainer,
    module: DistillationModule,
    data: ImageDataModule,
    directory: RunDirectory,
    fitted: Mapping[str, Any],
    update_bn: bool,
) -> dict[str, Any]:
    """Test the weights of the last epoch, and those of the best.

    The best epoch was chosen on the validation images; the test images play no part in it.

    Args:
        trainer: that has trained the module.
        module: with the weights of the last epoch.
        data: the images.
        directory: where the confusion matrix goes.
        fitted: what `fit` returned.
        update_bn: as in `fit`; the best epoch was chosen without it, and is tested with it.
    """
    results = {}
    if fitted["best_epoch"] < fitted["epochs"]:
        last = {key: value.clone() for key, value in module.state_dict().items()}
        module.load_state_dict(_load(_best(trainer))["state_dict"])
        if update_bn and trained_batchnorms(module.student):
            reestimate(trainer, module, data, fitted["best_epoch"])
        trainer.test(module, data, verbose=False)
        results["test_accuracy_at_best"] = metric(trainer, "test/accuracy")
        module.load_state_dict(last)
    # The last epoch is the headline and is tested last, so that its pictures are what remains.
    trainer.test(module, data, verbose=False)
    results["test_accuracy"] = metric(trainer, "test/accuracy")
    names, counts = _columns(data.classes), module.confusion.compute().tolist()
    directory.write_table("confusion", [dict(zip(names, row, strict=True)) for row in counts])
    results.setdefault("test_accuracy_at_best", results["test_accuracy"])
    return results


def _columns(classes: Sequence[str]) -> list[str]:
    """Names of the classes that a table can have as columns: text, and each another."""
    names: dict[str, None] = {}
    for label, name in enumerate(classes):
        column = str(name).encode("utf-8", "backslashreplace").decode()
        while column in names:
            column = f"{column} (class {label})"
        names[column] = None
    return list(names)


def _best(trainer: Trainer) -> ModelCheckpoint:
    best = trainer.checkpoint_callback
    assert isinstance(best, ModelCheckpoint)
    return best


def _load(best: ModelCheckpoint) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(
        best.best_model_path, map_location="cpu", weights_only=True
    )
    return content


def metric(trainer: Trainer, name: str) -> float:
    """The last value of what was logged under a name."""
    return float(trainer.callback_metrics[name])
