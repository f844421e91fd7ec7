"""Restricts which code a `_target_` in a file on disk may refer to.

An untrusted file must not run arbitrary code. So it may name only networks, data sets, loss terms,
optimizers and schedulers of these packages, which do nothing but what they are for: not any
function there, of which some load files or import modules that their arguments name.
"""

import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from kd_lightning.config.nodes import Node, find_target
from kd_lightning.config.packed import NETWORK
from kd_lightning.errors import InputError

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

FUNCTIONS = ("kd_lightning.schedules", "torch.nn.functional", "torch.nn.init")
"""Modules of which public functions are accepted, too."""

BUILDERS = ("kd_lightning.models.named.timm_model", "kd_lightning.models.named.torchvision_model")

SETTINGS = (
    "torchvision.models.convnext.CNBlockConfig",
    "torchvision.models.efficientnet.FusedMBConvConfig",
    "torchvision.models.efficientnet.MBConvConfig",
    "torchvision.models.mobilenetv3.InvertedResidualConfig",
    "torchvision.models.regnet.BlockParams",
    "torchvision.models.vision_transformer.ConvStemConfig",
)
"""Classes of numbers that networks of torchvision are built from."""

_WEIGHTS = ("weights", "weights_backbone", "pretrained", "pretrained_backbone")
"""Arguments by which a builder of torchvision reads a pickled file, or downloads it."""

_ARGUMENTS = ("hyper_parameters", "hparams", "module_arguments")  # the last two: of old versions

_VALUES = (str, int, float, type(None))


def check_trusted(node: Node, path: str, trust: Iterable[str] = ()) -> None:
    """Check that a node read from a file may be instantiated.

    Args:
        node: the node, possibly nested.
        path: its path, for messages.
        trust: your own packages and modules to trust in addition.

    Raises:
        InputError: a target, after resolving its name, is not a network, a data set, a loss term,
            an optimizer or a scheduler of a trusted package; or a value is an interpolation, which
            could become a target, or none that a run writes.
    """
    own = tuple(trust)
    for nested in _nodes(node, path):
        name = str(nested["_target_"])
        if name not in NAMED and not _trusted(name, nested, path, own):
            raise InputError(
                f"{path}._target_={name} is not in {', '.join((*TRUSTED, *own))}, or is no "
                "network, data set, loss term, optimizer or scheduler there, or has pretrained "
                "weights: rejected, because untrusted files could run arbitrary code; if it is "
                "your own run, trust its package or module by name: --trust PACKAGE, or "
                "trust=[PACKAGE] in Python"
            )


def check_arguments(
    checkpoint: Any,
    trust: Iterable[str] = (),
    map_location: Any = None,
    hparams_file: object = None,
    *_: object,
    **__: object,
) -> None:
    """Check the arguments of a module that Lightning takes from a checkpoint.

    Args:
        checkpoint: its content.
        trust: see `check_trusted`.
        map_location: see `LightningModule.load_from_checkpoint`; not used.
        hparams_file: see there; not accepted, as it would replace what is checked.

    Raises:
        InputError: as `check_trusted`.
    """
    if hparams_file is not None:
        raise InputError("hparams_file is not supported: the arguments are those of the checkpoint")
    for key in _ARGUMENTS:
        arguments = checkpoint.get(key, {}) if isinstance(checkpoint, dict) else {}
        check_trusted(arguments, key, trust)
        if isinstance(arguments, dict) and "_instantiator" in arguments:  # names a function
            raise InputError(f"{key} contains _instantiator: rejected")


def _trusted(name: str, node: Node, path: str, own: tuple[str, ...]) -> bool:
    # Untrusted names are not even imported.
    if not _within(name, (*TRUSTED, *own)):
        return False
    # The name alone is not sufficient, as `kd_lightning.models.convnet.nn.Module` is defined
    # elsewhere.
    found = find_target(name, path)
    module = str(getattr(found, "__module__", ""))
    if _within(name, own) and _within(f"{module}.", own):
        return True
    qualified = str(getattr(found, "__qualname__", "."))
    if not _within(f"{module}.", TRUSTED) or "." in qualified or qualified.startswith("_"):
        return False
    if f"{module}.{qualified}" in (*BUILDERS, *SETTINGS) or module in FUNCTIONS:
        return True
    if inspect.isclass(found):
        return (
            _is_exported(found) if _within(module, ("kd_lightning",)) else _is_for_training(found)
        )
    with_weights = node.get("_args_") or any(node.get(key) for key in _WEIGHTS)
    return _builds_classifier(qualified, module) and not with_weights


def _is_exported(found: type) -> bool:
    """Whether a class is part of the public interface of one of this project's packages."""
    package = sys.modules[".".join(found.__module__.split(".")[:2])]
    return getattr(package, found.__name__, None) is found


def _is_for_training(found: type) -> bool:
    """Whether a class of torch or torchvision is a network, an optimizer or a scheduler."""
    from torch import nn, optim

    kinds = (nn.Module, optim.Optimizer, optim.lr_scheduler.LRScheduler)
    wraps_objects = found.__module__.startswith(("torch.nn.cpp", "torch.nn.parallel"))
    return issubclass(found, kinds) and not wraps_objects


def _builds_classifier(name: str, module: str) -> bool:
    """Whether a function is one of torchvision's that build a network for classification."""
    import torchvision

    models: Any = torchvision.models
    if not module.startswith("torchvision.models.") or name not in models.list_models(models):
        return False
    return str(models.get_model_builder(name).__module__) == module


def _within(name: str, packages: Iterable[str]) -> bool:
    return name.startswith(tuple(f"{package}." for package in packages))


def _nodes(node: Any, path: str) -> Iterator[Node]:
    """All nodes with a `_target_`."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from _nodes(value, path)
    elif isinstance(node, list | tuple):  # tuples in checkpoints
        for value in node:
            yield from _nodes(value, path)
    elif isinstance(node, str) and "${" in node:
        raise InputError(
            f"{path} contains the interpolation {node!r}: rejected, because a run writes values "
            "only, and untrusted files could run arbitrary code"
        )
    elif not isinstance(node, _VALUES):
        raise InputError(f"{path} contains {node!r}, which no run writes: rejected")
