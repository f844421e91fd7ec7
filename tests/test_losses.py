"""Losses, compared with values computed by hand and with reference implementations."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_lightning.losses import (
    Attention,
    Context,
    CrossEntropy,
    Logit,
    OwnTeacher,
    Reads,
    Term,
    TermBatch,
)
from kd_lightning.losses.attention import attention_map
from kd_lightning.losses.logit import soft_target_loss
from kd_lightning.losses.pairs import FeatureMap, pair_by_resolution
from kd_lightning.models.features import Output
from kd_lightning.models.layouts import Layout


def output(logits=None, **features):
    return Output(logits if logits is not None else torch.zeros(1, 2), features)


# --- logit ---------------------------------------------------------------------------------------


def test_soft_target_loss_by_hand():
    # T = 2: teacher softmax([2, 0] / 2) = (e, 1) / (e + 1); student uniform.
    # KL = p ln 2p + q ln 2q with p = e / (e + 1); times T^2 = 4.
    p = math.e / (math.e + 1)
    expected = 4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    loss = soft_target_loss(torch.zeros(1, 2), torch.tensor([[2.0, 0.0]]), temperature=2.0)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


def slow_soft_target_loss(student, teacher, temperature):
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p = [math.exp(x / temperature) for x in t]
        q = [math.exp(x / temperature) for x in s]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(student)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(2, 12),
    st.floats(0.5, 20),
    st.integers(0, 2**31),
)
def test_soft_target_loss_matches_reference(batch, classes, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    student = 3 * torch.randn(batch, classes, generator=generator)
    teacher = 3 * torch.randn(batch, classes, generator=generator)
    loss = soft_target_loss(student, teacher, temperature)
    assert loss.dtype == torch.float32
    expected = slow_soft_target_loss(student, teacher, temperature)
    # Probabilities are rounded to 6e-8, and T^2 multiplies what remains of their differences.
    assert float(loss) == pytest.approx(expected, rel=1e-4, abs=5e-7 * max(1, temperature**2))
    exact = soft_target_loss(student.double(), teacher.double(), temperature)
    assert float(exact) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_logit_gradient_is_independent_of_high_temperatures():
    # The point of T^2 (Hinton et al., section 2.1): for large T the gradient is (z_s - z_t) / C
    # for logits of zero mean, whatever T is.
    student = torch.tensor([[1.0, -1.0]], requires_grad=True)
    teacher = torch.tensor([[-2.0, 2.0]])
    for temperature in (50.0, 500.0):
        (gradient,) = torch.autograd.grad(soft_target_loss(student, teacher, temperature), student)
        torch.testing.assert_close(gradient, (student - teacher) / 2, rtol=1e-2, atol=0)


@pytest.mark.parametrize("temperature", [0, -3, math.nan, math.inf])
def test_logit_rejects_invalid_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature"):
        Logit(temperature)


def test_logit_targets_do_not_depend_on_temperature():
    teacher = output(torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    remembered = Logit(4.0).remember(teacher)
    assert torch.equal(remembered, Logit(1.0).remember(teacher))
    assert remembered.dtype == torch.float32
    same = output(torch.tensor([[1.0, 2.0]]))
    assert float(Logit(4.0)(same, remembered, torch.tensor([0]))) == pytest.approx(0, abs=1e-6)


# --- cross-entropy -------------------------------------------------------------------------------


def labelled(*labels):
    labels = torch.tensor(labels)
    return TermBatch(labels, torch.arange(len(labels)), torch.zeros_like(labels))


def test_cross_entropy_by_hand():
    loss = CrossEntropy()(output(torch.tensor([[0.0, 0.0]])), None, labelled(1))
    assert float(loss) == pytest.approx(math.log(2))


def test_label_smoothing_by_hand():
    # Targets (0.9, 0.1) of two classes with a smoothing of 0.2.
    logits = torch.tensor([[math.log(3), 0.0]])
    loss = CrossEntropy(label_smoothing=0.2)(output(logits), None, labelled(0))
    assert float(loss) == pytest.approx(-0.9 * math.log(0.75) - 0.1 * math.log(0.25))
    assert CrossEntropy().label_smoothing == 0


@pytest.mark.parametrize("smoothing", [1, 1.5, -0.1, math.nan])
def test_label_smoothing_must_be_below_one(smoothing):
    with pytest.raises(
        ValueError, match=rf"^label_smoothing must be in \[0, 1\), not {smoothing}$"
    ):
        CrossEntropy(smoothing)


def test_cross_entropy_is_computed_in_float32():
    logits = torch.tensor([[20.0, 0.0]], dtype=torch.bfloat16)
    loss = CrossEntropy()(output(logits), None, labelled(0))
    assert loss.dtype == torch.float32


# --- attention -----------------------------------------------------------------------------------


def test_attention_map_by_hand():
    # Two channels, two positions: mean of squares (1 + 9) / 2 = 5 and (4 + 16) / 2 = 10.
    feature_map = torch.tensor([[[[1.0, 2.0]], [[-3.0, 4.0]]]])
    length = math.hypot(5, 10)
    torch.testing.assert_close(
        attention_map(feature_map), torch.tensor([[5 / length, 10 / length]])
    )


def test_attention_map_squares_before_pooling():
    # Activations of opposite sign would cancel if they were averaged first.
    feature_map = torch.tensor([[[[1.0, -1.0, 0.0, 0.0]] * 2]])
    pooled = attention_map(feature_map, size=(1, 2))
    torch.testing.assert_close(pooled, torch.tensor([[1.0, 0.0]]))


def reference_map(feature_map):
    return torch.nn.functional.normalize(feature_map.float().pow(2).mean(1).flatten(1), dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_map_and_gradient_match_reference(dtype, memory_format):
    torch.manual_seed(0)
    plain = torch.randn(4, 6, 5, 7).to(dtype).to(memory_format=memory_format).requires_grad_()
    ours = plain.detach().clone().requires_grad_()
    weight = torch.randn(4, 35)
    (reference_map(plain) * weight).sum().backward()
    (attention_map(ours) * weight).sum().backward()
    torch.testing.assert_close(attention_map(ours), reference_map(plain))
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(ours.grad, plain.grad, **tolerance)


@pytest.mark.parametrize("scale", [0.0, 1e-3])
def test_gradient_of_small_maps_does_not_overflow_in_float16(scale):
    torch.manual_seed(0)
    half = (torch.rand(1, 3, 4, 4) * scale).half().requires_grad_()
    full = half.detach().float().requires_grad_()
    weight = torch.randn(1, 16)
    for feature_map in (half, full):
        (attention_map(feature_map) * weight).sum().backward()
    torch.testing.assert_close(half.grad.float(), full.grad, rtol=1e-3, atol=1e-3)


def test_attention_map_does_not_modify_its_input():
    feature_map = torch.randn(2, 3, 4, 4)
    before = feature_map.clone()
    attention_map(feature_map)
    assert torch.equal(feature_map, before)


def test_attention_gradient_passes_gradcheck():
    feature_map = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 4)
    assert torch.autograd.gradcheck(
        lambda a: (attention_map(a) * weight).sum(), feature_map, eps=1e-2, atol=2e-2, rtol=2e-2
    )


def connected(**arguments):
    term = Attention(**arguments)
    shapes = {"a": (4, 8, 8), "b": (8, 4, 4)}
    term.setup(Context(shapes, {"x": (2, 8, 8), "y": (6, 8, 8), "z": (16, 2, 2)}))
    return term


def test_attention_mean_square_matches_the_authors_code():
    torch.manual_seed(0)
    term = connected(pairs=[["a", "y"]])
    student, teacher = torch.randn(3, 4, 8, 8), torch.randn(3, 6, 8, 8)
    remembered = term.remember(output(y=teacher))
    loss = term(output(a=student), remembered, torch.zeros(3))
    expected = (reference_map(student) - reference_map(teacher)).pow(2).mean()
    torch.testing.assert_close(loss, expected)


def test_attention_norm_matches_the_paper():
    torch.manual_seed(0)
    term = connected(pairs=[["a", "y"]], distance="norm")
    student, teacher = torch.randn(3, 4, 8, 8), torch.randn(3, 6, 8, 8)
    loss = term(output(a=student), term.remember(output(y=teacher)), torch.zeros(3))
    expected = (reference_map(student) - reference_map(teacher)).norm(dim=1).mean()
    torch.testing.assert_close(loss, expected)


def test_attention_sums_over_pairs_of_any_sizes():
    torch.manual_seed(0)
    pairs = [["a", "z"], ["b", "x"]]  # 8x8 with 2x2, 4x4 with 8x8
    term = connected(pairs=pairs)
    student = output(a=torch.randn(3, 4, 8, 8), b=torch.randn(3, 8, 4, 4))
    teacher = output(x=torch.randn(3, 2, 8, 8), z=torch.randn(3, 16, 2, 2))
    remembered = term.remember(teacher)
    assert remembered.shape == (3, 2 * 2 + 4 * 4)
    singles = []
    for pair in pairs:
        one = connected(pairs=[pair])
        singles.append(one(student, one.remember(teacher), torch.zeros(3)))
    torch.testing.assert_close(term(student, remembered, torch.zeros(3)), sum(singles))


def test_target_of_wrong_size_is_rejected():
    term = connected(pairs=[["a", "y"], ["b", "x"]])
    student = output(a=torch.randn(3, 4, 8, 8), b=torch.randn(3, 8, 4, 4))
    with pytest.raises((ValueError, RuntimeError)):
        term(student, torch.zeros(3, 8 * 8), torch.zeros(3))


def test_attention_loss_of_identical_networks_is_zero():
    term = connected(pairs=[["a", "y"]])
    same = torch.randn(3, 4, 8, 8)
    assert float(term(output(a=same), term.remember(output(y=same)), torch.zeros(3))) == 0


SHAPES = {"a": (4, 8, 6), "b": (8, 4, 3), "c": (8, 4, 3), "fc": (10,)}


def test_attention_pairs_only_candidate_layers():
    term = Attention(["a", "c"], ["x", "y", "z"])
    assert term.layers.chosen == []
    reads = term.setup(
        Context(SHAPES, {"x": (2, 8, 6), "y": (6, 8, 6), "z": (16, 4, 3), "w": (16, 4, 3)})
    )
    pairs = term.layers.chosen
    assert [(pair.student.layer, pair.teacher.layer) for pair in pairs] == [("a", "y"), ("c", "z")]
    assert [(pair.student.channels, pair.teacher.channels) for pair in pairs] == [(4, 6), (8, 16)]
    assert [pair.size for pair in pairs] == [(8, 6), (4, 3)]
    assert reads == Reads(("a", "c"), ("y", "z"), teacher_logits=False)
    assert term.depends_on() == {"maps": [["y", 8, 6], ["z", 4, 3]]}


def test_attention_compares_at_the_smaller_height_and_width():
    term = Attention(pairs=[["a", "x"], ["a", "y"], ["b", "x"]])
    reads = term.setup(Context(SHAPES, {"x": (2, 5, 9), "y": (2, 9, 5)}))
    assert [pair.size for pair in term.layers.chosen] == [(5, 6), (8, 5), (4, 3)]
    assert (reads.student, reads.teacher) == (("a", "b"), ("x", "y"))  # once each, in order


def maps(**sizes):
    return [FeatureMap(name, Layout("channels_first", *size), 1) for name, size in sizes.items()]


def paired(student, teacher):
    pairs = pair_by_resolution(maps(**student), maps(**teacher))
    return [(one.layer, other.layer) for one, other in pairs]


def test_deepest_layers_are_paired_by_resolution():
    student = {"s1": (32, 32), "s2": (16, 16), "s3": (16, 16)}
    teacher = {"t1": (32, 32), "t2": (32, 32), "t3": (16, 16), "t4": (8, 8)}
    assert paired(student, teacher) == [("s1", "t2"), ("s3", "t3")]


def test_without_a_common_resolution_the_deepest_are_paired():
    student = {"s1": (32, 32), "s2": (16, 16)}
    assert paired(student, {"t1": (28, 28), "t2": (7, 7)}) == [("s2", "t2")]
    three = {**student, "s3": (8, 8)}
    assert paired(three, {"t1": (28, 28)}) == [("s3", "t1")]
    assert paired({"s1": (4, 4)}, {f"t{n}": (20 + n, 9) for n in range(3)}) == [("s1", "t2")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pairs": [["nowhere", "x"]]}, "in the student there is no layer 'nowhere'.*a, b"),
        ({"pairs": [["a", "nowhere"]]}, "in the teacher there is no layer 'nowhere'.*x, y"),
        ({"pairs": [["a"]]}, r"^pairs must be a list of \[student layer, teacher layer\]$"),
        ({"pairs": [["a", "x"], ["a", "x", "y"]]}, "^pairs"),
        ({"pairs": [], "distance": "norm"}, "^pairs"),
        (
            {"student_layers": ["a"], "teacher_layers": ["x"], "distance": "far"},
            "^distance must be 'mean_square' or 'norm', not 'far'$",
        ),
    ],
)
def test_attention_rejects_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        connected(**arguments)


def test_attention_rejects_a_layer_without_a_map():
    term = Attention(pairs=[["a", "x"]])
    needs = r"outputs \(10,\), but a map \(channels, height, width\) is needed$"
    with pytest.raises(ValueError, match=f"^layer 'a' of the student {needs}"):
        term.setup(Context({"a": (10,)}, {"x": (2, 8, 8)}))
    with pytest.raises(ValueError, match=f"^layer 'x' of the teacher {needs}"):
        term.setup(Context({"a": (2, 8, 8)}, {"x": (10,)}))


# --- every term ----------------------------------------------------------------------------------


def test_terms_declare_their_needs():
    assert (CrossEntropy().needs_teacher, Logit().needs_teacher) == (False, True)
    assert Logit().temperature == 4
    assert Logit().depends_on() == {}  # the temperature is applied later
    assert Term().depends_on() is None  # by default nothing is cached
    assert Term().setup(Context({})) == Reads()
    assert not Term().relational
    for method in (lambda: Term().remember(output()), lambda: Term()(output(), None, None)):
        with pytest.raises(NotImplementedError):
            method()


# --- own teacher ---------------------------------------------------------------------------------


def test_own_teacher_by_hand():
    term = OwnTeacher(alpha=0.25, temperature=2.0, layers=["a", "b"])
    reads = term.setup(Context({"a": (4, 8, 8), "b": (6, 4, 4)}, num_classes=3))
    assert reads.student == ("a",)
    (head,) = term.heads
    assert head.convolution[0].weight.shape == (6, 4, 3, 3)
    torch.manual_seed(0)
    features, logits = torch.randn(5, 4, 8, 8), torch.randn(5, 3, requires_grad=True)
    batch = labelled(0, 1, 2, 0, 1)
    loss = term(output(logits, a=features), None, batch)
    early = head(features)
    labels = torch.nn.functional.cross_entropy(early, batch.labels)
    softened = soft_target_loss(early, logits, 2.0)
    torch.testing.assert_close(loss, 0.75 * labels + 0.25 * softened)
    loss.backward()
    assert logits.grad is None  # the teacher does not learn from its students
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"alpha": 1.5}, "alpha"), ({"temperature": 0}, "temperature")],
)
def test_own_teacher_rejects_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        OwnTeacher(**arguments)


def test_own_teacher_needs_two_layers():
    with pytest.raises(ValueError, match="at least two layers are needed, but only a"):
        OwnTeacher(layers=["a"]).setup(Context({"a": (4, 8, 8)}))
