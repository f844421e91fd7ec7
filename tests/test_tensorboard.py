"""TensorBoard: values are logged at their own steps, and HParams shows the differences."""

from types import SimpleNamespace

import pytest
import torch
from conftest import trainer_plan
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.backend_context import Context
from test_distillation import frozen, make_data, make_module

from kd_lightning.engine.trainer import build_trainer
from kd_lightning.reports.hparams import describe_terms, log_hparams

CPU = {
    "_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "devices": 1, "max_epochs": 2,
    "log_every_n_steps": 50,
}  # fmt: skip
BATCHES = 5  # per epoch: 33 images, batch size 8


class Spy(Callback):
    """Records each optimizer step: its learning rate and the total loss of its batches."""

    def __init__(self):
        self.rates, self.losses = {}, {}

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rates.setdefault(trainer.global_step, rate)
        self.step = trainer.global_step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = float(outputs["losses"]["loss/total"])
        self.losses.setdefault(self.step, []).append(loss)


def scalars(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(row.step, row.value) for row in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [0, 4, 9]),
        ({"log_every_n_steps": 3}, [0, 3, 4, 6, 9]),
        ({"log_every_n_steps": 1}, list(range(10))),
        ({"max_epochs": 1, "limit_train_batches": 1}, [0]),
        ({"max_steps": 7}, [0, 4, 6]),
        ({"val_check_interval": 2, "log_every_n_steps": 2}, [0, 2, 4, 6, 8, 9]),
        ({"accumulate_grad_batches": 2, "log_every_n_steps": 2}, [0, 2, 4, 5]),
    ],
)
def test_losses_are_logged_at_their_own_step(folder, tmp_path, settings, steps):
    spy = Spy()
    trainer = build_trainer(
        trainer_plan({**CPU, **settings}), tmp_path / "run", "x", callbacks=[spy]
    )
    trainer.fit(make_module(frozen()), make_data(folder))
    shown = scalars(tmp_path / "run")
    assert [step for step, _ in shown["loss/total"]] == steps
    for step, value in shown["loss/total"]:
        assert value == pytest.approx(sum(spy.losses[step]) / len(spy.losses[step]), rel=1e-6)
    assert shown["lr-SGD"] == [(step, pytest.approx(spy.rates[step])) for step in steps]
    for name in ("loss/logit", "loss_weighted/logit", "loss_weighted/attention"):
        assert [step for step, _ in shown[name]] == steps
    weighted = [shown[name] for name in shown if name.startswith("loss_weighted/")]
    for (_, total), *parts in zip(shown["loss/total"], *weighted, strict=True):
        assert total == pytest.approx(sum(value for _, value in parts), rel=1e-5)


class TwoOfThem:
    """A mock trainer of two processes; the losses of the other process are 3."""

    world_size, global_step, log_every_n_steps, optimizers = 2, 0, 1, ()

    def __init__(self):
        self.logged, self.loggers, self.strategy = {}, [self], self

    def reduce(self, values, reduce_op):
        assert reduce_op == "mean"
        return (values + 3.0 * self.other_share) / 2

    def log_metrics(self, values, step):
        self.logged[step] = values

    def save(self):
        pass


def test_logged_loss_of_several_processes_is_of_the_whole_batch():
    from kd_lightning.engine.callbacks.curves import Curves

    trainer, curves = TwoOfThem(), Curves()
    # Three images: two in this process, one in the other.
    batch = {"loss_weight": 2 * 2 / 3}
    trainer.other_share = 2 * 1 / 3
    curves.on_train_batch_start(trainer, None, batch, 0)
    trainer.global_step = 1
    curves.on_train_batch_end(trainer, None, {"losses": {"loss/a": torch.tensor(6.0)}}, batch, 0)
    assert trainer.logged == {0: {"loss/a": pytest.approx((6 + 6 + 3) / 3)}}


PLAN = SimpleNamespace(
    method="logit",
    teachers=(),
    teacher_name="convnet",
    data=SimpleNamespace(name="digits", node={"batch_size": 64}),
    student=SimpleNamespace(
        name="small",
        seed=1,
        optimizer={"lr": 0.1},
        terms={"logit": {"weight": 0.5, "temperature": 4.0}},
    ),
)


@pytest.mark.parametrize("method", ["none", "logit"])
def test_hparams_columns_start_with_the_differences(tmp_path, method):
    """Five columns are shown by default, in the order sent by TensorBoard's server."""
    logger = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    results = {"epochs": 2, "val_accuracy": 0.5, "test_accuracy": 0.25}
    log_hparams(logger, SimpleNamespace(**{**vars(PLAN), "method": method}), results, 9)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    content = events.PluginTagToContent("hparams")
    page = Context(None).experiment_from_metadata(None, "", True, {"run": content}, [])
    columns = [info.name for info in page.hparam_infos]
    assert columns[:5] == ["method", "seed", "student", "teacher", "weights, temperature"]
    assert {"lr", "batch_size", "data", "epochs", "logit.temperature"} < set(columns)
    shown = {info.name.tag for info in page.metric_infos}
    assert shown == {"final/val_accuracy", "final/test_accuracy"}
    assert events.Scalars("final/test_accuracy")[0].step == 9


def test_description_of_terms():
    terms = {
        "cross_entropy": {"_target_": "x", "weight": 0.6},
        "logit": {"_target_": "x", "weight": 1.1, "temperature": 5.0},
        "attention": {"_target_": "x", "weight": 10.0, "student_layers": ["a"]},
    }
    assert describe_terms(terms) == "0.6 1.1 10 T=5: cross_entropy logit attention"
    terms["logit"]["temperature"] = {"_target_": "mine.Schedule"}
    assert describe_terms(terms) == "0.6 1.1 10: cross_entropy logit attention"
