"""The networks have exactly the sizes they claim, and any layer of any model can be read."""

import pytest
import torch
from torch import nn

from kd_lightning.models import CifarResNet, ConvNet, FeatureReader, ResNet9
from kd_lightning.models.features import count_parameters, layer_shapes


@pytest.mark.parametrize(
    ("channels", "hidden", "parameters"),
    [
        ([16, 32], 64, 530_090),
        ([32, 64], 128, 2_117_962),
        ([48, 96], 256, 6_337_194),
        ([64, 128, 256], 512, 33_930_890),
    ],
)
def test_the_published_family_has_the_published_sizes(channels, hidden, parameters):
    for pool_after in range(1, len(channels) + 1):
        model = ConvNet(channels, hidden, pool_after=pool_after)
        assert count_parameters(model) == parameters


def test_pooling_before_relu_is_the_same_as_after():
    torch.manual_seed(0)
    model = ConvNet([4, 8], 16, pool_after=1).eval()
    images = torch.randn(3, 3, 32, 32)
    convolution, second = model.stage1[0], model.stage2[0]
    x = nn.functional.max_pool2d(torch.relu(convolution(images)), 2)
    expected = model.classifier(torch.relu(second(x)))
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("pool_after", [1, 2])
def test_where_the_pooling_stands(pool_after):
    shapes = layer_shapes(ConvNet([4, 8], 16, pool_after=pool_after), 32)
    assert shapes["stage1"] == ((4, 16, 16) if pool_after == 1 else (4, 32, 32))
    assert shapes["stage2"] == (8, 16, 16)


@pytest.mark.parametrize(
    "arguments",
    [
        {"channels": [], "hidden": 8},
        {"channels": [4], "hidden": 0},
        {"channels": [4], "hidden": 8, "image_size": 15},
        {"channels": [4], "hidden": 8, "pool_after": 2},
        {"channels": [4], "hidden": 8, "num_classes": 1},
    ],
)
def test_convnet_refuses_impossible_sizes(arguments):
    with pytest.raises(ValueError):
        ConvNet(**arguments)


# He et al. (2016), table 6: 0.27, 0.46, 0.66 and 0.85 million.
@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)],
)
def test_cifar_resnets_have_the_sizes_of_the_paper(depth, parameters):
    assert count_parameters(CifarResNet(depth)) == parameters


def test_cifar_resnet_refuses_a_depth_that_is_not_6n_plus_2():
    with pytest.raises(ValueError, match="6n"):
        CifarResNet(21)


def test_resnet9_is_compact():
    model = ResNet9()
    assert count_parameters(model) == 1_646_112
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_features_are_read_by_name_from_a_torchvision_model():
    torchvision = pytest.importorskip("torchvision")
    model = torchvision.models.resnet18(num_classes=7).eval()
    images = torch.randn(2, 3, 32, 32)
    output = FeatureReader(model, ["layer1", "layer2.0.conv1"])(images)
    assert output.features["layer1"].shape == (2, 64, 8, 8)
    assert output.features["layer2.0.conv1"].shape == (2, 128, 4, 4)
    torch.testing.assert_close(output.logits, model(images))


def test_closing_a_reader_takes_its_hooks_away():
    model = ConvNet([4, 8], 16)
    FeatureReader(model, ["stage1"]).close()
    assert not model.stage1._forward_hooks


def test_an_unknown_layer_is_answered_with_those_that_exist():
    with pytest.raises(ValueError, match=r"no layer 'stage9'; there are: stage1, .*classifier"):
        FeatureReader(ConvNet([4, 8], 16), ["stage9"])


def test_layer_shapes_leaves_the_model_as_it_was():
    model = ResNet9(width=4)
    model.stage1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    layer_shapes(model, 32)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module._forward_hooks for module in model.modules())
