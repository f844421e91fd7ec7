"""Losses on relations between images: values by hand, exceptional inputs, and two processes."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kd_lightning.distill.caching import _term_key
from kd_lightning.distill.gathering import gather
from kd_lightning.engine.launch import launch
from kd_lightning.losses import CRD, PKT, RKD, SP, Context, TermBatch, rkd
from kd_lightning.losses.crd import info_nce_loss, noise_contrastive_loss
from kd_lightning.losses.pkt import affinities, probability_transfer_loss
from kd_lightning.losses.rkd import angle_loss, distance_loss
from kd_lightning.losses.sp import similarity_loss
from kd_lightning.losses.vectors import unit
from kd_lightning.models import ConvNet, layer_shapes
from kd_lightning.models.features import Output

LOSSES = (similarity_loss, distance_loss, angle_loss, probability_transfer_loss)
NORMAL = torch.Generator().manual_seed(0)


def rows(*shape, scale=1.0):
    return scale * torch.randn(*shape, generator=NORMAL)


def batch_of(labels, index=None, **others):
    labels = torch.tensor(labels)
    index = torch.arange(len(labels)) if index is None else index
    return TermBatch(labels, index, torch.zeros_like(index), **others)


# --- values by hand ------------------------------------------------------------------------------


def test_similarity_loss_by_hand():
    # Student: orthogonal images, G = identity. Teacher: equal images, rows of G (1, 1) / sqrt(2).
    student, teacher = torch.eye(2), torch.ones(2, 3)
    half = 1 / math.sqrt(2)
    expected = (2 * (1 - half) ** 2 + 2 * half**2) / 4
    assert float(similarity_loss(student, teacher)) == pytest.approx(expected)


def test_distance_loss_by_hand():
    # Distances 3, 4, 5 with the mean 4; teacher: three equal ones.
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.eye(3)
    expected = 2 * (0.25**2 / 2) * 2 / 9  # 3/4 and 5/4 instead of 1, each of them twice
    assert float(distance_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_angle_loss_by_hand():
    # A right angle at the first image and two of 45 degrees; teacher: three of 60 degrees.
    student, teacher = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.eye(3)
    differences = (0 - 0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.5) - 0.5)
    expected = sum(2 * d**2 / 2 for d in differences) / 27
    assert float(angle_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_probability_transfer_loss_by_hand():
    # Kernel ((1, 1/2), (1/2, 1)) of the student, ones of the teacher.
    expected = (math.log(0.5 / (2 / 3)) + math.log(0.5 / (1 / 3))) / 4
    loss = probability_transfer_loss(torch.eye(2), torch.ones(2, 3))
    assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_info_nce_loss_by_hand():
    # Scores ((1, 0), (0, 1)) / 0.5.
    labels = torch.tensor([0, 1])
    loss = info_nce_loss(torch.eye(2), torch.eye(2), labels, temperature=0.5)
    assert float(loss) == pytest.approx(2 * math.log(1 + math.exp(-2)), rel=1e-5)


def test_images_of_the_same_class_are_no_negatives():
    student, teacher = unit(rows(4, 3)), unit(rows(4, 3))
    together = info_nce_loss(student, teacher, torch.tensor([0, 1, 2, 2]), 0.07)
    scores = (student @ teacher.T / 0.07).exp()
    scores[2, 3] = scores[3, 2] = 0
    own = scores.diag()
    expected = -(own / scores.sum(0)).log().mean() - (own / scores.sum(1)).log().mean()
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-5)


# --- exceptional inputs --------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", ["one image", "equal images", "zero", "equal teacher"])
def test_exceptional_batches_have_finite_gradients(loss, case):
    student, teacher = rows(5, 4), rows(5, 6)
    if case == "one image":
        student, teacher = student[:1], teacher[:1]
    elif case == "equal images":
        student[3] = student[1]
    elif case == "zero":
        student[1:3] = 0
    else:
        teacher[:] = teacher[:1].clone()
    value = loss(student.requires_grad_(), teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.norm() < 10
    if case == "one image":
        assert value == 0
        assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss, dtype):
    student, teacher = rows(6, 40).to(dtype), rows(6, 40).to(dtype)
    expected = loss(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(student, teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_affinities_of_opposite_vectors_are_not_negative():
    """Where rounding can leave a cosine below -1."""
    for _ in range(100):
        vector = rows(1, 100)
        assert affinities(torch.cat([vector, -vector])).min() >= 0


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_no_cancellation_for_close_images(loss):
    """Images that differ by 1e-3 of their length, in float32; compared with float64."""
    student, teacher = 1 + rows(6, 50, scale=1e-3), 1 + rows(6, 50, scale=1e-3)
    precise = student.double().requires_grad_()
    expected = loss(precise, teacher.double())
    expected.backward()
    found = loss(student.requires_grad_(), teacher)
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(student.grad.double(), precise.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_parts_give_the_loss_and_gradient_of_the_whole(monkeypatch, loss):
    student, teacher = rows(7, 5).double().requires_grad_(), rows(7, 9).double()
    whole = loss(student, teacher)
    (expected,) = torch.autograd.grad(whole, student)
    monkeypatch.setattr(rkd, "LARGEST", 7 * 9 * 2)  # two images at a time, and one at the end
    sizes = []
    original = rkd.checkpoint

    def recorded(function, anchors, *others, **options):
        sizes.append(len(anchors))
        return original(function, anchors, *others, **options)

    monkeypatch.setattr(rkd, "checkpoint", recorded)
    parts = loss(student, teacher)
    assert max(sizes) < 7
    (found,) = torch.autograd.grad(parts, student)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(found, expected)


def test_noise_contrastive_loss_at_low_temperatures():
    """Where the exponentials of the scores overflow."""
    own, other = torch.tensor([200.0]), torch.tensor([[-300.0, 400.0]])
    drawn = torch.ones(1, 2)
    loss = noise_contrastive_loss(own, other, drawn, 0.5)
    assert float(loss) == pytest.approx(400 - math.log(0.5), rel=1e-5)


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (lambda: RKD(distance_weight=-1), "distance_weight must be a number of at least 0, not -1"),
        (lambda: RKD(distance_weight=0, angle_weight=0), "must not both be 0"),
        (lambda: CRD(temperature=0), "temperature must be a number above 0, not 0"),
        (lambda: CRD(size=0), "size must be a whole number of at least 1, not 0"),
        (lambda: CRD(negatives=2.5), "negatives must be a whole number of at least 1, not 2.5"),
        (lambda: CRD(momentum=1), r"momentum must be in \[0, 1\), not 1"),
    ],
)
def test_invalid_arguments(create, message):
    with pytest.raises(ValueError, match=message):
        create()


def test_weights_of_rkd():
    student, teacher = rows(5, 4), rows(5, 6)
    parts = {"distance": distance_loss(student, teacher), "angle": angle_loss(student, teacher)}

    def value(**weights):
        term = RKD(**weights)
        term.setup(Context({"embedding": (4,)}, {"embedding": (6,)}))
        return term(Output(rows(5, 2), {"embedding": student}), teacher, None)

    torch.testing.assert_close(value(), 25 * parts["distance"] + 50 * parts["angle"])
    only = value(distance_weight=0, angle_weight=2)
    torch.testing.assert_close(only, 2 * parts["angle"])


# --- layers --------------------------------------------------------------------------------------


def context(train_size=100):
    torch.manual_seed(0)
    student, teacher = ConvNet([4, 8], 8, 3, 16), ConvNet([6, 10], 12, 3, 16)
    return Context(layer_shapes(student, 16), layer_shapes(teacher, 16), 3, train_size)


def test_default_layers():
    for kind in (RKD, PKT, CRD):
        reads = kind().setup(context())
        assert reads == (("classifier.3:input",), ("classifier.3:input",), False)
    assert SP().setup(context()) == (("stage2",), ("stage2",), False)


def test_maps_are_averaged_over_their_positions():
    term = PKT("stage1", "stage2")
    term.setup(context())
    feature = rows(2, 10, 4, 4).bfloat16()
    remembered = term.remember(Output(rows(2, 3), {"stage2": feature}))
    assert remembered.dtype == torch.float32
    torch.testing.assert_close(remembered, feature.float().mean((2, 3)))


def test_unusable_layers_are_rejected():
    for kind in (RKD, SP):
        with pytest.raises(ValueError, match="student_layer must be one layer; 'stages' is stage1"):
            kind("stages").setup(context())
    with pytest.raises(ValueError, match="in the teacher there is no layer 'nowhere'"):
        RKD(teacher_layer="nowhere").setup(context())


def test_terms_with_the_same_vector_share_a_cache():
    def key(term):
        term.setup(context())
        return _term_key(term)

    vector = key(RKD())
    assert vector == key(PKT(student_layer="stage1")) == key(CRD(size=4, memory=True))
    others = [key(RKD(teacher_layer=layer)) for layer in ("stage1", "stage2")] + [key(SP())]
    assert all(key != vector for key in others)
    assert others[0]["layout"] == ["channels_first", 8, 8, 0]


# --- two processes -------------------------------------------------------------------------------

TERMS = {
    "sp": lambda: SP("embedding", "embedding"),
    "rkd": RKD,
    "pkt": PKT,
    "crd": lambda: CRD(size=4),
    "crd, memory": lambda: CRD(size=4, memory=True, negatives=5),
    "crd, mixed": lambda: CRD(size=4),
    "crd, memory, mixed": lambda: CRD(size=4, memory=True, negatives=5),
}
INPUTS = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
TEACHER = torch.randn(7, 6, generator=torch.Generator().manual_seed(2))
INDEX = torch.tensor([4, 9, 1, 0, 7, 3, 5])
PARTNERS = torch.tensor([2, 0, 2, 1, 0, 0, 1])
RATIO = torch.tensor([0.1, 0.9, 0.2, 0.3, 0.8, 0.4, 0.45])


def trained(name, process=None):
    """Losses of two steps, and gradients of the second, of the part of one of two processes."""
    torch.manual_seed(0)
    term, model = TERMS[name](), nn.Linear(5, 4)
    term.setup(Context({"embedding": (4,)}, {"embedding": (6,)}, train_size=10))
    own = slice(None) if process is None else slice(process, None, 2)  # as in `ViewSampler`
    losses = []
    for _ in range(2):
        model.zero_grad()
        term.zero_grad()
        output = Output(torch.zeros(len(INDEX[own]), 3), {"embedding": model(INPUTS[own])})
        mixed = {"partner_labels": PARTNERS[own], "ratio": RATIO[own]} if "mixed" in name else {}
        targets, batch = TEACHER[own], batch_of((INDEX[own] % 3).tolist(), INDEX[own], **mixed)
        if process is not None:
            whole = gather(output, {"": targets}, batch, len(targets))
            output, targets, batch = whole[0], whole[1][""], whole[2]
        loss = term(output, targets, batch)
        loss.backward()
        losses.append(loss.item())
    parameters = [*model.parameters(), *term.parameters()]
    return losses, [parameter.grad for parameter in parameters]


def work():
    import os

    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", world_size=2, rank=rank)
    found = {}
    for name in TERMS:
        losses, gradients = trained(name, rank)
        for gradient in gradients:
            dist.all_reduce(gradient)  # as DDP does
        found[name] = losses, [(gradient / 2).tolist() for gradient in gradients]
    return found


def test_two_processes_have_the_losses_and_gradients_of_one():
    for name, (losses, gradients) in launch(2, work).items():
        expected = trained(name)
        assert losses == pytest.approx(expected[0], rel=1e-5), name
        for found, gradient in zip(gradients, expected[1], strict=True):
            torch.testing.assert_close(
                torch.tensor(found), gradient, rtol=1e-4, atol=1e-5, msg=name
            )
