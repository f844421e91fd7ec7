"""The configuration of every run of a grid is the one that Hydra composes."""

import copy
import os
import pickle
import shutil
from pathlib import Path

import composition
import pytest
from conftest import TINY
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core import hydra_config
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from hydra.types import RunMode
from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from kd_lightning.config import naming, overrides, sweeps
from kd_lightning.config.tree import tree_folder
from kd_lightning.errors import InputError
from kd_lightning.workflows import student

naming.register()
overrides.install()
sweeps.install()


ADAM = "{_target_: torch.optim.Adam, lr: 0.2}"


@pytest.fixture
def tree(tmp_path):
    """A copy of the configuration tree."""
    return Path(shutil.copytree(tree_folder(), tmp_path / "configs"))


@pytest.fixture(scope="module")
def grids():
    """The configuration of a grid, by its choices for Hydra, composed once for all tests."""

    known = {}

    def composed(loader, *hydra):
        if hydra not in known:
            known[hydra] = pickle.dumps(grid(loader, *hydra))
        return pickle.loads(known[hydra])

    return composed


@pytest.fixture
def shared():
    """The loader of the unchanged tree."""
    with initialize_config_dir(str(tree_folder()), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture
def loader(tree):
    with initialize_config_dir(str(tree), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def grid(loader, *given):
    return loader.load_configuration("train", list(given), RunMode.MULTIRUN)


def compositions(monkeypatch):
    """A list that grows with every complete composition."""
    calls = []
    original = ConfigLoaderImpl.load_configuration

    def counted(self, *arguments, **named):
        calls.append(arguments)
        return original(self, *arguments, **named)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    return calls


def as_hydra(loader, config, run):
    """Composed by Hydra, from files that are parsed once for all tests."""
    with sweeps.files_read_once(loader, sweeps._state(loader)):
        return sweeps._load_as_hydra(loader, config, run)


def everything(node):
    """All values of a configuration, in order, with types and flags."""
    if not isinstance(node, Container) or node._is_none() or node._is_interpolation():
        return type(node), node._value(), vars(node._metadata)
    keys = node.keys() if isinstance(node, DictConfig) else range(len(node))
    parts = [(key, everything(node._get_node(key))) for key in keys]
    return type(node), parts, vars(node._metadata)


@pytest.mark.parametrize(
    ("hydra", "run"),
    [
        ([], []),
        ([], ["seed=3", "method=logit", "student=large", "teacher=resnet20", "seed=4"]),
        ([], [*TINY, "data=digits", "+trainer.limit_train_batches=1", "pictures=False"]),
        ([], ["experiment=demo", "optimizer.lr=0.1", "++trainer.fast=1", "~student.layers"]),
        ([], ["optimizer.lr=0.1", f"optimizer={ADAM}",
              f"teacher.optimizer={ADAM}", "teacher.optimizer.lr=0.1"]),
        ([], ["optimizer={momentum: 0.5}", "optimizer=adamw", "+optimizer.eps=1e-8"]),
        ([], ["scheduler=null", "augmentation=none", "experiment=null", "output_dir='~/x'",
              "data.root='a b'", "teacher.ignore_keys=[a]", "update_bn=true"]),
        ([], ["~scheduler", "teacher.scheduler=null", "student.layers=[a,b]",
              "+callbacks.x={_target_: a.B, list: [1, {y: 2}]}", "name='${seed}-${now:%s}'"]),
        ([], ["scheduler@teacher.scheduler=cosine", "optimizer@teacher.optimizer=adamw"]),
        (["hydra.sweep.dir='~/y'", "hydra/job_logging=none"], ["method=none", "seed=2"]),
        (["hydra.sweep.dir='${output_dir}/x/${method.name}'", "hydra.sweep.subdir='s${seed}'"],
         ["method=none", "seed=2"]),
        (["hydra.sweep.subdir='${hydra.job.num}'", "+hydra.job.env_set.A='${name}'"], ["seed=2"]),
        (["hydra.job.config.override_dirname.exclude_keys=[seed]", "hydra.job.env_copy=[HOME]",
          "+hydra.job.env_set.A=b"], ["seed=2", "data.flip=false"]),
    ],
)  # fmt: skip
def test_a_run_is_composed_as_by_hydra(shared, grids, hydra, run):
    loader, config = shared, grids(shared, *hydra)
    assert sweeps.compose_run(loader, config, run) is not None
    again = [*run, "ema=0.5"]  # of the same groups
    fast = sweeps.compose_run(loader, config, again)
    assert everything(fast) == everything(as_hydra(loader, config, again))


def test_tests_compose_as_hydra(loader):
    runs = (
        [*TINY, "method=none", "seed=3"], [*TINY, "method=none"], ["experiment=demo"],
        ["student=large", "data=digits"], ["data=digits", "student=large", "hydra.mode=RUN"],
        ["method=none", "method=logit"], ["method=logit", "method=none"],
    )  # fmt: skip
    expected = [loader.load_configuration("train", run, RunMode.RUN) for run in runs]
    for config in expected:
        OmegaConf.clear_cache(config)  # the time
    with pytest.MonkeyPatch.context() as patch:
        composition.install(patch)
        for run, config in zip(runs, expected, strict=True):
            fast = loader.load_configuration("train", run, RunMode.RUN)
            assert everything(fast) == everything(config)
            assert everything(sweeps.copied(fast)) == everything(config)
        with pytest.raises(InputError, match="did you mean seed"):
            loader.load_configuration("train", ["sede=1"], RunMode.RUN)


@pytest.mark.parametrize(
    "run",
    [
        ["method=logits"], ["sede=1"], ["method/logit=1"], ["seed=1,2"], ["+seed=1"], ["a"],
        ["~method.name.x"], ["optimizer=a.B"], ["seed@x=1"], ["data.mean.x=1"], ["student=1"],
    ],
)  # fmt: skip
def test_an_impossible_run_is_refused_as_by_hydra(shared, grids, run, monkeypatch):
    config = grids(shared)
    with pytest.raises(Exception) as refused:
        as_hydra(shared, config, run)
    assert str(refused.value)
    left_to_hydra = []
    monkeypatch.setattr(sweeps, "_load_as_hydra", lambda *given: left_to_hydra.append(given))
    shared.load_sweep_config(config, run)
    assert left_to_hydra == [(shared, config, run)]


def test_files_are_composed_once_for_all_runs_with_the_same_groups(loader, grids, monkeypatch):
    config = grids(loader)
    calls = compositions(monkeypatch)
    for seed in range(3):
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))  # as Lightning does
        for method in ("none", "logit"):
            run = [f"method={method}", f"seed={seed}", f"optimizer.lr=0.{seed}"]
            composed = loader.load_sweep_config(config, run)
            assert (composed.method.name, composed.seed) == (method, seed)
            composed.optimizer.lr = 9  # does not affect the next
    assert len(calls) == 2


def test_a_file_is_read_once_for_all_groups(loader, grids, monkeypatch):
    config = grids(loader)
    read = []
    original = ConfigRepository.load_config

    def counted(self, config_path):
        result = original(self, config_path)
        if result is not None and not result.path.startswith("structured:"):
            read.append(config_path)
        return result

    monkeypatch.setattr(ConfigRepository, "load_config", counted)
    for method in ("none", "logit"):
        loader.load_sweep_config(config, [f"method={method}"])
    assert "student/small" in read
    assert len(read) == len(set(read))


class OnlyCopied:
    """An object that can be copied, but not pickled."""

    def __reduce__(self):
        raise NotImplementedError

    def __deepcopy__(self, _):
        return self


@pytest.mark.parametrize("value", [OnlyCopied(), type("Local", (), {})])
def test_a_value_that_cannot_be_pickled_is_copied(value):
    config = OmegaConf.create({"a": {"b": value}, "c": "${a}"}, flags={"allow_objects": True})
    copied = sweeps.copied(config)
    assert copied is not config
    assert everything(copied) == everything(config)


def test_hydras_own_settings_are_copied_as_by_hydra(shared, grids, monkeypatch):
    config = grids(shared)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.setattr(hydra_config, "OmegaConf", OmegaConf)
    HydraConfig.instance().set_config(config)
    expected = HydraConfig.instance().cfg
    monkeypatch.setattr(hydra_config, "OmegaConf", sweeps.FastOmegaConf)
    HydraConfig.instance().set_config(config)
    found = HydraConfig.instance().cfg
    assert everything(found) == everything(expected)
    assert found.hydra._get_parent() is expected.hydra._get_parent() is config
    assert found.hydra.sweep.dir == f"{config.output_dir}/runs/{config.setting}"
    config.hydra._set_flag("readonly", False)
    config.hydra.job.name = "x"
    assert found.hydra.job.name == "train"
    # As `run_job` copies it: without the rest of the configuration.
    for copied in (copy.deepcopy(found), sweeps.copied(found)):
        assert copied.hydra._get_parent() is copied
        with pytest.raises(InterpolationKeyError):
            copied.hydra.sweep.dir  # noqa: B018


@pytest.mark.parametrize("change", ["edited", "added", "removed", "environment", "folder"])
def test_changes_during_a_grid_are_noticed(loader, grids, tree, monkeypatch, tmp_path, change):
    config = grids(loader, "hydra.job.env_copy=[HOME]")
    run = ["optimizer=adamw", "seed=1", "+extra=x"]
    before = loader.load_sweep_config(config, run)
    file = tree / "optimizer" / "adamw.yaml"
    if change == "edited":  # to the same length, and with the same time of modification
        times = file.stat()
        text = file.read_text()
        file.write_text(text.replace("AdamW", "Adamx"))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "added":
        (tree / "extra").mkdir()
        (tree / "extra" / "x.yaml").write_text("a: 1")  # now a group, no longer a value
    elif change == "removed":
        file.unlink()
        with pytest.raises(MissingConfigException):
            loader.load_sweep_config(config, run)
        return
    elif change == "environment":
        monkeypatch.setenv("HOME", "/elsewhere")
    else:
        monkeypatch.chdir(tmp_path)
    expected = sweeps._load_as_hydra(loader, config, run)
    after = loader.load_sweep_config(config, run)
    assert everything(after) == everything(expected)
    assert everything(after) != everything(before)


def test_only_hydra_composes_from_unusual_search_paths(loader, grids, tmp_path, monkeypatch):
    more = tmp_path / "more" / "extra"
    more.mkdir(parents=True)
    (more / "x.yaml").write_text("a: 1")
    run = ["+extra=x", "seed=1"]
    config = grid(loader, f"hydra.searchpath=[{more.parent}]", *run)
    assert sweeps.compose_run(loader, config, run) is None
    assert loader.load_sweep_config(config, run).extra.a == 1
    config = grids(loader)
    assert sweeps.compose_run(loader, config, ["seed=1"]) is not None
    monkeypatch.setattr(sweeps, "MOST_FILES", 20)
    assert sweeps.compose_run(loader, config, ["seed=1"]) is None
    assert loader.load_sweep_config(config, ["seed=1"]).seed == 1


def test_edited_file_is_noticed_by_the_next_grid_of_a_process(train, tmp_path, monkeypatch):
    file = tmp_path / "mine" / "experiment" / "mine.yaml"
    file.parent.mkdir(parents=True)
    used = []

    def run(config, *_, **__):
        used.append((config["optimizer"]["weight_decay"], config["seed"]))
        return {}

    monkeypatch.setattr(student, "run", run)
    for decay in (0.1, 0.2):
        file.write_text(f"# @package _global_\noptimizer:\n  weight_decay: {decay}\n")
        train("-m", f"--config-dir={tmp_path}/mine", "experiment=mine", "method=none", "seed=0,1")
    assert used == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
