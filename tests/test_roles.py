"""The roles of layers, declared and found."""

from functools import partial

import pytest
import torch
import torchvision
from torch import nn

from kd_lightning.models import CifarResNet, ConvNet, FeatureReader, ResNet9, layer_shapes
from kd_lightning.models.roles import Roles, find_roles, select


def undeclared(model):
    model.roles = None
    return model


@pytest.mark.parametrize(
    ("model", "stages", "features"),
    [
        (ConvNet([4, 6], 12, image_size=32), ("stage1", "stage2"), 12),
        (ConvNet([4, 6, 8], 12, image_size=32, pool_after=2), ("stage1", "stage2", "stage3"), 12),
        (ResNet9(4), ("stem", "stage1", "stage2", "stage3"), 32),
        (CifarResNet(8), ("layer1", "layer2", "layer3"), 64),
    ],
)
def test_declared_roles_are_layers_of_the_model(model, stages, features):
    roles = find_roles(layer_shapes(model, 32), 10)
    assert roles.stages == stages
    read = FeatureReader(model.eval(), [*roles.stages, roles.embedding, roles.classifier])
    output = read(torch.randn(2, 3, 32, 32))
    assert output.features[roles.embedding].shape == (2, features)
    weight = model.get_submodule(roles.classifier).weight
    assert weight.shape == (10, features)


@pytest.mark.parametrize("model", [ResNet9(4), CifarResNet(8)], ids=["resnet9", "cifar"])
def test_found_roles_equal_the_declared(model):
    declared = type(model).roles
    assert find_roles(layer_shapes(undeclared(model), 32), 10) == declared


def small_vit():
    return torchvision.models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32,
        num_classes=7,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            partial(torchvision.models.resnet18, num_classes=7),
            (["layer1", "layer2", "layer3", "layer4"], "fc:input", "fc"),
        ),
        (small_vit, (["encoder"], "heads.head:input", "heads.head")),
        (
            partial(torchvision.models.mobilenet_v3_small, num_classes=7),
            (None, "classifier.3:input", "classifier.3"),
        ),
        (
            partial(torchvision.models.squeezenet1_1, num_classes=7),
            (["features"], "classifier.1:input", "classifier.1"),
        ),
    ],
    ids=["resnet18", "vit", "mobilenet", "squeezenet"],
)
def test_roles_are_found_in_models_of_torchvision(model, expected):
    model = model()
    stages, embedding, classifier = expected
    roles = find_roles(layer_shapes(model, 64), 7)
    assert (roles.embedding, roles.classifier) == (embedding, classifier)
    assert classifier not in roles.stages
    if stages is not None:
        assert list(roles.stages)[-len(stages) :] == stages
    sizes = [layer_shapes(model, 64)[stage] for stage in roles.stages]
    assert len(set(sizes)) == len(sizes)


def test_model_without_a_classifier_is_reported():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="no linear layer or convolution with 10 outputs"):
        find_roles(layer_shapes(model, 16), 10)


def test_layers_are_selected_by_role_or_name():
    model = ConvNet([4, 6], 12, num_classes=3, image_size=16)
    shapes = layer_shapes(model, 16)
    assert select("stages", shapes, 3) == ("stage1", "stage2")
    assert select("last_stage", shapes, 3) == ("stage2",)
    assert select(["stage1", "embedding"], shapes, 3) == ("stage1", "classifier.3:input")
    assert select("classifier", shapes, 3) == ("classifier.3",)
    assert select("stage1:input", shapes, 3) == ("stage1:input",)
    model.roles = Roles((), "classifier.3:input", "classifier.3")
    with pytest.raises(ValueError, match="no layer outputs a feature map; name the layers"):
        select("stages", shapes, 3)
