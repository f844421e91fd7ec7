"""Losses on relations between images, compared with values of the authors' own implementations."""

import math

import pytest
import torch
import torch.nn.functional as F
from reference_cases import cases, check_digest

from kd_lightning.losses.crd import CRD, noise_contrastive_loss
from kd_lightning.losses.memory_bank import MemoryBank
from kd_lightning.losses.pkt import probability_transfer_loss
from kd_lightning.losses.rkd import angle_loss, distance_loss
from kd_lightning.losses.sp import similarity_loss
from kd_lightning.losses.vectors import unit

TORCHDISTILL = "yoshitomo-matsubara/torchdistill"  # its SP divides by sums of absolute values
MMRAZOR = "open-mmlab/mmrazor"  # normalises the vectors first
KD_LIB = "SforAiDl/KD_Lib"  # its RKD adds 1e-7 to the mean distance
ZOO = "AberHu/Knowledge-Distillation-Zoo"  # its PKT has another epsilon


def not_of(repository):
    return lambda case: not case.content["source"].startswith(repository)


@pytest.mark.parametrize(
    "case",
    cases("maps", "SP", where=not_of(TORCHDISTILL)),
)
def test_sp(case):
    case.check(similarity_loss)


def prepared(case, loss):
    """The loss of the vectors as they are, or of length 1 in mmrazor."""
    if case.from_repository(MMRAZOR):
        return lambda student, teacher: loss(F.normalize(student), F.normalize(teacher))
    return loss


@pytest.mark.parametrize("case", cases("embeddings", "RKD distance", where=not_of(KD_LIB)))
def test_rkd_distance(case):
    case.check(prepared(case, distance_loss))


@pytest.mark.parametrize("case", cases("embeddings", "RKD angle"))
def test_rkd_angle(case):
    case.check(prepared(case, angle_loss))
    if case.content.get("singular_gradient"):  # coinciding images contribute nothing
        inputs = case.inputs()
        angle_loss(**inputs).backward()
        check_digest(inputs["student"].grad, case.expected["grads"]["student"])


@pytest.mark.parametrize(
    "case", cases("embeddings", "RKD", where=lambda case: "squared" not in case.id)
)
def test_rkd(case):
    def loss(student, teacher):
        student, teacher = student.flatten(1), teacher.flatten(1)
        distance, angle = distance_loss(student, teacher), angle_loss(student, teacher)
        return case.params["w_d"] * distance + case.params["w_a"] * angle

    case.check(loss)


ZERO_ROW = ("zero_row", "relu")


@pytest.mark.parametrize(
    "case",
    cases("embeddings", "PKT", where=not_of(ZOO)),
)
def test_pkt(case):
    zero_row = case.id.endswith(ZERO_ROW)
    case.check(probability_transfer_loss, gradients=not zero_row)
    if zero_row:  # the gradient of the authors' formula is of the order of 1 / epsilon there
        inputs = case.inputs()
        probability_transfer_loss(**inputs).backward()
        expected = torch.tensor(
            [float(g) for g in case.expected["grads"]["student"]["data"]], dtype=torch.float64
        ).view(4, 6)
        zero = (inputs["student"] == 0).all(dim=1)
        expected[zero] = 0
        torch.testing.assert_close(inputs["student"].grad, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("case", cases("embeddings", "CRD part"))
def test_noise_contrastive_loss(case):
    def loss(student):
        scores = student.log()
        drawn = torch.ones(len(scores), scores.shape[1] - 1)
        noise = (scores.shape[1] - 1) / case.params["n_data"]
        return noise_contrastive_loss(scores[:, 0], scores[:, 1:], drawn, noise)

    case.check(loss)


@pytest.mark.parametrize("case", cases("embeddings", "CRD"))
def test_crd_with_memory(case):
    inputs = case.inputs()
    student, teacher = (
        unit(F.linear(inputs[features], inputs[weight], inputs[bias]))
        for features, weight, bias in (("student", "ws_", "bs"), ("teacher", "wt", "bt"))
    )
    index, rows = inputs["y"], inputs["idx"][:, 1:]
    images, negatives = len(inputs["mem_s"]), rows.shape[1]
    drawn = torch.zeros(len(index), images).scatter_add_(1, rows, torch.ones(rows.shape))
    term = CRD(temperature=case.params.get("T", 0.07), memory=True, negatives=negatives)
    bank = MemoryBank(images, student.shape[1]).double()
    bank.student, bank.teacher = inputs["mem_s"].detach(), inputs["mem_t"].detach()
    bank.draw = lambda *_: drawn
    loss = term.against_bank(bank, student, teacher, index, torch.zeros_like(index))
    case.compare(inputs, loss)
    if case.content.get("right"):
        return  # a zero embedding, which is NaN in the authors' code
    outputs = case.content["outputs"]
    for scale, name in zip(bank.log_scale, ("Z_v1", "Z_v2"), strict=True):
        assert math.exp(scale) == pytest.approx(outputs[name], rel=1e-9)
    check_digest(bank.student, outputs["memory_v1_after"])
    check_digest(bank.teacher, outputs["memory_v2_after"])
