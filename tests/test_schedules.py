"""Schedules: warm-up to the learning rate, decay to zero, for any length."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from test_distillation import CROSS_ENTROPY, make_data, make_module, make_trainer

from kd_lightning.config.nodes import check_node
from kd_lightning.distill.schedulers import build_schedule
from kd_lightning.engine.callbacks.plateau import StepOnPlateau
from kd_lightning.errors import InputError
from kd_lightning.schedules import cosine, one_cycle
from kd_lightning.workflows.assembly import try_optimizer


@pytest.mark.parametrize("schedule", [one_cycle, cosine])
@given(steps=st.integers(1, 300), warmup=st.floats(0, 0.99))
def test_schedules_of_any_length_warm_up_and_decay(schedule, steps, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    scheduler = schedule(optimizer, total_steps=steps, warmup_fraction=warmup)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    top = round(steps * warmup)
    assert all(rate > 0 for rate in rates[: top + 1])
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    if top < steps:
        assert max(rates) == rates[top] == 0.5


TORCH = "torch.optim.lr_scheduler"
STEP_LR = {"_target_": f"{TORCH}.StepLR", "step_size": 1, "gamma": 0.1}
PLATEAU = {"_target_": f"{TORCH}.ReduceLROnPlateau", "patience": 0, "factor": 0.5, "mode": "max"}
ONE_CYCLE_LR = {"_target_": f"{TORCH}.OneCycleLR", "max_lr": 1.0}
LINEAR = {"_target_": f"{TORCH}.LinearLR", "total_iters": 2}
TEN = {"_target_": "test_schedules.tenth"}


def tenth():
    """A node that returns a function."""
    return lambda epoch: 0.1**epoch


@pytest.mark.parametrize(
    ("node", "interval"),
    [
        ({"_target_": "kd_lightning.schedules.one_cycle"}, "step"),
        ({"_target_": f"{TORCH}.MultiStepLR", "milestones": [2, 3]}, "epoch"),
        (STEP_LR, "epoch"),
        ({"_target_": f"{TORCH}.CosineAnnealingLR", "T_max": 3}, "epoch"),
        ({"_target_": f"{TORCH}.ExponentialLR", "gamma": 0.5}, "epoch"),
        ({"_target_": f"{TORCH}.PolynomialLR", "total_iters": 3}, "epoch"),
        ({"_target_": f"{TORCH}.CosineAnnealingWarmRestarts", "T_0": 2}, "epoch"),
        ({"_target_": f"{TORCH}.LambdaLR", "lr_lambda": TEN}, "epoch"),
        (PLATEAU, "epoch"),
        (ONE_CYCLE_LR, "step"),
        ({"_target_": f"{TORCH}.CyclicLR", "base_lr": 0.1, "max_lr": 1.0}, "step"),
        (
            {
                "_target_": f"{TORCH}.SequentialLR",
                "schedulers": [LINEAR, STEP_LR],
                "milestones": [2],
            },
            "epoch",
        ),
        ({"_target_": f"{TORCH}.ChainedScheduler", "schedulers": [LINEAR, STEP_LR]}, "epoch"),
        ({"_target_": f"{TORCH}.ChainedScheduler", "schedulers": [LINEAR, ONE_CYCLE_LR]}, "step"),
    ],
)
def test_torch_schedulers_are_built_and_stepped(node, interval):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    check_node(node, "scheduler", {"optimizer", "total_steps"})
    try_optimizer({"_target_": "torch.optim.SGD", "lr": 1.0, "momentum": 0.9}, node)
    schedule = build_schedule(node, optimizer, 10)
    assert schedule.interval == interval
    optimizer.step()
    schedule.scheduler.step(*([0.0] if node is PLATEAU else []))


def test_explicit_total_steps_are_kept():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)
    assert build_schedule(ONE_CYCLE_LR, optimizer, 10).scheduler.total_steps == 10
    node = {**ONE_CYCLE_LR, "total_steps": 99}
    assert build_schedule(node, optimizer, 10).scheduler.total_steps == 99


def as_in_transformers(optimizer, num_training_steps, num_warmup_steps=0):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / num_training_steps)


class LikeTimms:
    """Stepped with the epoch number, and not a torch scheduler."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, epoch):
        pass

    def state_dict(self):
        return {}


def test_num_training_steps_is_supported():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule({"_target_": f"{__name__}.as_in_transformers"}, optimizer, 10)
    assert schedule.interval == "step"
    optimizer.step()
    schedule.scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"_target_": f"{__name__}.LikeTimms"}, "scheduler must be a learning-rate scheduler"),
        (
            {
                "_target_": f"{TORCH}.SequentialLR",
                "schedulers": [LINEAR, PLATEAU],
                "milestones": [1],
            },
            r"scheduler.schedulers\[1\]: ReduceLROnPlateau",
        ),
        (
            {"_target_": f"{TORCH}.ChainedScheduler", "schedulers": [{**LINEAR, "gama": 1}]},
            r"scheduler.schedulers\[0\].*gama",
        ),
        ({"_target_": "torch.nn.Identity"}, "scheduler must be a learning-rate scheduler"),
        ({**ONE_CYCLE_LR, "pct_start": 3.0}, "scheduler: .*pct_start"),
    ],
)
def test_invalid_scheduler_is_rejected_before_training(node, said):
    optimizer = {"_target_": "torch.optim.SGD", "lr": 1.0, "momentum": 0.9}
    with pytest.raises(InputError, match=said):
        try_optimizer(optimizer, node)


class Rates(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        (STEP_LR, [0.05, 0.005, 0.0005]),
        ({"_target_": f"{TORCH}.MultiStepLR", "milestones": [2]}, [0.05, 0.05, 0.005]),
        # Nothing is better than the accuracy of the first epoch: 1.
        (PLATEAU, [0.05, 0.05, 0.025]),
    ],
)
def test_epoch_scheduler_is_constant_within_an_epoch(folder, tmp_path, scheduler, expected):
    rates = Rates()
    module = make_module(terms={"cross_entropy": CROSS_ENTROPY}, scheduler=scheduler)
    module.val_metrics["val/accuracy"].compute = lambda: torch.tensor(1.0)
    make_trainer(tmp_path, epochs=3, callbacks=[rates, StepOnPlateau()]).fit(
        module, make_data(folder)
    )
    assert rates.seen == pytest.approx([rate for rate in expected for _ in range(5)])
