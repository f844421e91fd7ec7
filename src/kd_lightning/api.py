"""Python API: run trainings and load trained students from notebooks and programs.

from kd_lightning import api

metrics = api.run("experiment=demo", "method=logit")
student = api.load_student(metrics["folder"])
student.predict(["one.png", "two.png"])
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from torch import Tensor, nn

from kd_lightning.config import naming, overrides
from kd_lightning.config.checks import check_sections
from kd_lightning.config.commandline import check_overrides
from kd_lightning.config.complete import plain
from kd_lightning.config.nodes import Node
from kd_lightning.config.stored import student_data
from kd_lightning.config.tree import tree_folder
from kd_lightning.data.decoding import RESIZE, read_image
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import student as workflow
from kd_lightning.workflows.earlier import train_earlier_runs


def compose(*arguments: str) -> Node:
    """Compose the complete configuration of a command, exactly as `train.py` does.

    Args:
        arguments: command-line overrides: ``method=logit``, ``optimizer.lr=0.05``.

    Raises:
        InputError: an override cannot be parsed, or its key or choice does not exist.
    """
    naming.register()
    overrides.install()
    given = check_overrides(arguments)
    with initialize_config_dir(tree_folder(), version_base="1.3"):
        # The `name` resolver needs HydraConfig, which `hydra.compose` does not set.
        composed = hydra_compose("train", given)
        train_earlier_runs(composed, given)
        config = plain(composed, given)
    if not any(argument.startswith("name=") for argument in given):
        config["name"] += naming.variant(given)
    check_sections(config)
    return config


def run(*arguments: str) -> dict[str, Any]:
    """Train and test one student; see `workflows.student.run`.

    Returns:
        The contents of `metrics.json`, plus the run's ``folder``.
    """
    config = compose(*arguments)
    folder = Path(config["output_dir"]) / "runs" / config["setting"] / config["name"]
    metrics = workflow.run(config, folder)
    return {"folder": str(folder), **metrics}


@dataclass(frozen=True)
class Student:
    """A trained student with everything needed for inference.

    Attributes:
        model: in evaluation mode; images (B, 3, H, W), normalised, to logits (B, C).
        classes: class names, in the order of the logits; empty if the run does not store them.
        image_size: input height and width, in pixels.
        mean: per-channel mean of pixel values scaled to [0, 1].
        std: per-channel standard deviation.
        config: the run's configuration.
        resize: how image files are made square, as in training; see `decoding.to_square`.
    """

    model: nn.Module
    classes: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    config: Node
    resize: str = "squash"

    def preprocess(self, images: Sequence[str | Path] | Tensor) -> Tensor:
        """Turn image files, or pixels (B, 3, H, W) in [0, 1], into model input.

        Raises:
            InputError: a file is not a readable image.
        """
        if not isinstance(images, Tensor):
            pixels = np.stack(
                [read_image(Path(path), self.image_size, self.resize) for path in images]
            )
            images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return (images.float() - mean) / std

    @torch.no_grad()
    def probabilities(self, images: Sequence[str | Path] | Tensor) -> Tensor:
        """Image files, or pixels (B, 3, H, W) in [0, 1], to probabilities (B, C)."""
        return torch.softmax(self.model(self.preprocess(images)).float(), dim=1)

    def predict(self, images: Sequence[str | Path] | Tensor) -> list[str]:
        """The most probable class of each image: its name, or its index if names are unknown."""
        labels = self.probabilities(images).argmax(dim=1).tolist()
        return [self.classes[label] if self.classes else str(label) for label in labels]


def load_student(run_dir: str | Path, trust: Iterable[str] = ()) -> Student:
    """Load a run's student from its run folder.

    Args:
        run_dir: folder of the run.
        trust: your own packages that the run may import; see `config.trust.check_trusted`.

    Raises:
        InputError: a file is missing or damaged, or refers to untrusted code.
    """
    directory = RunDirectory(run_dir)
    model, config = directory.load_student(trust)
    data = student_data(config)
    return Student(
        model=model,
        classes=tuple(directory.read_metrics().get("class_names", ())),
        image_size=data["image_size"],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        config=config,
        resize=data["resize"] if data.get("resize") in RESIZE else "squash",
    )
