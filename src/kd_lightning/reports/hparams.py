"""Logging of a run to TensorBoard's HParams dashboard."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.hparams.plugin_data_pb2 import (  # type: ignore[import-untyped]
    HParamsPluginData,
)
from torch.utils.tensorboard.summary import hparams

from kd_lightning.config.nodes import Node
from kd_lightning.config.plan import Plan


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
    first: dict[str, Any] = {
        "method": plan.method,
        "student": plan.student.name,
        "seed": plan.student.seed,
        "teacher": plan.teacher_name if plan.teachers else "none",
        "weights, temperature": describe_terms(plan.student.terms),
    }
    others = {
        "batch_size": plan.data.node["batch_size"],
        "data": plan.data.name,
        "epochs": results["epochs"],
        "lr": plan.student.optimizer.get("lr"),
    }
    for name, term in plan.student.terms.items():
        others |= {f"{name}.{key}": value for key, value in term.items() if _is_number(value)}
    settings = {**first, **others}
    settings = {key: value for key, value in settings.items() if value is not None}
    final = {
        f"final/{key}": results[key] for key in ("val_accuracy", "test_accuracy") if key in results
    }
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


def describe_terms(terms: Mapping[str, Node]) -> str:
    """Weights and temperature of a method: `0.6 1.1 T=5: cross_entropy logit`.

    The dashboard shows about 15 characters, so the numbers come first.
    """
    numbers = [f"{term['weight']:.3g}" for term in terms.values()]
    numbers += [f"T={term['temperature']:.3g}" for term in terms.values() if "temperature" in term]
    return f"{' '.join(numbers)}: {' '.join(terms)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
