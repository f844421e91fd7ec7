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
        InputError: a target, after resolving its name, is not a public class or function of a
            trusted package; or a value is an interpolation, which could become a target.
    """
    own = tuple(trust)
    for name in _targets(node, path):
        if name not in NAMED and not _trusted(name, path, own):
            raise InputError(
                f"{path}._target_={name} is not in {', '.join((*TRUSTED, *own))}, or private or a "
                "method there: rejected, because untrusted files could run arbitrary code; if it "
                "is your own code, trust its package by name: --trust PACKAGE, or trust=[PACKAGE] "
                "in Python"
            )


def _trusted(name: str, path: str, own: tuple[str, ...]) -> bool:
    # Untrusted names are not even imported.
    if not _within(name, (*TRUSTED, *own)):
        return False
    # The name alone is not sufficient, as `kd_lightning.models.convnet.nn.Module` is defined
    # elsewhere.
    found = find_target(name, path)
    module = f"{getattr(found, '__module__', '')}."
    if _within(name, own):
        return _within(module, (*TRUSTED, *own))
    # Private functions, and methods of any object that a file describes, may read other files.
    private = any(part.startswith("_") for part in name.split("."))
    method = "." in getattr(found, "__qualname__", "")
    return _within(module, TRUSTED) and not private and not method


def _within(name: str, packages: Iterable[str]) -> bool:
    return name.startswith(tuple(f"{package}." for package in packages))


def _targets(node: Any, path: str) -> list[str]:
    if isinstance(node, dict):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [target for value in node.values() for target in _targets(value, path)]
    if isinstance(node, list | tuple):  # tuples in checkpoints
        return [target for value in node for target in _targets(value, path)]
    if isinstance(node, str) and "${" in node:
        raise InputError(
            f"{path} contains the interpolation {node!r}: rejected, because a run writes values "
            "only, and untrusted files could run arbitrary code"
        )
    return []
