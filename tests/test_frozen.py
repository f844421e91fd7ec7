"""The frozen teacher has the outputs of the original model, for any architecture."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from kd_lightning.distill.teacher import FrozenTeacher, Normalization
from kd_lightning.models import ResNet9
from kd_lightning.models.features import FeatureReader
from kd_lightning.models.folding import fold_batchnorm

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
CPU = torch.device("cpu")


class ConvBN(nn.Module):
    """A convolution, BatchNorm, a classifier."""

    def __init__(self, convolution=None, normalization=None):
        super().__init__()
        self.conv = convolution or nn.Conv2d(3, 4, 3, bias=False)
        self.bn = normalization or nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        return self.fc(self.bn(self.conv(images)).relu().mean((2, 3)))


def convolution():
    return nn.Conv2d(3, 4, 3, bias=False)


def pruned():
    model = ConvBN()
    prune.random_unstructured(model.conv, "weight", 0.5)
    return model


def hooked():
    model = ConvBN()
    model.conv.register_forward_hook(lambda _module, _inputs, output: output * 2 + 1)
    return model


class Nested(nn.Module):
    """A stem that ends with a convolution, a block that starts with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(convolution())
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        return self.fc(self.block(self.stem(images)).mean((2, 3)))


class Reused(ConvBN):
    """BatchNorm is called twice."""

    def forward(self, images):
        x = self.bn(self.conv(images))
        return self.fc(self.bn(x.relu()).mean((2, 3)))


class Functional(ConvBN):
    """The convolution's weight is used twice."""

    def forward(self, images):
        other = F.conv2d(images.flip(-1), self.conv.weight)
        return self.fc((self.bn(self.conv(images)).relu() + other).mean((2, 3)))


class Alias(ConvBN):
    """The convolution has a second name, under which it is called."""

    def __init__(self):
        super().__init__()
        self.same = self.conv

    def forward(self, images):
        return self.fc(self.bn(self.same(images)).relu().mean((2, 3)))


class Tied(ConvBN):
    """Two convolutions share a weight."""

    def __init__(self):
        super().__init__()
        self.other = convolution()
        self.other.weight = self.conv.weight

    def forward(self, images):
        x = self.bn(self.conv(images)) + self.other(images)
        return self.fc(x.relu().mean((2, 3)))


class Stores(ConvBN):
    """Stores a non-leaf feature, which cannot be deep-copied."""

    def forward(self, images):
        self.feature = self.bn(self.conv(images))
        return self.fc(self.feature.relu().mean((2, 3)))


MODELS = {
    "plain": ConvBN,
    "nested": Nested,
    "reused": Reused,
    "functional": Functional,
    "alias": Alias,
    "tied": Tied,
    "stores": Stores,
    "hooked": hooked,
    "pruned": pruned,
    "weight_norm": lambda: ConvBN(nn.utils.weight_norm(convolution())),
    "new_weight_norm": lambda: ConvBN(parametrizations.weight_norm(convolution())),
    "spectral_norm": lambda: ConvBN(nn.utils.spectral_norm(convolution())),
    "no_statistics": lambda: ConvBN(normalization=nn.BatchNorm2d(4, track_running_stats=False)),
    "no_affine": lambda: ConvBN(normalization=nn.BatchNorm2d(4, affine=False)),
}


def build(name):
    """The model after one training step, with non-default statistics."""
    torch.manual_seed(0)
    model = MODELS[name]()
    model.train()(torch.randn(8, 3, 9, 9) * 2 + 1).sum().backward()
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", MODELS)
def test_prepared_teacher_has_the_outputs_of_the_model(name, dtype):
    model = build(name)
    layers = [layer for layer, _ in model.named_children() if layer != "other"]
    layers = [layer for layer in layers if (name, layer) != ("alias", "same")]
    images = torch.randn(8, 3, 9, 9)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype is not None):
        truth = {}
        for layer in layers:
            hook = model.get_submodule(layer).register_forward_hook(
                lambda _m, _i, output, layer=layer: truth.update({layer: output.clone()})
            )
            logits = model(images)
            hook.remove()
        teacher = FrozenTeacher(model, HALF, HALF)
        teacher.read(layers)
        teacher.prepare(CPU, torch.channels_last, dtype)
        output = teacher.answer(images)
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if dtype is None else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(output.logits, logits, **tolerance)
    for layer, feature in truth.items():
        torch.testing.assert_close(output.features[layer], feature, **tolerance)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated")
@pytest.mark.parametrize("name", MODELS)
def test_only_unshared_batchnorms_are_folded(name):
    count = fold_batchnorm(copy.deepcopy(build(name)) if name == "plain" else build(name))
    assert count == (name in {"plain", "nested", "no_affine", "stores"})


@pytest.mark.parametrize("layer", ["stem", "stem.0"])
def test_container_that_ends_with_a_convolution_keeps_its_output(layer):
    assert fold_batchnorm(build("nested"), keep=[layer]) == 0
    assert fold_batchnorm(build("nested"), keep=["block", "block.0"]) == 1


def test_copy_with_different_outputs_is_not_used(monkeypatch):
    def fold_wrongly(model, keep=()):
        del keep
        model.bn.bias.data.add_(0.5)
        return 1

    monkeypatch.setattr("kd_lightning.distill.teacher.fold_batchnorm", fold_wrongly)
    model, images = build("plain"), torch.randn(8, 3, 9, 9)
    expected = model(images).detach()
    teacher = FrozenTeacher(model, HALF, HALF)
    teacher.prepare(CPU, torch.contiguous_format, None)
    assert torch.equal(teacher(images), expected)


def test_failing_copy_is_not_used(monkeypatch):
    def fail(*_arguments, **_keywords):
        raise RuntimeError("not foldable")

    monkeypatch.setattr("kd_lightning.distill.teacher.fold_batchnorm", fail)
    model, images = build("plain"), torch.randn(8, 3, 9, 9)
    teacher = FrozenTeacher(model, HALF, HALF)
    teacher.prepare(CPU, torch.contiguous_format, None)
    assert torch.equal(teacher(images), model(images))


def test_weights_used_in_float32_too_are_not_converted():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(27, 5)

        def forward(self, images):
            with torch.autocast("cpu", enabled=False):
                exact = F.linear(images.flatten(1), self.fc.weight.float())
            return self.fc(images.flatten(1)) + exact

    torch.manual_seed(0)
    model, images = Both(), torch.randn(8, 3, 3, 3)
    teacher = FrozenTeacher(model, HALF, HALF)
    teacher.prepare(CPU, torch.contiguous_format, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(teacher(images), model(images))


def test_original_model_is_unchanged_and_in_evaluation_mode():
    torch.manual_seed(0)
    model = ResNet9(width=4)
    before = copy.deepcopy(model.state_dict())
    teacher = FrozenTeacher(model, HALF, HALF)
    teacher.prepare(CPU, torch.channels_last, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        teacher(torch.randn(4, 3, 32, 32))
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name]), name
    assert not any(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_teacher_draws_no_random_numbers():
    teacher = FrozenTeacher(build("plain"), HALF, HALF)
    teacher.prepare(CPU, torch.channels_last, None)
    images = torch.randn(8, 3, 9, 9)
    before = torch.get_rng_state()
    teacher(images)
    assert torch.equal(torch.get_rng_state(), before)


class Position(nn.Module):
    """Creates and stores a position grid on first use."""

    def __init__(self):
        super().__init__()
        self.grid, self.fc = None, nn.Linear(12, 5)

    def forward(self, images):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, images.shape[-1])
        return self.fc((images + self.grid).flatten(1))


def test_lazy_buffers_are_created_only_after_placement():
    model = Position()
    teacher = FrozenTeacher(model, HALF, HALF)
    teacher(torch.randn(4, 3, 2, 2))
    assert teacher.why_not_stored(torch.randn(4, 3, 2, 2)) == ""
    assert model.grid is None
    with torch.inference_mode():  # as in Lightning's validation
        teacher.prepare(CPU, torch.channels_last, None)
        teacher(torch.randn(4, 3, 2, 2))
    assert model.grid is None or not model.grid.is_inference()


class Noisy(ConvBN):
    """Different outputs in every pass."""

    def forward(self, images):
        return super().forward(images + torch.rand_like(images))


class BatchMean(ConvBN):
    """Outputs depend on the other images of the batch."""

    def forward(self, images):
        return super().forward(images - images.mean(0, keepdim=True))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (ConvBN, ""),
        (Noisy, "two passes"),
        (BatchMean, "other images"),
        (MODELS["no_statistics"], "other images"),
    ],
)
def test_nondeterministic_outputs_must_not_be_cached(model, reason):
    torch.manual_seed(0)
    teacher = FrozenTeacher(model(), HALF, HALF)
    images, before = torch.randn(4, 3, 9, 9), torch.get_rng_state()
    why = teacher.why_not_stored(images)
    assert reason in why
    assert bool(why) == bool(reason)
    assert torch.equal(torch.get_rng_state(), before)


def test_teacher_outputs_can_be_used_in_training():
    teacher = FrozenTeacher(build("plain"), HALF, HALF)
    with torch.inference_mode():
        logits = teacher(torch.randn(4, 3, 9, 9))
    assert not logits.is_inference()
    assert not logits.requires_grad


def test_features_are_equal_with_and_without_logits():
    model = nn.Sequential(convolution(), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten())
    images = torch.randn(4, 3, 9, 9)
    answers = []
    for logits in (True, False):
        teacher = FrozenTeacher(model, HALF, HALF)
        teacher.read(["1"], logits)
        teacher.prepare(CPU, torch.channels_last, None)
        answers += [teacher.answer(images).features["1"] for _ in range(2)]
    truth = model[1](model[0](images)).detach()
    for answer in answers:
        torch.testing.assert_close(answer, truth, rtol=1e-3, atol=1e-4)
        assert torch.equal(answer, answers[0])
    assert FeatureReader(model, ["1"])(images).features["1"].min() < 0
