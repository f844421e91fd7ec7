"""Members of an ensemble of teachers: `teacher.members` to complete teacher sections.

teacher=ensemble 'teacher.members=[resnet9,resnet20]'          choices of the group teacher
teacher=resnet9 'teacher.members=[{seed: 0},{seed: 1}]'        changes of the configured teacher
"""

import copy
from typing import Any, cast

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from kd_lightning.config.nodes import Node, without
from kd_lightning.config.overrides import merge, no_such_choice
from kd_lightning.errors import InputError


def expand_members(config: DictConfig) -> DictConfig:
    """A configuration in which every member of the ensemble is a complete teacher section.

    Without members, the configuration itself.

    Args:
        config: composed, with interpolations.

    Raises:
        InputError: a member is neither a choice nor a dictionary, or the choice does not exist.
    """
    members = OmegaConf.select(config, "teacher.members")
    if members is None:
        if OmegaConf.select(config, "teacher.name") == "ensemble":
            raise InputError("teacher=ensemble needs teacher.members, as [resnet9,resnet20]")
        return config
    if not isinstance(members, ListConfig) or not len(members):
        raise InputError(
            "teacher.members must be a list of teachers, as [resnet9,resnet20] or "
            f"[{{seed: 0}},{{seed: 1}}], not {members}"
        )
    folder = {key: config[key] for key in ("setting", "name")}  # as composed: that of the run
    config = copy.deepcopy(config)
    sections = [_section(config, member, number) for number, member in enumerate(members)]
    for number, section in enumerate(sections):
        if (same := sections.index(section)) < number:
            raise InputError(
                f"teacher.members[{number}] is the same as teacher.members[{same}]; for another "
                "teacher of the same recipe give it another seed, as {seed: 1}"
            )
    names = [str(section.get("name")) for section in sections]
    with open_dict(config):
        config.merge_with(folder)
        if len(set(names)) == 1:
            config.teacher.name = f"{names[0]} x{len(names)}"
        elif config.teacher.name == "ensemble":
            config.teacher.name = "+".join(names)
        config.teacher.members = sections
    return config


def add_terms(config: DictConfig) -> DictConfig:
    """Add the terms of the method to each member for which they differ, because they refer to the
    layers of the teacher; those of the ensemble are by default those of its first member.

    Args:
        config: with complete members; changed in place.
    """
    members = OmegaConf.select(config, "teacher.members") or []
    with open_dict(config):
        if members and not config.teacher.layers:
            config.teacher.layers = members[0].get("layers")
        common = OmegaConf.to_container(config.method.terms, resolve=True) if members else {}
        for member in members:
            alone = copy.deepcopy(config)
            alone.teacher = copy.deepcopy(member)
            terms = OmegaConf.to_container(alone.method.terms, resolve=True)
            if terms != common:
                member["terms"] = terms
    return config


def _section(config: DictConfig, member: Any, number: int) -> Node:
    """The section of a member, with interpolations."""
    path, configured = f"teacher.members[{number}]", _plain(config.teacher)
    if isinstance(member, str):
        if "=" in member:
            key, _, value = member.partition("=")
            raise InputError(f"{path}={member}: write {{{key}: {value}}}")
        if member not in (options := _loader().get_group_options("teacher")):
            raise InputError(no_such_choice(path, member, options))
        if member == "ensemble":
            raise InputError(f"{path}: a member cannot be an ensemble itself")
        if configured["model"] is not None:
            raise InputError(
                f"{path}={member} is a choice of the group teacher: select teacher=ensemble too"
            )
        section, changes = _choice(member), _changes(configured, _choice("ensemble"))
    elif isinstance(member, DictConfig):
        section, changes = configured, _plain(member)
        if changes.get("members") is not None:
            raise InputError(f"{path}: a member cannot be an ensemble itself")
    else:
        raise InputError(
            f"{path} must be a choice of the group teacher, or a dictionary of changes, as "
            f"{{seed: 1}}, not {member}"
        )
    whole = OmegaConf.create({"teacher": section})
    merge(whole, ["teacher"], changes)
    completed = _plain(whole.teacher)
    if completed["model"] is None and completed.get("run") is None:
        raise InputError(
            f"{path} has no model: name a choice, as resnet9, or select the teacher that "
            f"{member} changes, as teacher=resnet9"
        )
    return without(completed, "members", "average")


def _loader() -> ConfigLoader:
    return GlobalHydra.instance().config_loader()


def _choice(name: str) -> Node:
    """A choice of the group teacher, with interpolations."""
    choices = [f"teacher={name}"]
    return _plain(_loader().load_configuration(config_name(), choices, RunMode.RUN).teacher)


def config_name() -> str:
    """The name of the primary configuration, `--config-name` of the command."""
    given = HydraConfig.get().job.config_name if HydraConfig.initialized() else None
    return given or "train"


def _plain(section: DictConfig) -> Node:
    return cast(Node, OmegaConf.to_container(section))


def _changes(section: Node, unchanged: Node) -> Node:
    """What was changed in the section of the ensemble, for all members: `teacher.seed=5`."""
    found: Node = {}
    for key, value in section.items():
        before = unchanged.get(key)
        if key in ("members", "average", "name", "layers") or value == before:
            continue
        if isinstance(value, dict) and isinstance(before, dict):
            found[key] = _changes(value, before)
        else:
            found[key] = value
    return found
