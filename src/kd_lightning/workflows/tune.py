"""Hyper-parameter search with Optuna on validation accuracy; resumable, with parallel workers."""

import contextlib
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import optuna
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import SQLAlchemyError

from kd_lightning.config import overrides as rules
from kd_lightning.config.checks import check_sections
from kd_lightning.config.commandline import check_overrides
from kd_lightning.config.complete import plain
from kd_lightning.config.naming import config_key, register
from kd_lightning.config.nodes import Node, select
from kd_lightning.config.tree import tree_folder
from kd_lightning.errors import InputError, RunError
from kd_lightning.files import tidy
from kd_lightning.workflows.student import run

FAILURES = 3
"""How many trials may fail in a row before a search ends."""

DONE = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)


class Range(NamedTuple):
    """Search range of a number."""

    low: float
    high: float
    log: bool = False


TEMPERATURE = Range(1.0, 20.0, log=True)
WIDTH = 30.0
"""Factor by which the weight of a term without a range of its own may change in a search."""

# Default search space: key to range.
SPACE = {
    "optimizer.lr": Range(0.02, 0.3, log=True),
    "method.terms.logit.temperature": TEMPERATURE,
    "method.terms.cross_entropy.weight": Range(0.0, 1.0),
    "method.terms.logit.weight": Range(0.05, 2.0, log=True),
    "method.terms.attention.weight": Range(3.0, 3000.0, log=True),
}


def parse_range(text: str) -> tuple[str, Range]:
    """Parse `KEY=LOW:HIGH`, such as `optimizer.lr=0.01:0.3:log` or `...temperature=1:8`.

    Raises:
        InputError: it has another format.
    """
    found = re.fullmatch(r"([\w.]+)=([-+.\de]+):([-+.\de]+)(:log)?", text)
    with contextlib.suppress(ValueError):
        if found:
            low, high, log = float(found[2]), float(found[3]), bool(found[4])
            if low < high and (low > 0 or not log):
                return found[1], Range(low, high, log)
    raise InputError(f"--space {text}: write KEY=LOW:HIGH, or KEY=LOW:HIGH:log with LOW above 0")


def default_space(config: Node) -> dict[str, Range]:
    """The part of `SPACE` that exists in this configuration, and the weights and temperatures of
    other terms; weights only with several terms. Terms of weight 0 are left as they are, except
    those whose range contains 0.

    Every range contains the configured value.
    """
    space: dict[str, Range | None] = {}
    for key, usual in SPACE.items():
        with contextlib.suppress(KeyError):
            space[key] = _around(_number(config, key), usual)
    for name, term in config["method"]["terms"].items():
        path, weight = f"method.terms.{name}", float(term["weight"])
        if weight > 0:
            space.setdefault(f"{path}.weight", Range(weight / WIDTH, weight * WIDTH, log=True))
        temperature = term.get("temperature")
        if weight == 0:
            space[f"{path}.temperature"] = None
        elif isinstance(temperature, int | float) and temperature >= TEMPERATURE.low:
            # Not that of contrastive terms.
            space.setdefault(f"{path}.temperature", _around(temperature, TEMPERATURE))
    several = len(config["method"]["terms"]) > 1
    return {
        key: values
        for key, values in space.items()
        if values is not None and (several or not key.endswith(".weight"))
    }


def _around(value: float, usual: Range) -> Range | None:
    """The usual range of a number, or one of the same width around it; none for 0 in a log range.

    A range without `log` is extended.
    """
    if usual.low <= value <= usual.high:
        return usual
    if not usual.log:
        return Range(min(value, usual.low), max(value, usual.high))
    factor = math.sqrt(usual.high / usual.low)
    return Range(value / factor, value * factor, log=True) if value > 0 else None


class Pruning(Callback):
    """Prunes unpromising trials by their validation accuracy so far."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial = trial

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Report the accuracy, and stop if the trial is pruned."""
        if trainer.state.fn == "fit":
            value = float(trainer.callback_metrics["val/accuracy"])
            self.trial.report(value, trainer.current_epoch + 1)
            if self.trial.should_prune():
                raise optuna.TrialPruned


class GiveUp:
    """Ends a search in which all trials fail: failed trials do not count."""

    def __init__(self) -> None:
        self._failed = 0  # in a row

    def __call__(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        """Count the trial.

        Raises:
            RunError: `FAILURES` trials in a row have failed.
        """
        self._failed = 0 if trial.state in DONE else self._failed + 1
        if self._failed == FAILURES:
            raise RunError(
                f"{FAILURES} trials in a row have failed, the last one with: "
                f"{trial.user_attrs.get('error', 'no accuracy')}"
            )


def override(key: str, value: float) -> str:
    """`KEY=VALUE` for the command line, with the digits that a trial is trained with."""
    return f"{key}={value:.6g}"


def tune(
    overrides: Sequence[str],
    trials: int,
    storage: str | None = None,
    space: Mapping[str, Range] | None = None,
    name: str | None = None,
) -> optuna.Study:
    """Search until the study has this many trials; an existing study is resumed.

    The first trial is the unmodified configuration, so that the best trial is never worse; a number
    outside its `space` is moved to the nearest end.

    Args:
        overrides: command-line overrides, as for `train.py`.
        trials: number of finished or pruned trials, including those of earlier and other workers.
        storage: any Optuna storage URL; by default an SQLite file below `output_dir`.
        space: key to range; by default the applicable part of `SPACE`.
        name: name of the study; by default from method, student, setting and a hash of the
            configuration.

    Raises:
        InputError: the configuration is invalid, or not that of the existing study.
        RunError: several trials in a row have failed.
    """
    register()
    rules.install()
    overrides = check_overrides(overrides)

    def composed(extra: Sequence[str] = ()) -> Node:
        with initialize_config_dir(tree_folder(), version_base="1.3"):
            whole = [*overrides, *extra]
            node = plain(compose("train", whole), whole)
        check_sections(node)
        return node

    config = composed()
    key = config_key(config)
    if space:
        key = hashlib.sha256(f"{key} {sorted(space.items())}".encode()).hexdigest()
    space = dict(space or default_space(config))
    composed([override(path, space[path].low) for path in space])  # there must be such keys
    given = {path: _number(config, path) for path in space}  # of the unmodified configuration
    start = tidy(f"{config['method']['name']}-{config['student']['name']}-{config['setting']}")
    name = name or f"{start}-{key[:8]}"
    folder = Path(config["output_dir"]) / "tuning"
    folder.mkdir(parents=True, exist_ok=True)
    storage = storage or f"sqlite:///{folder / 'studies.db'}"
    study = _open_study(storage, name, key, config["trainer"]["max_epochs"])

    if not study.trials:
        study.enqueue_trial({key: min(max(given[key], r.low), r.high) for key, r in space.items()})

    def objective(trial: optuna.Trial) -> float:
        config = composed(
            [
                override(key, trial.suggest_float(key, r.low, r.high, log=r.log))
                for key, r in space.items()
            ]
        )
        # With the hash, because the folders may outlast the study, whose numbers then start again.
        place = folder / name / f"trial-{trial.number:04d}-{config_key(config)[:8]}"
        try:
            metrics = run(config, place, callbacks=[Pruning(trial)], test=False)
        except RunError as error:
            trial.set_user_attr("error", str(error))
            raise
        return float(metrics["val_accuracy"])

    stop = optuna.study.MaxTrialsCallback(trials, states=DONE)
    if sum(trial.state in DONE for trial in study.trials) < trials:
        study.optimize(objective, callbacks=[stop, GiveUp()], catch=(RunError,))
    return study


def _number(config: Node, key: str) -> float:
    value = select(config, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"--space {key}: its value is not a number: {value}")
    return float(value)


def _open_study(storage: str, name: str, key: str, epochs: int) -> optuna.Study:
    """Create or load a study.

    Args:
        storage: URL.
        name: of the study.
        key: hash of the configuration and of a given space, stored with the study.
        epochs: of every trial.

    Raises:
        InputError: the existing study is of another configuration, or the storage cannot be used.
    """
    # High learning rates lag behind in the first half of the epochs, but may win in the end.
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=epochs // 2)
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="maximize",
            load_if_exists=True,
            pruner=pruner,
        )
    except (SQLAlchemyError, StorageInternalError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the studies in {storage} cannot be opened: {reason}") from error
    known = study.user_attrs.get("config_key")
    if known is None and not study.trials:
        study.set_user_attr("config_key", key)
    elif known != key:
        raise InputError(
            f"the study {name} is of another configuration or --space; choose another name by "
            "--study"
        )
    return study
