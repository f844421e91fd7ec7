"""Features are exact layer outputs, logits are found, and lazy models work."""

import copy
import gc
import weakref
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from kd_lightning.errors import InputError, RunError
from kd_lightning.models import ConvNet, FeatureReader, ResNet9
from kd_lightning.models.features import count_parameters, layer_shapes
from kd_lightning.models.outputs import find_logits
from kd_lightning.models.preparing import materialize, to_memory_format

# --- features are exact layer outputs -----------------------------------------------------------


def cloned_outputs(model, images):
    """The outputs of all layers, copied immediately, and of the model."""
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
    """All ways in which a layer's output may be modified in place later."""

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
            y.data.clamp_(max=0.1)  # does not increment the version
        y.view(-1)[::2].detach().mul_(0.5)
        return self.fc(y.mean((2, 3)))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("logits", [False, True])
def test_features_are_unaffected_by_in_place_operations(training, gradients, logits):
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


def test_features_follow_the_mode_of_the_model():
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


def test_gradients_flow_through_features_modified_in_place():
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


def test_unmodified_features_are_not_copied():
    model, images = ResNet9(width=4).eval(), torch.randn(2, 3, 32, 32)
    put_out = {}
    model.stage1.register_forward_hook(lambda _m, _i, output: put_out.update(stage1=output))
    read = FeatureReader(model, ["stage1"])
    for _ in range(2):
        assert read(images).features["stage1"] is put_out["stage1"]


class Moody(torch.nn.Module):
    """Modifies the output of a layer in place, but not in the first call."""

    def __init__(self):
        super().__init__()
        self.layer, self.fc, self.calls = nn.Linear(3, 3), nn.Linear(3, 2), 0

    def forward(self, images):
        x = self.layer(images)
        self.calls += 1
        if self.calls > 1:
            x.mul_(2)
        return self.fc(x)


def test_new_in_place_modification_is_detected():
    model, images = Moody().eval(), torch.randn(4, 3)
    read = FeatureReader(model, ["layer"])
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(read(images).features["layer"], model.layer(images))
    read = FeatureReader(Moody(), ["layer"])
    read(images)
    with pytest.raises(RunError, match="'layer' was modified in place"):
        read(images)


def test_unused_or_non_tensor_layer_is_reported():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.unused = nn.LSTM(3, 3), nn.Identity()

        def forward(self, images):
            return self.pair(images)[0]

    for layer in ("pair", "unused"):
        with pytest.raises(RunError, match=f"the layer '{layer}'"):
            FeatureReader(Odd(), [layer])(torch.randn(4, 3))


def test_layers_replaced_before_training_are_read():
    network, images = ResNet9(width=4), torch.randn(2, 3, 32, 32)
    (layer, *_) = [n for n, part in network.named_modules() if isinstance(part, nn.BatchNorm2d)]
    read = FeatureReader(network, [layer, f"{layer}:input"])
    network.eval()
    before = read(images).features
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # as `sync_batchnorm=True` does
    assert converted is network
    assert isinstance(network.get_submodule(layer), nn.SyncBatchNorm)
    network.train()
    after = read(images).features
    assert torch.equal(after[f"{layer}:input"], before[f"{layer}:input"])
    assert after[layer].shape == before[layer].shape
    read.close()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_features_are_not_kept_between_calls():
    model, images = ConvNet([4, 8], 16), torch.randn(2, 3, 32, 32)
    read = FeatureReader(model, ["stage1"])
    feature = weakref.ref(read(images).features["stage1"])
    model(images)  # as in validation, without reading
    gc.collect()
    assert feature() is None
    assert read._reading is None


# --- outputs ------------------------------------------------------------------------------------

LOGITS, MAP, WIDE = torch.randn(2, 10), torch.randn(2, 4, 3, 3), torch.randn(2, 64)
GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", "logits aux2 aux1")
Prediction = namedtuple("Prediction", "loss logits")


@dataclass
class ModelOutput:
    """Like Hugging Face transformers."""

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
def test_logits_are_found_in_any_model_output(output):
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
def test_output_without_logits_is_reported(output):
    sentence = r"^the teacher must return logits .* the 10 classes.*returns"
    with pytest.raises(InputError, match=sentence):
        find_logits(output, 10, "the teacher")


# --- lazy models --------------------------------------------------------------------------------


class LazyGrid(torch.nn.Module):
    """Creates a position grid, which is not a buffer, from the first images."""

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
    """Creates its classifier once the width is known."""

    def __init__(self):
        super().__init__()
        self.fc = None

    def forward(self, images):
        if self.fc is None:
            self.fc = nn.Linear(images[0].numel(), 10)
        return self.fc(images.flatten(1))


def test_layer_shapes_has_no_side_effects():
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
def test_lazy_weights_are_materialised_in_time(build):
    torch.manual_seed(0)
    model = build()
    materialize(model, 8)
    assert count_parameters(model) > 1000
    weights = [id(weight) for weight in model.parameters()]
    to_memory_format(model, torch.channels_last)
    layer_shapes(model, 8)
    model.train()(torch.randn(2, 3, 8, 8)).sum().backward()
    assert [id(weight) for weight in model.parameters()] == weights


def test_lazy_model_with_wrong_image_size_is_rejected():
    model = nn.Sequential(nn.LazyConv2d(4, 9), nn.Flatten(), nn.LazyLinear(10))
    with pytest.raises(InputError, match=r"student\.model cannot take images of 8x8 pixels"):
        materialize(model, 8, "student.model")


def test_materialize_leaves_other_models_unchanged():
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
