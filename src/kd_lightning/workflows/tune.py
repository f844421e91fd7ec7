"""Hyper-parameters chosen on validation images by Optuna, resumable, by any number of workers."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import optuna
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_lightning.config import overrides as rules
from kd_lightning.config.checks import check_sections
from kd_lightning.config.commandline import check_overrides
from kd_lightning.config.naming import register
from kd_lightning.config.nodes import Node, select
from kd_lightning.config.tree import plain, tree_folder
from kd_lightning.errors import InputError, RunError
from kd_lightning.workflows.student import run


class Range(NamedTuple):
    """Where a number is searched."""

    low: float
    high: float
    log: bool = False


# What is searched unless something else is asked for: a pattern of keys to a range.
SPACE = {
    "optimizer.lr": Range(0.02, 0.3, log=True),
    "method.terms.logit.temperature": Range(1.0, 20.0, log=True),
    "method.terms.cross_entropy.weight": Range(0.0, 1.0),
    "method.terms.logit.weight": Range(0.05, 2.0, log=True),
    "method.terms.attention.weight": Range(3.0, 3000.0, log=True),
}


def parse_range(text: str) -> tuple[str, Range]:
    """`optimizer.lr=0.01:0.3:log` or `...temperature=1:8`.

    Raises:
        InputError: it is neither.
    """
    found = re.fullmatch(r"([\w.]+)=([-+.\de]+):([-+.\de]+)(:log)?", text)
    with contextlib.suppress(ValueError):
        if found:
            low, high, log = float(found[2]), float(found[3]), bool(found[4])
            if low < high and (low > 0 or not log):
                return found[1], Range(low, high, log)
    raise InputError(f"--space {text}: write KEY=LOW:HIGH, or KEY=LOW:HIGH:log with LOW above 0")


def default_space(config: Node) -> dict[str, Range]:
    """Of `SPACE`, what this configuration has; weights only where there are several to balance."""
    space = {}
    for key, values in SPACE.items():
        with contextlib.suppress(KeyError):
            select(config, key)
            space[key] = values
    if len(config["method"]["terms"]) == 1:
        return {key: values for key, values in space.items() if not key.endswith(".weight")}
    return space


class Pruning(Callback):
    """Ends a trial that has no prospects, by what it reaches on validation images so far."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Report, and give up if the study says so."""
        if trainer.state.fn == "fit":
            value = float(trainer.callback_metrics["val/accuracy"])
            self.trial.report(value, trainer.current_epoch + 1)
            if self.trial.should_prune():
                raise optuna.TrialPruned


def tune(
    overrides: Sequence[str],
    trials: int,
    storage: str | None = None,
    space: Mapping[str, Range] | None = None,
    name: str | None = None,
) -> optuna.Study:
    """Search until the study has this many trials; go on with one that exists.

    The first trial is the configuration as it is, so that the best is never worse than that.

    Args:
        overrides: of the configuration, as on the command line of `train.py`.
        trials: finished or pruned ones, those of earlier and other workers included.
        storage: any URL that Optuna takes; by default an SQLite file below `output_dir`.
        space: key to range; by default what of `SPACE` the configuration has.
        name: of the study; by default from method, student and setting.
    """
    register()
    rules.install()
    overrides = check_overrides(overrides)

    def composed(extra: Sequence[str] = ()) -> Node:
        with initialize_config_dir(tree_folder(), version_base="1.3"):
            node = plain(compose("train", [*overrides, *extra]))
        check_sections(node)
        return node

    config = composed()
    space = dict(space or default_space(config))
    name = name or f"{config['method']['name']}-{config['student']['name']}-{config['setting']}"
    folder = Path(config["output_dir"]) / "tuning"
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=storage or f"sqlite:///{folder / 'studies.db'}",
        study_name=name,
        direction="maximize",
        load_if_exists=True,
        # In the first half of its epochs a high learning rate is behind, and may lead in the end.
        pruner=optuna.pruners.MedianPruner(
            n_startup_trials=5, n_warmup_steps=config["trainer"]["max_epochs"] // 2
        ),
    )

    if not study.trials:  # what is searched from: the configuration as it is
        start = {key: float(select(config, key)) for key in space}
        study.enqueue_trial({key: min(max(start[key], r.low), r.high) for key, r in space.items()})

    def objective(trial: optuna.Trial) -> float:
        chosen = [
            f"{key}={trial.suggest_float(key, r.low, r.high, log=r.log):.6g}"
            for key, r in space.items()
        ]
        metrics = run(
            composed(chosen),
            folder / name / f"trial-{trial.number:04d}",
            callbacks=[Pruning(trial)],
            test=False,
        )
        return float(metrics["val_accuracy"])

    done = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    stop = optuna.study.MaxTrialsCallback(trials, states=done)
    if sum(trial.state in done for trial in study.trials) < trials:
        study.optimize(objective, callbacks=[stop], catch=(RunError,))
    return study
