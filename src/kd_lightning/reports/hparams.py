"""Logging of a run's settings and results: TensorBoard's HParams dashboard, and other loggers."""

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger, TensorBoardLogger
from tensorboard.plugins.hparams.plugin_data_pb2 import (  # type: ignore[import-untyped]
    HParamsPluginData,
)
from torch.utils.tensorboard.summary import hparams

from kd_lightning.config.nodes import Node
from kd_lightning.config.plan import Plan


def log_settings(loggers: Iterable[Logger], plan: Plan) -> None:
    """Log the run's settings at its beginning; TensorBoard needs them together with the results."""
    for logger in loggers:
        if not isinstance(logger, TensorBoardLogger):
            first, others = _settings(plan)
            epochs = plan.student.trainer.arguments["max_epochs"]
            first["terms"] = first.pop(_TERMS)  # MLflow does not accept a comma in a name
            # Lightning logs the arguments of the module as `student`, `terms`, ...
            logger.log_hyperparams({"run": {**first, **others, "max_epochs": epochs}})


def log_results(
    loggers: Iterable[Logger], plan: Plan, results: Mapping[str, Any], step: int
) -> None:
    """Log the run's final accuracies, and for TensorBoard its settings; see `log_hparams`."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            log_hparams(logger, plan, results, step)
        else:
            logger.log_metrics(_final(results), step=step)
            logger.save()


def log_hparams(
    logger: TensorBoardLogger, plan: Plan, results: Mapping[str, Any], step: int
) -> None:
    """Log the run's settings and results.

    By default the dashboard shows five columns, those marked as differing first, in alphabetical
    order, and takes the columns from an arbitrary run. So every run marks the same five: method,
    seed, student, teacher, and the weights of the terms with their temperature.

    Args:
        logger: logger of the run.
        plan: plan of the run.
        results: accuracies and epochs.
        step: last step of the training.
    """
    first, others = _settings(plan)
    settings, final = {**first, **others, "epochs": results["epochs"]}, _final(results)
    logger.log_metrics(final, step=step)
    experiment, start, end = hparams(settings, final)
    plugin_data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in first
    plugin_data.content = content.SerializeToString()
    writer = logger.experiment._get_file_writer()
    for part in (experiment, start, end):
        writer.add_summary(part, step)
    logger.save()


_TERMS = "weights, temperature"


def _settings(plan: Plan) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings that identify a run in a grid, and others."""
    first: dict[str, Any] = {
        "method": plan.method,
        "student": plan.student.name,
        "seed": plan.student.seed,
        "teacher": plan.teacher_name if plan.teachers else "none",
        _TERMS: describe_terms(plan.student.terms),
    }
    others = {
        "batch_size": plan.data.node["batch_size"],
        "data": plan.data.name,
        "lr": rate if _is_number(rate := plan.student.optimizer.get("lr")) else None,
    }
    for name, term in plan.student.terms.items():
        others |= {f"{name}.{key}": value for key, value in term.items() if _is_number(value)}
    return first, {key: value for key, value in others.items() if value is not None}


def _final(results: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("val_accuracy", "test_accuracy")
    return {f"final/{key}": results[key] for key in keys if key in results}


def describe_terms(terms: Mapping[str, Node]) -> str:
    """Weights and temperature of a method: `0.6 1.1 T=5: cross_entropy logit`.

    The dashboard shows about 15 characters, so the numbers come first.
    """
    numbers = [f"{term['weight']:.3g}" for term in terms.values()]
    temperatures = [term.get("temperature") for term in terms.values()]  # or a schedule
    numbers += [f"T={value:.3g}" for value in temperatures if _is_number(value)]
    return f"{' '.join(numbers)}: {' '.join(terms)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
