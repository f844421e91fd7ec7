"""The Lightning module: a trainable student, a frozen teacher, and the loss terms."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
from torch.nn import ModuleDict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from kd_lightning.config.nodes import Node, build, without
from kd_lightning.config.trust import check_arguments
from kd_lightning.data.loading import Batch, Shown
from kd_lightning.distill import metrics
from kd_lightning.distill.batchnorm import min_batch_size
from kd_lightning.distill.calibration import RecordedLogits
from kd_lightning.distill.ensemble import Ensemble, PerMember, members_of
from kd_lightning.distill.gathering import gather
from kd_lightning.distill.optimizers import build_optimizer
from kd_lightning.distill.quality import Quality
from kd_lightning.distill.schedulers import build_schedule
from kd_lightning.distill.targets import TeacherTargets
from kd_lightning.distill.teacher import Teacher
from kd_lightning.errors import InputError
from kd_lightning.losses import Context, Reads, Targets, Term, TermBatch
from kd_lightning.models.features import FeatureReader, LayerShapes, layer_shapes
from kd_lightning.models.outputs import find_logits
from kd_lightning.models.preparing import cannot_take, materialize, to_memory_format
from kd_lightning.models.shapes import Shapes
from kd_lightning.storage.teacher_cache import TeacherCache

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class DistillationModule(LightningModule):
    """Trains a student on a weighted sum of terms; without a teacher, plain supervised training.

    It implements training, validation and test steps; everything else is a callback
    (`kd_lightning.engine.callbacks`).

    Its hyper-parameters are plain dictionaries of primitives, from which the objects are built
    here, so that Lightning can save, load and resume with ``weights_only=True``.

    Args:
        student: `_target_` node of the student's model.
        terms: term name to its `_target_` node, each with a `weight`.
        optimizer: `_target_` node; called with the parameters of the student and of the terms.
        scheduler: `_target_` node; see `schedulers.build_schedule`. None keeps the learning rate
            constant.
        num_classes: number of classes.
        image_size: height and width of the images, in pixels.
        channels_last: memory format of student and teacher.
        train_size: number of training and validation images, for terms that need it.
        teacher: required if a term needs one; neither a hyper-parameter nor saved.
        member_terms: `terms` for each member of an ensemble, if they differ; not saved either.

    Attributes:
        step_losses: unweighted loss of every term in the current step, detached float32 scalars.
        min_batch_size: minimum batch size of a process.
        cache: cache of teacher outputs on training views, if any.
        evaluation_cache: cache of teacher logits on unaugmented images, if any, by member number.
        initial_sha256: hash of the weights that the student starts from, if any.

    Raises:
        InputError: a node cannot be built, or a term does not fit the two networks.
    """

    initial_sha256 = ""

    def __init__(
        self,
        student: Node,
        terms: dict[str, Node],
        optimizer: Node,
        scheduler: Node | None,
        num_classes: int,
        image_size: int,
        channels_last: bool = True,
        train_size: int = 0,
        teacher: Teacher | None = None,
        member_terms: Sequence[dict[str, Node]] = (),
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["teacher", "member_terms"])
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.student = build(student, "student.model")
        materialize(self.student, image_size, "student.model")
        to_memory_format(self.student, self.memory_format)
        self.num_classes = num_classes
        self.optimizer_node, self.scheduler_node = optimizer, scheduler
        self.term_weights = {name: float(node["weight"]) for name, node in terms.items()}
        # Registered as submodules, so that parameters of a term (e.g. a projector) are trained.
        self.terms = ModuleDict(
            {name: self._build_term(name, node) for name, node in terms.items()}
        )
        self._member_terms = member_terms or [terms] * len(members_of(teacher))
        self.teacher = teacher
        self.cache: TeacherCache | None = None
        self.evaluation_cache: TeacherCache | None = None
        self._set_up_terms(num_classes, image_size, train_size)
        self.train_metrics = metrics.train_metrics(num_classes)
        self.val_metrics = metrics.val_metrics(num_classes)
        self.test_metrics = metrics.test_metrics(num_classes)
        self.val_logits, self.quality = RecordedLogits(), Quality(num_classes)
        self.confusion = metrics.confusion_matrix(num_classes)
        self.teacher_accuracy = metrics.accuracy(num_classes)
        self.agreement = metrics.accuracy(num_classes)
        self.step_losses: dict[str, Tensor] = {}

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *args: Any, trust: Iterable[str] = (), **kwargs: Any
    ) -> "DistillationModule":
        """Like Lightning's method, but safe with untrusted files: it cannot run arbitrary code.

        As in Lightning, the module is in training mode; call `eval` before predicting without a
        Trainer.

        Args:
            checkpoint_path: the file.
            args: see Lightning.
            trust: your own packages that the checkpoint may import; see `check_trusted`.
            kwargs: arguments not stored in the checkpoint: the ``teacher``; not ``hparams_file``.

        Raises:
            InputError: the checkpoint refers to untrusted code.
        """
        content = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        check_arguments(content, trust, *args, **kwargs)
        kwargs["weights_only"] = True
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def _set_up_terms(self, num_classes: int, image_size: int, train_size: int) -> None:
        """Set up every term, and the extraction of the layers that the terms read."""
        student = self._shapes(partial(layer_shapes, self.student), "student", image_size)
        self.min_batch_size = min_batch_size(self.student, student)
        members: list[Shapes] = []
        if any(term.needs_teacher for term in self._terms.values()):
            if self.teacher is None:
                raise InputError("this method learns from a teacher, but none was given")
            members = [
                self._shapes(member.shapes, "teacher", image_size)
                for member in members_of(self.teacher)
            ]
        contexts = [Context(student, shapes, num_classes, train_size) for shapes in members or [{}]]
        self._student_layers: dict[str, str] = {}
        layers: list[dict[str, str]] = [{} for _ in members_of(self.teacher)]
        logits = [False] * len(layers)
        for name, term in list(self._terms.items()):
            try:
                reads = self._set_up(name, term, contexts)
                for number, context in enumerate(contexts):
                    read = reads[number % len(reads)]
                    self._student_layers |= read.of_student(context)
                    if term.needs_teacher:
                        layers[number] |= read.of_teacher(context)
                        logits[number] |= read.teacher_logits
            except ValueError as error:
                raise InputError(f"method.terms.{name}: {error}") from error
        every = dict.fromkeys(self._student_layers.values())
        self._read_student = FeatureReader(self.student, every, num_classes=num_classes)
        if self.teacher is not None:
            learning = {name: t for name, t in self._terms.items() if t.needs_teacher}
            self._targets = TeacherTargets(self.teacher, learning, num_classes, layers)
            for member, own, wanted in zip(members_of(self.teacher), layers, logits, strict=True):
                member.read(dict.fromkeys(own.values()), wanted, num_classes)

    def _set_up(self, name: str, term: Term, contexts: Sequence[Context]) -> list[Reads]:
        """Set up a term; what it reads, of each member of an ensemble if it reads features."""
        if term.needs_teacher and isinstance(self.teacher, Ensemble):
            copies = PerMember([self._build_term(name, node[name]) for node in self._member_terms])
            found = copies.setup_members(contexts)
            if any(read.teacher for read in found):
                self.terms[name] = copies
                return found
        return [term.setup(contexts[0])]

    @staticmethod
    def _build_term(name: str, node: Node) -> Term:
        return cast(Term, build(without(node, "weight"), f"method.terms.{name}"))

    @property
    def _terms(self) -> dict[str, Term]:
        return cast(dict[str, Term], self.terms)

    def _shapes(
        self, find: Callable[[int], LayerShapes], role: str, image_size: int
    ) -> LayerShapes:
        try:
            shapes = find(image_size)
        except Exception as error:
            raise InputError(cannot_take(f"{role}.model", image_size, error)) from error
        find_logits(shapes.output, self.num_classes, f"{role}.model")
        return shapes

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the student's logits (B, C)."""
        output = self.student(images.contiguous(memory_format=self.memory_format))
        return find_logits(output, self.num_classes)

    def losses(self, batch: Batch, progress: float = 0.0) -> tuple[dict[str, Tensor], Tensor]:
        """The unweighted loss of every term, float32 scalars, and the student's logits (B, C).

        Args:
            batch: a batch of training views.
            progress: completed fraction of the training, in [0, 1].
        """
        images = batch["images"].contiguous(memory_format=self.memory_format)
        targets = self.targets(batch) if self.teacher is not None else {}
        output = self._read_student(images).named(self._student_layers)
        shown: Shown = batch["shown"]
        own = TermBatch(
            batch["labels"], shown.index, shown.view, progress,
            batch.get("partner_labels"), batch.get("ratio"),
        )  # fmt: skip
        losses = {
            name: term(output, targets.get(name), own)
            for name, term in self._terms.items()
            if not self._gathers(term)
        }
        if len(losses) < len(self.terms):
            whole = gather(output, targets, own, len(output.logits) if batch["loss_weight"] else 0)
            losses |= {
                name: term(whole[0], whole[1].get(name), whole[2])
                for name, term in self._terms.items()
                if self._gathers(term)
            }
        return {name: losses[name] for name in self._terms}, output.logits

    def _gathers(self, term: Term) -> bool:
        """Whether a term receives the batches of all processes."""
        return term.relational and self._trainer is not None and self.trainer.world_size > 1

    def targets(self, batch: Batch) -> dict[str, Targets]:
        """The teacher's targets for every term, from the cache or computed."""
        flat = self._fetch(self.cache, batch, lambda: self.ask_teacher(batch["images"]))
        return self._targets.of_terms(flat)

    @staticmethod
    def _fetch(
        cache: TeacherCache | None, batch: Batch, compute: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        if cache is None:
            return compute()
        shown: Shown = batch["shown"]
        return cache.fetch(shown.index, shown.view, batch["images"].device, compute)

    def target_parts(self) -> dict[str, tuple[int, Term]]:
        """The targets that can be cached; see `TeacherTargets.parts`."""
        return self._targets.parts()

    def reduce_logits(self, top_k: int | None) -> None:
        """Keep only the largest logits of the teacher's output; see `distill.top_k`."""
        self._targets.top_k = top_k

    def is_reduced(self, name: str) -> bool:
        """Whether a target consists of the largest logits only."""
        return self._targets.is_reduced(name)

    def ask_teacher(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the targets for images (B, 3, H, W); see `TeacherTargets.ask`."""
        return self._targets.ask(images.contiguous(memory_format=self.memory_format))

    def ask_logits(self, images: Tensor) -> dict[str, Tensor]:
        """The logits (B, C), float32, of each member for images (B, 3, H, W), by its number."""
        members = members_of(self.teacher)
        return {str(number): member(images).float() for number, member in enumerate(members)}

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Return the weighted sum of all terms as ``loss``, and ``losses`` for `Curves`."""
        total_steps = float(self.trainer.estimated_stepping_batches)
        losses, logits = self.losses(batch, min(1.0, self.global_step / total_steps))
        weighted = {name: self.term_weights[name] * value for name, value in losses.items()}
        loss = torch.stack([*weighted.values()]).sum()
        if batch["loss_weight"]:
            self.train_metrics.update(logits, metrics.largest_labels(batch))
        self.step_losses = {name: value.detach() for name, value in losses.items()}
        shown = {"loss/total": loss.detach()}
        for name in losses:
            shown[f"loss/{name}"] = self.step_losses[name]
            shown[f"loss_weighted/{name}"] = weighted[name].detach()
        return {"loss": self._of_this_process(loss, weighted, batch), "losses": shown}

    def _of_this_process(
        self, loss: Tensor, weighted: Mapping[str, Tensor], batch: Batch
    ) -> Tensor:
        """The loss whose gradients, averaged over processes, equal those of the whole batch."""
        if self.trainer.world_size == 1:
            return loss
        # A relational term is already computed on the whole batch.
        whole = [value for name, value in weighted.items() if self._gathers(self._terms[name])]
        if not whole:
            return loss * batch["loss_weight"]
        gathered = torch.stack(whole).sum()
        return (loss - gathered) * batch["loss_weight"] + gathered

    def on_train_epoch_start(self) -> None:
        """Reset the training metrics."""
        self.train_metrics.reset()

    def on_train_epoch_end(self) -> None:
        """Log the accuracy on the training views of the epoch."""
        self.log_dict(self.train_metrics)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate the student and, outside of training, the teacher."""
        logits = self(batch["images"])
        if batch["loss_weight"]:
            self.val_metrics.update(logits, batch["labels"])
        self.val_logits.update(logits, batch["labels"], batch["loss_weight"] > 0)
        self.log_dict(self.val_metrics)
        if self.trainer.state.fn != TrainerFn.FITTING and self.teacher is not None:
            self._score_teacher(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Evaluate student and teacher, and the agreement of their predictions."""
        logits = self(batch["images"])
        if batch["loss_weight"]:
            self.test_metrics.update(logits, batch["labels"])
            self.confusion.update(logits, batch["labels"])
            self.quality.update(logits, batch["labels"])
        self.log_dict(self.test_metrics)
        if self.teacher is not None:
            teacher = self._score_teacher(batch, "test")
            if batch["loss_weight"]:
                self.agreement.update(logits, teacher.argmax(dim=1))
            self.log("test/agreement", self.agreement)
            self.quality.compare(logits, teacher, batch["labels"], batch["loss_weight"] > 0)

    def _score_teacher(self, batch: Batch, part: str) -> Tensor:
        images = batch["images"].contiguous(memory_format=self.memory_format)
        parts = self._fetch(self.evaluation_cache, batch, lambda: self.ask_logits(images))
        logits = [parts[str(number)] for number in range(len(parts))]
        whole = self.teacher.combine(logits) if isinstance(self.teacher, Ensemble) else logits[0]
        if batch["loss_weight"]:
            self.teacher_accuracy.update(whole, batch["labels"])
        self.log(f"{part}/teacher_accuracy", self.teacher_accuracy)
        return whole

    def on_fit_start(self) -> None:
        """Let the terms begin, and move the teacher to the student's device."""
        for term in self._terms.values():
            term.begin()
        self._place_teacher()

    def on_validation_start(self) -> None:
        """Move the teacher to the student's device and reset the metrics."""
        self._place_teacher()
        self.val_metrics.reset()  # they may be inference tensors from an earlier validation
        self.val_logits.reset()

    def on_test_start(self) -> None:
        """Move the teacher to the student's device and reset the metrics."""
        self._place_teacher()
        self.confusion.reset()
        self.quality.reset()

    def _place_teacher(self) -> None:
        if self.teacher is not None:
            dtype = AUTOCAST.get(str(self.trainer.precision))
            self.teacher.prepare(self.device, self.memory_format, dtype)

    def configure_optimizers(self) -> Any:
        """The optimizer of the student's and terms' parameters, and its scheduler."""
        precision = str(self.trainer.precision)
        optimizer = build_optimizer(self.optimizer_node, self.parameters(), precision)
        if self.scheduler_node is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = build_schedule(self.scheduler_node, optimizer, steps)
        # Lightning steps `ReduceLROnPlateau` after the epoch's checkpoint, so that a resumed
        # training would miss the step. The callback `StepOnPlateau` steps it before.
        settings = schedule._asdict()
        if isinstance(schedule.scheduler, ReduceLROnPlateau):
            settings |= {"reduce_on_plateau": False, "frequency": sys.maxsize}
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Like Lightning's method, but also with fused optimizers, unless gradients are scaled."""
        if str(self.trainer.precision) == "16-mixed":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        kind = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        # Bypass the check of MixedPrecision, which only matters for scaled gradients.
        plugin = self.trainer.precision_plugin
        Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, kind)
