"""The one Lightning module: a trainable student, a frozen teacher, and the terms between them."""

import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
from torch.nn import ModuleDict, Parameter
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from kd_lightning.config import Node, build, build_partial, without
from kd_lightning.data.loading import Batch
from kd_lightning.errors import InputError, RunError
from kd_lightning.frozen import FrozenTeacher
from kd_lightning.losses import Term
from kd_lightning.losses.term import Shapes
from kd_lightning.memory import Ask, Memory
from kd_lightning.models.features import FeatureReader, LayerShapes, layer_shapes
from kd_lightning.models.outputs import find_logits
from kd_lightning.models.preparing import cannot_take, materialize, to_memory_format
from kd_lightning.runs import check_trusted

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
VALIDATION = ("val_accuracy", "val_loss")
PROGRESS = ("images_trained", "training_seconds", "fit_seconds", "history")
FUSED = ("torch.optim.SGD", "torch.optim.Adam", "torch.optim.AdamW")


class DistillationModule(LightningModule):
    """Trains a student by a weighted sum of terms; without a teacher, plain supervised training.

    Its hyper-parameters are plain dictionaries of primitives, and the objects are built from them
    here: that is what lets Lightning save, load and resume with ``weights_only=True``.

    Args:
        student: `_target_` node of the student's model.
        terms: term name to its `_target_` node, each with a `weight`.
        optimizer: `_target_` node; called with the parameters of the student and of the terms.
        scheduler: `_target_` node; called with the optimizer and ``total_steps``, and stepped
            after every batch. None keeps the learning rate constant.
        num_classes: number of classes.
        image_size: height and width of the images, in pixels.
        channels_last: memory format of student and teacher.
        teacher: needed if a term needs one; neither a hyper-parameter nor saved.

    Attributes:
        history: a row an epoch: accuracy on the training views, on validation, speed.
        images_trained, training_seconds: what the speed of the whole training follows from.
        fit_seconds: until the last epoch's end, validation and all; an interrupted training counts.
        memory: what the teacher has said of training views before, if that is kept.
        evaluation_memory: its logits of images as they are, ``logits``, if they are kept.

    Raises:
        InputError: a node cannot be built, or a term cannot work between the two networks.
    """

    def __init__(
        self,
        student: Node,
        terms: dict[str, Node],
        optimizer: Node,
        scheduler: Node | None,
        num_classes: int,
        image_size: int,
        channels_last: bool = True,
        teacher: FrozenTeacher | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["teacher"], logger=False)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.student = build(student, "student.model")
        materialize(self.student, image_size, "student.model")
        to_memory_format(self.student, self.memory_format)
        self.num_classes = num_classes
        self.optimizer_node, self.scheduler_node = optimizer, scheduler
        self.weights = {name: float(node["weight"]) for name, node in terms.items()}
        # Registered, so that a term that has parameters of its own (a regressor, say) is trained.
        self.terms = ModuleDict(
            {
                name: build(without(node, "weight"), f"method.terms.{name}")
                for name, node in terms.items()
            }
        )
        self.teacher = teacher
        self.memory: Memory | None = None
        self.evaluation_memory: Memory | None = None
        self._connect(num_classes, image_size)
        accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)
        self.train_accuracy = accuracy.clone()
        self.accuracy = accuracy.clone()
        self.teacher_accuracy = accuracy.clone()
        self.agreement = accuracy.clone()
        # Not a plain number, whose mean over processes Lightning rounds to whole images.
        self.val_loss = MeanMetric()
        self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)
        self.validated_at = -1  # the step
        self.images_trained, self.training_seconds, self.fit_seconds = 0, 0.0, 0.0
        self.history: list[dict[str, float]] = []
        self._clock_began, self._clock_images = time.perf_counter(), 0
        self._epoch_began = self._clock_began

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *args: Any, trust: Iterable[str] = (), **kwargs: Any
    ) -> "DistillationModule":
        """As Lightning's, but a file of a stranger's cannot run code.

        Args:
            checkpoint_path: the file.
            args: see Lightning.
            trust: packages of one's own that the checkpoint may name; see `runs.check_trusted`.
            kwargs: what the checkpoint does not hold: the ``teacher``.

        Raises:
            InputError: the checkpoint names code that is not trusted.
        """
        content = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        check_trusted(content.get("hyper_parameters", {}), "hyper_parameters", trust)
        kwargs["weights_only"] = True
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def _connect(self, num_classes: int, image_size: int) -> None:
        """Show every term both networks, and set up the reading of the layers they ask for."""
        student = self._shapes(self.student, "student", num_classes, image_size)
        teacher: Shapes = {}
        terms = cast(dict[str, Term], self.terms)
        if any(term.needs_teacher for term in terms.values()):
            if self.teacher is None:
                raise InputError("this method learns from a teacher, but none was given")
            teacher = self._shapes(self.teacher.model, "teacher", num_classes, image_size)
        for name, term in terms.items():
            try:
                term.connect(student, teacher)
            except ValueError as error:
                raise InputError(f"method.terms.{name}: {error}") from error
        read = dict.fromkeys(layer for term in terms.values() for layer in term.student_reads)
        self._read_student = FeatureReader(self.student, read, num_classes=num_classes)
        if self.teacher is not None:
            read = dict.fromkeys(layer for term in terms.values() for layer in term.teacher_reads)
            logits = any(term.needs_teacher and term.needs_logits for term in terms.values())
            self.teacher.read(read, logits, num_classes)

    @staticmethod
    def _shapes(
        model: torch.nn.Module, role: str, num_classes: int, image_size: int
    ) -> LayerShapes:
        try:
            shapes = layer_shapes(model, image_size)
        except Exception as error:
            raise InputError(cannot_take(f"{role}.model", image_size, error)) from error
        find_logits(shapes.output, num_classes, f"{role}.model")
        return shapes

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to the student's logits (B, C)."""
        output = self.student(images.contiguous(memory_format=self.memory_format))
        return find_logits(output, self.num_classes)

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """The unweighted loss of every term, float32 scalars, and the student's logits (B, C)."""
        images = batch["images"].contiguous(memory_format=self.memory_format)
        terms = cast(dict[str, Term], self.terms)
        remembered: Mapping[str, Tensor] = {}
        if self.teacher is not None:
            remembered = self._remembered(batch, images)
        student = self._read_student(images)
        losses = {
            name: term(student, remembered.get(name), batch["labels"])
            for name, term in terms.items()
        }
        return losses, student.logits

    def _remembered(self, batch: Batch, images: Tensor) -> Mapping[str, Tensor]:
        """What every term needs of the teacher, (B, ...): recalled, or else computed."""
        return self._recall(self.memory, batch, lambda: self.ask_teacher(images))

    @staticmethod
    def _recall(memory: Memory | None, batch: Batch, ask: Ask) -> Mapping[str, Tensor]:
        if memory is None:
            return ask()
        return memory.recall(batch["index"], batch["view"], batch["images"].device, ask)

    def ask_teacher(self, images: Tensor) -> dict[str, Tensor]:
        """What every term remembers of these images (B, 3, H, W): term name to (B, ...)."""
        assert self.teacher is not None
        answer = self.teacher.answer(images.contiguous(memory_format=self.memory_format))
        terms = cast(dict[str, Term], self.terms)
        return {name: term.remember(answer) for name, term in terms.items() if term.needs_teacher}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of the weighted sum of all terms."""
        losses, logits = self.losses(batch)
        loss = torch.stack([self.weights[name] * losses[name] for name in losses]).sum()
        if batch["share"]:
            self.train_accuracy.update(logits, batch["labels"])
        self._clock_images += len(logits)
        logging = self.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if logging:
            self.log("loss/total", loss, sync_dist=True)
            for name, value in losses.items():
                self.log(f"loss/{name}", value, sync_dist=True)
                self.log(f"loss_weighted/{name}", self.weights[name] * value, sync_dist=True)
        # On an accelerator looking at the loss would make every step wait for it. What is not
        # finite in one of several processes is so in all of them a step later; rank 0 says it.
        look = self.global_rank == 0 and (logging or loss.device.type == "cpu")
        if look and not torch.isfinite(loss):
            bad = [name for name, value in losses.items() if not torch.isfinite(value)]
            raise RunError(
                f"the loss is not finite at step {self.global_step} "
                f"(term: {', '.join(bad) or 'their sum'}); lower the learning rate or its weight"
            )
        return loss if self.trainer.world_size == 1 else loss * batch["share"]

    def on_train_start(self) -> None:
        """Start the clock: an epoch that is gone on with does not start."""
        self._clock_began, self._clock_images = time.perf_counter(), 0

    def on_train_epoch_start(self) -> None:
        """Start the clock, and count images and right answers anew."""
        self._clock_began, self._clock_images = time.perf_counter(), 0
        self.train_accuracy.reset()

    def on_test_epoch_end(self) -> None:
        """Keep what the teacher said of the test images."""
        if self.evaluation_memory is not None:
            self.evaluation_memory.flush()

    def on_train_epoch_end(self) -> None:
        """Log the accuracy on the epoch's training views."""
        if self.memory is not None:
            self.memory.flush()
        self._stop_clock()
        self.log("train/accuracy", self.train_accuracy)
        self._remember_epoch()

    def _remember_epoch(self) -> None:
        row = {"epoch": self.current_epoch + 1, "train_accuracy": self.train_accuracy.compute()}
        logged = self.trainer.callback_metrics
        if self.validated_at == self.global_step:
            row |= {name: logged[f"val/{name.removeprefix('val_')}"] for name in VALIDATION}
        row["images_per_second"] = logged["images_per_second"]
        self.history.append({name: round(float(value), 6) for name, value in row.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the training has gone through so far goes with it."""
        now = time.perf_counter()
        self.fit_seconds += now - self._epoch_began
        self._epoch_began = now
        self._count_images()
        checkpoint["progress"] = {name: getattr(self, name) for name in PROGRESS}
        # Within an epoch; at its end it is counted anew.
        checkpoint["train_accuracy"] = self.train_accuracy.metric_state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting where it stopped."""
        for name, value in checkpoint.get("progress", {}).items():
            if name in PROGRESS:
                setattr(self, name, value)
        counts = checkpoint.get("train_accuracy", {})
        for name, value in self.train_accuracy.metric_state.items():
            if name in counts and isinstance(value, Tensor):
                setattr(self.train_accuracy, name, counts[name].to(value.device))

    def on_validation_start(self) -> None:
        """During training this comes right after a step: stop the clock."""
        self._place_teacher()
        for measured in (self.accuracy, self.val_loss):
            measured.reset()  # one validated before training was left in inference mode
        self.validated_at = self.global_step
        self._stop_clock()

    def on_validation_end(self) -> None:
        """Start the clock again, should the epoch go on."""
        self._clock_began = time.perf_counter()

    def _stop_clock(self) -> None:
        if self._clock_images:
            self.log("images_per_second", self._count_images())

    def _count_images(self) -> float:
        """Add what was trained since the clock began; images per second since then."""
        now = time.perf_counter()
        images, seconds = self._clock_images * self.trainer.world_size, now - self._clock_began
        self.images_trained += images
        self.training_seconds += seconds if images else 0
        self._clock_began, self._clock_images = now, 0
        return images / seconds

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The student on the validation images, and the teacher unless training goes on."""
        logits = self(batch["images"])
        if batch["share"]:
            self.accuracy.update(logits, batch["labels"])
            loss = F.cross_entropy(logits.float(), batch["labels"])
            self.val_loss.update(loss, weight=len(logits))
        self.log("val/accuracy", self.accuracy)
        self.log("val/loss", self.val_loss)
        if self.trainer.state.fn != TrainerFn.FITTING and self.teacher is not None:
            self._score_teacher(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Student and teacher on the test images, and how often they name the same class."""
        logits = self(batch["images"])
        if batch["share"]:
            self.accuracy.update(logits, batch["labels"])
            self.confusion.update(logits, batch["labels"])
        self.log("test/accuracy", self.accuracy)
        if self.teacher is not None:
            teacher = self._score_teacher(batch, "test")
            if batch["share"]:
                self.agreement.update(logits, teacher.argmax(dim=1))
            self.log("test/agreement", self.agreement)

    def _score_teacher(self, batch: Batch, part: str) -> Tensor:
        images = batch["images"].contiguous(memory_format=self.memory_format)

        def ask() -> dict[str, Tensor]:
            assert self.teacher is not None
            return {"logits": self.teacher(images).float()}

        logits = self._recall(self.evaluation_memory, batch, ask)["logits"]
        if batch["share"]:
            self.teacher_accuracy.update(logits, batch["labels"])
        self.log(f"{part}/teacher_accuracy", self.teacher_accuracy)
        return logits

    def _place_teacher(self) -> None:
        if self.teacher is not None:
            dtype = AUTOCAST.get(str(self.trainer.precision))
            self.teacher.prepare(self.device, self.memory_format, dtype)

    def on_fit_start(self) -> None:
        """The student is on its device: bring the teacher there."""
        self._place_teacher()
        self._epoch_began = time.perf_counter()

    def on_test_start(self) -> None:
        """The student is on its device: bring the teacher there."""
        self._place_teacher()

    def on_test_epoch_start(self) -> None:
        """Testing twice (last epoch, best epoch) must not add up."""
        self.confusion.reset()

    def configure_optimizers(self) -> Any:
        """The optimizer of the student's (and terms') parameters, and its schedule by steps."""
        precision = str(self.trainer.precision)
        optimizer = build_optimizer(self.optimizer_node, self.parameters(), precision)
        if self.scheduler_node is None:
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = build_partial(self.scheduler_node, "scheduler")(optimizer, total_steps=steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning does, with fused optimizers too unless gradients are scaled."""
        if str(self.trainer.precision) == "16-mixed":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        # Past the refusal of MixedPrecision, which is meant for gradients that are scaled.
        plugin = self.trainer.precision_plugin
        Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)


def build_optimizer(node: Node, parameters: Iterable[Parameter], precision: str) -> Optimizer:
    """The optimizer, in its fused form where it has one: a single pass over weights, gradients
    and momenta, five to ten times faster on a CPU.

    Args:
        node: its `_target_` node.
        parameters: what it optimises.
        precision: that of the training. In 16-mixed a fused optimizer removes the scale of the
            gradients itself, so that they cannot be clipped before.
    """
    chosen = "fused" in node or "foreach" in node
    if node["_target_"] in FUSED and precision != "16-mixed" and not chosen:
        node = {**node, "fused": True}
    return cast(Optimizer, build_partial(node, "optimizer")(parameters))
