"""The student of another run as teacher: born-again networks, teacher assistants, longer chains.

    teacher=run teacher.run=DIR                              of a finished run
    teacher=run 'teacher.run={method: none, student: large}' of the run with these overrides

The run of a dictionary has the other settings of the command (data, trainer, seed, ...), except
those of method and teacher, and of the student if it names another. It is trained first, unless it
is finished; its teacher may be the student of a further run.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from kd_lightning.config import naming
from kd_lightning.config.commandline import check_overrides, composition_error, hydra_text
from kd_lightning.config.finished import finished_elsewhere
from kd_lightning.config.members import config_name, expand_members
from kd_lightning.config.nodes import Node
from kd_lightning.config.packed import is_name
from kd_lightning.config.stored import read_config, student_data, student_model
from kd_lightning.config.trust import check_trusted
from kd_lightning.errors import InputError
from kd_lightning.files import home, read_json, tidy

_NOT_INHERITED = {"method", "teacher", "name", "setting"}
_EXAMPLE = "a run's folder, or overrides as {method: none, student: large}"


class EarlierRun(NamedTuple):
    """A run whose student is the teacher of another.

    Attributes:
        config: composed, with interpolations.
        overrides: of its command.
        folder: folder of the run.
    """

    config: DictConfig
    overrides: list[str]
    folder: Path


def earlier_runs(config: DictConfig, overrides: Sequence[str]) -> list[EarlierRun]:
    """The runs that have to be finished before a run, in this order.

    Args:
        config: of the run; composed, with interpolations.
        overrides: of its command.

    Raises:
        InputError: an override of such a run is invalid.
    """
    runs: list[EarlierRun] = []
    for section in sections(expand_members(config)):
        if isinstance(section.get("run"), DictConfig):
            run = _compose(section.run, overrides)
            runs += [*earlier_runs(run.config, run.overrides), run]
    return runs


def fill_in_runs(
    config: DictConfig,
    overrides: Sequence[str],
    plain: Callable[[DictConfig, Sequence[str]], Node],
) -> DictConfig:
    """Complete the teachers that are students of other runs: model, weights, normalisation.

    Args:
        config: with the members of an ensemble completed; changed in place.
        overrides: of its command.
        plain: completes the configuration of another run, `config.complete.plain`.

    Raises:
        InputError: there is no such run, or it is not finished.
    """
    folder_of_run: dict[str, str] = {}  # as composed
    for section in sections(config):
        run = section.get("run")
        if run is None:
            if section.get("name") == "run" and section.get("model") is None:
                raise InputError(f"teacher=run needs teacher.run: {_EXAMPLE}")
            continue
        if isinstance(run, str) and ("=" not in run or Path(home(run)).is_dir()):
            folder = Path(home(run))
        elif isinstance(run, DictConfig):
            folder = _folder_of(_compose(run, overrides), plain)
        else:
            raise InputError(f"teacher.run must be {_EXAMPLE}, not {run}")
        folder_of_run = folder_of_run or {key: config[key] for key in ("setting", "name")}
        with open_dict(config):
            size = OmegaConf.select(config, "data.image_size")
            section.merge_with(_teacher(folder, section, size, checked=isinstance(run, str)))
            config.merge_with(folder_of_run)
    members = [part.name for part in OmegaConf.select(config, "teacher.members") or []]
    if members and config.teacher.name == f"run x{len(members)}":
        with open_dict(config):
            config.teacher.name = "+".join(members)
    return config


def _folder_of(run: EarlierRun, plain: Callable[[DictConfig, Sequence[str]], Node]) -> Path:
    """The folder of a run, or of an equivalent finished run in another setting."""
    other = finished_elsewhere(run.folder, plain(run.config, run.overrides))
    return Path(other["folder"]) if other else run.folder


def sections(config: DictConfig) -> list[DictConfig]:
    """The teacher's section, or those of an ensemble's members."""
    teacher = OmegaConf.select(config, "teacher")
    if not isinstance(teacher, DictConfig):
        return []
    return list(teacher.get("members") or [teacher])


def _compose(own: DictConfig, inherited: Sequence[str]) -> EarlierRun:
    """Compose the run with these overrides.

    Args:
        own: overrides in `teacher.run`.
        inherited: those of the command.
    """
    changes = cast(Node, OmegaConf.to_container(own))
    dropped = _NOT_INHERITED | ({"student"} if "student" in changes else set())
    common = [override for override in inherited if not _sections(override) & dropped]
    overrides = [*common, *(f"{key}={hydra_text(value)}" for key, value in changes.items())]
    loader = GlobalHydra.instance().config_loader()
    try:
        check_overrides(overrides)
        config = loader.load_configuration(config_name(), overrides, RunMode.RUN)
    except InputError as error:
        raise InputError(f"teacher.run: {error}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(f"teacher.run: {composition_error(error)}") from error
    with open_dict(config):
        config.pop("hydra", None)
    if not any(override.startswith("name=") for override in overrides):
        config.name = naming.run_name(config, overrides)
    folder = Path(home(config.output_dir)) / "runs" / config.setting / config.name
    return EarlierRun(config, overrides, folder)


def _sections(override: str) -> set[str]:
    """The sections that an override changes: {"optimizer", "teacher"} of
    `optimizer@teacher.optimizer=adamw`.
    """
    key = override.lstrip("+~").partition("=")[0]
    return {re.split("[./]", part)[0] for part in key.split("@")}


def _teacher(folder: Path, section: DictConfig, image_size: int | None, checked: bool) -> Node:
    """The section of a teacher that is a run's student.

    Args:
        folder: folder of the run.
        section: the section to complete.
        image_size: of the data, in pixels.
        checked: whether the run may be from an untrusted source.
    """
    config, metrics = read_config(folder), read_json(folder / "metrics.json")
    if metrics.get("status") != "finished":
        raise InputError(f"teacher.run: {folder} is not finished; run its command again")
    trust = section.get("trust") or []
    if not isinstance(trust, Sequence) or isinstance(trust, str):
        raise InputError(f"teacher.trust must be a list of packages, not {trust!r}")
    data, name = student_data(config), section.get("name")
    if name == "run":
        name = str(metrics.get("name") or folder.name)  # it becomes a part of paths
        name = name if is_name(name) else tidy(folder.name)
    # Part of a teacher's identity, so that it is only given where it matters.
    own_size = {} if data["image_size"] == image_size else {"image_size": data["image_size"]}
    found = {
        **({} if section.get("image_size") else own_size),
        "name": name,
        "model": student_model(config),
        "layers": config["student"].get("layers"),
        "checkpoint": str(folder / "student.safetensors"),
        "mean": data["mean"],
        "std": data["std"],
    }
    if checked:
        check_trusted(found, "teacher.run: its student", map(str, trust))
    return found
