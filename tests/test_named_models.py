"""Models of timm and torchvision by name: building, pretrained weights, roles, identity."""

import sys

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.transforms import v2

from kd_lightning.config.nodes import build
from kd_lightning.config.plan import PretrainedPlan
from kd_lightning.config.trust import check_trusted
from kd_lightning.data.views import Normalization
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.errors import InputError
from kd_lightning.losses import Context
from kd_lightning.losses.attention import Attention
from kd_lightning.models.features import FeatureReader, layer_shapes
from kd_lightning.models.named import pretrained_settings, timm_model, torchvision_model
from kd_lightning.models.roles import find_roles
from kd_lightning.storage import identity
from kd_lightning.workflows.initial import load_initial

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
TIMM = "kd_lightning.models.timm_model"
VIT = {"img_size": 32, "patch_size": 8}


def node(name, library="timm", **options):
    target = f"kd_lightning.models.{library}_model"
    return {"_target_": target, "model_name": name, "num_classes": 5, **options}


def stored(path, classes, name="test_resnet"):
    """A file with the weights of a model of timm, and the configuration that refers to it."""
    torch.manual_seed(classes)
    network = timm.create_model(name, num_classes=classes)
    save_file(network.state_dict(), path)
    overlay = {"file": str(path), "num_classes": classes, "mean": [0.4, 0.5, 0.6], "std": [0.2] * 3}
    return network.eval(), overlay


def test_named_model_is_that_of_the_library():
    for ours, theirs in [
        (node("test_resnet"), lambda: timm.create_model("test_resnet", num_classes=5)),
        (node("test_vit", **VIT), lambda: timm.create_model("test_vit", num_classes=5, **VIT)),
        (
            node("squeezenet1_1", "torchvision", dropout=0.1),
            lambda: torchvision.models.squeezenet1_1(num_classes=5, dropout=0.1),
        ),
    ]:
        torch.manual_seed(0)
        expected = theirs().state_dict()
        torch.manual_seed(0)
        built = build(ours, "student.model").state_dict()
        assert built.keys() == expected.keys()
        assert all(torch.equal(built[key], expected[key]) for key in built)
        check_trusted(ours, "student.model")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (node("test_resnett"), "timm has no model test_resnett; did you mean test_resnet?"),
        (node("hf-hub:someone/model"), "hf_hub_id"),
        (node("test_resnet", pretrained=True), "omit pretrained; use pretrained: true"),
        (node("test_resnet", checkpoint_path="a.pt"), "omit checkpoint_path; use checkpoint"),
        (node("resnet81", "torchvision"), "torchvision has no model resnet81"),
        (node("fasterrcnn_resnet50_fpn", "torchvision"), "torchvision has no model"),
    ],
)
def test_unknown_models_and_misplaced_options_are_refused(model, sentence):
    with pytest.raises(InputError) as refused:
        build(model, "student.model")
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_missing_timm_is_one_sentence_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[timm\]'"):
        build(node("test_resnet"), "student.model")


def test_settings_are_those_of_the_library():
    found = pretrained_settings(timm_model, {"model_name": "test_resnet", "num_classes": 5})
    assert found == ("test_resnet", 1000, 160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    overlay = {"mean": [0.1, 0.2, 0.3], "input_size": [3, 32, 32], "num_classes": 7}
    arguments = {"model_name": "test_resnet", "pretrained_cfg_overlay": overlay}
    assert pretrained_settings(timm_model, arguments)[1:4] == (7, 32, (0.1, 0.2, 0.3))
    found = pretrained_settings(torchvision_model, {"model_name": "efficientnet_v2_s"})
    assert found[1:] == (1000, 384, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("builder", "arguments", "sentence"),
    [
        (timm_model, {"model_name": "mixer_s32_224"}, "no pretrained weights of mixer_s32_224"),
        (torchvision_model, {"model_name": "resnet18", "weights": "V7"}, "but IMAGENET1K_V1"),
        (torchvision.models.resnet18, {}, "only models by name"),
    ],
)
def test_missing_pretrained_weights_are_reported(builder, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrained_settings(builder, arguments)


def test_pretrained_teacher_answers_as_timm_with_its_own_transforms(tmp_path):
    theirs, overlay = stored(tmp_path / "w.safetensors", 5)
    ours = node("test_resnet", pretrained_cfg_overlay=overlay)
    network = build(ours, "teacher.model")
    load_initial(network, ours, PretrainedPlan("teacher"))
    own = Normalization(tuple(overlay["mean"]), tuple(overlay["std"]))
    pixels = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    transforms = v2.Compose(
        [v2.Resize(40, antialias=True), v2.Normalize(overlay["mean"], overlay["std"])]
    )
    with torch.no_grad():
        expected = theirs(transforms(pixels))
    teacher = FrozenTeacher(network, own, HALF, image_size=40)
    torch.testing.assert_close(teacher((pixels - 0.5) / 0.5), expected, atol=1e-4, rtol=1e-4)
    assert teacher.shapes(24).image_size == 40


def test_image_size_is_part_of_the_fingerprint():
    network = build(node("test_resnet"), "teacher.model")
    prints = [FrozenTeacher(network, HALF, HALF, size).fingerprint() for size in (None, 32, 48)]
    assert len(set(prints)) == 3


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (node("test_resnet"), 32),
        (node("mobilenetv3_small_050"), 32),
        (node("test_vit", **VIT), 32),
        (node("test_convnext"), 64),
        (node("shufflenet_v2_x0_5", "torchvision"), 32),
    ],
    ids=lambda value: value["model_name"] if isinstance(value, dict) else None,
)
def test_prepared_teacher_gives_the_same_logits(model, size):
    torch.manual_seed(0)
    network = build(model, "teacher.model")
    for part in network.modules():  # statistics that folding has to take into account
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
    images = torch.randn(4, 3, size, size)
    with torch.no_grad():
        raw = network.eval()(images)
    teacher = FrozenTeacher(network, HALF, HALF)
    teacher.read([], num_classes=5)
    teacher.prepare(torch.device("cpu"), torch.channels_last, None)
    largest = float(raw.abs().max())
    torch.testing.assert_close(teacher(images), raw, atol=1e-4 * max(1, largest), rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "stages", "classifier"),
    [
        ("test_resnet", {}, ("act1", "layer1", "layer2", "layer3"), "fc"),
        ("test_efficientnet", {}, None, "classifier"),
        ("test_vit", VIT, ("blocks.5",), "head"),
        ("test_convnext", {}, ("stages.0", "stages.1", "stages.2"), "head.fc"),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32, "depth": 2}, ("blocks.1",), "head"),
    ],
)
def test_roles_are_those_that_timm_declares(name, options, stages, classifier):
    model = build(node(name, **options), "student.model")
    shapes = layer_shapes(model, 32)
    roles = find_roles(shapes, 5)
    assert roles.classifier == classifier
    assert stages is None or roles.stages == stages
    output = FeatureReader(model.eval(), [roles.embedding])(torch.randn(2, 3, 32, 32))
    features = output.features[roles.embedding]
    assert model.get_submodule(classifier)(features).shape == (2, 5)
    assert len({shapes.layouts[stage].size for stage in roles.stages}) == len(roles.stages)


@pytest.mark.parametrize("teacher", [node("test_vit", **VIT), node("squeezenet1_1", "torchvision")])
def test_maps_of_any_two_families_are_compared_without_layer_names(teacher):
    shapes = [layer_shapes(build(model, "model"), 32) for model in (node("test_resnet"), teacher)]
    term = Attention()
    reads = term.setup(Context(*shapes, 5, 100))
    assert reads.student
    assert reads.teacher


def test_classifier_for_other_classes_is_left_to_be_trained(tmp_path):
    theirs, overlay = stored(tmp_path / "w.safetensors", 9)
    ours = node("test_resnet", pretrained_cfg_overlay=overlay)
    network = build(ours, "student.model")
    before = network.fc.weight.clone()
    digest = load_initial(network, ours, PretrainedPlan("student"), num_classes=5)
    assert torch.equal(network.fc.weight, before)
    assert torch.equal(network.conv1[0].weight, theirs.conv1[0].weight)
    other = build(ours, "student.model")  # another random classifier
    assert load_initial(other, ours, PretrainedPlan("student"), num_classes=5) == digest
    with pytest.raises(InputError, match=r"'fc.weight' has the shape \(9, 96\)"):
        load_initial(network, ours, PretrainedPlan("student"))


def test_weights_without_classifier_are_accepted(tmp_path):
    _, overlay = stored(tmp_path / "w.safetensors", 0)
    ours = node("test_resnet", pretrained_cfg_overlay=overlay)
    network = build(ours, "student.model")
    load_initial(network, ours, PretrainedPlan("student"), num_classes=5)


def test_pretrained_weights_of_torchvision(monkeypatch):
    state = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    ours = node("squeezenet1_1", "torchvision")
    network = build(ours, "student.model")
    load_initial(network, ours, PretrainedPlan("student"), num_classes=5)
    assert torch.equal(network.features[0].weight, state["features.0.weight"])
    assert network.classifier[1].weight.shape[0] == 5


def test_model_that_normalises_its_input_itself_needs_that_option(monkeypatch):
    state = torchvision.models.googlenet(init_weights=False).state_dict()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: state)
    ours = node("googlenet", "torchvision", init_weights=False)
    network = build(ours, "student.model")
    with pytest.raises(InputError, match="need the model's option transform_input: true"):
        load_initial(network, ours, PretrainedPlan("student"), num_classes=5)


def test_version_of_the_library_identifies_the_code_of_its_models(monkeypatch):
    real = {name: identity.source_sha256(node("a", name)) for name in ("timm", "torchvision")}
    assert None not in real.values()
    assert len(set(real.values())) == 2
    config = {"data_dir": "data", "student": {"model": node("a")}}
    stamp = identity.stamps(config)
    monkeypatch.setattr(identity.importlib.metadata, "version", lambda _: "9.9")
    assert identity.source_sha256(node("a")) != real["timm"]
    assert identity.stamps(config) != stamp
    assert {build for build in identity.LIBRARIES if not callable(_resolved(build))} == set()


def _resolved(path):
    package, _, name = path.rpartition(".")
    return getattr(sys.modules[package], name)
