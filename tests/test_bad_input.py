"""Invalid input: a one-sentence error, exit code 2, before training, and no files lost."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import FOLDER, REPOSITORY, TINY, in_a_new_process, write_folder
from lightning.pytorch import Trainer
from PIL import Image
from torchvision.datasets import CIFAR10

from kd_lightning import api
from kd_lightning.errors import InputError
from kd_lightning.workflows.evaluate import evaluate
from kd_lightning.workflows.jobs import prepare


@pytest.fixture
def refused(train, tmp_path, monkeypatch):
    """Run a command that must be rejected before training; return its error message."""

    def run(*arguments: str, **options: bool) -> str:
        monkeypatch.setattr(Trainer, "fit", lambda *_, **__: pytest.fail("training was begun"))
        done = train(*arguments, **options)
        assert done.code == 2, done.out + done.err
        assert done.out == ""
        lines = done.err.strip().splitlines()
        assert len(lines) == 1, done.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in done.err
        # No partially written file is left.
        assert not [path for path in tmp_path.rglob("*partial*") if path.is_file()]
        return lines[0]

    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("data") / "images")


METHODS = ", ".join(sorted(path.stem for path in REPOSITORY.glob("configs/method/*.yaml")))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        # groups and keys
        (
            ["method=magic"],
            ["method=magic", METHODS],
        ),
        (["student=tiny"], ["student=tiny", "large, medium", "small"]),
        (["teacher=guru"], ["teacher=guru", "convnet", "resnet9"]),
        (["data=mnist"], ["data=mnist", "cifar10, cifar100, digits, folder"]),
        (["typo=1"], ["'typo'"]),
        (["+typo=1"], ["'typo'", "seed"]),
        (["+traner.max_epochs=1"], ["'traner'", "trainer"]),
        (["trainer.max_epoch=1"], ["trainer.max_epoch"]),
        (["+trainer.max_epoch=1"], ["trainer.max_epoch", "trainer.max_epochs"]),
        (["+optimizer.momentun=1"], ["optimizer.momentun", "optimizer.momentum"]),
        (["+method.terms.logit.temprature=1"], ["temprature", "temperature"]),
        (["+student.width=1"], ["student.width"]),
        (["+data.paddin=1"], ["data.paddin", "data.padding"]),
        (["method.terms.logit._target_=kd_lightning.losses.Logits"], ["Logits"]),
        (["method.terms.logit._target_=nowhere.Loss"], ["nowhere.Loss"]),
        (["=5"], ["command line"]),
        # temperatures
        (["method.terms.logit.temperature=0"], ["temperature", "above 0", "0"]),
        (["method.terms.logit.temperature=-3"], ["temperature", "above 0", "-3"]),
        (["method.terms.logit.temperature=nan"], ["method.terms.logit.temperature", "finite"]),
        (["method.terms.logit.temperature=hot"], ["temperature", "a number", "hot"]),
        (["method.terms.logit.temperature=null"], ["temperature", "a number"]),
        # weights
        (["method.terms.logit.weight=-1"], ["method.terms.logit.weight", "-1"]),
        (["method.terms.attention.weight=inf"], ["method.terms.attention.weight", "inf"]),
        (["method.terms.cross_entropy.weight=much"], ["method.terms.cross_entropy.weight", "much"]),
        # numbers
        (["data.batch_size=0"], ["batch_size", "at least 1", "0"]),
        (["data.batch_size=1.5"], ["batch_size", "whole number"]),
        (["data.batch_size=1000"], ["batch_size=1000", "33 training images"]),
        (["data.val_fraction=1"], ["val_fraction"]),
        (["data.view_seed=4294967296"], ["view_seed", "2^32 - 1", "4294967296"]),
        (["data.split_seed=-1"], ["split_seed", "2^32 - 1", "-1"]),
        (["data.num_classes=4"], ["num_classes", "3 classes"]),
        (["seed=-1"], ["seed", "-1"]),
        (["seed=none"], ["seed", "none"]),
        (["trainer.max_epochs=0"], ["trainer.max_epochs", "0"]),
        (["trainer.max_epochs=many"], ["trainer.max_epochs", "many"]),
        (["teacher.trainer.max_epochs=0"], ["teacher.trainer.max_epochs", "0"]),
        (["trainer.precision=8"], ["trainer.precision", "bf16-mixed"]),
        (["+trainer.limit_val_batches=0"], ["limit_val_batches", "nothing to report"]),
        (["+trainer.fast_dev_run=true"], ["fast_dev_run", "limit_train_batches"]),
        (["+trainer.logger=false"], ["trainer.logger"]),
        (["trainer.accelerator=quantum"], ["trainer", "quantum"]),
        (["optimizer.lr=-1"], ["optimizer", "-1"]),
        (["optimizer.lr=nan"], ["optimizer.lr", "nan"]),
        (["optimizer.lr=fast"], ["optimizer.lr", "fast"]),
        (["teacher.cutout=-1"], ["teacher.cutout", "-1"]),
        (["teacher.optimizer.lr=-1"], ["teacher.optimizer", "-1"]),
        (["scheduler=cosine", "scheduler.warmup_fraction=2"], ["scheduler", "warmup_fraction"]),
        (["student.model.pool_after=3"], ["student.model.pool_after"]),
        (["+student.model.pool_after=3"], ["student.model", "pool_after", "3"]),
        (["student.model.num_classes=7"], ["student.model", "3 classes"]),
        (["teacher.model.hidden=wide"], ["teacher.model.hidden", "wide"]),
        (["seed=[1]"], ["seed must", "[1]"]),
        (["student.model.channels=[a,32]"], ["student.model.channels[0]", "whole number", "'a'"]),
        (["data.padding=[1]"], ["data.padding", "whole number", "[1]"]),
        (["student.model.hidden={a: 1}"], ["student.model.hidden", "whole number"]),
        (["optimizer.lr=null"], ["optimizer.lr", "number", "None"]),
        (["remember=x"], ["remember", "'x'"]),
        (
            ["data.augmentation={_target_: kd_lightning.data.Augmentation, padding: 99}"],
            ["padding must be below", "not 99"],
        ),
        (
            ["data.augmentation={_target_: kd_lightning.data.Augmentation, _args_: 3}"],
            ["data.augmentation._args_", "list"],
        ),
        (
            ["data.augmentation={_target_: kd_lightning.data.Augmentation, _recursive_: a}"],
            ["data.augmentation._recursive_", "true or false"],
        ),
        (["data.augmentation={_target_: 3}"], ["data.augmentation._target_", "3"]),
        (["+trainer.max_time=[1]"], ["trainer"]),
        # names
        (["name=null"], ["name must be"]),
        (["setting=[a]"], ["setting must be"]),
        (["method.name={a: 1}"], ["method.name must be"]),
        (["student.name=null"], ["student.name must be"]),
        (["data.name=[x]"], ["data.name must be"]),
        # layers
        (["student.layers=[stage1,stage9]"], ["student", "'stage9'", "stage1, "]),
        (["teacher.layers=[conv]"], ["teacher", "'conv'", "stage1, "]),
        (["student.layers=[classifier]"], ["classifier", "map"]),
        (["+method.terms.attention.pairs=[[a,stage1]]"], ["'a'", "stage1"]),
        # files
        (["teacher.checkpoint=/no/such/file.pt"], ["teacher.checkpoint=/no/such/file.pt", "exist"]),
        (["data.root=/no/such/folder"], ["data.root=/no/such/folder", "train"]),
        (["data.root=???"], ["data.root"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else "",
)
def test_invalid_values_are_reported(tmp_path, images, arguments, parts):
    place = f"data.root={images}", f"output_dir={tmp_path / 'outputs'}"
    with pytest.raises(InputError) as error:
        prepare(api.compose(*FOLDER, *place, *TINY, *arguments))
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["=5"], "command line"),
        (["+typo=1"], "'typo'"),
        (["data.root=???"], "data.root"),
        (["trainer.max_epochs=0"], "trainer.max_epochs"),
        (["trainer.accelerator=quantum"], "quantum"),
        (["teacher.checkpoint=/no/such/file.pt"], "exist"),
    ],
)
def test_invalid_values_are_one_line_of_the_command(refused, arguments, part):
    assert part in refused(*arguments)


def test_missing_data_root_is_reported(refused):
    assert "data.root=VALUE" in refused("data=folder", data=False)


def test_empty_class_folder(refused, folder):
    shutil.rmtree(folder / "test" / "class1")
    (folder / "test" / "class1").mkdir()
    assert f"{folder}/test/class1 holds no images" in refused()


def test_mismatched_class_folders(refused, folder):
    (folder / "train" / "extra").mkdir()
    assert "extra" in refused()


@pytest.mark.parametrize("part", ["train", "test"])
def test_file_that_is_not_an_image(refused, folder, part):
    path = folder / part / "class0" / "broken.png"
    path.write_bytes(b"not a picture")
    assert str(path) in refused()


def test_truncated_image(refused, folder):
    path = folder / "train" / "class2" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300])
    assert str(path) in refused()


@pytest.fixture
def offline(monkeypatch):
    def fail(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", fail)


def test_no_network(refused, offline, tmp_path):
    sentence = refused("data=cifar10", data=False)
    assert "could not be downloaded" in sentence
    assert "Network is unreachable" in sentence


@pytest.mark.parametrize("content", [b"", b"truncated" * 1000])
def test_truncated_or_altered_archive(refused, offline, tmp_path, content):
    archive = tmp_path / "data" / CIFAR10.filename
    archive.parent.mkdir()
    archive.write_bytes(content)
    sentence = refused("data=cifar10", data=False)
    assert str(archive) in sentence
    assert "wrong checksum" in sentence
    assert archive.read_bytes() == content


def test_file_that_is_not_a_checkpoint(refused, tmp_path):
    path = tmp_path / "teacher.pt"
    path.write_bytes(b"not a checkpoint")
    sentence = refused(f"teacher.checkpoint={path}")
    assert str(path) in sentence
    assert path.read_bytes() == b"not a checkpoint"


def test_checkpoint_of_another_architecture(refused, tmp_path):
    path = tmp_path / "teacher.pt"
    torch.save({"state_dict": {"conv1.weight": torch.zeros(3)}}, path)
    sentence = refused(f"teacher.checkpoint={path}")
    assert "does not match the architecture" in sentence
    assert "stage1.0.weight" in sentence
    torch.save({"stage1.0.weight": torch.zeros(3)}, path)
    assert "shape (3,)" in refused(f"teacher.checkpoint={path}")


def test_checkpoint_with_nonfinite_weights(train, tmp_path):
    from kd_lightning.models import ConvNet

    state = ConvNet([8, 16], hidden=16, num_classes=3, image_size=16).state_dict()
    state["stage2.0.weight"][0] = float("nan")
    torch.save(state, tmp_path / "teacher.pt")
    done = train("method=logit", f"teacher.checkpoint={tmp_path / 'teacher.pt'}")
    assert done.code == 2
    assert "the teacher's weights are not finite ('stage2.0.weight' in teacher.ch" in done.err


def test_output_folder_not_writable(refused, tmp_path):
    (tmp_path / "file").write_text("in the way")
    sentence = refused(f"output_dir={tmp_path / 'file'}")
    assert str(tmp_path / "file") in sentence
    assert (tmp_path / "file").read_text() == "in the way"


def test_teacher_store_not_writable(train, tmp_path):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "teachers").write_text("in the way")
    done = train()
    assert done.code == 2
    assert "teacher store" in done.err


def test_rejected_run_of_a_grid_is_recorded_as_failed(train):
    done = train("-m", "optimizer.lr=-1")
    assert done.code == 2
    assert done.metrics["status"] == "failed"
    assert "optimizer" in done.metrics["error"]


def test_failure_while_running_has_exit_code_1_and_names_the_run(train):
    done = train("method=none", "optimizer.lr=1e30", "trainer.precision=32-true")
    assert done.code == 1
    assert "not finite" in done.err
    assert str(done.runs[0]) in done.err
    assert done.metrics["status"] == "failed"


def test_exit_code_and_message_reach_the_shell(tmp_path):
    done = in_a_new_process("train.py", "method=magic", f"output_dir={tmp_path}")
    assert done.code == 2
    assert done.out == ""
    assert done.err == (f"error: method=magic does not exist; choose from {METHODS}\n")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    rest = (
        "trainer.log_every_n_steps=1",
        f"data.root={write_folder(root / 'images')}",
        f"output_dir={root / 'outputs'}",
    )
    return Path(api.run(*FOLDER, *TINY, *rest, "method=none", "trainer.max_epochs=1")["folder"])


@pytest.fixture
def run(trained, tmp_path):
    """A finished run."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: shutil.rmtree(run), "not a run directory"),
        (lambda run: (run / "config.yaml").write_text("]["), "config.yaml is damaged"),
        (lambda run: (run / "config.yaml").write_text("a: 1"), "not the configuration"),
        (lambda run: (run / "metrics.json").write_text("garbage"), "no finished run"),
        (lambda run: (run / "metrics.json").write_text('{"status": "finished"}'), "never tested"),
        (lambda run: (run / "student.safetensors").write_bytes(b"half"), "is damaged"),
        (lambda run: (run / "student.safetensors").unlink(), "does not exist"),
    ],
)
def test_evaluate_rejects_folder_without_finished_run(run, break_it, message):
    break_it(run)
    with pytest.raises(InputError, match=message):
        evaluate(run)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "subprocess.Popen",
        "torch.load",
        "kd_lightning.files.write_text",
        "kd_lightning.models.features.torch.load",
        "kd_lightning.data.folder.save_file",
        "kd_lightning.data.folder.os.system",
    ],
)
def test_untrusted_run_cannot_execute_code(run, target):
    assert evaluate(run)["accuracy"] >= 0
    config = yaml.safe_load((run / "config.yaml").read_text())
    for key in ("mean", "model"):
        config["student"][key] = {"_target_": target}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
        with pytest.raises(InputError, match="rejected"):
            evaluate(run)
        config["student"][key] = None


def test_decompression_bomb_is_rejected(refused, folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert "bomb" in refused()


@pytest.mark.parametrize("link", ["train", "train/class3", "train/class0/a.png"])
def test_links_outside_the_root_and_broken_links_are_rejected(refused, folder, tmp_path, link):
    outside = tmp_path / "outside"
    shutil.copytree(folder / "train", outside)
    if link == "train":
        shutil.rmtree(folder / "train")
        target = outside
    else:
        target = outside / "class0" / ("1.png" if link.endswith("png") else "")
    (folder / link).symlink_to(target)
    assert f"{folder / link} is a link to outside data.root={folder}" in refused()
    if link != "train":
        (folder / link).unlink()
        (folder / link).symlink_to(folder / link)
        sentence = refused()
        assert str(folder / link) in sentence
        assert "broken link" in sentence


def test_link_within_the_root_is_followed(folder, train):
    (folder / "train" / "class0" / "again.png").symlink_to(folder / "train" / "class0" / "1.png")
    assert train("method=none").code == 0
