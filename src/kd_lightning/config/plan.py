"""The plan of a run: its typed configuration, with the defaults that depend on hardware, data or
other settings resolved.

`resolve` creates it once; the code below it receives only the part of the plan that it needs. Nodes
with a `_target_` and arguments of Lightning's Trainer are passed on as they are.
"""

from dataclasses import dataclass
from pathlib import Path

from kd_lightning.config.nodes import Node
from kd_lightning.data.views import Normalization


@dataclass(frozen=True)
class TrainerPlan:
    """Arguments of Lightning's Trainer, and the resolved precision and devices.

    Attributes:
        arguments: keyword arguments of Lightning's Trainer.
        precision: Lightning's name, such as ``bf16-mixed``.
        channels_last: whether networks and images are channels-last in memory.
        processes: number of processes over all nodes (the world size).
    """

    arguments: Node
    precision: str
    channels_last: bool
    processes: int


@dataclass(frozen=True)
class TrainingPlan:
    """How one network, the student or a teacher, is trained.

    Attributes:
        name: name of the network.
        model: `_target_` node.
        terms: term name to its `_target_` node, each with a ``weight``.
        optimizer: `_target_` node.
        scheduler: `_target_` node; None keeps the learning rate constant.
        seed: seed of the initial weights and of random layers such as dropout.
        trainer: device, precision and duration.
        callbacks: name to `_target_` node.
        update_bn: whether BatchNorm's running statistics are re-estimated at the end.
        ema: decay of the moving average of the weights that is validated and kept; None: the
            weights themselves.
        pictures: whether figures are logged.
        loggers: name to `_target_` node.
        initial: weights that the training starts from; None: random.
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
    ema: float | None
    pictures: bool
    loggers: dict[str, Node]
    initial: "CheckpointPlan | PretrainedPlan | None" = None


@dataclass(frozen=True)
class CheckpointPlan:
    """A user-provided checkpoint.

    Attributes:
        path: the file.
        rename_keys: key prefixes to their replacements.
        ignore_keys: patterns of keys to skip.
        key: location of the state dict in the file; None: detected automatically.
        role: ``teacher`` or ``student``.
    """

    path: Path
    rename_keys: dict[str, str]
    ignore_keys: tuple[str, ...]
    key: str | None
    role: str = "teacher"

    @property
    def origin(self) -> str:
        """The key of the configuration and its value, for messages."""
        return f"{self.role}.checkpoint={self.path}"


@dataclass(frozen=True)
class PretrainedPlan:
    """The pretrained weights of a model by name.

    Attributes:
        role: ``teacher`` or ``student``.
    """

    role: str

    @property
    def origin(self) -> str:
        """The key of the configuration, for messages."""
        return f"{self.role}.pretrained"


@dataclass(frozen=True)
class TeacherPlan:
    """The teacher of a run.

    Attributes:
        normalization: of its input images.
        training: how it is trained, unless there are `weights`.
        cutout: side of the grey square in its training views, in pixels, unless `augmentation` is
            given.
        augmentation: `_target_` node that renders its training views; None: crops and flips as the
            data's, with its own cutout.
        mixing: `_target_` node that mixes its training views, or None.
        weights: checkpoint or pretrained weights that are used as they are, if any.
        outputs: packed file with its outputs, instead of weights, if any.
        decay: of the moving average of the student that is the teacher, instead of weights.
        recipe: the parts of the configuration that determine its weights.
        image_size: height and width that images are resized to; None: those of the data.
    """

    normalization: Normalization
    training: TrainingPlan
    cutout: int
    augmentation: Node | None
    mixing: Node | None
    weights: CheckpointPlan | PretrainedPlan | None
    recipe: Node
    outputs: Path | None = None
    decay: float | None = None
    image_size: int | None = None

    @property
    def name(self) -> str:
        """Name of the network."""
        return self.training.name

    @property
    def model(self) -> Node:
        """`_target_` node of the network."""
        return self.training.model

    @property
    def own_nodes(self) -> tuple[Node | None, ...]:
        """The nodes that may refer to user code or files on which the weights depend."""
        training = self.training
        views = (self.augmentation, self.mixing)
        return (self.model, training.optimizer, training.scheduler, *views)


@dataclass(frozen=True)
class DataPlan:
    """The data set.

    Attributes:
        name: name of the data set.
        node: `_target_` node of the data module.
        num_classes: number of classes.
        image_size: height and width of the images, in pixels.
        normalization: of the images that networks receive.
    """

    name: str
    node: Node
    num_classes: int
    image_size: int
    normalization: Normalization


@dataclass(frozen=True)
class CachePlan:
    """The teacher-output cache.

    Attributes:
        root: its folder.
        limit: maximum size, in bytes.
        dtype: storage dtype of outputs on training views.
    """

    root: Path
    limit: float
    dtype: str


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        name: name of the run.
        setting: identifier shared by runs that can be compared.
        output_dir: folder of all runs and teachers.
        method: name of the method.
        student: the student's training.
        teachers: the teacher, or the members of an ensemble; empty if no term needs one.
        member_terms: the method's terms for each of them, which may differ in their layers.
        average: how the predictions of an ensemble are averaged; see `Ensemble`.
        teacher_name: name of the configured teacher, whether needed or not.
        teacher_models: its `_target_` node, or those of the members.
        data: the data set.
        cache: None if nothing is cached.
        top_k: number of the teacher's logits that terms on logits read, cached or not; None: all;
            ``auto``: by the number of classes.
        key: hash of the parts of the configuration that determine the result.
        key_without_teacher: the same, excluding the teacher.
        baseline_key: the same, excluding teacher and method; runs with equal keys share a baseline.
        config: the complete configuration, as in `config.yaml`.
    """

    name: str
    setting: str
    output_dir: Path
    method: str
    student: TrainingPlan
    teachers: tuple[TeacherPlan, ...]
    member_terms: tuple[dict[str, Node], ...]
    average: str
    teacher_name: str
    teacher_models: tuple[Node, ...]
    data: DataPlan
    cache: CachePlan | None
    top_k: int | str | None
    key: str
    key_without_teacher: str
    baseline_key: str
    config: Node
