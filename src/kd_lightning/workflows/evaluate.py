"""Evaluation of a finished run from its files."""

import logging
from collections.abc import Iterable
from pathlib import Path

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Trainer

from kd_lightning.config.checks import of_one_process
from kd_lightning.config.hardware import is_available
from kd_lightning.config.nodes import build
from kd_lightning.config.resolve import SUPERVISED, resolve_trainer
from kd_lightning.config.stored import student_data, student_model
from kd_lightning.config.trust import check_trusted
from kd_lightning.data.module import ImageDataModule
from kd_lightning.distill.module import DistillationModule
from kd_lightning.engine.quiet import quiet_lightning
from kd_lightning.errors import InputError
from kd_lightning.models.preparing import takes_channels_last
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.weights import load_weights

log = logging.getLogger(__name__)


def evaluate(
    run_dir: str | Path, data_root: str | None = None, trust: Iterable[str] = ()
) -> dict[str, float]:
    """Load the student of a run from its folder and test it.

    Args:
        run_dir: folder of the run.
        data_root: new location of the images, if they have moved.
        trust: your own packages that the run may import; see `config.trust.check_trusted`.

    Returns:
        ``accuracy`` on the test set, and ``recorded``, the accuracy that the run reported.

    Raises:
        InputError: the folder does not contain a finished run, a file in it is damaged or refers to
            untrusted code, or the images are missing.
    """
    quiet_lightning()
    directory = RunDirectory(run_dir)
    config, metrics = directory.read_config(), directory.read_metrics()
    if metrics.get("status") != "finished":
        raise InputError(f"{run_dir} contains no finished run (status: {metrics.get('status')})")
    recorded = metrics.get("test_accuracy")
    if not isinstance(recorded, float):
        raise InputError(
            f"{run_dir} contains a run that was never tested, such as those of a search"
        )
    for path, node in (("student.model", student_model(config)), ("data", student_data(config))):
        check_trusted(node, path, trust)
    if data_root is not None:
        config["data"]["root"] = data_root
    settings = of_one_process(config["trainer"])
    if not is_available(settings["accelerator"]):
        settings["accelerator"] = "auto"  # trained on other hardware
    # The original test precision, unless the hardware differs.
    plan = resolve_trainer(settings, student_model(config))
    size = config["data"]["image_size"]
    student, _ = directory.load_student(trust)
    module = DistillationModule(
        student=student_model(config),
        terms=SUPERVISED,
        optimizer=config["optimizer"],
        scheduler=None,
        num_classes=config["data"]["num_classes"],
        image_size=size,
        channels_last=plan.channels_last and takes_channels_last(student, size),
    )
    load_weights(module.student, directory.path / "student.safetensors")
    data: ImageDataModule = build(student_data(config), "data")
    trainer = Trainer(
        accelerator=settings["accelerator"],
        devices=1,
        limit_test_batches=settings.get("limit_test_batches"),
        precision=plan.precision,  # type: ignore[arg-type]
        plugins=[LightningEnvironment()],  # ignore a cluster's environment variables
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.test(module, data, verbose=False)
    if metrics.get("images_sha256", data.fingerprint()) != data.fingerprint():
        log.warning("the images differ from those that the run was trained and tested on")
    return {
        "accuracy": float(trainer.callback_metrics["test/accuracy"]),
        "recorded": recorded,
    }
