"""A folder of one's own configuration files, in a training by several processes of a launcher."""

import sys

import pytest
from hydra.errors import MissingConfigException

from kd_lightning import cli
from kd_lightning.config.launcher import trainer_of


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "trainer" / "mine.yaml").write_text("defaults: [ddp, _self_]\nnum_nodes: 2\n")
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /trainer: mine\n"
    )
    (tmp_path / "whole.yaml").write_text("defaults: [train, _self_]\ntrainer: {devices: 3}\n")
    return tmp_path


@pytest.mark.parametrize("choice", ["trainer=mine", "experiment=mine"])
@pytest.mark.parametrize("option", [["--config-dir={}"], ["-cd", "{}"], ["hydra.searchpath=[{}]"]])
def test_own_folder_determines_the_number_of_processes(folder, choice, option):
    command = [choice, "seed=0,1", *(word.format(folder) for word in option), "-m"]
    trainer = trainer_of(sorted(command, key=lambda word: "=" not in word))  # overrides first
    assert (trainer["devices"], trainer["num_nodes"]) == ("auto", 2)


def test_own_main_configuration_determines_it(folder):
    command = ["+trainer.num_nodes=2", "--config-dir", str(folder), "--config-name", "whole"]
    trainer = trainer_of(command)
    assert (trainer["devices"], trainer["num_nodes"]) == (3, 2)


def test_folder_is_relative_to_the_current_one(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert trainer_of(["trainer=mine", "--config-dir", folder.name])["num_nodes"] == 2


@pytest.mark.parametrize(("rank", "error"), [(0, MissingConfigException), (1, SystemExit)])
def test_choice_that_does_not_exist_is_reported_by_rank_0(monkeypatch, rank, error):
    variables = {
        "TORCHELASTIC_RUN_ID": "none", "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2,
        "GROUP_WORLD_SIZE": 1,
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys, "argv", ["train.py", "trainer=mine"])
    with pytest.raises(error):
        cli._join_others()
