"""Python API: run trainings, and use trained students, from notebooks and programs.

    from kd_lightning import api

    metrics = api.run("experiment=demo", "method=logit")
    student = api.load_student(metrics["folder"])
    student.predict(["one.png", "two.png"])

See docs/shipping.md.
"""

from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from kd_lightning.config import naming, overrides
from kd_lightning.config.checks import check_sections
from kd_lightning.config.commandline import check_overrides, composition_error
from kd_lightning.config.complete import plain
from kd_lightning.config.nodes import Node
from kd_lightning.config.tree import tree_folder
from kd_lightning.engine.quiet import quiet_lightning
from kd_lightning.errors import InputError
from kd_lightning.inference.loading import load_student
from kd_lightning.inference.student import Student
from kd_lightning.reports.runs import read_runs
from kd_lightning.workflows import student as workflow
from kd_lightning.workflows.earlier import check_earlier_runs, train_earlier_runs
from kd_lightning.workflows.evaluate import evaluate
from kd_lightning.workflows.export import Exported, export
from kd_lightning.workflows.predict import Prediction, find_images, predict_files

__all__ = [
    "Exported",
    "Prediction",
    "Student",
    "compose",
    "evaluate",
    "export",
    "find_images",
    "load_student",
    "predict_files",
    "read_results",
    "run",
]


def compose(*arguments: str, train_earlier: bool = False) -> Node:
    """Compose the complete configuration of a command, as `train.py` does, but without training.

    `run` completes it: with the number of classes of an image folder, for instance, and the name of
    the setting that follows from it.

    Args:
        arguments: command-line overrides: ``method=logit``, ``optimizer.lr=0.05``.
        train_earlier: train the runs that are named as teachers by `teacher.run`, unless they are
            finished.

    Returns:
        A dictionary of dictionaries.

    Raises:
        InputError: an override cannot be parsed, its key or choice does not exist, or the run that
            is the teacher is not finished.
    """
    naming.register()
    overrides.install()
    given = check_overrides(arguments)
    with initialize_config_dir(tree_folder(), version_base="1.3"):
        # The `name` resolver needs HydraConfig, which `hydra.compose` does not set.
        try:
            composed = hydra_compose("train", given)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
            raise InputError(composition_error(error)) from error
        if train_earlier:
            train_earlier_runs(composed, given)
        else:
            check_earlier_runs(composed, given)
        config = plain(composed, given)
    if not any(argument.startswith("name=") for argument in given):
        config["name"] += naming.variant(given)
    check_sections(config)
    return config


def run(*arguments: str) -> dict[str, Any]:
    """Train and test one student, as ``train.py`` with the same overrides; see docs/shipping.md.

    A finished run is not repeated, an interrupted one is resumed. Nothing is printed except the
    progress, on standard error.

    Args:
        arguments: command-line overrides.

    Returns:
        The contents of `metrics.json`, plus the run's ``folder``.

    Raises:
        InputError: the configuration, the data or a file is invalid.
        RunError: the training failed.
    """
    quiet_lightning()
    config = compose(*arguments, train_earlier=True)
    folder = Path(config["output_dir"]) / "runs" / config["setting"] / config["name"]
    metrics = workflow.run(config, folder)
    return {"folder": str(folder), **metrics}


def read_results(*sources: str | Path) -> pd.DataFrame:
    """Read runs, finished or not, into a table with one row per run.

    Args:
        sources: folders that contain runs, such as ``outputs/runs``, or tables (`results.csv`).

    Returns:
        The columns of `results.csv` (see `results.FIGURES`), and one for each setting that differs
        between the runs. Accuracies are fractions.

    Raises:
        InputError: a source does not exist or is not a table of runs.
    """
    for source in sources:
        if not Path(source).exists():
            raise InputError(f"{source} does not exist")
    return read_runs(sources)
