"""User callbacks from the configuration: early stopping and others, including resume."""

import copy
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from test_resume import Ask, configuration, left
from test_schedules import PLATEAU, STEP_LR, TORCH
from test_tensorboard import scalars

from kd_lightning.engine.callbacks.plateau import StepOnPlateau
from kd_lightning.engine.callbacks.stopping import StopWhenAsked
from kd_lightning.engine.callbacks.users import build_callbacks
from kd_lightning.errors import InputError, RunError, Stopped
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import student as training

LIGHTNING = "lightning.pytorch.callbacks"
STOP = {
    "_target_": f"{LIGHTNING}.EarlyStopping", "monitor": "val/accuracy", "mode": "max",
    "patience": 1, "min_delta": 2.0,
}  # fmt: skip
OURS = {"_target_": f"{LIGHTNING}.ModelCheckpoint", "monitor": "val/accuracy", "mode": "max"}


class Counter(Callback):
    """A user callback with a state."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def on_train_epoch_end(self, trainer, module):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("callbacks")


def curves(folder):
    """TensorBoard's curves of the training, without the final validation."""
    shown = scalars(folder)
    return {name: shown[name] for name in shown if name.startswith(("lr", "loss", "train/"))}


def setting(root, epochs=6, callbacks=(), **changes):
    config = configuration(root, "method=none", f"trainer.max_epochs={epochs}")
    return {**config, "callbacks": dict(callbacks), **changes}


def test_early_stopping_finishes_the_run(root, tmp_path):
    """No improvement by 200 points: stops after the second epoch, and is not continued."""
    config = setting(root, callbacks={"stop": STOP})
    metrics = training.run(copy.deepcopy(config), tmp_path / "run")
    assert metrics["status"] == "finished"
    assert metrics["epochs"] == 2
    assert 1 <= metrics["best_epoch"] <= 2
    rows = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert len(rows) == 1 + 2
    # The scheduler still assumes the planned six epochs.
    rates = curves(tmp_path / "run")["lr-AdamW"]
    assert len(rates) == 10
    assert rates[-1][1] > 0.5 * max(rate for _, rate in rates)

    # If interrupted between the last step and the test, training is not continued.
    (tmp_path / "run" / "metrics.json").write_text(
        (tmp_path / "run" / "metrics.json").read_text().replace("finished", "running")
    )
    before, seen = left(tmp_path / "run"), curves(tmp_path / "run")
    time.sleep(1.1)  # event files are ordered by the seconds in their names
    again = training.run(copy.deepcopy(config), tmp_path / "run")
    assert again["epochs"] == 2
    assert left(tmp_path / "run")[:2] == before[:2]
    assert again["test_accuracy"] == metrics["test_accuracy"]
    assert curves(tmp_path / "run") == seen


def test_resume_keeps_the_patience_of_early_stopping(root, tmp_path):
    config = setting(root, callbacks={"stop": {**STOP, "patience": 2}})
    whole = training.run(copy.deepcopy(config), tmp_path / "whole")
    with pytest.raises(Stopped):
        training.run(copy.deepcopy(config), tmp_path / "run", callbacks=[Ask(7)])
    resumed = training.run(copy.deepcopy(config), tmp_path / "run")
    assert whole["epochs"] == resumed["epochs"] == 3
    assert left(tmp_path / "run") == left(tmp_path / "whole")


@pytest.mark.parametrize(
    "scheduler",
    [
        STEP_LR,
        {"_target_": f"{TORCH}.MultiStepLR", "milestones": [1, 2]},
        {**PLATEAU, "mode": "min", "threshold": 1.0},
        {"_target_": f"{TORCH}.OneCycleLR", "max_lr": 0.01},
    ],
    ids=["StepLR", "MultiStepLR", "ReduceLROnPlateau", "OneCycleLR"],
)
def test_resume_with_any_scheduler_is_bit_identical(root, tmp_path, scheduler):
    """Interrupted after an epoch, and within one."""
    config = setting(root, epochs=2, scheduler=scheduler)
    training.run(copy.deepcopy(config), tmp_path / "whole")
    for step in (5, 7):
        with pytest.raises(Stopped):
            training.run(copy.deepcopy(config), tmp_path / "run", callbacks=[Ask(step)])
    training.run(copy.deepcopy(config), tmp_path / "run")
    assert left(tmp_path / "run") == left(tmp_path / "whole")


def test_scheduler_is_not_stepped_with_a_validation_before_the_training():
    """A teacher of the user's own is validated first; epoch 0 may have no validation."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=5)
    results = {"val/loss": torch.tensor(9.0), "val/accuracy": torch.tensor(0.1)}
    module = SimpleNamespace(
        val_metrics=SimpleNamespace(compute=lambda: results), lr_schedulers=lambda: scheduler
    )
    trainer = SimpleNamespace(current_epoch=0, state=SimpleNamespace(fn=TrainerFn.VALIDATING))
    callback = StepOnPlateau()
    callback.on_validation_epoch_end(trainer, module)
    trainer.state.fn = TrainerFn.FITTING
    callback.on_train_epoch_end(trainer, module)
    assert scheduler.last_epoch == 0
    callback.on_validation_epoch_end(trainer, module)
    callback.on_train_epoch_end(trainer, module)
    assert (scheduler.last_epoch, scheduler.best) == (1, 9)


def test_user_callbacks_do_not_collide_with_ours(root, tmp_path):
    """Two checkpoint callbacks with one state key, two of one class, and a progress bar."""
    callbacks = {
        "best": {**OURS, "dirpath": str(tmp_path / "own"), "filename": "mine"},
        "other": {**OURS, "dirpath": str(tmp_path / "other")},
        "bar": {"_target_": f"{LIGHTNING}.TQDMProgressBar"},
        "summary": {"_target_": f"{LIGHTNING}.ModelSummary"},
        "count": {"_target_": "test_callbacks.Counter", "start": 5},
    }
    config = setting(root, epochs=2, callbacks=callbacks)
    metrics = training.run(copy.deepcopy(config), tmp_path / "run")
    assert metrics["epochs"] == 2
    assert (tmp_path / "own" / "mine.ckpt").exists()
    place = RunDirectory(tmp_path / "run").checkpoint().path
    state = torch.load(place, weights_only=True)["callbacks"]
    assert state["callbacks.count"] == {"count": 7}
    assert state["callbacks.best"]["dirpath"] == str(tmp_path / "own")
    ours = [value for key, value in state.items() if key.startswith("ModelCheckpoint")]
    assert len(ours) == 2


def test_checkpoints_after_any_step_do_not_stop_the_clock(root, tmp_path):
    every = {
        "_target_": f"{LIGHTNING}.ModelCheckpoint", "every_n_train_steps": 1,
        "dirpath": str(tmp_path / "own"),
    }  # fmt: skip
    config = setting(root, epochs=2, callbacks={"every": every})
    metrics = training.run(copy.deepcopy(config), tmp_path / "run")
    assert metrics["epochs"] == 2
    rates = [value for _, value in scalars(tmp_path / "run")["images_per_second"]]
    assert len(rates) == 2
    assert len(set(rates)) == 2


@pytest.mark.parametrize(("every", "saved"), [(None, True), (3, False), (2, True), (5, True)])
def test_a_stop_before_the_end_of_an_epoch_is_saved(tmp_path, every, saved):
    """Unless a validation follows; its times are not known if they are intervals of time."""
    places = []
    trainer = SimpleNamespace(
        val_check_batch=every, check_val_every_n_epoch=1, is_last_batch=False,
        accumulate_grad_batches=1, save_checkpoint=lambda path, **_: places.append(path),
    )  # fmt: skip
    stop = StopWhenAsked("x", tmp_path)
    stop._noted = 15
    stop.on_train_batch_end(trainer, None, None, None, batch_idx=2)
    assert places == [tmp_path] * saved


AVERAGES = {
    "swa": {
        "_target_": f"{LIGHTNING}.StochasticWeightAveraging",
        "swa_lrs": 0.01,
        "swa_epoch_start": 1,
    },
    "ema": {"_target_": f"{LIGHTNING}.EMAWeightAveraging", "decay": 0.9},
}


def test_averaged_weights_are_validated_and_saved(root, tmp_path):
    weights = {}
    for name, callbacks in {
        "plain": {},
        **{name: {name: AVERAGES[name]} for name in AVERAGES},
    }.items():
        metrics = training.run(setting(root, epochs=2, callbacks=callbacks), tmp_path / name)
        assert metrics["status"] == "finished"
        assert metrics["epochs"] == 2
        weights[name] = left(tmp_path / name)[0]
    assert len({*weights.values()}) == 3


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": f"{LIGHTNING}.EarlyStoping"}, r"callbacks.x\._target_=.*cannot be imported"),
        ({**STOP, "patiense": 3}, "did you mean callbacks.x.patience"),
        ({"_target_": f"{LIGHTNING}.EarlyStopping"}, "callbacks.x.monitor must be given"),
        ("EarlyStopping", "callbacks.x must be a node with a _target_"),
        ({"_target_": "torch.nn.ReLU"}, "callbacks.x must be a lightning.pytorch.Callback"),
        ({**STOP, "mode": "maximum"}, "callbacks.x: .*mode"),
        ({"_target_": f"{LIGHTNING}.LearningRateFinder"}, r"callbacks.x: .*scripts/tune.py"),
    ],
)
def test_invalid_callback_is_rejected_before_training(root, tmp_path, node, said):
    with pytest.raises(InputError, match=said):
        training.run(setting(root, callbacks={"x": node}), tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoints"))


def test_training_without_steps_is_not_finished(root, tmp_path):
    timer = {"_target_": f"{LIGHTNING}.Timer", "duration": "00:00:00:00"}
    with pytest.raises(RunError, match="stopped the training before its first step"):
        training.run(setting(root, callbacks={"timer": timer}), tmp_path / "run")


def test_unknown_monitor_lists_the_known_metrics(root, tmp_path):
    config = setting(root, callbacks={"stop": {**STOP, "monitor": "val/acc"}})
    with pytest.raises(InputError, match=r"callbacks\.stop.monitor.*val/acc;.*val/accuracy"):
        training.run(config, tmp_path / "run")


def test_callbacks_are_named_and_keep_their_class():
    one, two = build_callbacks({"a": STOP, "b": STOP})
    assert (one.state_key, two.state_key) == ("callbacks.a", "callbacks.b")
    assert type(one).__name__ == "EarlyStopping"
