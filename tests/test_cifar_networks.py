"""The CIFAR networks of the distillation literature: sizes, roles, and published checkpoints."""

import pytest
import torch
from conftest import REPOSITORY
from omegaconf import OmegaConf
from published_networks import PUBLISHED, state

from kd_lightning import api
from kd_lightning.config.nodes import build
from kd_lightning.losses import Context, SimKD
from kd_lightning.models import (
    VGG,
    BottleneckResNet,
    FeatureReader,
    MobileNetV2,
    ProjectionResNet,
    ReusedClassifier,
    ShuffleNetV1,
    ShuffleNetV2,
    WideResNet,
    count_parameters,
    layer_shapes,
)
from kd_lightning.models.folding import fold_batchnorm
from kd_lightning.models.preparing import materialize
from kd_lightning.models.roles import select
from kd_lightning.storage.checkpoints import load_checkpoint
from kd_lightning.workflows import student

# With 100 classes; counted from RepDistiller's code, except resnet14 and resnet44.
PARAMETERS = {
    "resnet8": 83_892,
    "resnet14": 181_108,
    "resnet20": 278_324,
    "resnet32": 472_756,
    "resnet44": 667_188,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_1": 180_916,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
    "resnet50_cifar": 23_705_252,
}
# First logits of RepDistiller's networks with the weights of `state(name, 10)`, in float64.
LOGITS = {
    "resnet20": [-28.8333, -20.8852, 33.6132, 10.0516],
    "resnet8x4": [-3.1003, 3.9155, 0.1648, 2.6642],
    "wrn_16_2": [-16.8752, -25.0266, -13.0461, -3.7858],
    "vgg8": [1.4899, -4.4929, 1.8144, -3.219],
    "mobilenetv2": [-24675.762, -11850.12, -10314.4642, -21749.6558],
    "shufflenetv1": [45.612, -84.2245, 57.0751, 28.2893],
    "shufflenetv2": [356.8604, 387.7526, -82.5422, 217.9085],
    "resnet50_cifar": [-287.5349, -2735.0953, 2560.601, -1371.0682],
}
# One of each family, small: constructor, shapes of the stages for images of 32x32, embedding.
FAMILIES = {
    "projection_resnet": (
        lambda **other: ProjectionResNet(14, [4, 8, 12, 16], 7),
        [(8, 32), (12, 16), (16, 8)],
        16,
    ),
    "bottleneck_resnet": (
        lambda **other: BottleneckResNet([1, 2, 1, 1], 4, 7),
        [(16, 32), (32, 16), (64, 8), (128, 4)],
        128,
    ),
    "wide_resnet": (lambda **other: WideResNet(10, 1, 7), [(16, 32), (32, 16), (64, 8)], 64),
    "vgg": (
        lambda image_size=32: VGG([1, 1, 1, 1, 1], 7, image_size),
        [(128, 16), (256, 8), (512, 4), (512, 4)],
        512,
    ),
    "mobilenetv2": (
        lambda **other: MobileNetV2(0.25, num_classes=7),
        [(6, 16), (8, 8), (24, 4), (80, 2)],
        1280,
    ),
    "shufflenetv1": (
        lambda **other: ShuffleNetV1([48, 96, 192], [2, 2, 1], num_classes=7),
        [(48, 16), (96, 8), (192, 4)],
        192,
    ),
    "shufflenetv2": (
        lambda **other: ShuffleNetV2([8, 16, 32, 64], [1, 2, 1], num_classes=7),
        [(8, 16), (16, 8), (32, 4)],
        64,
    ),
}


def made(family, **arguments):
    torch.manual_seed(0)
    return FAMILIES[family][0](**arguments)


def section(name, classes=100):
    """The section of a student, resolved."""
    data = {"num_classes": classes, "image_size": 32}
    whole = {"data": data, "student": OmegaConf.load(REPOSITORY / f"configs/student/{name}.yaml")}
    return OmegaConf.to_container(OmegaConf.create(whole), resolve=True)["student"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_networks_have_the_parameters_of_the_literature(name):
    node = section(name)
    with torch.device("meta"):
        model = build(node["model"], "student.model")
    assert count_parameters(model) == PARAMETERS[name]
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert own == dict(PUBLISHED[name](100))
    assert node["name"] == name
    assert node["layers"] == list(model.roles.stages)


@pytest.mark.parametrize("name", LOGITS)
def test_logits_are_those_of_the_public_implementation(name):
    model = build(section(name, classes=10)["model"], "student.model").double().eval()
    model.load_state_dict(state(name, 10))
    images = (torch.arange(3 * 32 * 32, dtype=torch.float64) * 0.37).sin().view(1, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)[0, :4]
    torch.testing.assert_close(logits, logits.new_tensor(LOGITS[name]), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_are_the_stages_and_the_pooled_vector(family):
    model, (_, stages, features) = made(family).eval(), FAMILIES[family]
    shapes = layer_shapes(model, 32)
    names = select("stages", shapes, 7)
    assert [shapes[name] for name in names] == [(c, size, size) for c, size in stages]
    assert all(shapes.layouts[name].size == shapes[name][1:] for name in names)
    (embedding,), (classifier,), (pooled,) = (
        select(role, shapes, 7) for role in ("embedding", "classifier", "pooled")
    )
    images = torch.randn(2, 3, 32, 32)
    output = FeatureReader(model, [embedding, classifier, pooled])(images)
    vector = output.features[embedding]
    assert vector.shape == (2, features)
    torch.testing.assert_close(output.features[pooled].mean((2, 3)), vector)
    torch.testing.assert_close(model.forward_features(images).mean((2, 3)), vector)
    assert torch.equal(output.features[classifier], output.logits)
    assert model.get_submodule(classifier).weight.shape == (7, features)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_trained_at_any_image_size(family, size):
    model = made(family, image_size=size)
    logits = model(torch.randn(4, 3, size, size))
    assert logits.shape == (4, 7)
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert [name for name, p in model.named_parameters() if not p.grad.isfinite().all()] == []


def test_last_block_of_vgg_has_half_the_resolution_for_large_images():
    for size, last in ((32, 4), (64, 4), (96, 6)):
        shapes = layer_shapes(VGG([1] * 5, 7, image_size=size), size)
        assert shapes["block3"] == (512, size // 8, size // 8)
        assert shapes["block4"] == (512, last, last)


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_networks_are_folded_without_a_change(family):
    model, images = made(family).eval(), torch.randn(2, 3, 32, 32)
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.nn.init.uniform_(buffer, 0.5, 2)
    with torch.no_grad():
        before = model(images)
        assert fold_batchnorm(model) > 0
        torch.testing.assert_close(model(images), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_simkd_reuses_the_classifier_of_any_family(family):
    """Also where the map that is pooled is not the last stage."""
    teacher = made(family).eval()
    shapes = layer_shapes(teacher, 32)
    channels, size, _ = shapes[select("pooled", shapes, 7)[0]]
    model = ReusedClassifier(made("wide_resnet"), channels, size, 7, "average")
    materialize(model, 32)
    term = SimKD()
    term.setup(Context(layer_shapes(model, 32), shapes, 7))
    term.begin()
    assert torch.equal(model.classifier.weight, teacher.get_submodule(shapes.model.roles[2]).weight)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: ProjectionResNet(9),
        lambda: ProjectionResNet(8, [16, 32]),
        lambda: BottleneckResNet([1, 1]),
        lambda: WideResNet(17),
        lambda: WideResNet(16, 0),
        lambda: VGG([1, 1]),
        lambda: MobileNetV2(0.01),
        lambda: ShuffleNetV1([240]),
        lambda: ShuffleNetV2([3, 6, 9, 12]),
    ],
)
def test_impossible_sizes_are_rejected(wrong):
    with pytest.raises(ValueError):
        wrong()


def repdistiller(weights):
    """The content of its ``ckpt_epoch_240.pth``."""
    optimizer = {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 5e-5}]}
    accuracy = torch.tensor([72.3])
    return {"epoch": 240, "model": weights, "accuracy": accuracy, "optimizer": optimizer}


def mdistiller(weights):
    """The content of its ``latest`` and ``best``; ``student_best`` has only the student."""
    both = {f"module.student.{key}": value for key, value in weights.items()}
    both |= {f"module.teacher.{key}": value for key, value in state("resnet8", 10).items()}
    return {"epoch": 240, "model": both, "optimizer": {"param_groups": []}, "best_acc": 70.1}


def assert_same(state, other):
    assert state.keys() == other.keys()
    assert all(torch.equal(state[key], other[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("resnet20", repdistiller),
        ("wrn_16_1", repdistiller),
        ("vgg8", repdistiller),
        ("mobilenetv2", repdistiller),
        ("shufflenetv1", repdistiller),
        ("shufflenetv2", repdistiller),
        ("wrn_16_1", mdistiller),
        ("wrn_16_1", lambda weights: {"model": weights}),
    ],
)
def test_published_checkpoints_load_without_renaming(tmp_path, name, content):
    weights = state(name, classes=10)
    torch.save(content(weights), tmp_path / "file.pth")
    model = build(section(name, classes=10)["model"], "teacher.model")
    load_checkpoint(model, tmp_path / "file.pth", {"module.": ""})
    assert_same(model.state_dict(), weights)


@pytest.mark.parametrize(
    ("teacher", "network", "content"),
    [("resnet20_projection", "resnet20", repdistiller), ("wrn_16_1", "wrn_16_1", mdistiller)],
)
def test_published_checkpoint_as_a_teacher(tmp_path, teacher, network, content):
    """`train.py teacher=... teacher.checkpoint=FILE`, up to the beginning of the training."""
    weights, file = state(network, classes=10), tmp_path / "ckpt_epoch_240.pth"
    torch.save(content(weights), file)
    job = student.prepare(
        api.compose(
            f"teacher={teacher}", f"teacher.checkpoint={file}", "data=digits", "method=logit",
            "trainer.accelerator=cpu", f"output_dir={tmp_path}",
        )
    )  # fmt: skip
    assert_same(job.teachers[0].model.state_dict(), weights)


@pytest.mark.parametrize("name", PARAMETERS)
def test_teachers_are_the_students_of_their_name(name):
    file = REPOSITORY / f"configs/teacher/{name}_projection.yaml"
    if not file.exists():
        file = REPOSITORY / f"configs/teacher/{name}.yaml"
    assert f"/student/{name}@_here_" in OmegaConf.load(file).defaults
