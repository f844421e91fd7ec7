"""Detection of feature-map layouts, for any order of the axes."""

import pytest
import torch
from torch import nn

from kd_lightning.losses import Attention, Context
from kd_lightning.models import ConvNet
from kd_lightning.models.features import FeatureReader, LayerShapes, layer_shapes
from kd_lightning.models.layouts import Layout


class Patches(nn.Module):
    """Tokens of 8x8 patches with `before` class or register tokens, and `after` at the end.

    Args:
        fixed: takes images of 32x32 only.
        convolution: whether patches are embedded by a convolution.
        channels: of the tokens.
        last: tokens (B, C, N) instead of (B, N, C).
    """

    def __init__(self, before=0, after=0, fixed=True, convolution=True, channels=24, last=False):
        super().__init__()
        self.fixed, self.last, self.convolution = fixed, last, convolution
        self.embed = nn.Conv2d(3, channels, 8, 8) if convolution else nn.Linear(192, channels)
        self.first = nn.Parameter(torch.randn(1, before, channels))
        self.end = nn.Parameter(torch.randn(1, after, channels))
        self.tokens, self.tail = nn.Identity(), nn.LazyLinear(10)

    def forward(self, images):
        if self.fixed:
            assert images.shape[-1] == 32
        if self.convolution:
            x = self.embed(images).flatten(2).transpose(1, 2)
        else:
            x = nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
            x = self.embed(x)
        one = len(images)
        x = torch.cat([self.first.expand(one, -1, -1), x, self.end.expand(one, -1, -1)], 1)
        x = x + 0.01 * x.mean(1, keepdim=True)  # every token depends on all others
        x = self.tokens(x.transpose(1, 2) if self.last else x)
        return self.tail(x.flatten(1))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (2, 0), (4, 0), (5, 0), (0, 1)])
def test_token_grid_with_class_and_register_tokens(before, after, fixed, convolution, last):
    torch.manual_seed(0)
    model = Patches(before, after, fixed, convolution, last=last)
    kind = "tokens_last" if last else "tokens"
    assert layer_shapes(model, 32).layouts["tokens"] == Layout(kind, 4, 4, before)


def test_equal_numbers_of_tokens_and_channels():
    torch.manual_seed(0)
    for last in (False, True):
        model = Patches(channels=16, last=last)
        layout = layer_shapes(model, 32).layouts["tokens"]
        assert layout == Layout("tokens_last" if last else "tokens", 4, 4)


class Cube(nn.Module):
    """A map with equal numbers of channels, rows and columns, in either order."""

    def __init__(self, last, fixed):
        super().__init__()
        self.last, self.fixed = last, fixed
        self.conv, self.out, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Identity(), nn.LazyLinear(10)

    def forward(self, images):
        if self.fixed:
            assert images.shape[-1] == 32
        x = self.conv(images)
        x = self.out(x.permute(0, 2, 3, 1) if self.last else x)
        return self.fc(x.flatten(1))


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("last", [False, True])
def test_layout_of_a_cubic_map(last, fixed):
    torch.manual_seed(0)
    layouts = layer_shapes(Cube(last, fixed), 32).layouts
    assert layouts["out"] == Layout("channels_last" if last else "channels_first", 8, 8)
    assert layouts["conv"] == Layout("channels_first", 8, 8)


class Sequence(nn.Module):
    """Rows of the image as tokens: 16 tokens, but no grid."""

    def __init__(self, rows=4):
        super().__init__()
        self.rows, self.embed, self.fc = rows, nn.Linear(96 * rows, 24), nn.Linear(24, 10)

    def forward(self, images):
        x = images.transpose(1, 2).flatten(2)  # (B, H, 3 W)
        x = x.reshape(len(x), -1, 96 * self.rows)
        return self.fc(self.embed(x).mean(1))


@pytest.mark.parametrize("rows", [1, 2])
def test_tokens_without_a_grid_are_rejected(rows):
    torch.manual_seed(0)
    shapes = layer_shapes(Sequence(rows), 32)
    assert "embed" not in shapes.layouts
    with pytest.raises(ValueError, match=rf"outputs \({32 // rows}, 24\), but a map .* is needed"):
        Attention(pairs=[["stage1", "embed"]]).setup(
            Context(layer_shapes(ConvNet([4, 8], 8), 32), shapes)
        )


@pytest.mark.parametrize(
    "layout",
    [
        Layout("channels_first", 3, 4),
        Layout("channels_last", 3, 4),
        Layout("tokens", 3, 4),
        Layout("tokens", 3, 4, 2),
        Layout("tokens_last", 3, 4, 1),
    ],
)
def test_to_map_does_not_copy(layout):
    true = torch.randn(2, 5, 3, 4)
    output = {
        "channels_first": true,
        "channels_last": true.permute(0, 2, 3, 1),
        "tokens": true.flatten(2).transpose(1, 2),
        "tokens_last": true.flatten(2),
    }[layout.kind].contiguous()
    if layout.kind.startswith("tokens"):
        axis = 2 if layout.kind == "tokens_last" else 1
        extra = output.narrow(axis, 0, layout.start)
        output = torch.cat([extra, output, extra], dim=axis)
    found = layout.to_map(output)
    assert torch.equal(found, true)
    assert found.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()


def swin():
    models = pytest.importorskip("torchvision").models
    return models.SwinTransformer(
        patch_size=[4, 4], embed_dim=24, depths=[1, 1], num_heads=[2, 2], window_size=[4, 4],
        num_classes=10,
    )  # fmt: skip


def vit():
    models = pytest.importorskip("torchvision").models
    return models.VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
        num_classes=10,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("build", "layer", "true_map"),
    [
        (swin, "features.3", lambda x: x.permute(0, 3, 1, 2)),
        (
            vit,
            "encoder.layers.encoder_layer_0",
            lambda x: x[:, 1:].transpose(1, 2).unflatten(2, (4, 4)),
        ),
    ],
)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_attention_of_a_transformer(build, layer, true_map, role):
    torch.manual_seed(0)
    model, images = build().eval(), torch.randn(4, 3, 32, 32)
    other = {"map": (4, 4, 4)}
    term = Attention(pairs=[["map", layer] if role == "teacher" else [layer, "map"]])
    shapes = layer_shapes(model, 32)
    term.setup(Context(*((other, shapes) if role == "teacher" else (shapes, other))))
    assert [pair.size for pair in term.layers.chosen] == [(4, 4)]
    read = FeatureReader(model, [layer])(images)
    truth = read._replace(features={"map": true_map(read.features[layer])})
    plain = Attention(pairs=[["map", "map"]])
    plain.setup(Context(other, other))
    labels = torch.zeros(4)
    if role == "teacher":
        torch.testing.assert_close(term.remember(read), plain.remember(truth))
        key = term.depends_on()["maps"][0]
        assert key[:3] == [layer, 4, 4]
        assert len(key) > 3  # different from the key of older versions, which assumed (C, H, W)
    else:
        target = plain.remember(read._replace(features={"map": torch.randn(4, 7, 4, 4)}))
        loss = term(read, target, labels)
        torch.testing.assert_close(loss, plain(truth, target, labels))
        loss.backward()
        assert any(weight.grad is not None for weight in model.parameters())


def test_cache_key_of_channels_first_maps_is_stable():
    models = pytest.importorskip("torchvision").models
    student = layer_shapes(ConvNet([4, 8], 8), 32)
    term = Attention(pairs=[["stage1", "layer1"], ["stage1", "layer1.0.bn1"]])
    term.setup(Context(student, layer_shapes(models.resnet18(num_classes=10), 32)))
    ordinary, modified = term.depends_on()["maps"]
    assert ordinary == ["layer1", 8, 8]
    # Older versions read it after an in-place ReLU: their cache must not be used.
    assert modified[:3] == ["layer1.0.bn1", 8, 8]
    assert len(modified) == 4


def test_layer_without_tensor_output_is_reported():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.unused = nn.MultiheadAttention(12, 2), nn.ReLU()
            self.fc = nn.Linear(12, 10)

        def forward(self, images):
            x = images.flatten(2).transpose(1, 2)[..., :1].expand(-1, -1, 12)
            return self.fc(self.attention(x, x, x)[0].mean(1))

    shapes = layer_shapes(Attending(), 32)
    assert isinstance(shapes, LayerShapes)
    student = layer_shapes(ConvNet([4, 8], 8), 32)
    for layer, message in (
        ("attention", "of the teacher outputs tuple"),
        ("unused", "of the teacher outputs nothing"),
        ("nowhere", "in the teacher there is no layer"),
    ):
        with pytest.raises(ValueError, match=message):
            Attention(pairs=[["stage1", layer]]).setup(Context(student, shapes))


def test_output_without_batch_axis_is_not_a_map():
    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.windows, self.fc = nn.Identity(), nn.Linear(3, 10)

        def forward(self, images):
            x = images.unflatten(2, (2, -1)).unflatten(4, (2, -1))  # (B, 3, 2, h, 2, w)
            x = self.windows(x.permute(0, 2, 4, 1, 3, 5).flatten(0, 2))
            return self.fc(x.unflatten(0, (-1, 4)).mean((1, 3, 4)))

    shapes = layer_shapes(Windows(), 8)
    assert "windows" not in shapes
    assert "images" in shapes.others["windows"]


def test_tokens_not_in_row_major_order_are_not_a_map():
    class Scattered(Patches):
        def forward(self, images):
            x = self.embed(images).unflatten(2, (2, 2)).unflatten(4, (2, 2))
            x = x.permute(0, 2, 4, 3, 5, 1).flatten(1, 4)  # in order of 2x2 windows
            return self.tail(self.tokens(x).flatten(1))

    torch.manual_seed(0)
    assert "tokens" not in layer_shapes(Scattered(), 32).layouts
