"""Losses on feature maps, compared with values computed by hand, and the choice of layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_lightning.distill.caching import _part_key, _term_key
from kd_lightning.losses import NST, OFD, VID, Context, FitNet, ReviewKD, TermBatch
from kd_lightning.losses.fitnet import hint_loss
from kd_lightning.losses.nst import gram, gram_distance, kernel_distance, nst_loss, selectivity
from kd_lightning.losses.ofd import image_margin, normal_margin, partial_loss, stage_sum
from kd_lightning.losses.projectors import ProjectorNorm, convolution_norm
from kd_lightning.losses.reviewkd import hierarchical_loss, resize
from kd_lightning.losses.vid import gaussian_loss
from kd_lightning.models import ConvNet, layer_shapes
from kd_lightning.models.features import FeatureReader, Output

LABELS = torch.tensor([0, 1, 2, 0])


def batch(progress=0.0, size=4):
    index = torch.arange(size)
    return TermBatch(LABELS[:size], index, index, progress)


def images(size, count=4):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 3, size, size, generator=generator)


def output(**features):
    return Output(torch.zeros(4, 0), features)


SHAPES = {"a": (4, 8, 8), "b": (6, 4, 4), "c": (8, 2, 2)}


def of_shapes(term, student=SHAPES, teacher=SHAPES):
    """The term after `setup`, and what it reads."""
    return term, term.setup(Context(student, teacher, 3))


def random_maps(shapes=SHAPES, seed=0, count=4):
    generator = torch.Generator().manual_seed(seed)
    return output(
        **{name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}
    )


LAYERS = {"student_layers": list(SHAPES), "teacher_layers": list(SHAPES)}

# --- FitNet --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "middle"), [("a", "a"), ("ab", "b"), ("abc", "b"), ("abcd", "c")]
)
def test_fitnet_reads_the_middle_layer(layers, middle):
    shapes = SHAPES | {"d": (8, 1, 1)}
    term = FitNet(list(layers), list(layers))
    _, reads = of_shapes(term, shapes, shapes)
    assert (reads.student, reads.teacher) == ((middle,), (middle,))


def test_fitnet_without_projector_is_a_mean_squared_error():
    term, reads = of_shapes(FitNet(pairs=[["a", "a"], ["b", "b"]], projector=False))
    assert reads.student == ("a", "b")
    assert not [*term.parameters()]
    given, wanted = random_maps(), random_maps(seed=1)
    expected = sum((given.features[n] - wanted.features[n]).square().mean() for n in "ab")
    torch.testing.assert_close(term(given, term.remember(wanted), batch()), expected)


def test_fitnet_without_projector_needs_equal_channels():
    message = (
        "layer 'a' of the student has 4 channels, but layer 'b' of the teacher has 6; "
        "choose other layers or projector: true"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        of_shapes(FitNet(pairs=[["a", "b"]], projector=False))


def test_fitnet_projects_with_a_relu():
    term, _ = of_shapes(FitNet(pairs=[["a", "b"]]))
    project = term.projectors[0]
    assert [type(part) for part in project] == [nn.Conv2d, ProjectorNorm, nn.ReLU]
    given, wanted = random_maps(), random_maps(seed=1)
    x = F.batch_norm(project[0](F.avg_pool2d(given.features["a"], 2)), None, None, training=True)
    expected = (x.relu() - wanted.features["b"]).square().mean()
    torch.testing.assert_close(term(given, term.remember(wanted), batch()), expected)


# --- VID -----------------------------------------------------------------------------------------


def test_vid_by_hand():
    # Variances 4 and 1; squared errors 16 and 4.
    scale = torch.tensor([math.log(math.expm1(4 - 1e-5)), math.log(math.expm1(1 - 1e-5))])
    loss = gaussian_loss(
        torch.tensor([[[[5.0]], [[2.0]]]]), torch.tensor([[[[1.0]], [[4.0]]]]), scale
    )
    assert float(loss) == pytest.approx((16 / 4 + math.log(4) + 4 / 1 + math.log(1)) / 4, rel=1e-6)


def test_vid_does_not_overflow():
    scale = torch.tensor([200.0, -200.0], requires_grad=True)
    loss = gaussian_loss(torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1), scale)
    loss.backward()
    assert loss.isfinite()
    assert scale.grad.isfinite().all()


@pytest.mark.parametrize("variance", [2e-5, 2.0, 1e4])
def test_vid_starts_with_the_given_variance(variance):
    term, _ = of_shapes(VID(pairs=[["a", "b"]], variance=variance))
    torch.testing.assert_close(F.softplus(term.scales[0]) + 1e-5, torch.full((6,), variance))


@pytest.mark.parametrize("variance", [0, -1, math.nan, math.inf])
def test_vid_rejects_invalid_variances(variance):
    with pytest.raises(ValueError, match=f"^variance must be a number above 1e-05, not {variance}"):
        VID(variance=variance)


# --- NST -----------------------------------------------------------------------------------------


def test_nst_by_hand():
    # One image, two positions. Student: one channel (1, 0). Teacher: (0, 1) and (1, 1) / sqrt(2).
    # Mean kernels: student 1; teacher (1 + 1 + 2 * 1/2) / 4; mixed (0 + 1/2) / 2.
    student = torch.tensor([[[[3.0, 0.0]]]])
    teacher = torch.tensor([[[[0.0, 2.0]], [[5.0, 5.0]]]])
    assert float(nst_loss(student, teacher)) == pytest.approx(1 + 3 / 4 - 2 / 4)


@pytest.mark.parametrize("channels", [(2, 3), (9, 3), (2, 9), (7, 9)])
def test_nst_is_the_same_from_positions_and_from_channels(channels):
    student, teacher = (
        torch.randn(3, number, 2, 3, generator=torch.Generator().manual_seed(number))
        for number in channels
    )
    given, wanted = selectivity(student), selectivity(teacher)
    loss = kernel_distance(given, wanted)
    torch.testing.assert_close(gram_distance(given, gram(wanted)), loss)
    torch.testing.assert_close(nst_loss(student, teacher), loss)


def test_nst_stores_the_smaller_targets():
    teacher = {"a": (4, 8, 8), "c": (8, 2, 2)}
    term, _ = of_shapes(NST(["a", "c"], ["a", "c"]), SHAPES, teacher)
    kept = term.remember(random_maps(teacher))
    assert [tuple(rows.shape) for rows in kept.values()] == [(4, 4, 64), (4, 4, 4)]


def test_nst_is_zero_for_equal_maps():
    term, _ = of_shapes(NST(**LAYERS))
    same = random_maps()
    assert abs(float(term(same, term.remember(same), batch()))) < 1e-6


# --- OFD -----------------------------------------------------------------------------------------


def test_ofd_by_hand():
    # Counted: above a negative target, 0.5 and 0.25; both sides of a positive target, 1 and 4.
    # Not counted: below a negative target.
    student = torch.tensor([[[[0.0, -0.5, -9.0]]], [[[3.0, 0.0, -0.5]]]])
    teacher = torch.tensor([[[[-0.5, -0.75, -0.5]]], [[[2.0, 2.0, -0.5]]]])
    loss = partial_loss(student, teacher)
    assert float(loss) == pytest.approx((0.5**2 + 0.25**2 + 1 + 4) / 2)


def test_ofd_weights_stages():
    assert float(stage_sum([torch.tensor(8.0), torch.tensor(4.0), torch.tensor(1.0)])) == 5


@pytest.mark.parametrize(("weight", "bias"), [(1.0, 0.0), (-0.7, 0.4), (2.0, -3.0), (0.5, -5.0)])
def test_normal_margin_is_the_mean_of_negative_outputs(weight, bias):
    x = torch.linspace(-40, 0, 400_001, dtype=torch.float64)
    density = (-(((x - bias) / weight) ** 2) / 2).exp()
    expected = float((x * density).sum() / density.sum())
    margin = normal_margin(torch.tensor([weight]), torch.tensor([bias]))
    assert margin.dtype == torch.float32
    assert float(margin) == pytest.approx(expected, rel=1e-3)


def test_normal_margin_of_rare_negative_outputs_and_of_constants():
    weight, bias = torch.tensor([-0.5, 0.0, 0.0, 0.0]), torch.tensor([5.0, -2.0, 0.0, 3.0])
    assert normal_margin(weight, bias).tolist() == [-1.5, -2, 0, 0]


def test_image_margin_is_the_mean_of_negative_values():
    feature_map = torch.tensor([[[[-1.0, 2.0], [-3.0, 0.0]], [[0.0, 1.0], [2.0, 3.0]]]])
    assert image_margin(feature_map).flatten().tolist() == [-2, 0]


class Normalised(nn.Module):
    """A convolution, BatchNorm and ReLU as modules."""

    def __init__(self, affine=True):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.bn = nn.BatchNorm2d(4, affine=affine)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.relu(self.bn(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("layer", ["bn", "norms.0"])
def test_ofd_takes_margins_from_a_batchnorm_whose_weights_are_loaded_later(layer):
    teacher, student = Normalised().eval(), ConvNet([4, 8], 8, 3, 8)
    teacher.norms = nn.ModuleList([teacher.bn])  # the same module under another name
    term = OFD(pairs=[["stage1", layer]])
    term.setup(Context(layer_shapes(student, 8), layer_shapes(teacher, 8), 3))
    assert not any(parameter is teacher.bn.weight for parameter in term.parameters())
    with torch.no_grad():
        teacher.bn.weight.copy_(torch.tensor([0.5, 1.0, 2.0, 0.0]))
        teacher.bn.bias.fill_(-0.5)
    read = FeatureReader(teacher, [layer])(images(8))
    margin = normal_margin(teacher.bn.weight, teacher.bn.bias).detach().view(1, 4, 1, 1)
    expected = F.avg_pool2d(torch.maximum(read.features[layer], margin), 2)
    torch.testing.assert_close(term.remember(read)["0"], expected)
    assert term.depends_on() == {
        "parts": {"0": [layer, 4, 4, "before it is modified in place", "normal"]}
    }


def test_ofd_margins_without_batchnorm_parameters_and_before_a_relu():
    shapes = layer_shapes(Normalised(affine=False).eval(), 8)
    student = layer_shapes(ConvNet([4, 8], 8, 3, 8), 8)
    term = OFD(pairs=[["stage1", "bn"], ["stage1", "relu:input"], ["stage1", "relu"]])
    term.setup(Context(student, shapes, 3))
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    kept = term.remember(output(**{"bn": x, "relu:input": x, "relu": x.relu()}))
    normal = -math.sqrt(2 / math.pi)  # of the standard normal distribution
    for number, margin in enumerate((torch.tensor(normal), image_margin(x), torch.zeros(1))):
        expected = F.avg_pool2d(torch.maximum(x, margin), 2)
        torch.testing.assert_close(kept[str(number)], expected)


# --- ReviewKD ------------------------------------------------------------------------------------


def test_hierarchical_loss_by_hand():
    # 2x2, so that only 1x1 is added, with half the weight. Differences 4, 0, 0, 0; their mean 1.
    student = torch.tensor([[[[4.0, 0.0], [0.0, 0.0]]]])
    loss = hierarchical_loss(student, torch.zeros(1, 1, 2, 2))
    assert float(loss) == pytest.approx((16 / 4 + 1 / 2) / 1.5)


@pytest.mark.parametrize(("progress", "factor"), [(0, 0), (0.125, 0.5), (0.25, 1), (1, 1)])
def test_reviewkd_is_warmed_up(progress, factor):
    given, wanted = random_maps(), random_maps(seed=1)
    losses = []
    for warmup in (0, 0.25):
        torch.manual_seed(0)
        term, _ = of_shapes(ReviewKD(**LAYERS, embedding=False, warmup=warmup))
        losses.append(term(given, term.remember(wanted), batch(progress)))
    torch.testing.assert_close(losses[1], factor * losses[0])
    assert ReviewKD().warmup == pytest.approx(1 / 12)


@pytest.mark.parametrize("warmup", [-0.1, 1.1, math.nan])
def test_reviewkd_rejects_invalid_warmups(warmup):
    with pytest.raises(ValueError, match=rf"^warmup must be in \[0, 1\], not {warmup}$"):
        ReviewKD(warmup=warmup)


def test_reviewkd_fuses_deeper_maps():
    """The map of a layer also depends on deeper layers, but not on earlier ones."""
    term, _ = of_shapes(ReviewKD(**LAYERS, embedding=False, warmup=0))
    given = random_maps()
    leaves = {name: x.requires_grad_() for name, x in given.features.items()}
    for number, name in enumerate("abc"):
        kept = term.remember(random_maps(seed=1))
        loss = term(given, kept, batch())
        other = {**kept, str(number): kept[str(number)].flip(0)}
        change = term(given, other, batch()) - loss
        gradients = torch.autograd.grad(change, [*leaves.values()], allow_unused=True)
        reached = [n for n, g in zip("abc", gradients, strict=True) if g.abs().max() > 1e-6]
        assert reached == [n for n in "abc" if n >= name]


def test_reviewkd_compares_at_the_size_of_the_teacher():
    pairs = [["a", "b"], ["c", "b"]]  # 8x8 and 2x2 with 4x4
    term, _ = of_shapes(ReviewKD(pairs=pairs, embedding=False, warmup=0))
    kept = term.remember(random_maps())
    assert [tuple(rows.shape) for rows in kept.values()] == [(4, 6, 4, 4)] * 2
    assert term(random_maps(seed=1), kept, batch()).isfinite()


def test_maps_are_enlarged_by_repeating_values():
    wide = resize(torch.tensor([[[[1.0, 2.0]]]]), (2, 4))
    assert wide.tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]


def test_reviewkd_averages_an_embedding_that_is_a_map():
    class Convolutional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(5, 3, 1)

        def forward(self, x):
            return self.head(self.body(x)).mean((2, 3))

    teacher = Convolutional().eval()
    term = ReviewKD(pairs=[["stage1", "body"]])
    reads = term.setup(
        Context(layer_shapes(ConvNet([4, 8], 8, 3, 8), 8), layer_shapes(teacher, 8), 3)
    )
    assert reads.teacher == ("body", "head:input")
    kept = term.remember(FeatureReader(teacher, reads.teacher)(images(8)))
    torch.testing.assert_close(kept["1"], kept["0"].mean((2, 3), keepdim=True))


def test_reviewkd_needs_an_embedding():
    with pytest.raises(ValueError, match=r"^the embedding of the student, 'embedding', must be"):
        of_shapes(ReviewKD(**LAYERS))


# --- projectors ----------------------------------------------------------------------------------


def test_projector_norm_accepts_a_single_value_per_channel():
    norm = ProjectorNorm(3)
    norm.running_mean.fill_(1.0)
    norm.running_var.fill_(4.0)
    x = torch.tensor([3.0, 1.0, -1.0]).view(1, 3, 1, 1).requires_grad_()
    torch.testing.assert_close(norm(x).flatten(), torch.tensor([1.0, 0.0, -1.0]), rtol=1e-5, atol=0)
    norm(x).square().sum().backward()
    assert x.grad.any()
    assert norm.running_mean.tolist() == [1, 1, 1]
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 2), (4, 3, 2, 2)])
def test_projector_norm_is_otherwise_batchnorm(shape):
    torch.manual_seed(0)
    x, norm, plain = torch.randn(shape), ProjectorNorm(3), nn.BatchNorm2d(3)
    assert torch.equal(norm(x), plain(x))
    assert torch.equal(norm.running_var, plain.running_var)
    assert torch.equal(norm.eval()(x[:1]), plain.eval()(x[:1]))


def test_convolutions_keep_the_size():
    assert convolution_norm(2, 5, kernel=3)(torch.ones(2, 2, 3, 4)).shape == (2, 5, 3, 4)


# --- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [hint_loss, nst_loss, partial_loss, hierarchical_loss])
def test_losses_are_computed_in_at_least_float32(loss):
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    exact = loss(x.double(), y.double())
    assert exact.dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(x, y), exact.float(), rtol=1e-5, atol=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        half = loss((300 * x).to(dtype), (300 * y).to(dtype))
        assert half.dtype == torch.float32
        assert half.isfinite()


def test_a_map_that_several_terms_read_is_cached_once():
    keys = []
    for term in (FitNet(**LAYERS), VID(**LAYERS), ReviewKD(**LAYERS, embedding=False)):
        of_shapes(term)
        key = _term_key(term)
        keys.append([_part_key(key, part) for part in term.remember(random_maps())])
    assert keys[0] == [keys[1][1]]
    assert keys[1] == keys[2]
    assert len({str(key) for key in keys[1]}) == 3
    for other in (NST(**LAYERS), OFD(**LAYERS)):
        of_shapes(other)
        assert _part_key(_term_key(other), "0") not in keys[1]


def test_keys_of_parts():
    assert _part_key({"class": "x"}, "") == {"class": "x"}
    assert _part_key({"class": "x"}, "a") == {"class": "x", "part": "a"}
    key = {"class": "x", "parts": {"a": 1, "b": 2}}
    assert _part_key(key, "b") == {"class": "x", "part": 2}
    assert key["parts"] == {"a": 1, "b": 2}


@pytest.mark.parametrize("term", [VID, NST, OFD])
def test_targets_of_half_precision_maps_are_float32(term):
    term, _ = of_shapes(term(**LAYERS))
    half = {name: x.bfloat16() for name, x in random_maps().features.items()}
    assert {rows.dtype for rows in term.remember(output(**half)).values()} == {torch.float32}
