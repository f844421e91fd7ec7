"""User callbacks: Lightning's or your own, given in the configuration."""

from collections.abc import Mapping

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    DeviceStatsMonitor,
    LearningRateFinder,
    LearningRateMonitor,
)

from kd_lightning.config.nodes import Node, build
from kd_lightning.errors import InputError

METRICS = ("val/accuracy", "val/loss", "train/accuracy", "images_per_second")
"""Metrics logged once per epoch, for callbacks that monitor one."""


def build_callbacks(nodes: Mapping[str, Node]) -> list[Callback]:
    """Build callbacks from their `_target_` nodes.

    Args:
        nodes: name to node. A callback's state is saved in checkpoints under its name.

    Raises:
        InputError: one cannot be built, is not a callback, or would change the configuration.
    """
    callbacks = []
    for name, node in nodes.items():
        callback = build(node, f"callbacks.{name}")
        if not isinstance(callback, Callback):
            raise InputError(
                f"callbacks.{name} must be a lightning.pytorch.Callback, not {node['_target_']}"
            )
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise InputError(
                f"callbacks.{name}: {type(callback).__name__} changes settings that identify the "
                "run; tune them with scripts/tune.py instead"
            )
        callbacks.append(_named(callback, name))
    # A user-defined callback may log further metrics.
    if all(type(callback).__module__.startswith("lightning.") for callback in callbacks):
        for name, callback in zip(nodes, callbacks, strict=True):
            monitor = getattr(callback, "monitor", None)
            if monitor not in (None, *METRICS):
                raise InputError(
                    f"callbacks.{name}.monitor: there is no metric {monitor}; choose from "
                    f"{', '.join(METRICS)}"
                )
    return callbacks


def check_logged(callbacks: Mapping[str, Callback], loggers: Mapping[str, Node]) -> None:
    """Check that there is a logger for callbacks that do nothing but log.

    Raises:
        InputError: there is none.
    """
    for name, callback in callbacks.items():
        if not loggers and isinstance(callback, LearningRateMonitor | DeviceStatsMonitor):
            raise InputError(
                f"callbacks.{name} has nothing to log to with logger=none: choose another logger "
                "or omit the callback"
            )


def _named(callback: Callback, name: str) -> Callback:
    """Give the callback a unique state key; by default two of one class may share theirs."""
    own = type(callback)
    key = property(lambda self: f"callbacks.{name}")
    callback.__class__ = type(
        own.__name__, (own,), {"state_key": key, "__module__": own.__module__}
    )
    return callback
