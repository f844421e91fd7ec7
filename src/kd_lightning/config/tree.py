"""Location of the configuration tree, and conversion of configurations to plain dictionaries."""

from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd_lightning.config.members import expand_members
from kd_lightning.config.nodes import Node
from kd_lightning.config.packed import fill_in_packed
from kd_lightning.errors import InputError
from kd_lightning.files import home


def tree() -> str:
    """Hydra's search path of the configuration tree: in a checkout, else in the installed wheel."""
    checkout = Path(__file__).resolve().parents[3] / "configs"
    return str(checkout) if checkout.is_dir() else "pkg://kd_lightning.configs"


def tree_folder() -> str:
    """The configuration tree as a folder, for `hydra.initialize_config_dir`."""
    address = tree()
    return str(Path(__file__).parents[1] / "configs") if address.startswith("pkg://") else address


def plain(config: DictConfig) -> Node:
    """Convert a configuration to plain dictionaries, with interpolations resolved, and the members
    of an ensemble or a packed teacher completed.

    Raises:
        InputError: a value is missing (``???``), or an interpolation cannot be resolved.
    """
    try:
        resolved = OmegaConf.to_container(
            expand_members(fill_in_packed(config)), resolve=True, throw_on_missing=True
        )
    except OmegaConfBaseException as error:
        key = error.full_key or "the configuration"
        reason = str(error).splitlines()[0]
        if "Missing mandatory value" in reason:
            raise InputError(f"{key} must be given: add {key}=VALUE to the command") from error
        raise InputError(f"{key}: {reason}") from error
    return cast(Node, _expand_home(resolved))


def _expand_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_expand_home(part) for part in value]
    return home(value) if isinstance(value, str) else value
