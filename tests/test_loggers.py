"""Loggers from the configuration: choice, validation, identity, resuming, images."""

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import yaml
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers import wandb as lightning_wandb
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_only
from test_resume import Ask, configuration, left

from kd_lightning import api
from kd_lightning.config.loggers import check_loggers
from kd_lightning.config.naming import config_key
from kd_lightning.engine.callbacks.users import build_callbacks, check_logged
from kd_lightning.engine.loggers import (
    TENSORBOARD,
    ContinuedCSVLogger,
    build_loggers,
    check_login,
    closing,
    log_image,
    shows_images,
)
from kd_lightning.errors import InputError, Stopped
from kd_lightning.storage.identity import stamps
from kd_lightning.storage.run_directory import Checkpoint
from kd_lightning.workflows import student as training

LIGHTNING = "lightning.pytorch.loggers"
CSV = {"csv": {"_target_": "kd_lightning.engine.loggers.ContinuedCSVLogger"}}
WANDB = {"wandb": {"_target_": f"{LIGHTNING}.WandbLogger", "project": "mine", "offline": True}}
MLFLOW = {"mlflow": {"_target_": f"{LIGHTNING}.MLFlowLogger"}}


def without_logger(config):
    return {key: value for key, value in config.items() if key != "logger"}


def test_loggers_are_chosen_by_name_and_are_no_part_of_the_identity(tmp_path):
    given = (f"output_dir={tmp_path}", f"data_dir={tmp_path}")
    usual = api.compose(*given)
    assert list(usual["logger"]) == ["tensorboard"]
    for choice, names in {
        "[tensorboard,csv]": ["tensorboard", "csv"],
        "[csv,wandb,mlflow]": ["csv", "wandb", "mlflow"],
        "none": [],
        "null": [],
    }.items():
        other = api.compose(*given, f"logger={choice}")
        assert list(other.get("logger") or {}) == names
        assert without_logger(other) == without_logger(usual)  # with its name and setting
        assert config_key(other) == config_key(usual) == config_key(without_logger(usual))
        assert stamps(other) == stamps(usual)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        ({"x": {"_target_": "torch.nn.ReLU"}}, "logger.x must be a lightning.pytorch.loggers"),
        ({"x": {"_target_": f"{LIGHTNING}.CsvLogger"}}, r"logger.x\._target_=.*cannot be imported"),
        ({"x": {**CSV["csv"], "purge_steps": 1}}, r"did you mean logger\.x\.purge_step"),
        ("csv", "logger must be names"),
        (WANDB, r"logger.wandb needs the package wandb: pip install -e '.\[wandb\]'"),
        (MLFLOW, r"logger.mlflow needs the package mlflow: pip install -e '.\[mlflow\]'"),
    ],
)
def test_invalid_loggers_are_rejected(nodes, said, monkeypatch):
    find_spec = importlib.util.find_spec

    def without_extras(name, package=None):
        return None if name in ("wandb", "mlflow") else find_spec(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without_extras)
    with pytest.raises(InputError, match=said):
        check_loggers(nodes)
    check_loggers({**TENSORBOARD, **CSV})


def rows(folder):
    """Logged values by step and name, except those of speed."""
    with (folder / "csv" / "metrics.csv").open() as file:
        return sorted(
            (int(row["step"]), name, value)
            for row in csv.DictReader(file)
            for name, value in row.items()
            if value and name.startswith(("l", "train", "val", "test", "final"))
        )


def test_resume_with_other_loggers(tmp_path):
    """A run without a logger, then with one, then with two, as without any interruption."""
    without = configuration(tmp_path, "method=none", "logger=none")
    training.run(without, tmp_path / "without")
    assert not list((tmp_path / "without").rglob("events.*"))
    assert not (tmp_path / "without" / "csv").exists()

    one = configuration(tmp_path, "method=none", "logger=csv")
    training.run(one, tmp_path / "whole")
    shown = rows(tmp_path / "whole")
    assert [step for step, name, _ in shown if name == "loss/total"] == list(range(15))
    assert {"final/test_accuracy", "val/accuracy", "lr-AdamW"} < {name for _, name, _ in shown}
    logged = yaml.safe_load((tmp_path / "whole" / "csv" / "hparams.yaml").read_text())
    assert (logged["run"]["method"], logged["run"]["student"]) == ("none", "small")

    run = tmp_path / "run"
    with pytest.raises(Stopped):
        training.run(one, run, callbacks=[Ask(8)])
    assert max(step for step, *_ in rows(run)) < 8
    both = configuration(tmp_path, "method=none", "logger=[csv,tensorboard]")
    training.run(both, run)
    assert rows(run) == shown
    assert list(run.glob("events.*"))
    assert left(run) == left(tmp_path / "whole") == left(tmp_path / "without")


def test_rows_after_the_checkpoint_are_dropped(tmp_path):
    first = ContinuedCSVLogger(tmp_path)
    for step in range(4):
        first.log_metrics({"a": float(step)}, step)
    first.save()
    (tmp_path / "csv" / "metrics.csv").open("a").write("7.0")  # the disk was full
    again = ContinuedCSVLogger(tmp_path, purge_step=2)
    again.log_metrics({"b": 5.0}, 2)
    again.save()
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        found = [(row["step"], row["a"], row["b"]) for row in csv.DictReader(file)]
    assert found == [("0", "0.0", ""), ("1", "1.0", ""), ("2", "", "5.0")]


class FakeRun:
    """A run of Weights & Biases."""

    def __init__(self, **init):
        self.init, self.logged, self.config, self.finished = init, [], {}, False
        self.id = init["id"]

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        self.finished = True


def refuse():
    raise RuntimeError("No API key configured. Use `wandb login` to log in.")


def test_wandb_needs_an_account_unless_it_is_offline(wandb, monkeypatch):
    monkeypatch.setattr(sys.modules["wandb"], "login", refuse, raising=False)
    online = {"wandb": {**WANDB["wandb"], "offline": False}}
    with pytest.raises(InputError, match=r"No API key .*logger\.wandb\.offline=true"):
        check_login(online)
    check_login({**WANDB, **CSV})
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_login(online)


@pytest.fixture
def wandb(monkeypatch):
    """The parts of the package wandb that Lightning uses; as there, one run at a time is active."""
    package, begun = ModuleType("wandb"), []
    package.run = None
    package.Image = lambda pixels: SimpleNamespace(pixels=pixels)

    def init(**arguments):
        begun.append(FakeRun(**arguments))
        return begun[-1]

    package.init = init
    parts = {"wandb": package}
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run"):
        parts[name] = ModuleType(name)
    parts["wandb.sdk.lib"].RunDisabled = type("RunDisabled", (), {})
    parts["wandb.wandb_run"].Run = FakeRun
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", True)
    monkeypatch.setenv("WANDB_MODE", "online")  # restored after the test
    return begun


def test_wandb_continues_its_run_and_shows_images(wandb, tmp_path):
    (logger,) = build_loggers(WANDB, tmp_path, "logit-small-s0")
    assert isinstance(logger, WandbLogger)
    assert shows_images([logger])
    with closing([logger]):
        logger.log_metrics({"loss": 1.0}, step=3)
        log_image([logger], "views", np.full((2, 2, 3), 0.5, dtype=np.float32))
        assert not wandb[0].finished
    assert wandb[0].finished  # so that the next training begins another
    init = wandb[0].init
    assert (init["name"], init["project"], init["dir"]) == ("logit-small-s0", "mine", str(tmp_path))
    assert wandb[0].logged[0] == {"loss": 1.0, "trainer/global_step": 3}
    assert (wandb[0].logged[1]["views"][0].pixels == 128).all()

    resumed = build_loggers(WANDB, tmp_path, "x", Checkpoint(Path("last.ckpt"), 1, 5))
    assert resumed[0].version == init["id"]
    (again,) = build_loggers(WANDB, tmp_path, "x")
    assert again.version != init["id"]  # trained again from the beginning
    named = {"wandb": {**WANDB["wandb"], "name": "own", "id": "7", "entity": "team"}}
    check = build_loggers(named, tmp_path, "x")[0]
    assert (check._name, check.version, check._wandb_init["entity"]) == ("own", "7", "team")


def test_only_rank_zero_logs(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    loggers = build_loggers({**TENSORBOARD, **CSV, **WANDB, **MLFLOW}, tmp_path, "x")
    assert [type(logger) for logger in loggers] == [
        TensorBoardLogger, ContinuedCSVLogger, WandbLogger, DummyLogger,
    ]  # fmt: skip
    for logger in loggers:
        logger.log_metrics({"a": 1.0}, step=1)
        logger.save()
    assert wandb == []
    assert list(tmp_path.iterdir()) == []


def test_callbacks_that_only_log_need_a_logger():
    nodes = {"rate": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}}
    (callback,) = build_callbacks(nodes)
    check_logged({"rate": callback}, TENSORBOARD)
    with pytest.raises(InputError, match=r"callbacks\.rate .*logger=none"):
        check_logged({"rate": callback}, {})


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="an extra")
def test_mlflow_continues_its_run(tmp_path):
    node = {**MLFLOW["mlflow"], "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"}
    (logger,) = build_loggers({"mlflow": node}, tmp_path, "x")
    assert isinstance(logger, MLFlowLogger)
    logger.log_hyperparams({"terms": "1 T=4: logit", "logit.weight": 1.0})
    logger.log_metrics({"loss/total": 1.0}, step=2)
    resumed = build_loggers({"mlflow": node}, tmp_path, "x", Checkpoint(Path("last.ckpt"), 1, 5))
    assert resumed[0].run_id == logger.run_id
    (again,) = build_loggers({"mlflow": node}, tmp_path, "x")
    assert again.run_id != logger.run_id
