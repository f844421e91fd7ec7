"""float16 with a gradient scaler, which skips steps, tried on the CPU."""

import warnings

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.trainer.connectors import accelerator_connector as connector
from test_distillation import COSINE
from test_divergence import run

from kd_lightning.engine.quiet import quiet_lightning

BY_EPOCH = {"_target_": "torch.optim.lr_scheduler.StepLR", "step_size": 9, "gamma": 0.9}
COMPOSITE = {"_target_": "torch.optim.lr_scheduler.ChainedScheduler", "schedulers": [BY_EPOCH]}
HARMLESS = "Detected call of `lr_scheduler.step"


@pytest.fixture
def skipping(monkeypatch):
    """Training in 16-mixed, with an initial scale at which the first steps overflow."""
    monkeypatch.setattr(
        connector._AcceleratorConnector,
        "_check_and_init_precision",
        lambda _: MixedPrecision(
            "16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**26)
        ),
    )


@pytest.mark.parametrize("scheduler", [COSINE, COMPOSITE])
def test_skipped_first_step_causes_no_warning(folder, tmp_path, skipping, scheduler):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_lightning()
        result = run(folder, tmp_path, settings={"max_epochs": 9}, scheduler=scheduler)
    assert [warning for warning in caught if HARMLESS in str(warning.message)] == []
    assert result["val_accuracy"] > 0.5  # later steps were not skipped


def test_same_mistake_of_other_code_is_still_reported():
    quiet_lightning()
    optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1.0)
    with pytest.warns(UserWarning, match=HARMLESS):
        torch.optim.lr_scheduler.StepLR(optimizer, 1).step()
