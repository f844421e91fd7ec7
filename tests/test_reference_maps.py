"""Losses on feature maps, compared with values of the authors' own implementations."""

import pytest
import torch
from reference_cases import cases, check_digest
from torch import nn
from torch.nn.functional import relu

from kd_lightning.losses.fitnet import hint_loss
from kd_lightning.losses.nst import nst_loss
from kd_lightning.losses.ofd import normal_margin, partial_loss, stage_sum
from kd_lightning.losses.projectors import convolution_norm
from kd_lightning.losses.reviewkd import AttentionFusion, hierarchical_loss
from kd_lightning.losses.vid import gaussian_loss, initial_scale, regressor
from kd_lightning.models.pooling import pool

ZOO = "AberHu/Knowledge-Distillation-Zoo"  # VID with another epsilon


def pooled(student, teacher):
    """Both maps at the smaller size."""
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return pool(student, size), pool(teacher, size)


def with_weights(module, *weights):
    """Apply a module with these weights of its convolutions; gradients reach the given tensors."""
    names = [
        f"{name}.weight" for name, part in module.named_modules() if isinstance(part, nn.Conv2d)
    ]
    given = dict(zip(names, weights, strict=True))
    module.double()
    return lambda *inputs: torch.func.functional_call(module, given, inputs)


# --- FitNet --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", cases("maps", "FitNet hint", where=lambda case: "/rep/" in case.id)
)
def test_hint_loss(case):
    case.check(hint_loss)


@pytest.mark.parametrize(
    "case", cases("maps", "FitNet hint", where=lambda case: "same_size_1x1" in case.id)
)
def test_hint_loss_with_projector(case):
    def loss(student, teacher, w, b):
        projector = convolution_norm(3, 5).eval()  # as in this case
        # The authors' convolution has a bias, which a shift of BatchNorm can replace.
        weights = {"0.weight": w, "1.bias": b / (1 + projector[1].eps) ** 0.5}
        mapped = torch.func.functional_call(projector.double(), weights, (student,))
        return hint_loss(relu(mapped), teacher)

    case.check(loss)


# --- VID -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", cases("maps", "VID", where=lambda case: not case.from_repository(ZOO))
)
def test_vid(case):
    def loss(student, teacher, w1, w2, w3, log_scale):
        given, wanted = pooled(student, teacher)
        mean = with_weights(regressor(w1.shape[1], w3.shape[0]), w1, w2, w3)
        return gaussian_loss(mean(given), wanted, log_scale)

    case.check(loss)


@pytest.mark.parametrize("case", cases("maps", "VID constant"))
def test_vid_initial_scale(case):
    assert initial_scale(5.0) == pytest.approx(case.content["loss"], rel=1e-12)


# --- NST -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("maps", "NST"))
def test_nst(case):
    def loss(student, teacher):
        if isinstance(student, list):
            pairs = zip(student, teacher, strict=True)
            return torch.stack([nst_loss(*pooled(*pair)) for pair in pairs]).sum()
        return nst_loss(*pooled(student, teacher))

    case.check(loss)


# --- OFD -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("maps", "OFD part"))
def test_ofd_partial_loss(case):
    def loss(student, teacher, margin):
        value = partial_loss(student, torch.maximum(teacher, margin).detach())
        if "/ofd/" in case.id:  # divided later
            return value * len(student)
        return value / 1000 if "/mmr/" in case.id else value

    case.check(loss)


@pytest.mark.parametrize("case", cases("maps", "OFD margin"))
def test_ofd_margin(case):
    inputs = case.inputs()
    margin = normal_margin(inputs["w"].detach(), inputs["b"].detach())
    # The authors round to float32.
    assert float(margin.float().double().sum()) == pytest.approx(case.content["loss"], rel=1e-12)


@pytest.mark.parametrize("case", cases("maps", "OFD", where=lambda case: "/mdis/" in case.id))
def test_ofd_stages(case):
    def loss(student, teacher, w1, w2, m1, m2):
        losses = []
        for given, wanted, weight, margin in zip(student, teacher, (w1, w2), (m1, m2), strict=True):
            connect = with_weights(convolution_norm(weight.shape[1], weight.shape[0]), weight)
            losses.append(partial_loss(connect(given), torch.maximum(wanted, margin).detach()))
        return stage_sum(losses)

    case.check(loss)


# --- ReviewKD ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("maps", "ReviewKD hcl"))
def test_hierarchical_loss(case):
    def loss(student, teacher):
        pairs = zip(student, teacher, strict=True)
        return torch.stack([hierarchical_loss(*pair) for pair in pairs]).sum()

    case.check(loss)


@pytest.mark.parametrize("case", cases("maps", "ReviewKD ABF"))
def test_attention_fusion(case):
    def loss(student, teacher, w1, w2, aw=None, ab=None, y=None):
        fusion = AttentionFusion(3, 4, 5, fuse=aw is not None).double()
        weights = {"reduce.0.weight": w1, "expand.0.weight": w2}
        if aw is not None:
            weights |= {"attention.weight": aw, "attention.bias": ab}
        size = tuple(teacher.shape[2:])
        out, residual = torch.func.functional_call(fusion, weights, (student, y, size))
        check_digest(out, case.content["outputs"]["out"])
        check_digest(residual, case.content["outputs"]["residual"])
        return hierarchical_loss(out, teacher)

    case.check(loss)
