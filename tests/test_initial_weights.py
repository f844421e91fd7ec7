"""Students and teachers that start from a checkpoint or from pretrained weights."""

import copy
import functools
from types import SimpleNamespace

import pytest
import timm
import torch
import yaml
from conftest import FOLDER, write_folder
from safetensors.torch import load_file, save_file

from kd_lightning import api
from kd_lightning.config import naming
from kd_lightning.errors import InputError
from kd_lightning.models import ConvNet
from kd_lightning.storage.identity import stamps
from kd_lightning.storage.teacher_store import TeacherStore, teacher_key
from kd_lightning.workflows.evaluate import evaluate
from kd_lightning.workflows.jobs import prepare
from kd_lightning.workflows.teacher import find_teachers

STUDENT = ("student=timm", "student.model.model_name=test_resnet")
TEACHER = ("teacher=timm", "teacher.model.model_name=test_resnet", "teacher.optimizer.lr=0.000001")
ONCE = (
    "trainer.max_epochs=1", "teacher.trainer.max_epochs=1", "trainer.accelerator=cpu",
    "trainer.precision=32-true", "pictures=false",
)  # fmt: skip
VIT = (
    "teacher=timm", "teacher.model.model_name=vit_tiny_patch16_224",
    "+teacher.model={img_size: 32, patch_size: 8, depth: 1, embed_dim: 24}",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Images of 3 classes, weights of models for 3 and 9 classes, and the stored teachers."""
    place = tmp_path_factory.mktemp("place")
    write_folder(place / "images")
    for classes in (3, 9):
        torch.manual_seed(classes)
        network = timm.create_model("test_resnet", num_classes=classes)
        save_file(network.state_dict(), place / f"{classes}.safetensors")
    return place


@pytest.fixture(scope="module")
def compose(place):
    """The configuration of a command. Choices are composed once, as that takes most of the time;
    other overrides are then set.
    """
    composed = {}

    def compose(*arguments):
        arguments = [argument.lstrip("+").partition("=")[::2] for argument in arguments]
        choices = [(key, value) for key, value in arguments if "." not in key or "_name" in key]
        names = tuple(f"{key}={value}" for key, value in choices if key != "seed")
        if names not in composed:
            common = (f"data.root={place / 'images'}", f"data_dir={place}", f"output_dir={place}")
            composed[names] = api.compose(*FOLDER, *common, *ONCE, *names)
        config = copy.deepcopy(composed[names])
        for key, value in arguments:
            if f"{key}={value}" in names:
                continue
            *parents, last = key.split(".")
            node = functools.reduce(dict.__getitem__, parents, config)
            value = yaml.safe_load(value)
            node[last] = {**node.get(last, {}), **value} if last == "model" else value
        return config

    return compose


@pytest.fixture(scope="module")
def job(compose):
    """A run that is ready to be trained."""
    return lambda *arguments: prepare(compose(*arguments))


def pretrained(role, place, classes):
    """Pretrained weights in a local file, in place of a download."""
    settings = f"file: {place / f'{classes}.safetensors'}, num_classes: {classes}"
    return (
        f"{role}.pretrained=true",
        f"+{role}.model.pretrained_cfg_overlay="
        f"{{{settings}, input_size: [3,24,24], mean: [0.1,0.2,0.3]}}",
    )


def is_parameter(name):
    return not name.split(".")[-1].startswith(("running_", "num_batches"))


def parameters(state):
    return {name: part for name, part in state.items() if is_parameter(name)}


def equal(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[k], other[k]) for k in state)


def key(job):
    """The key of a job's teacher in the teacher store."""
    (plan,), (teacher,) = job.plan.teachers, job.teachers
    return teacher_key(plan, job.data.fingerprint(), teacher.initial_sha256)


@pytest.fixture(scope="module")
def finished(place):
    """A run with pretrained student and teacher and a learning rate of 0."""
    still = ("optimizer.lr=0", "optimizer.weight_decay=0", "method=logit")
    common = (f"data.root={place / 'images'}", f"data_dir={place}", f"output_dir={place / 'run'}")
    start = *pretrained("student", place, 3), *pretrained("teacher", place, 3)
    metrics = api.run(*FOLDER, *common, *ONCE, *STUDENT, *TEACHER, *start, *still)
    return SimpleNamespace(metrics=metrics, folder=metrics["folder"], output=place / "run")


def test_student_that_is_not_trained_equals_its_initial_weights(finished, place):
    trained = load_file(f"{finished.folder}/student.safetensors")
    assert equal(parameters(trained), parameters(load_file(place / "3.safetensors")))


def test_run_directory_rebuilds_a_pretrained_student_with_its_own_normalisation(finished):
    assert api.load_student(finished.folder).mean == (0.1, 0.2, 0.3)
    found = evaluate(finished.folder)
    assert found["accuracy"] == pytest.approx(found["recorded"])


def test_pretrained_teacher_is_used_as_it_is(finished):
    assert not list(finished.output.glob("teachers/test_resnet-*"))
    assert finished.metrics["teacher_key"] is None
    assert 0 <= finished.metrics["teacher_test_accuracy"] <= 1
    assert finished.metrics["teacher_sha256"]


def test_teacher_keeps_its_own_input_and_the_students_is_independent(job, place):
    both = job(
        *STUDENT, *pretrained("student", place, 3), "student.mean=[0.4,0.4,0.4]",
        *TEACHER, *pretrained("teacher", place, 3), "method=logit",
    )  # fmt: skip
    (teacher,) = both.plan.teachers
    assert tuple(both.data.mean) == (0.4, 0.4, 0.4)
    assert both.plan.data.normalization.mean == (0.4, 0.4, 0.4)
    assert (teacher.normalization.mean, teacher.image_size) == ((0.1, 0.2, 0.3), 24)
    trained = job(*STUDENT, *pretrained("student", place, 3), *TEACHER, "method=logit")
    assert trained.plan.teachers[0].normalization.mean == (0.5, 0.5, 0.5)
    alone = job(*TEACHER, "method=logit")
    assert key(trained) == key(alone)  # of the same teacher, whatever the student is


def test_checkpoint_of_any_student_with_renamed_keys(job, tmp_path):
    state = ConvNet([4, 8], 8, 3, 16).state_dict()
    torch.save({"model": {f"net.{name}": part for name, part in state.items()}}, tmp_path / "a.pt")
    small = ("student.model.channels=[4,8]", "student.model.hidden=8", "method=none")
    start = f"student.checkpoint={tmp_path / 'a.pt'}"
    assert equal(job(*small, start).module.student.state_dict(), state)  # a common prefix
    renamed = {name.replace("stage1", "first"): part for name, part in state.items()}
    torch.save(renamed, tmp_path / "a.pt")
    rename = "student.rename_keys={first: stage1}"
    assert equal(job(*small, start, rename).module.student.state_dict(), state)
    with pytest.raises(InputError) as refused:
        job(*small, start)
    assert f"student.checkpoint={tmp_path / 'a.pt'}" in str(refused.value)
    assert "student.rename_keys={first.: stage1.}" in str(refused.value)
    assert "teacher" not in str(refused.value)


def test_content_of_the_initial_weights_is_part_of_the_identity(job, compose, place, tmp_path):
    file = tmp_path / "a.safetensors"
    command = (*STUDENT, "method=none", f"student.checkpoint={file}")
    file.write_bytes((place / "3.safetensors").read_bytes())
    first, stamp = job(*command).contents, stamps(compose(*command))
    file.write_bytes((place / "9.safetensors").read_bytes())
    assert job(*command).contents.changes(first.as_metrics())
    assert stamps(compose(*command)) != stamp
    # The same, if the file is not mentioned in the configuration.
    codes = [job(*STUDENT, "method=none").contents.code]
    for seed in (0, 1):
        start = (*pretrained("student", place, 9), f"seed={seed}")
        codes.append(job(*STUDENT, "method=none", *start).contents.code)
    assert codes[0] != codes[1] == codes[2]  # of both seeds: a random classifier does not count


def test_downloaded_weights_are_part_of_the_identity(job, monkeypatch):
    codes = []
    for value in (0.0, 1.0):
        state = timm.create_model("test_resnet").state_dict()
        state["conv1.0.weight"].fill_(value)
        monkeypatch.setattr(
            "timm.models._builder.load_state_dict_from_hf", lambda *_, s=state, **__: s
        )
        codes.append(job(*STUDENT, "method=none", "student.pretrained=true").contents.code)
    assert codes[0] != codes[1]


def test_fine_tuned_teacher_is_stored_and_reused(job, place, monkeypatch):
    command = (*TEACHER, "method=logit", "teacher.finetune=true", *pretrained("teacher", place, 9))
    first = job(*command)
    (stored,) = find_teachers(first.plan, first.data, first.teachers)
    weights, start = load_file(stored.weights), load_file(place / "9.safetensors")
    assert weights["fc.weight"].shape == (3, 96)  # another classifier
    for name, part in parameters(start).items():
        if not name.startswith("fc."):
            torch.testing.assert_close(weights[name], part, atol=1e-3, rtol=0)
    monkeypatch.setattr(TeacherStore, "_train", None)
    again = job(*command, "seed=1", *STUDENT)
    assert find_teachers(again.plan, again.data, again.teachers) == (stored,)
    teacher = again.with_teachers((stored,)).teachers[0]
    assert equal(teacher.model.state_dict(), weights)


def test_fine_tuned_teacher_is_confused_with_no_other(job, place, tmp_path):
    tune = (*TEACHER, "method=logit", "teacher.finetune=true")
    file = tmp_path / "a.safetensors"
    file.write_bytes((place / "9.safetensors").read_bytes())
    keys = [
        key(job(*TEACHER, "method=logit")),
        key(job(*TEACHER, "method=logit", "teacher.image_size=24")),
        key(job(*tune, *pretrained("teacher", place, 9))),
        key(job(*tune, f"teacher.checkpoint={file}")),
    ]
    file.write_bytes((place / "3.safetensors").read_bytes())
    keys.append(key(job(*tune, f"teacher.checkpoint={file}")))
    assert len(set(keys)) == len(keys)
    moved = tmp_path / "b.safetensors"
    moved.write_bytes(file.read_bytes())
    assert key(job(*tune, f"teacher.checkpoint={moved}")) == keys[-1]


def test_network_of_a_fixed_size_is_trained_on_resized_images(job):
    work = job(*VIT, "teacher.image_size=32", "method=combined")
    work = work.with_teachers(find_teachers(work.plan, work.data, work.teachers))
    images = work.data.render(torch.arange(4), torch.zeros(4, dtype=torch.long))["images"]
    assert work.teachers[0](images).shape == (4, 3)
    with pytest.raises(InputError, match="cannot take images of 16x16 pixels"):
        job(*VIT, "method=logit")


def test_failed_download_is_one_sentence_and_loses_nothing(train, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fail)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", fail)
    start = ("teacher.pretrained=true", "teacher.finetune=true")
    done = train(*ONCE, *TEACHER, *start, "method=logit", tiny=False)
    assert done.code != 0
    assert done.runs == []
    assert not (tmp_path / "outputs" / "teachers").exists()
    (sentence,) = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert "weights of test_resnet could not be downloaded (no route to host)" in sentence
    assert "teacher.checkpoint=FILE" in sentence


def test_weights_for_other_classes_are_refused_unless_fine_tuned(job, place):
    with pytest.raises(InputError) as refused:
        job(*TEACHER, *pretrained("teacher", place, 9), "method=logit")
    assert "for 9 classes, the data has 3" in str(refused.value)
    assert "teacher.finetune=true" in str(refused.value)
    job(*TEACHER, *pretrained("teacher", place, 9), "method=none")  # does not use it
    with pytest.raises(InputError, match=r"\(9, 96\) instead of .*teacher\.finetune=true"):
        job(*TEACHER, f"teacher.checkpoint={place / '9.safetensors'}", "method=logit")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["teacher.finetune=true"], "teacher.finetune needs weights to start from"),
        (["teacher.pretrained=true"], "only models by name have pretrained weights"),
        (["student.pretrained=maybe"], "student.pretrained must be true or false"),
        (["student.checkpoint=/no/file.pt"], "student.checkpoint=/no/file.pt does not exist"),
        (["teacher.image_size=0"], "teacher.image_size must be null or a number of pixels"),
        (["student.mean=[1]"], "student.mean must be null or three numbers"),
        (["teacher.std=[0.5,0,0.5]"], "teacher.std must be null or three numbers above 0"),
        (["teacher.pretrained=true", "teacher.checkpoint=a.pt"], "omit one"),
        (["student=timm"], "student.model.model_name must be given"),
        ([*STUDENT, "student.pretrained=true", "method=simkd"], "replaces the student's class"),
    ],
)
def test_contradictions_are_refused(job, arguments, sentence):
    with pytest.raises(InputError) as refused:
        job("method=logit", *arguments)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_new_keys_with_default_values_rename_nothing(compose):
    plain = compose("method=none")
    added = copy.deepcopy(plain)
    added["teacher"] |= {"pretrained": False, "finetune": False, "image_size": None}
    added["student"] |= {"pretrained": False, "checkpoint": None, "mean": None, "std": None}
    assert naming.config_key(added) == naming.config_key(plain)
    added["student"]["checkpoint"] = "a.pt"
    assert naming.config_key(added) != naming.config_key(plain)


def test_run_is_named_after_the_model():
    model = "student.model.model_name=test_resnet"
    assert naming.variant([model, "student.pretrained=true"]) == "-pretrained_true"
    other = naming.variant([model, "student.name=other"])
    assert other == "-model.model_name_test_resnet"
