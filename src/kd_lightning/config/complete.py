"""Completion of a composed configuration, and its conversion to plain dictionaries."""

from collections.abc import Sequence
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from kd_lightning.config.earlier_run import fill_in_runs
from kd_lightning.config.members import add_terms, expand_members
from kd_lightning.config.nodes import Node
from kd_lightning.config.packed import fill_in_packed
from kd_lightning.errors import InputError
from kd_lightning.files import home


def plain(config: DictConfig, overrides: Sequence[str] = ()) -> Node:
    """Convert a configuration to plain dictionaries, with interpolations resolved, and the members
    of an ensemble, a packed teacher, or one that is a run's student completed.

    Args:
        config: composed, with interpolations.
        overrides: of the command.

    Raises:
        InputError: a value is missing (``???``), or an interpolation cannot be resolved.
    """
    try:
        config = fill_in_runs(expand_members(fill_in_packed(config)), overrides, plain)
        config = add_terms(config)
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "the configuration"
        reason = str(error).splitlines()[0]
        if "Missing mandatory value" in reason:
            if isinstance(error, InterpolationToMissingValueError):
                # The missing key, not the one that refers to it.
                key = reason.rpartition("Missing mandatory value: ")[2]
            raise InputError(f"{key} must be given: add {key}=VALUE to the command") from error
        raise InputError(f"{key}: {reason}") from error
    return cast(Node, _expand_home(resolved))


def _expand_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _expand_home(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_expand_home(part) for part in value]
    return home(value) if isinstance(value, str) else value
