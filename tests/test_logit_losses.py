"""Losses on logits: values computed by hand, identities, and extreme inputs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_lightning.losses import (
    DIST,
    DKD,
    MLKD,
    NKD,
    CrossEntropy,
    HardLabel,
    Logit,
    TermBatch,
    TfKD,
)
from kd_lightning.losses.dist import correlation, dist_loss
from kd_lightning.losses.dkd import decoupled_losses
from kd_lightning.losses.logit import soft_target_loss
from kd_lightning.losses.mlkd import batch_relation_loss, class_relation_loss
from kd_lightning.losses.nkd import normalized_losses
from kd_lightning.losses.precision import at_least_float32
from kd_lightning.losses.standardize import standardize
from kd_lightning.losses.target_class import mean_over_labels, split_target
from kd_lightning.losses.tfkd import virtual_teacher_losses
from kd_lightning.models.features import Output

LN2 = math.log(2)

# Class probabilities, which are those of the logits T log p at the temperature T.
STUDENT, TEACHER = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
FIRST = torch.tensor([0])


def labelled(labels, **given):
    index = torch.arange(len(labels))
    return TermBatch(labels, index, torch.zeros_like(index), **given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_of_the_computation(given, expected):
    assert at_least_float32(torch.ones(2, dtype=given)).dtype == expected


def test_float32_is_not_copied():
    values = torch.ones(2)
    assert at_least_float32(values) is values


# --- the target class ----------------------------------------------------------------------------


def test_target_class_is_split_off_in_order():
    logits = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    target, others = split_target(logits, torch.tensor([1, 0, 2]))
    assert target.tolist() == [[2], [4], [9]]
    assert others.tolist() == [[1, 3], [5, 6], [7, 8]]


def test_mean_over_labels_by_hand():
    scores = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])

    def losses(labels):
        return scores.gather(1, labels[:, None]).squeeze(1)

    plain = labelled(torch.tensor([0, 1]))
    assert mean_over_labels(losses, plain).item() == (1 + 16) / 2
    mixed = labelled(
        torch.tensor([0, 1]),
        partner_labels=torch.tensor([2, 0]),
        ratio=torch.tensor([0.75, 0.5]),
    )
    assert mean_over_labels(losses, mixed).item() == ((0.75 + 1) + (8 + 4)) / 2


# --- by hand -------------------------------------------------------------------------------------


def test_hard_labels_by_hand():
    student = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    teacher = torch.tensor([[-1.0, -2.0], [5.0, 7.0]])
    loss = HardLabel()(Output(student, {}), teacher, None)
    assert loss.item() == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_dkd_by_hand(temperature):
    # The target class against the rest: (1/4, 3/4) of the teacher, (1/2, 1/2) of the student.
    # Within the rest: (2/3, 1/3) and (1/2, 1/2).
    target = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    others = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    logits = temperature * STUDENT.log(), temperature * TEACHER.log()
    (loss,) = decoupled_losses(*logits, FIRST, 3.0, 5.0, temperature)
    assert loss.item() == pytest.approx(temperature**2 * (3 * target + 5 * others), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 5), st.integers(2, 12), st.floats(0.5, 20), st.integers(0, 2**31))
def test_dkd_is_a_decomposition_of_kd(batch, classes, temperature, seed):
    """Equation 6: KD = TCKD + (1 - p_t) NCKD."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        3 * torch.randn(batch, classes, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    labels = torch.randint(0, classes, (batch,), generator=generator)
    parts = [
        decoupled_losses(student, teacher, labels, *weights, temperature)
        for weights in ((1, 0), (0, 1))
    ]
    p = (teacher / temperature).softmax(1).gather(1, labels[:, None]).squeeze(1)
    whole = (parts[0] + (1 - p) * parts[1]).mean()
    expected = soft_target_loss(student, teacher, temperature)
    torch.testing.assert_close(whole, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("progress", "factor"), [(0, 0), (0.1, 0.4), (0.25, 1), (0.9, 1)])
def test_dkd_is_warmed_up(progress, factor):
    student, teacher = Output(STUDENT.log(), {}), TEACHER.log()
    full = DKD(warmup=0)(student, teacher, labelled(FIRST))
    loss = DKD(warmup=0.25)(student, teacher, labelled(FIRST, progress=progress))
    torch.testing.assert_close(loss, factor * full)


def test_nkd_by_hand():
    # Target class: weight 1/4, probability 1/2. The others: any (q, 1 - q) against (1/2, 1/2).
    (loss,) = normalized_losses(STUDENT.log(), TEACHER.log(), FIRST, 3.0, 1.0)
    assert loss.item() == pytest.approx(0.25 * LN2 + 3 * LN2)
    (loss,) = normalized_losses(STUDENT.log(), TEACHER.log(), FIRST, 3.0, 2.0)
    assert loss.item() == pytest.approx(0.25 * LN2 + 4 * 3 * LN2)  # T^2; 1/2 at any temperature


def test_correlations_by_hand():
    first = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    second = torch.tensor([[3.0, 2.0, 1.0], [5.0, 8.0, 5.0]])
    torch.testing.assert_close(correlation(first, second, dim=1), torch.tensor([-1.0, 1.0]))
    torch.testing.assert_close(correlation(first, second, dim=0), torch.tensor([-1.0, -1.0, -1.0]))


def test_dist_of_opposite_relations():
    # With two classes and two images all correlations are 1 or -1.
    teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    same = dist_loss(3 * teacher, teacher, 1, 1, 4)
    opposite = dist_loss(teacher.flip(1), teacher, 3, 5, 2)
    assert same.item() == pytest.approx(0, abs=1e-4)
    assert opposite.item() == pytest.approx(2**2 * (3 * 2 + 5 * 2), rel=1e-4)


def test_mlkd_relations_by_hand():
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    # (3/4, 1/4) against (1/2, 1/2); outer products differ by 5/16, -1/16, -1/16, -3/16.
    assert class_relation_loss(student, teacher, 1).item() == pytest.approx(36 / 256 / 2, rel=1e-5)
    assert batch_relation_loss(student, teacher, 1).item() == pytest.approx(1 / 64, rel=1e-5)
    assert class_relation_loss(student, 2 * teacher, 2).item() == pytest.approx(
        36 / 256 / 2, rel=1e-5
    )
    double = torch.cat([teacher, teacher])
    loss = batch_relation_loss(torch.zeros(2, 2), double, 1)  # all four products are equal
    assert loss.item() == pytest.approx(4 / 64 / 2, rel=1e-5)


def test_mlkd_is_the_weighted_sum_of_its_parts():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    loss = MLKD([2, 3], instance=3, classes=5, batch=7)(Output(student, {}), teacher, None)
    expected = sum(
        3 * soft_target_loss(student, teacher, temperature)
        + 5 * class_relation_loss(student, teacher, temperature)
        + 7 * batch_relation_loss(student, teacher, temperature)
        for temperature in (2, 3)
    )
    torch.testing.assert_close(loss, expected)


def test_mlkd_class_relations_do_not_depend_on_the_batch_size_when_scaled():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    term = MLKD([2], instance=0, batch=0, class_images=4)
    once = term(Output(student, {}), teacher, None)
    twice = term(Output(student.repeat(2, 1), {}), teacher.repeat(2, 1), None)
    torch.testing.assert_close(once, class_relation_loss(student, teacher, 2))
    torch.testing.assert_close(twice, once)


def test_mlkd_relations_are_not_computed_in_half_precision():
    student, teacher = torch.randn(8, 5), torch.randn(8, 5)
    for loss in (class_relation_loss, batch_relation_loss):
        expected = loss(student, teacher, 4)
        exact = loss(student.double(), teacher.double(), 4)
        assert expected.item() == pytest.approx(exact.item(), rel=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(student, teacher, 4), expected)


def test_tfkd_by_hand():
    # softmax(0.9, 0.1) against (1/2, 1/2), averaged over two classes.
    q = 1 / (1 + math.exp(-0.8))
    expected = (q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))) / 2
    for label in (0, 1):
        (loss,) = virtual_teacher_losses(torch.zeros(1, 2), torch.tensor([label]), 1.0, 0.9)
        assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("classes", "temperature"), [(4, 0.5), (100, 20.0)])
def test_tfkd_has_the_gradient_of_a_label_smoothing(classes, temperature):
    student = torch.randn(3, classes, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 3, 1])
    gap = (0.99 - 0.01 / (classes - 1)) / temperature
    smoothing = classes / (classes - 1 + math.exp(gap))
    if classes == 100:
        assert smoothing == pytest.approx(0.9995, abs=5e-5)  # as documented
    loss = classes * virtual_teacher_losses(student, labels, temperature, 0.99).mean()
    smoothed = CrossEntropy(smoothing)(Output(student, {}), None, labelled(labels))
    ours, expected = (torch.autograd.grad(value, student)[0] for value in (loss, smoothed))
    torch.testing.assert_close(ours, expected)


# --- logit standardization -----------------------------------------------------------------------


def test_standardized_logits_by_hand():
    logits = torch.tensor([[1.0, 2.0, 3.0], [-7.0, 5.0, -1.0]])
    torch.testing.assert_close(standardize(logits), torch.tensor([[-1.0, 0, 1], [-1, 1, 0]]))


def test_standardized_logits_do_not_depend_on_scale_and_shift():
    logits = torch.randn(4, 9)
    torch.testing.assert_close(standardize(5 * logits - 3), standardize(logits))
    assert standardize(logits.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_logits_have_no_gradient(value, dtype):
    """Rounding errors of their deviation must not be amplified."""
    student = torch.full((3, 7), value, dtype=dtype, requires_grad=True)
    teacher = torch.randn(3, 7, dtype=dtype)
    for term in (Logit(2, standardize=True), DKD(warmup=0, standardize=True), DIST()):
        loss = term(Output(student, {}), teacher, labelled(torch.tensor([0, 1, 2])))
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.isfinite()
        assert not gradient.any()


def test_rounding_errors_are_not_standardized():
    values = torch.tensor([[3.3, 3.3, 3.3, 3.3]])
    values[0, 0] = torch.nextafter(values[0, 0], torch.tensor(4.0))
    assert not standardize(values).any()
    assert standardize(values + torch.tensor([1e-4, 0, 0, 0])).any()


def test_terms_standardize_both_logits():
    student, teacher = torch.randn(4, 5), torch.randn(4, 5)
    labels = torch.tensor([0, 1, 2, 3])
    for kind in (Logit, lambda **given: DKD(warmup=0, **given)):
        plain, standardized = kind(), kind(standardize=True)
        expected = plain(Output(standardize(student), {}), standardize(teacher), labelled(labels))
        loss = standardized(Output(student, {}), teacher, labelled(labels))
        torch.testing.assert_close(loss, expected)
        assert not torch.allclose(loss, plain(Output(student, {}), teacher, labelled(labels)))


# --- every term ----------------------------------------------------------------------------------

TERMS = {
    "logit": Logit(),
    "logit, standardized": Logit(2, standardize=True),
    "hard": HardLabel(),
    "dkd": DKD(warmup=0),
    "dkd, standardized": DKD(9, 72, 2, warmup=0, standardize=True),
    "dist": DIST(),
    "nkd": NKD(),
    "mlkd": MLKD(),
    "tfkd": TfKD(),
}
LOGITS = {
    "leads of 5000": lambda g: 5000 * torch.eye(6)[:4] + torch.randn(4, 6, generator=g),
    "up to 1e4": lambda g: 1e4 * torch.randn(4, 6, generator=g),
    "equal": lambda g: torch.full((4, 6), 3.3),
    "zero": lambda g: torch.zeros(4, 6),
    "two classes": lambda g: torch.randn(4, 2, generator=g),
    "two classes, large": lambda g: 1e4 * torch.randn(4, 2, generator=g),
    "one image": lambda g: torch.randn(1, 6, generator=g),
    "equal rows": lambda g: torch.randn(1, 6, generator=g).repeat(4, 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", LOGITS)
@pytest.mark.parametrize("name", TERMS)
def test_extreme_logits_give_finite_losses_and_gradients(name, kind, dtype):
    generator = torch.Generator().manual_seed(0)
    extreme = LOGITS[kind](generator)
    usual = torch.randn(extreme.shape, generator=generator)
    labels = torch.arange(len(extreme)) % extreme.shape[1]
    for student, teacher in ((extreme, usual), (usual, extreme), (extreme, extreme.flip(1))):
        student = student.to(dtype).requires_grad_()
        remembered = None
        if TERMS[name].needs_teacher:
            remembered = TERMS[name].remember(Output(teacher.to(dtype), {}))
        loss = TERMS[name](Output(student, {}), remembered, labelled(labels))
        (gradient,) = torch.autograd.grad(loss, student)
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert gradient.isfinite().all()
        assert gradient.abs().max() < 1e4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DKD(alpha=-1), "alpha must be a number of at least 0, not -1"),
        (lambda: DKD(beta=math.nan), "beta must be a number of at least 0, not nan"),
        (lambda: DKD(temperature=0), "temperature must be a number above 0, not 0"),
        (lambda: DKD(warmup=1.5), r"warmup must be in \[0, 1\], not 1.5"),
        (lambda: DKD(warmup=-0.1), r"warmup must be in \[0, 1\], not -0.1"),
        (lambda: DIST(beta=-1), "beta must be a number of at least 0, not -1"),
        (lambda: DIST(gamma=math.inf), "gamma must be a number of at least 0, not inf"),
        (lambda: DIST(temperature=-1), "temperature must be a number above 0, not -1"),
        (lambda: NKD(gamma=-1), "gamma must be a number of at least 0, not -1"),
        (lambda: NKD(temperature=0), "temperature must be a number above 0, not 0"),
        (lambda: MLKD([]), "temperatures must not be empty"),
        (lambda: MLKD([2, 0]), "temperatures must be a number above 0, not 0"),
        (lambda: MLKD(instance=-1), "instance must be a number of at least 0, not -1"),
        (lambda: MLKD(classes=-1), "classes must be a number of at least 0, not -1"),
        (lambda: MLKD(batch=-1), "batch must be a number of at least 0, not -1"),
        (lambda: MLKD(class_images=0), "class_images must be a number above 0, not 0"),
        (lambda: TfKD(temperature=0), "temperature must be a number above 0, not 0"),
        (lambda: TfKD(probability=1), r"probability must be in \(0, 1\), not 1"),
        (lambda: TfKD(probability=0), r"probability must be in \(0, 1\), not 0"),
    ],
)
def test_invalid_arguments_are_rejected(make, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        make()


def test_authors_values_are_the_defaults():
    dkd, dist, mlkd, tfkd = DKD(), DIST(), MLKD(), TfKD()
    assert (dkd.alpha, dkd.beta, dkd.temperature, dkd.standardize) == (1, 8, 4, False)
    assert (dist.beta, dist.gamma, dist.temperature) == (1, 1, 4)
    assert (NKD().gamma, NKD().temperature) == (1.5, 1)
    assert mlkd.temperatures == [2, 3, 4, 5, 6]
    assert (mlkd.instance, mlkd.classes, mlkd.batch) == (1, 1, 1)
    assert (tfkd.temperature, tfkd.probability, tfkd.needs_teacher) == (20, 0.99, False)
    assert all(term.relational for term in (dist, mlkd))
    assert not any(TERMS[name].relational for name in ("logit", "hard", "dkd", "nkd", "tfkd"))
