"""The one Lightning module: a trainable student, a frozen teacher, and the terms between them."""

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
from torch.nn import ModuleDict
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from kd_lightning.batchnorm import images_needed
from kd_lightning.config import Node, build, without
from kd_lightning.data.loading import Batch
from kd_lightning.divergence import LossWatch, first_not_finite, trainable
from kd_lightning.errors import InputError, RunError
from kd_lightning.frozen import FrozenTeacher
from kd_lightning.losses import Term
from kd_lightning.losses.term import Shapes
from kd_lightning.memory import Ask, Memory
from kd_lightning.models.features import FeatureReader, LayerShapes, layer_shapes
from kd_lightning.models.outputs import find_logits
from kd_lightning.models.preparing import cannot_take, materialize, to_memory_format
from kd_lightning.optimizers import build_optimizer
from kd_lightning.runs import check_trusted
from kd_lightning.schedules import build_schedule, step_on_plateau

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
VALIDATION = ("val_accuracy", "val_loss")
PROGRESS = ("images_trained", "training_seconds", "fit_seconds", "history", "validated")


class DistillationModule(LightningModule):
    """Trains a student by a weighted sum of terms; without a teacher, plain supervised training.

    Its hyper-parameters are plain dictionaries of primitives, and the objects are built from them
    here: that is what lets Lightning save, load and resume with ``weights_only=True``.

    Args:
        student: `_target_` node of the student's model.
        terms: term name to its `_target_` node, each with a `weight`.
        optimizer: `_target_` node; called with the parameters of the student and of the terms.
        scheduler: `_target_` node; see `schedules.build_schedule`. None keeps the learning rate
            constant.
        num_classes: number of classes.
        image_size: height and width of the images, in pixels.
        channels_last: memory format of student and teacher.
        teacher: needed if a term needs one; neither a hyper-parameter nor saved.

    Attributes:
        history: a row an epoch: accuracy on the training views, on validation, speed.
        images_trained, training_seconds: what the speed of the whole training follows from.
        fit_seconds: until the last epoch's end, validation and all; an interrupted training counts.
        images_needed: the fewest images that a process can train on at once.
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
        # Not a plain number, whose mean over processes Lightning rounds to whole images. By default
        # it leaves out what is NaN.
        self.val_loss = MeanMetric(nan_strategy="disable")
        self.confusion = MulticlassConfusionMatrix(num_classes, validate_args=False)
        self.validated_at = -1  # the step
        self.validated: dict[str, float] = {}  # the last validation's results, and its epoch
        self._watch, self._look_every_step = LossWatch(), True
        self.images_trained, self.training_seconds, self.fit_seconds = 0, 0.0, 0.0
        self.history: list[dict[str, float]] = []
        self._clock_began, self._clock_images = time.perf_counter(), 0
        self._epoch_began = self._clock_began

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls, checkpoint_path: str | Path, *args: Any, trust: Iterable[str] = (), **kwargs: Any
    ) -> "DistillationModule":
        """As Lightning's, but a stranger's file cannot run code.

        The module is in training mode, as Lightning's are: a Trainer switches modes by itself, but
        call `eval` before predicting without one.

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
        self.images_needed = images_needed(self.student, student)
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

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One step of the weighted sum of all terms: ``loss``, and ``losses`` for `Curves`."""
        losses, logits = self.losses(batch)
        weighted = {name: self.weights[name] * value for name, value in losses.items()}
        stacked = torch.stack([*weighted.values()])
        loss = stacked.sum()
        if batch["share"]:
            self.train_accuracy.update(logits, batch["labels"])
        self._clock_images += len(logits)
        self._watch_losses(losses, stacked.detach(), batch)
        shown = {"loss/total": loss.detach()}
        for name, value in losses.items():
            shown[f"loss/{name}"] = value.detach()
            shown[f"loss_weighted/{name}"] = weighted[name].detach()
        return {
            "loss": loss * batch["share"] if self.trainer.world_size > 1 else loss,
            "losses": shown,
        }

    def _watch_losses(self, names: Iterable[str], values: Tensor, batch: Batch) -> None:
        """Raise an error if a loss is not finite; on an accelerator, not in every step.

        What is not finite in one of several processes is so in all a step later; rank 0 reports it.
        """
        if self.global_rank:
            return
        self._watch.note(names, values)
        due = self.global_step % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        if (due or self._look_every_step) and not self._watch.scaled:
            self._report(self._watch.look(), batch)

    def _report(self, bad: Sequence[str], batch: Batch | None = None) -> None:
        if not bad:
            return
        place = f"{'at' if batch else 'by'} step {self.global_step}"
        if batch is not None and self.teacher is not None:
            for name, values in self._remembered(batch, batch["images"]).items():
                if not values.isfinite().all():
                    raise RunError(
                        f"the teacher's answers are not finite {place} (term: {name}): check "
                        "teacher.checkpoint, teacher.mean and teacher.std"
                    )
        raise RunError(
            f"the loss is not finite {place} (term: {', '.join(bad)}); "
            "lower the learning rate or its weight"
        )

    def check_finite(self) -> None:
        """Check that the training has not diverged: losses since the last check, and weights.

        Raises:
            RunError: it has.
        """
        self._report(self._watch.look())
        name = first_not_finite(trainable(self))
        if name is not None:
            raise RunError(
                f"the weights are not finite after step {self.global_step} (first: {name}); "
                "lower the learning rate"
            )

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
        """Log the accuracy on the epoch's training views; look whether the training goes well."""
        self.check_finite()
        if self.memory is not None:
            self.memory.flush()
        self._stop_clock()
        self.log("train/accuracy", self.train_accuracy)
        self._remember_epoch()
        if self.validated.get("epoch") == self.current_epoch:
            step_on_plateau(self.lr_schedulers(), self.validated)

    def _remember_epoch(self) -> None:
        row = {"epoch": self.current_epoch + 1, "train_accuracy": self.train_accuracy.compute()}
        logged = self.trainer.callback_metrics
        if self.validated_at == self.global_step:
            row |= {name: logged[f"val/{name.removeprefix('val_')}"] for name in VALIDATION}
        row["images_per_second"] = logged["images_per_second"]
        self.history.append({name: round(float(value), 6) for name, value in row.items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what the training has gone through so far, unless it has diverged."""
        self.check_finite()
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

    def on_validation_epoch_end(self) -> None:
        """Keep the results for a scheduler that waits for them."""
        results = {"val/accuracy": self.accuracy, "val/loss": self.val_loss}
        self.validated = {name: float(value.compute()) for name, value in results.items()}
        self.validated["epoch"] = self.current_epoch

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
        self._watch = LossWatch(scaled=str(self.trainer.precision) == "16-mixed")
        self._look_every_step = self.device.type == "cpu"
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
        schedule = build_schedule(self.scheduler_node, optimizer, steps)
        # Lightning would step `ReduceLROnPlateau` after the epoch's checkpoint: a resumed training
        # would miss it. `on_train_epoch_end` does it before.
        never = {"reduce_on_plateau": False, "frequency": sys.maxsize}
        plateau = isinstance(schedule.scheduler, ReduceLROnPlateau)
        settings = {**schedule._asdict(), **(never if plateau else {})}
        return {"optimizer": optimizer, "lr_scheduler": settings}

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
