"""The plan of a run: what was asked for, with every default, `auto` and null decided.

`resolve` makes it, once. Below that, nobody sees the configuration: each is given the part of the
plan that it needs.
"""

from dataclasses import dataclass
from pathlib import Path

from kd_lightning.config.nodes import Node
from kd_lightning.data.views import Normalization


@dataclass(frozen=True)
class TrainerPlan:
    """Lightning's Trainer and where it computes.

    Attributes:
        arguments: of Lightning's Trainer.
        precision: as Lightning calls it, such as ``bf16-mixed``.
        channels_last: the memory format of networks and images.
        processes: how many train together, over all nodes.
    """

    arguments: Node
    precision: str
    channels_last: bool
    processes: int


@dataclass(frozen=True)
class TrainingPlan:
    """How one network is trained: the student, or a teacher.

    Attributes:
        name: of the network.
        model: `_target_` node.
        terms: term name to its `_target_` node, each with a ``weight``.
        optimizer: `_target_` node.
        scheduler: `_target_` node; None keeps the learning rate constant.
        seed: of the initial weights and of what the network draws.
        trainer: where and how long.
        callbacks: name to `_target_` node.
        update_bn: whether BatchNorm's running statistics are re-estimated at the end.
        pictures: whether TensorBoard gets pictures.
    """

    name: str
    model: Node
    terms: dict[str, Node]
    optimizer: Node
    scheduler: Node | None
    seed: int
    trainer: TrainerPlan
    callbacks: dict[str, Node]
    update_bn: bool
    pictures: bool


@dataclass(frozen=True)
class CheckpointPlan:
    """The user's own weights of a teacher.

    Attributes:
        path: the file.
        rename_keys: prefixes of its keys to what replaces them.
        ignore_keys: patterns of keys that are left out.
        key: where in the file the weights are; None finds them.
    """

    path: Path
    rename_keys: dict[str, str]
    ignore_keys: tuple[str, ...]
    key: str | None


@dataclass(frozen=True)
class TeacherPlan:
    """The teacher of a run.

    Attributes:
        normalization: the one that it expects.
        training: how it is trained, unless there is a checkpoint.
        cutout: side of the grey square in its training views, in pixels.
        checkpoint: the user's own weights, if any.
        recipe: all of the configuration that its weights depend on.
    """

    normalization: Normalization
    training: TrainingPlan
    cutout: int
    checkpoint: CheckpointPlan | None
    recipe: Node

    @property
    def name(self) -> str:
        """Of the network."""
        return self.training.name

    @property
    def model(self) -> Node:
        """`_target_` node of the network."""
        return self.training.model


@dataclass(frozen=True)
class DataPlan:
    """The data set.

    Attributes:
        name: of the data set.
        node: `_target_` node of the data module.
        num_classes: number of classes.
        image_size: height and width of the images, in pixels.
        normalization: of the images that networks are given.
    """

    name: str
    node: Node
    num_classes: int
    image_size: int
    normalization: Normalization


@dataclass(frozen=True)
class CachePlan:
    """The cache of teacher outputs.

    Attributes:
        root: its folder.
        limit: bytes that it may use.
        dtype: that outputs on training views are rounded to.
    """

    root: Path
    limit: float
    dtype: str


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        name: of the run.
        setting: what runs share that may be compared.
        output_dir: the folder of all runs and teachers.
        method: name of the method.
        student: the student's training.
        teacher: None if no term of the method needs one.
        teacher_name: of the teacher in the configuration, needed or not.
        teacher_model: its `_target_` node.
        data: the data set.
        cache: None if nothing is stored.
        key: hash of all of the configuration that the result depends on.
        key_without_teacher: the same but for the teacher.
        baseline_key: the same but for teacher and method: runs that have it in common have the same
            baseline.
        config: the complete configuration, as `config.yaml` holds it.
    """

    name: str
    setting: str
    output_dir: Path
    method: str
    student: TrainingPlan
    teacher: TeacherPlan | None
    teacher_name: str
    teacher_model: Node
    data: DataPlan
    cache: CachePlan | None
    key: str
    key_without_teacher: str
    baseline_key: str
    config: Node
