"""Members of an ensemble of teachers: `teacher.members` to complete teacher sections.

teacher=ensemble 'teacher.members=[resnet9,resnet20]'          choices of the group teacher
teacher=resnet9 'teacher.members=[{seed: 0},{seed: 1}]'        changes of the configured teacher
"""

import copy
from typing import Any, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from kd_lightning.config.nodes import Node, without
from kd_lightning.config.overrides import merge, no_such_choice
from kd_lightning.errors import InputError


def expand_members(config: DictConfig) -> DictConfig:
    """A configuration in which every member of the ensemble is a complete teacher section.

    The terms of the method, which may refer to the layers of the teacher, are added to a member if
    they differ. Without members, the configuration itself.

    Args:
        config: composed, with interpolations.

    Raises:
        InputError: a member is neither a choice nor a dictionary, or the choice does not exist.
    """
    members = OmegaConf.select(config, "teacher.members")
    if members is None:
        return config
    if not isinstance(members, ListConfig) or not len(members):
        raise InputError(
            "teacher.members must be a list of teachers, as [resnet9,resnet20] or "
            f"[{{seed: 0}},{{seed: 1}}], not {members}"
        )
    folder = {key: config[key] for key in ("setting", "name")}  # as composed: that of the run
    config = copy.deepcopy(config)
    sections = [_section(config, member, number) for number, member in enumerate(members)]
    names = [str(section.get("name")) for section in sections]
    with open_dict(config):
        config.merge_with(folder)
        if len(set(names)) == 1:
            config.teacher.name = f"{names[0]} x{len(names)}"
        elif config.teacher.name == "ensemble":
            config.teacher.name = "+".join(names)
        if not config.teacher.layers:
            config.teacher.layers = sections[0].get("layers")
        common = OmegaConf.to_container(config.method.terms, resolve=True)
        for section in sections:
            alone = copy.deepcopy(config)
            alone.teacher = section
            terms = OmegaConf.to_container(alone.method.terms, resolve=True)
            if terms != common:
                section["terms"] = terms
        config.teacher.members = sections
    return config


def _section(config: DictConfig, member: Any, number: int) -> Node:
    """The section of a member, with interpolations."""
    if isinstance(member, str):
        loader = GlobalHydra.instance().config_loader()
        if member not in (options := loader.get_group_options("teacher")):
            raise InputError(no_such_choice(f"teacher.members[{number}]", member, options))
        chosen = loader.load_configuration("train", [f"teacher={member}"], RunMode.RUN)
        section = OmegaConf.to_container(chosen.teacher)
    elif isinstance(member, DictConfig):
        whole = OmegaConf.create({"teacher": OmegaConf.to_container(config.teacher)})
        merge(whole, ["teacher"], cast(Node, OmegaConf.to_container(member)))
        section = OmegaConf.to_container(whole.teacher)
    else:
        raise InputError(
            f"teacher.members[{number}] must be a choice of the group teacher, or a dictionary of "
            f"changes, as {{seed: 1}}, not {member}"
        )
    return without(cast(Node, section), "members", "average")
