"""Model sizes, and feature extraction from any layer of any model."""

import pytest
import torch
from torch import nn

from kd_lightning.models import CifarResNet, ConvNet, FeatureReader, ResNet9
from kd_lightning.models.convnet import Flatten
from kd_lightning.models.features import count_parameters, layer_shapes
from kd_lightning.models.folding import fold_batchnorm


@pytest.mark.parametrize(
    ("channels", "hidden", "parameters"),
    [
        ([16, 32], 64, 530_090),
        ([32, 64], 128, 2_117_962),
        ([48, 96], 256, 6_337_194),
        ([64, 128, 256], 512, 33_930_890),
    ],
)
def test_convnets_have_the_sizes_of_the_original_table(channels, hidden, parameters):
    for pool_after in range(1, len(channels) + 1):
        model = ConvNet(channels, hidden, pool_after=pool_after)
        assert count_parameters(model) == parameters


def test_pooling_commutes_with_relu():
    torch.manual_seed(0)
    model = ConvNet([4, 8], 16, pool_after=1).eval()
    images = torch.randn(3, 3, 32, 32)
    convolution, second = model.stage1[0], model.stage2[0]
    x = nn.functional.max_pool2d(torch.relu(convolution(images)), 2)
    expected = model.classifier(torch.relu(second(x)))
    torch.testing.assert_close(model(images), expected)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_flatten_gradient_keeps_the_memory_format(memory_format):
    images = torch.randn(2, 3, 4, 5).contiguous(memory_format=memory_format).requires_grad_()
    weights = torch.randn(2, 60)
    formats = []
    middle = images * 1
    middle.register_hook(lambda g: formats.append(g.is_contiguous(memory_format=memory_format)))
    flat = Flatten()(middle)
    assert torch.equal(flat, torch.nn.Flatten()(images))
    (flat * weights).sum().backward()
    assert formats == [True]
    assert torch.equal(images.grad, weights.view(2, 3, 4, 5))


@pytest.mark.parametrize("pool_after", [1, 2])
def test_position_of_the_pooling(pool_after):
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
def test_convnet_rejects_invalid_sizes(arguments):
    with pytest.raises(ValueError):
        ConvNet(**arguments)


# He et al. (2016), table 6: 0.27, 0.46, 0.66 and 0.85 million.
@pytest.mark.parametrize(
    ("depth", "parameters"),
    [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018)],
)
def test_cifar_resnets_have_the_sizes_of_the_paper(depth, parameters):
    assert count_parameters(CifarResNet(depth)) == parameters


def test_cifar_resnet_rejects_invalid_depths():
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


def test_close_removes_the_hooks():
    model = ConvNet([4, 8], 16)
    FeatureReader(model, ["stage1"]).close()
    assert not model.stage1._forward_hooks


def test_unknown_layer_lists_the_existing_ones():
    with pytest.raises(ValueError, match=r"no layer 'stage9'; layers: stage1, .*classifier"):
        FeatureReader(ConvNet([4, 8], 16), ["stage9"])


def test_layer_shapes_leaves_the_model_unchanged():
    model = ResNet9(width=4)
    model.stage1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    layer_shapes(model, 32)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("logits", [True, False])
def test_last_call_of_a_layer_is_read(logits):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.after = torch.nn.Identity(), torch.nn.Identity()
            self.calls = 0
            self.after.register_forward_hook(self.count)

        def count(self, *_):
            self.calls += 1

        def forward(self, images):
            return self.after(self.twice(self.twice(images) * 2) * 2)

    model = Twice()
    read = FeatureReader(model, ["twice"], logits=logits)
    images = torch.ones(2, 3)
    for _ in range(3):
        output = read(images)
        assert torch.equal(output.features["twice"], 2 * images)
    # Layers after the last one read run only if the logits are requested.
    assert model.calls == (3 if logits else 1)
    assert output.logits.shape == (2, 3 if logits else 0)
    assert torch.equal(read(images, complete=True).logits, 4 * images)


def trained_statistics(model):
    """Non-default running statistics and scales."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -1, 1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


@pytest.mark.parametrize("family", ["resnet9", "cifar_resnet", "torchvision"])
def test_folding_changes_no_output_and_no_read_layer(family):
    torch.manual_seed(0)
    model, count, layers = {  # in ResNet-9, three are separated by pooling
        "resnet9": lambda: (ResNet9(width=4), 5, ["stem", "stage1", "stage3"]),
        "cifar_resnet": lambda: (CifarResNet(20), 19, ["layer1", "layer2.0.bn1"]),
        "torchvision": lambda: (
            pytest.importorskip("torchvision").models.resnet18(num_classes=5),
            20,
            ["layer1", "layer4.1.bn2"],
        ),
    }[family]()
    trained_statistics(model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = FeatureReader(model, layers)(images)
        assert fold_batchnorm(model) == count
        after = FeatureReader(model, layers)(images)
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-3, atol=1e-4)
    for layer in layers:
        torch.testing.assert_close(
            after.features[layer], before.features[layer], rtol=1e-3, atol=1e-3
        )


def test_read_convolution_is_not_folded():
    model = trained_statistics(CifarResNet(8))
    assert fold_batchnorm(model, keep=["layer1.0.conv1"]) == 6
    assert isinstance(model.layer1[0].bn1, torch.nn.BatchNorm2d)


def test_untraceable_network_is_not_folded():
    class Branching(torch.nn.Sequential):
        def forward(self, images):
            return super().forward(images) if images.sum() > 0 else images

    model = Branching(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)).eval()
    assert fold_batchnorm(model) == 0
    assert isinstance(model[1], torch.nn.BatchNorm2d)
