"""Construction of learning-rate schedulers, torch's or ours, from their nodes."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, LRScheduler, ReduceLROnPlateau

from kd_lightning.config.checks import TOTAL_STEPS
from kd_lightning.config.nodes import Node, build_partial, takes, without
from kd_lightning.errors import InputError


class Schedule(NamedTuple):
    """A scheduler and its stepping interval."""

    scheduler: LRScheduler
    interval: Literal["step", "epoch"]


def build_schedule(
    node: Node, optimizer: Optimizer, total_steps: int, path: str = "scheduler"
) -> Schedule:
    """Build a scheduler from its `_target_` node.

    A scheduler with a parameter ``total_steps`` (or ``num_training_steps``, as in transformers)
    receives the total number of optimizer steps, unless the node sets it. It is stepped after every
    optimizer step, and so is `CyclicLR`; all others are stepped after every epoch. A composite
    scheduler (`SequentialLR`, `ChainedScheduler`) is stepped after every optimizer step if one of
    its parts is.

    Args:
        node: its `_target_` node, without the optimizer, also in nested nodes.
        optimizer: the optimizer.
        total_steps: total number of optimizer steps.
        path: the node's path in the configuration, for messages.

    Raises:
        InputError: the scheduler rejects its arguments.
    """
    steps = [name for name in TOTAL_STEPS if takes(node, name, path)]
    given: dict[str, Any] = {"optimizer": optimizer}
    given |= {name: node.get(name, total_steps) for name in steps}
    by_step = bool(steps)

    def built(value: Any, place: str) -> Any:
        nonlocal by_step
        if isinstance(value, list):
            return [built(part, f"{place}[{number}]") for number, part in enumerate(value)]
        if not _is_scheduler(value, place):
            return value
        inner = build_schedule(value, optimizer, total_steps, place)
        if isinstance(inner.scheduler, ReduceLROnPlateau):
            raise InputError(f"{place}: ReduceLROnPlateau cannot be part of another scheduler")
        by_step = by_step or inner.interval == "step"
        return inner.scheduler

    inner = {
        key: built(value, f"{path}.{key}") for key, value in node.items() if _holds(value, path)
    }
    scheduler = build_partial(without(node, *TOTAL_STEPS, *inner), path)(**given, **inner)
    if not isinstance(scheduler, LRScheduler):
        raise InputError(f"{path} must be a learning-rate scheduler, not {node['_target_']}")
    by_step = by_step or isinstance(scheduler, CyclicLR)
    return Schedule(scheduler, "step" if by_step else "epoch")


def step_on_plateau(scheduler: Any, validated: Mapping[str, float]) -> None:
    """Step `ReduceLROnPlateau` with the validation loss, or accuracy if the mode is ``max``.

    Args:
        scheduler: the scheduler; others are ignored.
        validated: ``val/loss`` and ``val/accuracy``.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(validated["val/accuracy" if scheduler.mode == "max" else "val/loss"])


def _is_scheduler(value: Any, path: str) -> bool:
    return isinstance(value, dict) and "_target_" in value and takes(value, "optimizer", path)


def _holds(value: Any, path: str) -> bool:
    """Whether a value of a node is a scheduler, or a list that contains one."""
    if isinstance(value, list):
        return any(_is_scheduler(part, path) for part in value)
    return _is_scheduler(value, path)
