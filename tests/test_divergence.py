"""A diverged run never counts as finished, on any device, and the error names the cause."""

import math

import pytest
import torch
from conftest import trainer_plan
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from test_distillation import CROSS_ENTROPY, frozen, make_data, make_module
from test_tensorboard import CPU

from kd_lightning.distill.divergence import LossWatch, first_not_finite
from kd_lightning.engine.callbacks.divergence import StopWhenDiverged
from kd_lightning.engine.fitting import fit
from kd_lightning.engine.trainer import build_trainer
from kd_lightning.errors import RunError
from kd_lightning.storage.run_directory import RunDirectory

NAN = float("nan")
EPOCH = 5  # batches per epoch


class Accelerator(Callback):
    """Makes the module behave as on an accelerator, without synchronisation at every step."""

    def on_train_start(self, trainer, module):
        (watch,) = [c for c in trainer.callbacks if isinstance(c, StopWhenDiverged)]
        watch._look_every_step = False


class Spoil(Callback):
    """Sets a weight, a gradient or the loss of the nth batch to NaN."""

    def __init__(self, what, batch):
        self.what, self.batch = what, batch

    def _now(self, trainer):
        return trainer.fit_loop.total_batch_idx + 1 == self.batch

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self._now(trainer) and self.what == "loss":
            batch["images"] = batch["images"] * NAN

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self._now(trainer) and self.what == "gradient":
            module.student.stage1[0].weight.grad.fill_(NAN)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if self._now(trainer) and self.what == "weight":
            with torch.no_grad():
                module.student.stage1[0].weight[0, 0, 0, 0] = math.inf


def run(folder, path, *callbacks, teacher=None, settings=(), **module_settings):
    directory = RunDirectory(path / "run")
    settings = {**CPU, "gradient_clip_val": None, **dict(settings)}
    trainer = build_trainer(trainer_plan(settings), directory.path, "x", callbacks=callbacks)
    if teacher is None:
        module_settings = {"terms": {"cross_entropy": CROSS_ENTROPY}, **module_settings}
    module = make_module(teacher, **module_settings)
    return fit(trainer, module, make_data(folder), directory, "student")


@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
@pytest.mark.parametrize("batch", [EPOCH, EPOCH + 2, 2 * EPOCH])
def test_divergence_on_an_accelerator_is_detected_at_epoch_end(folder, tmp_path, what, batch):
    with pytest.raises(RunError, match=r"not finite .*; lower the learning rate"):
        run(folder, tmp_path, Accelerator(), Spoil(what, batch))
    assert not (tmp_path / "run" / "student.safetensors").exists()
    for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
        state = torch.load(path, weights_only=True)
        assert all(value.isfinite().all() for value in state["state_dict"].values()), path
        assert state["epoch"] == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists() == (batch > EPOCH)


@pytest.mark.parametrize("what", ["gradient", "weight"])
@pytest.mark.parametrize("settings", [{}, {"max_steps": 7}])
def test_nonfinite_weights_in_the_last_step_fail_the_run(folder, tmp_path, what, settings):
    """The loss of every step was finite."""
    last = settings.get("max_steps", 2 * EPOCH)
    with pytest.raises(RunError, match=rf"the weights are not finite after step {last}"):
        run(folder, tmp_path, Spoil(what, last), settings=settings)


def test_no_checkpoint_contains_a_diverged_student(folder, tmp_path):
    own = ModelCheckpoint(tmp_path / "own", every_n_train_steps=1, save_top_k=-1)
    with pytest.raises(RunError, match="not finite"):
        run(folder, tmp_path, Spoil("gradient", 3), own)
    assert len(list((tmp_path / "own").glob("*"))) == 2


def test_losses_of_several_steps_are_checked_together():
    watch = LossWatch()
    assert watch.look() == []
    for value in (1.0, math.inf, 2.0):
        watch.note("ab", torch.tensor([1.0, value]))
    assert watch.look() == ["b"]
    watch.note("ab", torch.tensor([1.0, 1.0]))
    assert watch.look() == []


def test_steps_skipped_by_the_scaler_are_not_divergence():
    watch = LossWatch(scaled=True)
    for value in (NAN, 1.0, math.inf):
        watch.note("a", torch.tensor([value]))
    assert watch.look() == []
    for value in (NAN, math.inf):
        watch.note("a", torch.tensor([value]))
    assert watch.look() == ["a"]


def test_a_mask_may_be_infinite_and_integers_are_finite():
    assert first_not_finite([("a", torch.ones(2)), ("b", torch.ones(2, dtype=torch.int64))]) is None
    assert first_not_finite([("a", torch.ones(2)), ("b", torch.tensor([1.0, NAN]))]) == "b"
    assert first_not_finite([]) is None


@pytest.mark.parametrize("accelerator", [False, True])
def test_teacher_with_nan_outputs_is_reported(folder, tmp_path, accelerator):
    teacher = frozen()
    with torch.no_grad():
        next(teacher.model.parameters()).fill_(NAN)
    callbacks = [Accelerator()] if accelerator else []
    with pytest.raises(
        RunError, match=r"the teacher's outputs are not finite .*teacher\.checkpoint"
    ):
        run(folder, tmp_path, *callbacks, teacher=teacher)


class SpoilValidation(Callback):
    """Makes the last validation batch NaN, in every epoch or up to one."""

    def __init__(self, until=99):
        self.until = until

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0):
        if trainer.current_epoch < self.until:
            batch["images"] = batch["images"] * NAN


def test_nan_in_a_validation_batch_is_not_dropped(folder, tmp_path):
    with pytest.raises(RunError, match="loss on the validation images is not finite"):
        run(folder, tmp_path, SpoilValidation())
    rows = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert rows[0].split(",")[3] == "val_loss"
    assert [row.split(",")[3] for row in rows[1:]] == ["nan", "nan"]


def test_run_with_recovered_student_is_finished(folder, tmp_path):
    results = run(folder, tmp_path, SpoilValidation(until=1))
    assert results["epochs"] == 2
