"""Restricts which code a `_target_` in a file on disk may refer to."""

from collections.abc import Iterable
from typing import Any

from kd_lightning.config.nodes import Node, find_target
from kd_lightning.config.packed import NETWORK
from kd_lightning.errors import InputError

# A `_target_` in a file on disk is accepted only if it is a class or function defined in one of
# these packages, so that an untrusted file cannot run arbitrary code.
TRUSTED = (
    "kd_lightning.models",
    "kd_lightning.data",
    "kd_lightning.losses",
    "kd_lightning.schedules",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
)
NAMED = ("lightning.pytorch.Trainer", NETWORK)
"""Classes elsewhere that configurations of runs name, without side effects when constructed."""


def check_trusted(node: Node, path: str, trust: Iterable[str] = ()) -> None:
    """Check that a node read from a file may be instantiated.

    Args:
        node: the node, possibly nested.
        path: its path, for messages.
        trust: your own packages and modules to trust in addition.

    Raises:
        InputError: a target, after resolving its name, is not defined in a trusted package.
    """
    packages = (*TRUSTED, *trust)

    def trusted(name: str) -> bool:
        return name.startswith(tuple(f"{package}." for package in packages))

    for nested in _targets(node):
        if nested in NAMED:
            continue
        # Untrusted names are not even imported. The name alone is not sufficient, as
        # `kd_lightning.models.convnet.nn.Module` is defined elsewhere.
        if not trusted(nested) or not trusted(
            f"{getattr(find_target(nested, path), '__module__', '')}."
        ):
            raise InputError(
                f"{path}._target_={nested} is not in {', '.join(packages)}: rejected, because "
                "untrusted files could run arbitrary code; if it is your own code, trust its "
                "package by name: --trust PACKAGE, or trust=[PACKAGE] in Python"
            )


def _targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [target for value in node.values() for target in _targets(value)]
    if isinstance(node, list):
        return [target for value in node for target in _targets(value)]
    return []
