"""Construction of Lightning's Trainer, for students and teachers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar as LightningProgressBar

from kd_lightning.config.hardware import keep_freed_memory
from kd_lightning.config.nodes import Node, build_partial
from kd_lightning.config.plan import TrainerPlan
from kd_lightning.engine.callbacks.buffers import SameBuffers
from kd_lightning.engine.callbacks.caching import FlushCaches
from kd_lightning.engine.callbacks.curves import Curves
from kd_lightning.engine.callbacks.divergence import StopWhenDiverged
from kd_lightning.engine.callbacks.history import History
from kd_lightning.engine.callbacks.pictures import Pictures
from kd_lightning.engine.callbacks.plateau import StepOnPlateau
from kd_lightning.engine.callbacks.progress import ProgressBar
from kd_lightning.engine.callbacks.resuming import ExactResume
from kd_lightning.engine.callbacks.speed import Speed
from kd_lightning.engine.callbacks.stopping import StopWhenAsked
from kd_lightning.engine.checkpointing import AtomicCheckpoints, MovableCheckpoints
from kd_lightning.engine.loggers import TENSORBOARD, build_loggers, shows_images
from kd_lightning.engine.worker import cluster_environment
from kd_lightning.errors import InputError
from kd_lightning.storage.run_directory import LAST, Checkpoint


def build_trainer(
    plan: TrainerPlan,
    folder: Path,
    name: str,
    resume: Checkpoint | None = None,
    callbacks: Sequence[Callback] = (),
    pictures: bool = True,
    loggers: Mapping[str, Node] = TENSORBOARD,
) -> Trainer:
    """Build Lightning's Trainer with logging, checkpoints and progress display.

    Args:
        plan: arguments of Lightning's Trainer, and the resolved precision and devices.
        folder: where logs and checkpoints are written.
        name: human-readable name of the training.
        resume: checkpoint to resume from; what was logged later is dropped, where possible.
        callbacks: additional callbacks.
        pictures: whether figures are logged.
        loggers: name to `_target_` node.
    """
    checkpoints = folder / "checkpoints"
    own_bar = any(isinstance(callback, LightningProgressBar) for callback in callbacks)
    log_to = build_loggers(loggers, folder, name, resume)
    fixed = {
        "precision": plan.precision,
        "default_root_dir": str(folder),
        "logger": log_to,
        "plugins": [AtomicCheckpoints(), cluster_environment()],
        "callbacks": [
            MovableCheckpoints(
                checkpoints, "best", monitor="val/accuracy", mode="max",
                save_weights_only=True, enable_version_counter=False,
            ),
            MovableCheckpoints(
                checkpoints, "last", save_on_train_epoch_end=True, enable_version_counter=False
            ),
            # The order matters at the end of an epoch.
            StopWhenDiverged(),
            FlushCaches(),
            Speed(),
            History(),
            StepOnPlateau(),
            Curves(),
            *([Pictures()] if pictures and shows_images(log_to) else []),
            *([] if own_bar else [ProgressBar(name)]),
            *callbacks,
            SameBuffers(),
            ExactResume(),
            # Last: the checkpoint that it saves within an epoch contains the step of all others.
            StopWhenAsked(name, checkpoints / LAST),
        ],
        "enable_progress_bar": own_bar,
        "enable_model_summary": False,
        # The sampler shards and shuffles itself; the networks are checked before training.
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        # Tensors that a model creates and keeps during validation must be usable in training.
        "inference_mode": False,
    }  # fmt: skip
    settings = plan.arguments
    if settings.get("fast_dev_run"):
        raise InputError(
            "trainer.fast_dev_run leaves nothing to report; for a quick test use "
            "trainer.max_epochs=1 +trainer.limit_train_batches=5"
        )
    for part in ("train", "val", "test"):
        if settings.get(f"limit_{part}_batches") in (0, 0.0):
            raise InputError(f"trainer.limit_{part}_batches=0 leaves nothing to report")
    if "logger" in settings:
        raise InputError("trainer.logger cannot be set: choose loggers with logger=NAME instead")
    for key in fixed.keys() - {"precision"}:
        if key in settings:
            raise InputError(f"trainer.{key} cannot be set: this project sets it itself")
    keep_freed_memory()
    try:
        return build_partial(settings, "trainer")(**fixed)
    except MisconfigurationException as error:
        raise InputError(f"trainer: {str(error).splitlines()[0]}") from error


def try_trainer(plan: TrainerPlan) -> None:
    """Build a single-process trainer, to detect invalid arguments before anything is written.

    Raises:
        InputError: Lightning rejects an argument, or it cannot be set here.
    """
    alone = {**plan.arguments, "devices": 1, "num_nodes": 1, "strategy": "auto"}
    single = TrainerPlan(alone, plan.precision, plan.channels_last, 1)
    build_trainer(single, Path("unused"), "", loggers={})
