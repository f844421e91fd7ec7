"""The networks have exactly the sizes they claim, and any layer of any model can be read."""

import copy
import gc
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from kd_lightning.errors import InputError, RunError
from kd_lightning.models import CifarResNet, ConvNet, FeatureReader, ResNet9
from kd_lightning.models.convnet import Flatten
from kd_lightning.models.features import count_parameters, layer_shapes
from kd_lightning.models.folding import fold_batchnorm
from kd_lightning.models.outputs import find_logits
from kd_lightning.models.preparing import materialize, to_memory_format


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


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_flattening_gives_the_gradient_back_in_the_maps_own_format(memory_format):
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


@pytest.mark.parametrize("logits", [True, False])
def test_a_layer_used_twice_is_read_the_last_time(logits):
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
    # What comes after the last reading is computed only if somebody wants it.
    assert model.calls == (3 if logits else 1)
    assert output.logits.shape == (2, 3 if logits else 0)
    assert torch.equal(read(images, complete=True).logits, 4 * images)


def trained_statistics(model):
    """Running statistics and scales other than those of a new network."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -1, 1)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
            torch.nn.init.uniform_(module.bias, -1, 1)
    return model.eval()


@pytest.mark.parametrize("family", ["resnet9", "cifar_resnet", "torchvision"])
def test_folding_changes_no_output_and_no_layer_that_is_read(family):
    torch.manual_seed(0)
    model, count, layers = {  # of ResNet-9, three have a pooling in between
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


def test_a_convolution_that_is_read_keeps_its_normalisation():
    model = trained_statistics(CifarResNet(8))
    assert fold_batchnorm(model, keep=["layer1.0.conv1"]) == 6
    assert isinstance(model.layer1[0].bn1, torch.nn.BatchNorm2d)


def test_a_network_that_cannot_be_traced_is_left_alone():
    class Branching(torch.nn.Sequential):
        def forward(self, images):
            return super().forward(images) if images.sum() > 0 else images

    model = Branching(torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)).eval()
    assert fold_batchnorm(model) == 0
    assert isinstance(model[1], torch.nn.BatchNorm2d)


# --- features are what the layer put out --------------------------------------------------------


def cloned_outputs(model, images):
    """What every layer puts out, copied at once, and what the model returns."""
    found, handles = {}, []
    for name, module in model.named_modules():

        def hook(_module, _inputs, output, name=name):
            found[name] = output.clone()

        handles.append(module.register_forward_hook(hook))
    output = model(images)
    for handle in handles:
        handle.remove()
    return {name: feature for name, feature in found.items() if name}, output


class InPlace(torch.nn.Module):
    """Every way in which a layer's output may be modified by what follows."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.relu, self.identity = nn.ReLU(inplace=True), nn.Identity()
        self.last, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 5)

    def forward(self, images):
        x = self.relu(self.bn1(self.conv1(images)))
        y = self.bn2(self.conv2(x))
        y += x
        y = self.identity(self.relu(y))
        y = self.last(y * 1)
        with torch.no_grad():
            y.data.clamp_(max=0.1)  # not counted by autograd
        y.view(-1)[::2].detach().mul_(0.5)
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_a_feature_is_what_the_layer_put_out_whatever_modifies_it(training, gradients, logits):
    torch.manual_seed(0)
    model, images = InPlace().train(training), torch.randn(4, 3, 6, 6)
    with torch.set_grad_enabled(gradients):
        truth, returned = cloned_outputs(model, images)
        for layers in (list(truth), ["bn1"], ["relu"], ["conv2", "bn2"]):
            read = FeatureReader(model, layers, logits)
            for _ in range(3):
                output = read(images)
                for layer in layers:
                    assert torch.equal(output.features[layer], truth[layer]), layer
                if logits:
                    assert torch.equal(output.logits, returned)
            assert torch.equal(read(images, complete=True).logits, returned)
            read.close()


def test_features_are_those_of_the_mode_the_model_is_in():
    torch.manual_seed(0)
    model, images = InPlace(), torch.randn(4, 3, 6, 6)
    read = FeatureReader(model, ["conv1", "bn1"])
    for training, autocast in [(True, False), (False, False), (False, True), (True, True)] * 2:
        model.train(training)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            truth, _ = cloned_outputs(model, images)
            for _ in range(2):
                for layer, feature in read(images).features.items():
                    assert torch.equal(feature, truth[layer])


def test_gradients_flow_through_features_that_are_modified_later():
    torch.manual_seed(0)
    model, images = InPlace(), torch.randn(4, 3, 6, 6)
    out_of_place = copy.deepcopy(model)
    out_of_place.relu.inplace = False
    gradients = []
    for network in (model, out_of_place):
        read = FeatureReader(network, ["bn1"])
        for _ in range(2):
            network.zero_grad()
            output = read(images)
            (output.features["bn1"].pow(3).sum() + output.logits.sum()).backward()
            gradients.append(network.conv1.weight.grad.clone())
    assert gradients[0].abs().sum() > 0
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_what_is_not_modified_is_not_copied():
    model, images = ResNet9(width=4).eval(), torch.randn(2, 3, 32, 32)
    put_out = {}
    model.stage1.register_forward_hook(lambda _m, _i, output: put_out.update(stage1=output))
    read = FeatureReader(model, ["stage1"])
    for _ in range(2):
        assert read(images).features["stage1"] is put_out["stage1"]


class Moody(torch.nn.Module):
    """Modifies the output of a layer in place, but not the first time."""

    def __init__(self):
        super().__init__()
        self.layer, self.fc, self.calls = nn.Linear(3, 3), nn.Linear(3, 2), 0

    def forward(self, images):
        x = self.layer(images)
        self.calls += 1
        if self.calls > 1:
            x.mul_(2)
        return self.fc(x)


def test_a_modification_that_the_first_call_did_not_show_is_never_silent():
    model, images = Moody().eval(), torch.randn(4, 3)
    read = FeatureReader(model, ["layer"])
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(read(images).features["layer"], model.layer(images))
    read = FeatureReader(Moody(), ["layer"])
    read(images)
    with pytest.raises(RunError, match="'layer' was modified in place"):
        read(images)


def test_a_layer_that_is_not_used_or_puts_out_no_tensor_is_named():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.unused = nn.LSTM(3, 3), nn.Identity()

        def forward(self, images):
            return self.pair(images)[0]

    for layer in ("pair", "unused"):
        with pytest.raises(RunError, match=f"the layer '{layer}'"):
            FeatureReader(Odd(), [layer])(torch.randn(4, 3))


def test_features_are_not_kept_between_calls():
    model, images = ConvNet([4, 8], 16), torch.randn(2, 3, 32, 32)
    read = FeatureReader(model, ["stage1"])
    feature = weakref.ref(read(images).features["stage1"])
    model(images)  # as in validation: nobody reads
    gc.collect()
    assert feature() is None
    assert read._reading is None


# --- outputs ------------------------------------------------------------------------------------

LOGITS, MAP, WIDE = torch.randn(2, 10), torch.randn(2, 4, 3, 3), torch.randn(2, 64)
GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", "logits aux2 aux1")
Prediction = namedtuple("Prediction", "loss logits")


@dataclass
class ModelOutput:
    """As in Hugging Face's transformers."""

    loss: object = None
    logits: object = None
    hidden_states: tuple = ()


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS,),
        (LOGITS, {"features": [MAP]}),
        [LOGITS, MAP],
        (MAP, LOGITS),
        (WIDE, LOGITS),
        (LOGITS, LOGITS * 0.5),
        GoogLeNetOutputs(LOGITS, LOGITS * 2, LOGITS * 3),
        Prediction(None, LOGITS),
        {"logits": LOGITS},
        {"aux": LOGITS * 2, "logits": LOGITS},
        {"out": LOGITS, "features": MAP},
        OrderedDict(pooled=WIDE, prediction=LOGITS),
        ModelOutput(logits=LOGITS, hidden_states=(MAP,)),
        ((LOGITS, MAP), {}),
        {"head": {"prediction": LOGITS}},
    ],
)
def test_logits_are_found_in_whatever_a_model_returns(output):
    assert find_logits(output, 10) is LOGITS


@pytest.mark.parametrize(
    "output",
    [
        WIDE,
        MAP,
        (MAP,),
        {},
        None,
        "logits",
        {"a": LOGITS, "b": LOGITS * 2},
        (MAP, LOGITS, LOGITS * 2),
        LOGITS.argmax(1),
        LOGITS.long(),
    ],
)
def test_an_output_without_logits_is_described(output):
    sentence = r"^the teacher must give one logit for each of the 10 classes.*returns"
    with pytest.raises(InputError, match=sentence):
        find_logits(output, 10, "the teacher")


# --- models that are made on first use ----------------------------------------------------------


class LazyGrid(torch.nn.Module):
    """Keeps a position grid, which is no buffer, of the first images."""

    def __init__(self):
        super().__init__()
        self.grid, self.cache, self.fc = None, {}, nn.Linear(3, 10)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, images.shape[-1])
        self.cache.setdefault(images.shape[-1], self.grid)
        return self.fc((images + self.grid * self.scale).mean((2, 3)))


class LazyHead(torch.nn.Module):
    """Makes its classifier when it knows the width, by hand."""

    def __init__(self):
        super().__init__()
        self.fc = None

    def forward(self, images):
        if self.fc is None:
            self.fc = nn.Linear(images[0].numel(), 10)
        return self.fc(images.flatten(1))


def test_looking_at_shapes_leaves_nothing_behind():
    model = LazyGrid()
    before = torch.get_rng_state()
    with torch.inference_mode():
        shapes = layer_shapes(model, 16)
        assert shapes.layouts == {}
    materialize(model, 16)
    assert model.grid is None
    assert not model.cache
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Sequential(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(10)
        ),
        LazyHead,
    ],
)
def test_weights_that_are_made_on_first_use_are_made_before_they_are_needed(build):
    torch.manual_seed(0)
    model = build()
    materialize(model, 8)
    assert count_parameters(model) > 1000
    weights = [id(weight) for weight in model.parameters()]
    to_memory_format(model, torch.channels_last)
    layer_shapes(model, 8)
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert [id(weight) for weight in model.parameters()] == weights


def test_a_lazy_model_that_cannot_take_the_images_is_refused_in_a_sentence():
    model = nn.Sequential(nn.LazyConv2d(4, 9), nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(InputError, match=r"student\.model cannot take images of 8x8 pixels"):
        materialize(model, 8, "student.model")


def test_materializing_changes_nothing_of_an_ordinary_model():
    torch.manual_seed(0)
    model = ResNet9(width=4)
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    materialize(model, 32)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_weights_of_any_rank_survive_the_memory_format():
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv2d(3, 4, 3), nn.Linear(2, 2))
    to_memory_format(model, torch.channels_last)
    assert model[1].weight.is_contiguous(memory_format=torch.channels_last)
    reference = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    assert model[1].weight.stride() == reference.weight.stride()
