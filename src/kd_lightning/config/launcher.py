"""Detection of torchrun and srun from their environment variables, without importing torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.types import RunMode
from omegaconf import OmegaConf

from kd_lightning.config.nodes import Node
from kd_lightning.config.overrides import override_parser
from kd_lightning.config.tree import tree
from kd_lightning.errors import InputError

_WHAT_COUNTS = ("trainer", "experiment", "trainer.devices", "trainer.num_nodes", "hydra.searchpath")


class Launcher(NamedTuple):
    """A launcher that has started several processes with the same command.

    Attributes:
        name: ``torchrun`` or ``srun``.
        rank: rank of this process among all.
        local_rank: rank of this process on its node.
        world: number of processes.
        nodes: number of nodes.
    """

    name: str
    rank: int
    local_rank: int
    world: int
    nodes: int

    @property
    def per_node(self) -> int:
        """Number of processes on each node."""
        return self.world // self.nodes


def find_launcher() -> Launcher | None:
    """The launcher of this process; None if it was started alone.

    Variables such as RANK or SLURM_PROCID alone do not count: a scheduler or an earlier command
    may have left them.
    """
    try:
        found = _torchrun() or _srun()
    except (KeyError, ValueError):
        return None
    if found is None or found.world < 2 or not 0 <= found.rank < found.world:
        return None
    return found if found.nodes > 0 and found.world % found.nodes == 0 else None


def _torchrun() -> Launcher | None:
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    rank, local, world = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return Launcher("torchrun", rank, local, world, int(os.environ.get("GROUP_WORLD_SIZE", 1)))


def _srun() -> Launcher | None:
    # In a shell of salloc, and in a job named so, Lightning does not count the tasks either.
    if os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive"):
        return None
    # Of the step, if given: a batch script has the number of tasks that it could start.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ["SLURM_NTASKS"])
    rank, local = (int(os.environ[key]) for key in ("SLURM_PROCID", "SLURM_LOCALID"))
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", "1"))
    return Launcher("srun", rank, local, int(tasks), int(nodes))


def launched_together(trainer: Node) -> Launcher | None:
    """The launcher, if its processes train one network together; None if each has its own run.

    Args:
        trainer: the trainer section of the configuration.

    Raises:
        InputError: torchrun has started several processes, but the trainer uses one.
    """
    launcher = find_launcher()
    if launcher is None or uses_several(trainer):
        return launcher
    if launcher.name == "torchrun":
        raise InputError(
            f"torchrun has started {launcher.world} processes, but trainer.devices=1 uses one: add "
            "trainer=ddp to train with all of them, or run the command without torchrun"
        )
    return None


def uses_several(trainer: Node) -> bool:
    """Whether a trainer section may use several processes."""
    devices = trainer.get("devices")
    if isinstance(devices, list):
        devices = len(devices)
    return devices != 1 or trainer.get("num_nodes", 1) != 1


def trainer_of(arguments: Sequence[str]) -> Node:
    """The trainer section of a command, as far as it determines the number of processes.

    Args:
        arguments: of the command, as `commandline.prepare` returns them.

    Raises:
        InputError: it is a grid whose runs need different numbers of processes.
    """
    options = get_args_parser().parse_args(list(arguments))
    own = [
        word for word in options.overrides if word.partition("=")[0].lstrip("+~") in _WHAT_COUNTS
    ]
    search_path = create_config_search_path(options.config_path or tree())
    if options.config_dir is not None:
        folder = f"file://{Path(options.config_dir).absolute()}"
        search_path.prepend("command-line", folder, SearchPathQuery(provider="schema"))
    loader, name = ConfigLoaderImpl(search_path), options.config_name or "train"
    sweeper: Any = BasicSweeper
    (runs,) = sweeper.split_arguments(override_parser().parse_overrides(own), None)
    found = []
    for run in runs:
        composed: Any = loader.load_configuration(name, run, RunMode.RUN)
        found.append(cast(Node, OmegaConf.to_container(composed.trainer, resolve=True)))
    if len({str([trainer.get("devices"), trainer.get("num_nodes")]) for trainer in found}) > 1:
        raise InputError("the runs of this grid need different numbers of processes")
    return found[0]
