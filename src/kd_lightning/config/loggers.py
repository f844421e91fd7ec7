"""Validation of the configured loggers."""

import importlib.util
import inspect
from typing import Any

from kd_lightning.config.nodes import check_node, find_target
from kd_lightning.errors import InputError


def check_loggers(nodes: Any) -> None:
    """Check the `logger` section of a configuration.

    Args:
        nodes: name to `_target_` node.

    Raises:
        InputError: a node is invalid, is not a logger, or needs a package that is not installed.
    """
    from lightning.pytorch.loggers import Logger, MLFlowLogger, WandbLogger  # takes seconds

    # Extras of the same name.
    packages: dict[type[Logger], str] = {WandbLogger: "wandb", MLFlowLogger: "mlflow"}
    if not isinstance(nodes, dict):
        raise InputError(f"logger must be names with a _target_ node each, not {nodes!r}")
    for name, node in nodes.items():
        path = f"logger.{name}"
        check_node(node, path, {"save_dir", "root_dir"})  # given by `engine.loggers`
        target = find_target(node["_target_"], path)
        if not inspect.isclass(target):
            continue  # a function; what it returns is checked when it is called
        if not issubclass(target, Logger):
            raise InputError(
                f"{path} must be a lightning.pytorch.loggers.Logger, not {node['_target_']}"
            )
        for kind, package in packages.items():
            if issubclass(target, kind) and importlib.util.find_spec(package) is None:
                raise InputError(
                    f"{path} needs the package {package}: pip install -e '.[{package}]'"
                )
