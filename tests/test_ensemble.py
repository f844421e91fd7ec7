"""Ensembles of teachers: averaged predictions, features of each member, shared caches."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import FOLDER, TINY, write_folder
from safetensors.torch import load_file

from kd_lightning import api
from kd_lightning.config.checks import check
from kd_lightning.data.loading import Shown
from kd_lightning.data.views import Normalization
from kd_lightning.distill.ensemble import Ensemble, PerMember
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.errors import InputError
from kd_lightning.losses import Attention, Logit
from kd_lightning.models import ConvNet
from kd_lightning.storage.teacher_cache import stored

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
ENSEMBLE = ("method=combined", "teacher.members=[{seed: 0},{seed: 1}]")


def teacher(seed, channels=(8, 16)):
    torch.manual_seed(seed)
    model = ConvNet(channels=list(channels), hidden=8, num_classes=3, image_size=16)
    return FrozenTeacher(model, HALF, HALF)


def module(members, average="probabilities", member_terms=(), **terms):
    nodes = {
        name: {"_target_": f"kd_lightning.losses.{kind}", "weight": 1.0, **arguments}
        for name, (kind, arguments) in terms.items()
    }
    return DistillationModule(
        student={"_target_": "kd_lightning.models.ConvNet", "channels": [4, 8], "hidden": 8,
                 "num_classes": 3, "image_size": 16},
        terms=nodes, optimizer={"_target_": "torch.optim.SGD", "lr": 0.1}, scheduler=None,
        num_classes=3, image_size=16, member_terms=member_terms,
        teacher=Ensemble(members, average) if len(members) > 1 else members[0],
    ).eval()  # fmt: skip


def batch(size=5):
    torch.manual_seed(9)
    index = torch.arange(size)
    return {
        "images": torch.randn(size, 3, 16, 16), "labels": index % 3,
        "shown": Shown(index, index * 0), "loss_weight": 1.0,
    }  # fmt: skip


LAYERS = {"student_layers": ["stage1", "stage2"], "teacher_layers": ["stage1", "stage2"]}


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_average_of_the_predictions(average):
    members = [teacher(seed) for seed in range(3)]
    images = batch()["images"]
    single = torch.stack([member(images) for member in members])
    got = Ensemble(members, average)(images)
    if average == "logits":
        torch.testing.assert_close(got, single.mean(0))
    torch.testing.assert_close(
        got.softmax(1), single.softmax(2).mean(0) if average == "probabilities" else
        single.mean(0).softmax(1),
    )  # fmt: skip
    assert Ensemble(members).parameters == sum(member.parameters for member in members)
    prints = {Ensemble(part).fingerprint() for part in (members, members[:2], members[::-1])}
    assert len(prints) == 3


def test_logit_term_learns_from_the_average():
    members = [teacher(seed) for seed in range(2)]
    whole = module(members, logit=("Logit", {"temperature": 2.0}))
    losses, logits = whole.losses(batch())
    expected = Logit(temperature=2.0)
    target = Ensemble(members)(batch()["images"])
    student = type("Output", (), {"logits": logits})
    torch.testing.assert_close(losses["logit"], expected(student, target, None))


def test_attention_is_the_mean_over_members_of_any_architecture():
    members = [teacher(0), teacher(1, channels=(8, 8, 16))]
    deep = {**LAYERS, "teacher_layers": ["stage2", "stage3"]}
    terms = [
        {"attention": {"_target_": "kd_lightning.losses.Attention", "weight": 1.0, **part}}
        for part in (LAYERS, deep)
    ]
    whole = module(members, attention=("Attention", LAYERS), member_terms=terms)
    assert isinstance(whole.terms["attention"], PerMember)
    together = whole.losses(batch())[0]["attention"]
    alone = []
    for member, layers in zip(members, (LAYERS, deep), strict=True):
        one = module([member], attention=("Attention", layers))
        one.student.load_state_dict(whole.student.state_dict())
        assert isinstance(one.terms["attention"], Attention)
        alone.append(one.losses(batch())[0]["attention"])
    torch.testing.assert_close(together, torch.stack(alone).mean())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with an ensemble, of a configuration as of `train`."""
    root = tmp_path_factory.mktemp("finished")
    return api.run(
        *FOLDER, f"data.root={write_folder(root / 'images')}", *TINY, *ENSEMBLE,
        f"output_dir={root / 'outputs'}", f"data_dir={root / 'data'}",
    )  # fmt: skip


@pytest.fixture
def outputs(tmp_path, finished):
    """The output folder of `train`, with the teachers of the run."""
    root = tmp_path / "outputs"
    shutil.copytree(Path(finished["folder"]).parents[2] / "teachers", root / "teachers")
    return root


def caches(tmp_path):
    root = tmp_path / "outputs" / "teachers" / "remembered"
    return {entry.folder.name: entry.views for entry in stored(root)}


def test_members_are_trained_and_cached_like_single_teachers(train, tmp_path, outputs):
    store = outputs / "teachers"
    assert len(list(store.glob("*/teacher.safetensors"))) == 2
    before = caches(tmp_path)
    assert sorted(name.split("-")[1] for name in before) == [
        "attention", "attention", "evaluation", "evaluation", "logit", "logit",
    ]  # fmt: skip
    # A subset, in another order, needs no training and no further output.
    for members in ("teacher.seed=1", "teacher.members=[{seed: 1},{seed: 0}]"):
        done = train("method=combined", "trainer.max_epochs=1", members)
        assert done.code == 0, done.err
        assert "teacher convnet: epoch" not in done.err
    assert caches(tmp_path) == before
    assert len(list(store.glob("*/teacher.safetensors"))) == 2


def test_results_of_an_ensemble(train, finished, outputs):
    metrics = finished
    single = train("method=logit", "trainer.max_epochs=1").metrics
    assert metrics["teacher"] == "convnet x2"
    assert metrics["teacher_parameters"] == 2 * single["teacher_parameters"]
    assert metrics["compression_ratio"] == pytest.approx(2 * single["compression_ratio"])
    assert 0 < metrics["teacher_test_accuracy"] <= 1
    assert 0 < metrics["teacher_val_accuracy"] <= 1
    assert 0 <= metrics["agreement"] <= 1
    assert len(metrics["teacher_key"]) == 64
    assert metrics["teacher_key"] != single["teacher_key"]
    # The accuracy of the averaged prediction.
    config = json.loads(json.dumps(api.load_student(finished["folder"]).config))
    data = api_data(config)
    members = []
    for part in sorted((outputs / "teachers").glob("*/teacher.safetensors")):
        network = ConvNet(channels=[8, 16], hidden=16, num_classes=3, image_size=16)
        network.load_state_dict(load_file(part))
        members.append(network.eval())
    (test,) = data.test_dataloader()
    with torch.no_grad():
        mean = torch.stack([member(test["images"]).softmax(1) for member in members]).mean(0)
    accuracy = (mean.argmax(1) == test["labels"]).float().mean()
    assert metrics["teacher_test_accuracy"] == pytest.approx(float(accuracy))


def api_data(config):
    from kd_lightning.workflows.assembly import build_data

    data = build_data(config["data"])
    data.setup()
    return data


def test_ensemble_of_one_is_the_teacher(train, outputs):
    students = [
        train("method=logit", "remember.disk_gb=0", "trainer.max_epochs=1", *members).runs[0]
        for members in ((), ("teacher.members=[{seed: 0}]",))
    ]
    one, other = [(run / "student.safetensors").read_bytes() for run in students]
    assert one == other


def test_choices_and_changes_as_members():
    config = api.compose(
        "method=combined", "data=digits", "teacher=ensemble",
        "teacher.members=[resnet9,{name: mine, model: {_target_: torch.nn.Identity}},resnet20]",
    )  # fmt: skip
    first, changed, last = config["teacher"]["members"]
    assert config["teacher"]["name"] == "resnet9+mine+resnet20"
    assert (first["name"], last["name"]) == ("resnet9", "resnet20")
    assert first["model"]["num_classes"] == 10
    assert changed["model"] == {"_target_": "torch.nn.Identity"}
    assert last["terms"]["attention"]["teacher_layers"] == last["layers"]
    # Equal to the section of a single teacher.
    alone = api.compose("method=combined", "data=digits", "teacher=resnet9")["teacher"]
    assert first == {key: alone[key] for key in first}


def test_changes_of_the_ensemble_apply_to_every_choice():
    config = api.compose(
        "data=digits", "teacher=ensemble", "teacher.members=[resnet9,resnet20]", "teacher.seed=5",
        "teacher.trainer.max_epochs=3", "teacher.cutout=7",
    )  # fmt: skip
    for member in config["teacher"]["members"]:
        assert (member["seed"], member["cutout"], member["trainer"]["max_epochs"]) == (5, 7, 3)
    assert config["teacher"]["members"][0]["optimizer"]["lr"] == 0.2  # its own


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("teacher.members=resnet9", "teacher.members must be a list"),
        ("teacher.members=[]", "teacher.members must be a list"),
        ("teacher.members=[3]", "teacher.members[0]"),
        ("teacher.members=[{sed: 1}]", "did you mean teacher.members[0].seed"),
        ("teacher.members=[{seed: 0},{seed: -1}]", "teacher.members[1].seed"),
        ("teacher.members=[resnet99]", "resnet9"),
        ("teacher.members=[resnet9]", "select teacher=ensemble too"),
        ("teacher=ensemble", "needs teacher.members"),
        ("teacher.members=[ensemble]", "teacher.members[0]: a member cannot be an ensemble"),
        ("teacher.members=[{members: [{}]}]", "teacher.members[0]: a member cannot be"),
        ("teacher.members=['seed=1']", "write {seed: 1}"),
        ("teacher.members=[{seed: 0},{}]", "teacher.members[1] is the same as teacher.members[0]"),
        ("teacher.average=mean", "teacher.average must be one of probabilities, logits"),
        ("teacher.members=[{model: {_target_: nothing.Here}}]", "teacher.members[0].model"),
    ],
)
def test_invalid_members_are_rejected(wrong, words):
    with pytest.raises(InputError) as error:
        check(api.compose("method=logit", "data=digits", wrong))
    assert words in str(error.value)
