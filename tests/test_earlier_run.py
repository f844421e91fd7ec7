"""The student of another run as teacher."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FOLDER, write_folder
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file, save_file

from kd_lightning import api
from kd_lightning.config import naming
from kd_lightning.config import overrides as rules
from kd_lightning.config.checks import check
from kd_lightning.config.complete import plain
from kd_lightning.config.earlier_run import earlier_runs
from kd_lightning.config.naming import config_key
from kd_lightning.config.tree import tree_folder
from kd_lightning.errors import InputError

SMALL = ("student.model.channels=[4,8]", "student.model.hidden=8")
LARGE = "student.model.channels: [6,8], student.model.hidden: 12"
FAST = (
    "trainer.accelerator=cpu", "trainer.max_epochs=1", "optimizer.lr=0.01", "pictures=false",
)  # fmt: skip


@pytest.fixture
def command(train):
    def run(*arguments, data=True):
        return train(*SMALL, *FAST, *arguments, tiny=False, data=data)

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished run, of a configuration as of `command`."""
    root = tmp_path_factory.mktemp("trained")
    images = write_folder(root / "images")
    arguments = (f"data.root={images}", f"output_dir={root / 'outputs'}", "method=none")
    return Path(api.run(*FOLDER, *SMALL, *FAST, *arguments)["folder"])


@pytest.fixture
def earlier(trained, tmp_path):
    """A copy of it, which a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "earlier"))


def metrics_of(run):
    return json.loads((run / "metrics.json").read_text())


def test_student_of_a_finished_run_is_a_teacher(command, earlier):
    first = metrics_of(earlier)
    arguments = ("method=logit", "teacher=run", f"teacher.run={earlier}", "setting=again")
    done = command(*arguments)
    assert done.code == 0, done.err
    second = done.metrics
    assert second["teacher"] == first["name"] == "none-small-s0-model.channels_4_8-model.hidden_8"
    assert second["teacher_parameters"] == second["parameters"] == first["parameters"]
    assert second["teacher_val_accuracy"] == first["val_accuracy"]
    assert second["teacher_test_accuracy"] == first["test_accuracy"]
    # Another student in that folder is another teacher.
    weights = load_file(earlier / "student.safetensors")
    save_file({name: -value for name, value in weights.items()}, earlier / "student.safetensors")
    third = command(*arguments)
    assert third.code == 0, third.err
    assert metrics_of(done.runs[0])["teacher_sha256"] != second["teacher_sha256"]


def test_equal_run_of_another_setting_is_the_teacher(command):
    """A student without a teacher is trained once for all settings."""
    (folder,) = command("method=none", "teacher=resnet8").runs
    done = command("method=logit", "teacher=run", "teacher.run={method: none}")
    assert done.code == 0, done.err
    (run,) = done.runs
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["teacher"]["checkpoint"] == str(folder / "student.safetensors")


def test_students_of_another_image_size_see_images_of_their_own(command, trained):
    run = ("method=logit", "teacher=run", f"teacher.run={trained}")
    for size, own in ((8, 16), (16, None)):
        done = command(*run, f"data.image_size={size}")
        assert done.code == 0, done.err
        config = yaml.safe_load((done.runs[0] / "config.yaml").read_text())
        assert config["teacher"].get("image_size") == own
    assert done.metrics["teacher_test_accuracy"] == metrics_of(trained)["test_accuracy"]


def test_chain_is_trained_in_order_and_once(command, tmp_path):
    chain = (
        "method=logit", "teacher=run", "setting=chain",
        f"teacher.run={{student: medium, {LARGE}, method: logit, teacher: run, name: middle,"
        f" teacher.run: {{student: large, {LARGE}, method: none, name: first}}}}",
    )  # fmt: skip
    done = command(*chain)
    assert done.code == 0, done.err
    found = {run.name: metrics_of(run) for run in done.runs}
    assert len(found) == 3
    assert (found["first"]["method"], found["first"]["student"]) == ("none", "large")
    assert found["middle"]["teacher"] == "first"
    last = next(run for name, run in found.items() if name not in ("first", "middle"))
    assert last["teacher"] == "middle"
    assert last["teacher_test_accuracy"] == found["middle"]["test_accuracy"]
    weights = {run.name: load_file(run / "student.safetensors") for run in done.runs}
    assert weights["middle"]["stage1.0.weight"].shape[0] == 6
    written = {run.name: (run / "student.safetensors").stat().st_mtime_ns for run in done.runs}
    again = command(*chain)
    assert "already finished" in again.out + again.err
    for run in done.runs:
        assert (run / "student.safetensors").stat().st_mtime_ns == written[run.name]
    # Results depend on the earlier run, but not on the place of its outputs.
    (run,) = (run for run in done.runs if run.name not in ("first", "middle"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    moved = {**config, "teacher": {**config["teacher"], "checkpoint": "elsewhere"}}
    assert config_key(moved) == config_key(config)
    other = {**config, "teacher": {**config["teacher"], "run": {"method": "logit"}}}
    assert config_key(other) != config_key(config)


def test_earlier_run_inherits_all_but_method_student_and_teacher(tmp_path):
    shared = [
        "data=digits", "trainer.max_epochs=7", "optimizer.lr=0.02", f"output_dir={tmp_path}",
    ]  # fmt: skip
    own = [
        "method=logit", "method.terms.logit.temperature=2", "seed=3",
        "teacher=run", "teacher.seed=9", "optimizer@teacher.optimizer=adamw",
    ]  # fmt: skip
    naming.register()
    rules.install()
    with initialize_config_dir(tree_folder(), version_base="1.3"):
        composed = compose("train", [*shared, *own, "teacher.run={method: none, seed: 5}"])
        (earlier,) = earlier_runs(composed, [*shared, *own])
    node = plain(earlier.config, earlier.overrides)
    assert node == api.compose(*shared, "seed=5", "method=none")
    assert earlier.folder == tmp_path / "runs" / node["setting"] / "none-small-s5"


def test_setting_is_that_of_the_folder(tmp_path):
    """Whatever run the teacher is from: that of each seed is in the same setting."""
    config = api.compose("data=digits", "method=none")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "metrics.json").write_text(json.dumps({"status": "finished", "name": "other"}))
    arguments = ["data=digits", "method=logit", "teacher=run", f"teacher.run={tmp_path}"]
    with initialize_config_dir(tree_folder(), version_base="1.3"):
        composed = compose("train", arguments)
    completed = api.compose(*arguments)
    assert completed["teacher"]["name"] == "other"
    assert completed["setting"] == composed.setting


def test_student_is_inherited_unless_another_is_named():
    shared, own = ["data=digits"], ["student=medium", "student.model.hidden=32", "method=logit"]
    naming.register()
    rules.install()

    def student_of(run):
        composed = compose("train", [*shared, *own, "teacher=run", f"teacher.run={run}"])
        (earlier,) = earlier_runs(composed, [*shared, *own, "teacher=run"])
        return plain(earlier.config, earlier.overrides)["student"]

    with initialize_config_dir(tree_folder(), version_base="1.3"):
        same, other = student_of("{method: none}"), student_of("{student: large}")
    assert (same["name"], same["model"]["hidden"]) == ("medium", 32)
    assert (other["name"], other["model"]["hidden"]) == ("large", 256)


def test_ensemble_of_runs(command, trained):
    runs = [trained, *command("method=none", "seed=1").runs]
    members = ",".join(f"{{run: {run}}}" for run in runs)
    done = command("method=logit", "teacher=run", f"teacher.members=[{members}]")
    assert done.code == 0, done.err
    assert done.metrics["teacher_parameters"] == 2 * done.metrics["parameters"]
    assert done.metrics["teacher"] == "+".join(metrics_of(run)["name"] for run in runs)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["teacher=run"], "teacher=run needs teacher.run"),
        (["teacher=run", "teacher.run=nowhere"], "nowhere is not a run directory"),
        (["teacher=run", "teacher.run=[none]"], "teacher.run must be"),
        (["teacher=run", "teacher.run='method=none'"], "teacher.run must be"),
        (
            ["teacher=run", "teacher.run={methd: none}"],
            "teacher.run: there is no key 'methd'; did you",
        ),
        (["teacher=run", "teacher.run={method: nothing}"], "method=nothing does not exist"),
        (
            ["teacher=run", "teacher.run={optimizer.lr: -1}"],
            "teacher.run: optimizer: Invalid learning rate: -1",
        ),
    ],
)
def test_invalid_runs_are_rejected(command, arguments, words):
    done = command("method=logit", *arguments)
    assert done.code == 2
    assert words in done.err
    assert not done.runs


def test_failed_earlier_run_is_named_and_the_cell_is_shown_as_failed(command, tmp_path):
    arguments = ("method=logit", "teacher=run", "teacher.run={method: none, optimizer.lr: 1e30}")
    done = command("-m", "setting=grid", *arguments)
    assert done.code == 1
    assert "teacher.run: the loss is not finite" in done.err
    (failed,) = (tmp_path / "outputs" / "runs" / "grid").glob("logit-*/metrics.json")
    metrics = json.loads(failed.read_text())
    assert metrics["status"] == "failed"
    assert metrics["error"].startswith("teacher.run: ")


def test_unfinished_and_untrusted_runs_are_rejected(command, earlier):
    folder = earlier
    arguments = ("method=logit", "teacher=run", f"teacher.run={folder}")
    metrics = metrics_of(folder)
    (folder / "metrics.json").write_text(json.dumps({**metrics, "status": "failed"}))
    assert "is not finished" in command(*arguments).err
    (folder / "metrics.json").write_text(json.dumps(metrics))
    config = (folder / "config.yaml").read_text()
    changed = config.replace("kd_lightning.models.ConvNet", "os.system")
    (folder / "config.yaml").write_text(changed)
    done = command(*arguments)
    assert done.code == 2
    assert "os.system" in done.err
    assert "teacher.trust must be a list" in command(*arguments, "teacher.trust=os").err


def test_api_trains_the_earlier_run_first(folder, tmp_path):
    metrics = api.run(
        "data=folder", f"data.root={folder}", "data.image_size=16", "data.batch_size=16",
        "data.padding=2", f"output_dir={tmp_path / 'out'}", *SMALL, *FAST, "method=logit",
        "teacher=run", "teacher.run={method: none}",
    )  # fmt: skip
    assert metrics["teacher"].startswith("none-small-s0")


def test_members_that_are_earlier_runs_change_the_configured_one(command, tmp_path):
    done = command(
        "method=logit", "teacher=run", "teacher.run={method: none}",
        "teacher.members=[{run: {seed: 1}},{run: {seed: 2}}]",
    )  # fmt: skip
    assert done.code == 0, done.err
    names = {path.name.partition("-model")[0] for path in tmp_path.glob("outputs/runs/*/*")}
    assert {"none-small-s1", "none-small-s2", "logit-small-s0"} == names
    (last,) = [run for run in done.runs if run.name.startswith("logit")]
    assert metrics_of(last)["teacher"].count("none-small") == 2


def test_layers_of_members_are_those_of_the_runs(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "date=today" / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["student"]["layers"] = ["stage2"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    composed = api.compose(
        "data=digits", "method=attention", "teacher=run",
        f'teacher.members=[{{run: "{run}"}},{{run: "{trained}"}}]',
    )  # fmt: skip
    assert composed["teacher"]["layers"] == ["stage2"]
    terms = [member.get("terms") for member in composed["teacher"]["members"]]
    assert terms[0] is None
    assert composed["method"]["terms"]["attention"]["teacher_layers"] == ["stage2"]
    assert terms[1]["attention"]["teacher_layers"] != ["stage2"]


def test_api_takes_users_code_in_the_earlier_run(folder, tmp_path):
    arguments = (
        "data=folder", f"data.root={folder}", "data.image_size=16", "data.batch_size=16",
        "data.padding=2", f"output_dir={tmp_path / 'out'}", *SMALL, *FAST, "method=logit",
        "optimizer={_target_: test_earlier_run.Own, lr: 0.01}",
        "teacher=run", "teacher.run={method: none}",
    )  # fmt: skip
    first, second = (api.run(*arguments) for _ in range(2))
    assert first["test_accuracy"] == second["test_accuracy"]
    assert api.compose(*arguments)["teacher"]["name"].startswith("none-small-s0")


class Own(torch.optim.SGD):
    """A user's optimizer."""


@pytest.mark.parametrize("name", ["../../../elsewhere/x", "a/b", "x" * 200, 7, "", None])
def test_name_of_an_earlier_run_stays_within_folders(earlier, name):
    metrics = {**metrics_of(earlier), "name": name}
    (earlier / "metrics.json").write_text(json.dumps(metrics))
    composed = api.compose("data=digits", "method=logit", "teacher=run", f"teacher.run={earlier}")
    assert composed["teacher"]["name"] == ("7" if name == 7 else "earlier")


@pytest.mark.parametrize(
    ("section", "key"), [("student", "layers"), ("data", "mean"), ("student", "model")]
)
def test_interpolations_of_an_earlier_run_are_rejected(earlier, section, key):
    config = yaml.safe_load((earlier / "config.yaml").read_text())
    value = ["${oc.env:HOME}"]
    config[section][key] = {**config[section][key], "hidden": value} if key == "model" else value
    (earlier / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="interpolation"):
        api.compose("data=digits", "method=logit", "teacher=run", f"teacher.run={earlier}")


def test_composing_trains_nothing(folder, tmp_path):
    given = ("data=folder", f"data.root={folder}", f"output_dir={tmp_path / 'out'}", *SMALL)
    with pytest.raises(InputError, match="not finished"):
        api.compose(*given, "method=logit", "teacher=run", "teacher.run={method: none}")
    assert not (tmp_path / "out").exists()


def test_incomplete_teacher_is_reported_by_the_check():
    with pytest.raises(InputError, match="teacher=run needs"):
        check(api.compose("method=logit", "data=digits", "teacher=run"))
