"""Students and teachers that start from a checkpoint or from pretrained weights."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from kd_lightning import api
from kd_lightning.config.naming import config_key
from kd_lightning.storage.teacher_store import TeacherStore
from kd_lightning.workflows.evaluate import evaluate

STUDENT = ("student=timm", "student.model.model_name=test_resnet")
TEACHER = ("teacher=timm", "teacher.model.model_name=test_resnet")
ONCE = (
    "trainer.max_epochs=1", "teacher.trainer.max_epochs=1", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "scheduler=null", "scheduler@teacher.scheduler=one_cycle",
)  # fmt: skip
STILL = ("optimizer.lr=0", "optimizer.weight_decay=0", "method=none")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights of models for 3 and 9 classes, and for none."""
    place = tmp_path_factory.mktemp("weights")
    for classes in (3, 9):
        torch.manual_seed(classes)
        network = timm.create_model("test_resnet", num_classes=classes)
        save_file(network.state_dict(), place / f"{classes}.safetensors")
    return place


def overlay(role, files, classes):
    """Pretrained weights in a local file, in place of a download."""
    settings = f"file: {files / f'{classes}.safetensors'}, num_classes: {classes}"
    return (
        f"{role}.pretrained=true",
        f"+{role}.model.pretrained_cfg_overlay={{{settings}, input_size: [3,24,24]}}",
    )


def run(train, *arguments):
    done = train(*ONCE, *arguments, tiny=False)
    assert done.code == 0, done.err
    return done


def refused(train, *arguments):
    done = train(*ONCE, *arguments, tiny=False)
    assert done.code != 0
    assert done.runs == []
    (sentence,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    return sentence


def is_parameter(name):
    return not name.split(".")[-1].startswith(("running_", "num_batches"))


@pytest.mark.parametrize("how", ["checkpoint", "pretrained"])
def test_student_starts_there(train, files, how):
    start = (f"student.checkpoint={files / '3.safetensors'}",)
    if how == "pretrained":
        start = overlay("student", files, 3)
    done = run(train, *STUDENT, *start, *STILL)
    trained = load_file(done.runs[0] / "student.safetensors")
    expected = load_file(files / "3.safetensors")
    assert trained.keys() == expected.keys()
    names = [name for name in expected if is_parameter(name)]
    assert all(torch.equal(trained[name], expected[name]) for name in names)
    # Rebuilt from its folder alone, with its own normalisation.
    student = api.load_student(done.runs[0])
    own = (0.5, 0.5, 0.5)
    assert student.mean == own
    found = evaluate(done.runs[0])
    assert found["accuracy"] == pytest.approx(found["recorded"])


def test_normalisation_of_a_pretrained_student_is_its_own_unless_given(train, files):
    start = overlay("student", files, 3)
    start = (*start, "+student.model.pretrained_cfg_overlay.mean=[0.1,0.2,0.3]")
    done = run(train, *STUDENT, *start, *STILL)
    student = api.load_student(done.runs[0])
    assert student.mean == (0.1, 0.2, 0.3)
    found = evaluate(done.runs[0])
    assert found["accuracy"] == pytest.approx(found["recorded"])
    done = run(train, *STUDENT, *start, *STILL, "student.mean=[0.4,0.4,0.4]")
    assert api.load_student(done.runs[0]).mean == (0.4, 0.4, 0.4)


def test_checkpoint_of_any_student_with_renamed_keys(train, tmp_path):
    first = run(train, "method=none", "student.model.channels=[4,8]", "student.model.hidden=8")
    state = load_file(first.runs[0] / "student.safetensors")
    torch.save({"model": {f"net.{name}": part for name, part in state.items()}}, tmp_path / "a.pt")
    small = ("student.model.channels=[4,8]", "student.model.hidden=8", "method=none")
    start = f"student.checkpoint={tmp_path / 'a.pt'}"
    second = run(train, *small, start, "optimizer.lr=0", "student.rename_keys={net.: ''}")
    again = load_file(second.runs[0] / "student.safetensors")
    assert all(torch.equal(again[name], state[name]) for name in state)
    sentence = refused(train, "method=none", start)
    assert f"student.checkpoint={tmp_path / 'a.pt'}" in sentence
    assert "teacher" not in sentence


def test_content_of_the_checkpoint_is_part_of_the_runs_identity(train, files, tmp_path):
    file = tmp_path / "a.safetensors"
    file.write_bytes((files / "3.safetensors").read_bytes())
    command = (*STUDENT, f"student.checkpoint={file}", *STILL, "setting=one")
    first = run(train, *command)
    before = first.metrics["code_sha256"]
    file.write_bytes((files / "9.safetensors").read_bytes())
    again = run(train, *command)
    assert "your own code" in again.err or "changed since" in again.err
    metrics = json.loads((first.runs[0] / "metrics.json").read_text())
    assert metrics["code_sha256"] != before


def stored(tmp_path):
    return {path for path in (tmp_path / "outputs" / "teachers").glob("test_resnet-*[!k]")}


def test_pretrained_teacher_is_used_as_it_is(train, files, tmp_path):
    done = run(train, *TEACHER, *overlay("teacher", files, 3), "method=logit")
    assert stored(tmp_path) == set()
    assert done.metrics["teacher_key"] is None
    assert 0 <= done.metrics["teacher_test_accuracy"] <= 1
    assert done.metrics["teacher_sha256"]
    sentence = refused(train, *TEACHER, *overlay("teacher", files, 9), "method=logit")
    assert "for 9 classes, the data has 3" in sentence
    assert "teacher.finetune=true" in sentence


def test_fine_tuned_teacher_is_stored_and_reused(train, files, tmp_path, monkeypatch):
    trained = []
    train_one = TeacherStore._train
    monkeypatch.setattr(
        TeacherStore, "_train", lambda *args: trained.append(args) or train_one(*args)
    )
    command = (*TEACHER, "method=logit", "teacher.optimizer.lr=1e-6", "teacher.finetune=true")
    tuned = run(train, *command, *overlay("teacher", files, 9))
    assert len(trained) == 1
    (place,) = stored(tmp_path)
    weights = load_file(place / "teacher.safetensors")
    start = load_file(files / "9.safetensors")
    assert weights["fc.weight"].shape == (3, 96)  # another classifier
    for name in start:
        if is_parameter(name) and not name.startswith("fc."):
            torch.testing.assert_close(weights[name], start[name], atol=1e-3, rtol=0)
    again = run(train, *command, *overlay("teacher", files, 9), "seed=1")
    assert len(trained) == 1
    assert again.metrics["teacher_key"] == tuned.metrics["teacher_key"]
    assert again.metrics["teacher_test_accuracy"] == tuned.metrics["teacher_test_accuracy"]
    # Neither other weights nor a training from scratch give the same teacher.
    keys = {tuned.metrics["teacher_key"]}
    for other in (
        (*command, *overlay("teacher", files, 3)),
        (*command, f"teacher.checkpoint={files / '9.safetensors'}", "teacher.image_size=24"),
        (*TEACHER, "method=logit", "teacher.optimizer.lr=1e-6"),
    ):
        keys.add(run(train, *other).metrics["teacher_key"])
    assert len(keys) == len(trained) == 4


def test_network_of_a_fixed_size_is_fine_tuned_on_resized_images(train, files, tmp_path):
    options = "+teacher.model.img_size=32", "+teacher.model.patch_size=8"
    done = run(
        train, "teacher=timm", "teacher.model.model_name=test_vit", *options,
        "teacher.image_size=32", "method=combined", "student.model.channels=[4,8]",
    )  # fmt: skip
    assert done.metrics["status"] == "finished"
    sentence = refused(
        train, "teacher=timm", "teacher.model.model_name=test_vit", *options, "method=logit"
    )
    assert "cannot take images of 16x16 pixels" in sentence


def test_failed_download_is_one_sentence_and_loses_nothing(train, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", fail)
    sentence = refused(
        train, *TEACHER, "teacher.pretrained=true", "teacher.finetune=true", "method=logit"
    )
    assert "weights of test_resnet could not be downloaded (no route to host)" in sentence
    assert "teacher.checkpoint=FILE" in sentence
    assert not (tmp_path / "outputs" / "teachers").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["teacher.finetune=true"], "teacher.finetune needs weights to start from"),
        (["teacher.pretrained=true"], "only models by name have pretrained weights"),
        (["student.pretrained=yes"], "student.pretrained must be true or false"),
        (["student.checkpoint=/no/file.pt"], "student.checkpoint=/no/file.pt does not exist"),
        (["teacher.image_size=0"], "teacher.image_size must be null or a number of pixels"),
        (["student.mean=[1]"], "student.mean must be null or three numbers"),
        (["teacher.pretrained=true", "teacher.checkpoint=a.pt"], "omit one"),
        (["student=timm"], "student.model.model_name"),
    ],
)
def test_contradictions_are_refused(train, arguments, sentence):
    assert sentence in refused(train, *arguments, "method=logit")


def test_new_keys_with_default_values_rename_nothing():
    plain = api.compose("data=digits")
    keys = {
        **{f"teacher.{key}": False for key in ("pretrained", "finetune")},
        "teacher.image_size": None,
        "student.pretrained": False,
        **{f"student.{key}": None for key in ("checkpoint", "mean", "std")},
    }
    added = {**plain, "teacher": {**plain["teacher"]}, "student": {**plain["student"]}}
    for key, value in keys.items():
        section, _, name = key.partition(".")
        added[section][name] = value
    assert config_key(added) == config_key(plain)
    added["student"]["checkpoint"] = "a.pt"
    assert config_key(added) != config_key(plain)
