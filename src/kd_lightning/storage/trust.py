"""Which code a `_target_` in a file on disk may name."""

from collections.abc import Iterable
from typing import Any

from kd_lightning.config.nodes import Node, find_target
from kd_lightning.errors import InputError

# A `_target_` in a file on disk is honoured only if it names a class or function defined in one of
# these packages: what a stranger's file names must not be able to run anything else.
TRUSTED = (
    "kd_lightning.models",
    "kd_lightning.data",
    "kd_lightning.losses",
    "kd_lightning.schedules",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
)


def check_trusted(node: Node, path: str, trust: Iterable[str] = ()) -> None:
    """Check that a node read from a file may be built.

    Args:
        node: with any nodes in it.
        path: what to call it.
        trust: packages and modules of one's own, whose classes and functions may be used too.

    Raises:
        InputError: a target in it, wherever its name leads, is not defined in a trusted package.
    """
    packages = (*TRUSTED, *trust)

    def trusted(name: str) -> bool:
        return name.startswith(tuple(f"{package}." for package in packages))

    for nested in _targets(node):
        # Nothing else is even imported. But the name alone proves nothing:
        # `kd_lightning.models.convnet.nn.Module` walks elsewhere.
        if not trusted(nested) or not trusted(
            f"{getattr(find_target(nested, path), '__module__', '')}."
        ):
            raise InputError(
                f"{path}._target_={nested} is not in {', '.join(packages)}: refused, because code "
                "named in a file from elsewhere could do anything; if it is yours, say so (trust)"
            )


def _targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [target for value in node.values() for target in _targets(value)]
    if isinstance(node, list):
        return [target for value in node for target in _targets(value)]
    return []
