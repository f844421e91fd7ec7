"""Composition of the runs of a grid: with the same result as Hydra's, but faster.

Hydra composes every run of a grid twice, each time from all its files. In a repeated grid, whose
runs are finished, this takes most of the time. But the files are the same for all runs with the
same groups: here they are composed once, and a run's values, such as its seed, are applied to a
copy. Each file is read once for all groups. Then most of the rest is what Hydra copies in each run.
"""

import contextlib
import copy
import functools
import itertools
import os
import pickle
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import hydra.core.utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core import hydra_config
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.types import Override
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config.overrides import apply, override_parser

MOST_FILES = 1000
"""With more files in the search path, looking for changes would take longer than composing them."""

_load_as_hydra = ConfigLoaderImpl.load_sweep_config


def install() -> None:
    """Patch Hydra, in this process, to compose the runs of a grid by this module, and to copy
    configurations faster.
    """

    def load(self: ConfigLoaderImpl, master_config: DictConfig, sweep_overrides: list[str]) -> Any:
        config = None
        with contextlib.suppress(Exception):  # Hydra's own composition fails too, and says why
            config = compose_run(self, master_config, sweep_overrides)
        return config or _load_as_hydra(self, master_config, sweep_overrides)

    ConfigLoaderImpl.load_sweep_config = load  # type: ignore[method-assign]
    hydra.core.utils.copy = SimpleNamespace(deepcopy=copied)  # type: ignore[assignment, attr-defined]
    hydra_config.OmegaConf = FastOmegaConf  # type: ignore[attr-defined]


def compose_run(
    loader: ConfigLoaderImpl, grid: DictConfig, overrides: Sequence[str]
) -> DictConfig | None:
    """The configuration of one run of a grid, as Hydra would compose it.

    Args:
        loader: Hydra's.
        grid: the configuration of the grid.
        overrides: of this run.

    Returns:
        None if only Hydra can compose it.
    """
    state = _state(loader)
    if state is None:
        return None
    parsed = override_parser().parse_overrides(list(overrides))
    values = [override for override in parsed if _is_value(loader, override)]
    lines = {override.input_line for override in values}
    # Not resolved: `hydra.sweep.subdir=${name}` is another folder for every run.
    of_hydra = cast(list[str], OmegaConf.to_container(grid.hydra.overrides.hydra))
    first = [*of_hydra, *(line for line in overrides if line not in lines)]
    config = pickle.loads(_composed(loader, grid.hydra.job.config_name, tuple(first), state))
    if config.hydra.searchpath:  # may contain further groups
        return None
    apply(values, config)
    task = config.hydra.overrides.task
    lines.update(task)
    applied = [override for override in parsed if override.input_line in lines]
    config.hydra.overrides.task = [override.input_line for override in applied]
    config.hydra.job.override_dirname = get_overrides_dirname(
        applied, **config.hydra.job.config.override_dirname
    )
    OmegaConf.copy_cache(from_config=grid, to_config=config)
    return config


def copied(config: DictConfig) -> DictConfig:
    """A deep copy, five times as fast as `copy.deepcopy`, of a configuration without a parent."""
    try:
        with _only(config):
            return cast(DictConfig, pickle.loads(pickle.dumps(config)))
    except Exception:  # a value that cannot be pickled, but perhaps copied
        return copy.deepcopy(config)


@contextlib.contextmanager
def _only(config: DictConfig) -> Iterator[None]:
    """Detach a configuration from others: `HydraConfig` has nodes with another parent."""
    nodes = [node for node in vars(config)["_content"].values() if node._get_parent() is not config]
    parents = [node._get_parent() for node in nodes]
    for node in nodes:
        node._set_parent(config)
    try:
        yield
    finally:
        for node, parent in zip(nodes, parents, strict=True):
            node._set_parent(parent)


class FastOmegaConf(OmegaConf):
    """For `HydraConfig`, which copies Hydra's own settings twice in every run."""

    @staticmethod
    def masked_copy(conf: DictConfig, keys: str | list[str]) -> DictConfig:
        """A copy with some of the keys."""
        masked = OmegaConf.create()
        for key in [keys] if isinstance(keys, str) else keys:
            vars(masked)["_content"][key] = conf._get_node(key)
        return copied(masked)


class FilesReadOnce(ConfigRepository):
    """Hydra's access to the files of its search path, which parses each of them once."""

    def __init__(self, config_search_path: ConfigSearchPath) -> None:
        super().__init__(config_search_path)
        self._read: dict[tuple[object, ...], bytes] = {}

    def __deepcopy__(self, _: dict[int, Any]) -> "FilesReadOnce":
        """For Hydra, which sets other sources in its copies but changes none."""
        return copy.copy(self)

    def load_config(self, config_path: str) -> ConfigResult | None:
        """What a file contains, as an own copy."""
        key = (*((source.provider, source.path) for source in self.sources), config_path)
        if key in self._read:
            return cast(ConfigResult, pickle.loads(self._read[key]))
        result = super().load_config(config_path)
        if result is not None and not result.path.startswith("structured:"):  # is not in a file
            self._read[key] = pickle.dumps(result)
        return result


@functools.lru_cache(maxsize=2)
def _files_of(search_path: tuple[tuple[str, str], ...], state: object) -> FilesReadOnce:
    whole = ConfigSearchPathImpl()
    for provider, path in search_path:
        whole.append(provider, path)
    return FilesReadOnce(whole)


@contextlib.contextmanager
def files_read_once(loader: ConfigLoaderImpl, state: object) -> Iterator[None]:
    """Let Hydra read its files through `FilesReadOnce`.

    Args:
        loader: Hydra's.
        state: from `_state`; the files are read again when it changes.
    """
    usual = loader.repository
    path = [(str(part.provider), str(part.path)) for part in loader.get_search_path().get_path()]
    loader.repository = _files_of(tuple(path), state)
    try:
        yield
    finally:
        loader.repository = usual


@functools.lru_cache(maxsize=256)
def _composed(
    loader: ConfigLoaderImpl, config_name: str, overrides: tuple[str, ...], state: object
) -> bytes:
    with files_read_once(loader, state):
        config = loader.load_configuration(config_name, list(overrides), RunMode.RUN)
    return pickle.dumps(config)


def _is_value(loader: ConfigLoaderImpl, override: Override) -> bool:
    """Whether an override changes a value only, instead of choosing files or configuring Hydra."""
    key = override.key_or_group
    if "/" in key or override.package is not None:
        return False
    if override.is_hydra_override() or override.is_sweep_override():
        return False
    return isinstance(override.value(), dict) or not loader.repository.group_exists(key)


def _state(loader: ConfigLoaderImpl) -> object:
    """Everything besides overrides that a composition depends on; None if that is not known.

    A file that is edited while a grid runs affects the following runs, as in Hydra.
    """
    folders = []
    for source in loader.get_sources():
        if source.scheme() == "file":
            folders.append(source.path)
        elif source.scheme() == "pkg":
            folders.append(str(resources.files(source.path)))
        elif source.scheme() != "structured":
            return None
    found = itertools.chain.from_iterable(map(_files, folders))
    files = tuple(itertools.islice(found, MOST_FILES + 1))
    # Lightning sets this variable in every run.
    variables = [pair for pair in os.environ.items() if pair[0] != "PL_GLOBAL_SEED"]
    environment = (Path.cwd(), *variables)
    return (files, environment) if len(files) <= MOST_FILES else None


def _files(folder: str) -> Iterator[tuple[Any, ...]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            status = entry.stat()
            yield entry.path, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
            if entry.is_dir():
                yield from _files(entry.path)
