"""Fast composition for tests: each choice of groups is composed once per session.

Composing takes longer than training a tiny student. As in a grid, values are applied to a copy of
the composed groups (`kd_lightning.config.sweeps`). tests/test_sweeps.py compares this with Hydra.
Test processes and the commands that they start share what is composed, as files in `STORE`.
"""

import functools
import hashlib
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from kd_lightning.config import sweeps
from kd_lightning.errors import InputError

STORE = "KD_TEST_COMPOSED"
"""Environment variable with the folder of the composed groups of this session."""

MODE = "hydra.mode=RUN"
"""Override that Hydra adds to those of a command."""

_load_as_hydra = ConfigLoaderImpl.load_configuration
_composed: dict[str, bytes] = {}


def install(patch: pytest.MonkeyPatch) -> None:
    """Compose single runs, and the runs of a grid, from what earlier tests have composed."""
    patch.setattr(ConfigLoaderImpl, "load_configuration", _load)
    patch.setattr(sweeps, "_composed", _compose)


def skip_waits(patch: pytest.MonkeyPatch) -> None:
    """Skip what takes time in every short training and does not affect the result of a test.

    Lightning reads the entry points of all installed packages whenever it builds a trainer. Files
    are flushed to the disk, which only matters if the machine loses power.
    """
    from lightning.fabric.utilities import registry

    patch.setattr(registry, "entry_points", functools.cache(registry.entry_points))
    patch.setattr(os, "fsync", lambda _: None)


def read_commit_once(patch: pytest.MonkeyPatch) -> None:
    """Ask git for the state of the checkout once, instead of in every training."""
    from kd_lightning.storage import provenance

    patch.setattr(provenance, "_git_commit", functools.cache(provenance._git_commit))


def may_choose_mode(overrides: Sequence[str]) -> bool:
    """Whether Hydra has to compose a configuration first, to read its `hydra.mode`."""
    return any(override.startswith(("experiment=", "hydra")) for override in overrides)


def _load(
    self: ConfigLoaderImpl,
    config_name: str | None,
    overrides: list[str],
    run_mode: RunMode,
    *args: Any,
    **kwargs: Any,
) -> DictConfig:
    if run_mode is RunMode.RUN:
        given = {"overrides": {"hydra": []}, "job": {"config_name": config_name}}
        try:
            config = sweeps.compose_run(self, OmegaConf.create({"hydra": given}), overrides)
            if config is not None:
                return config
        except InputError:
            raise  # ours, with the message that a user sees
        except Exception:
            pass  # Hydra fails too, and says why
    return _load_as_hydra(self, config_name, overrides, run_mode, *args, **kwargs)


def _compose(
    loader: ConfigLoaderImpl, config_name: str, overrides: tuple[str, ...], state: Any
) -> bytes:
    files, (folder, *_) = state  # no file is chosen by an environment variable
    searched = tuple((path.provider, path.path) for path in loader.get_search_path().get_path())
    groups = [override for override in overrides if override != MODE]
    if len({override.partition("=")[0] for override in groups}) == len(groups):
        groups.sort()
    key = repr((searched, config_name, groups, files, str(folder)))
    if key not in _composed:
        place = Path(os.environ[STORE], hashlib.sha256(key.encode()).hexdigest())
        if not place.exists():
            with sweeps.files_read_once(loader, state):
                config = _load_as_hydra(loader, config_name, groups, RunMode.RUN)
            partial = place.with_name(f"{place.name}.{os.getpid()}")
            partial.write_bytes(pickle.dumps(config))
            partial.replace(place)
        _composed[key] = place.read_bytes()
    if MODE not in overrides:
        return _composed[key]
    if (with_mode := f"{key} {MODE}") not in _composed:
        config = pickle.loads(_composed[key])
        config.hydra.mode = RunMode.RUN
        config.hydra.overrides.hydra.append(MODE)
        _composed[with_mode] = pickle.dumps(config)
    return _composed[with_mode]
