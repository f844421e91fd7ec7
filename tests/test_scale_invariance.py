"""Losses that do not depend on the scale of the features, at extreme scales."""

import pytest
import torch
import torch.nn.functional as F

from kd_lightning.losses.attention import attention_map
from kd_lightning.losses.nst import nst_loss
from kd_lightning.losses.pkt import affinities, probability_transfer_loss
from kd_lightning.losses.rkd import angle_loss, distance_loss
from kd_lightning.losses.scale import power_of_two
from kd_lightning.losses.sp import similarity_loss


def attention_loss(student, teacher):
    return F.mse_loss(attention_map(student), attention_map(teacher))


LOSSES = {
    similarity_loss: (5, 7), distance_loss: (5, 7), angle_loss: (5, 7),
    probability_transfer_loss: (5, 7), attention_loss: (3, 4, 2, 5), nst_loss: (3, 4, 2, 5),
}  # fmt: skip


def features(shape, scale=1.0):
    torch.manual_seed(0)
    return [factor * torch.randn(shape, dtype=torch.float64) for factor in (scale, 1.0)]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("scale", "dtype"),
    [
        *((scale, torch.float32) for scale in (1e-36, 1e-30, 1e-12, 1e-5, 1e5, 1e12, 1e30, 1e38)),
        *((scale, torch.bfloat16) for scale in (1e-30, 1e30)),
        *((scale, torch.float64) for scale in (1e-200, 1e200)),
    ],
)
def test_losses_do_not_depend_on_the_scale(loss, scale, dtype):
    if loss is attention_loss:
        scale = scale**0.4  # within the range of its squares
    student, teacher = (part.to(dtype).double() for part in features(LOSSES[loss]))
    student.requires_grad_()
    expected = loss(student, teacher)
    expected.backward()
    # Rounding to half precision comes before the scale, which is a power of two.
    scale = 2.0 ** round(torch.tensor(scale, dtype=torch.float64).log2().item())
    scaled = (scale * student.detach()).to(dtype).requires_grad_()
    found = loss(scaled, teacher.to(dtype))
    found.backward()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    rtol = 2e-2 if dtype == torch.bfloat16 else 1e-3
    gradient = scaled.grad.double() * scale
    torch.testing.assert_close(gradient, student.grad, rtol=rtol, atol=rtol * 1e-2)
    # The same for the teacher, which has no gradient.
    swapped = loss(teacher.to(dtype), scaled.detach())
    reference = loss(teacher, student.detach())
    torch.testing.assert_close(swapped.double(), reference, rtol=1e-4, atol=0)


@pytest.mark.parametrize("loss", LOSSES)
def test_zeros_at_small_scales(loss):
    student, teacher = (part.float() for part in features(LOSSES[loss], 1e-30))
    student[1] = 0
    loss(student.requires_grad_(), teacher).backward()
    assert student.grad.isfinite().all()
    nothing = torch.zeros_like(student, requires_grad=True)
    loss(nothing, teacher).backward()
    assert nothing.grad.isfinite().all()


def test_small_distances_of_large_features_count():
    student, teacher = features((5, 7), 2.0**30)
    student[1] = student[0]
    student[1, 0] += 0.5  # far above the smallest distance, but not relative to the scale
    expected = F.smooth_l1_loss(*(relative_distances(part) for part in (student, teacher)))
    torch.testing.assert_close(distance_loss(student, teacher), expected, rtol=1e-11, atol=0)


def test_smallest_distance_is_relative_to_small_features():
    student, teacher = features((5, 7), 2.0**-40)
    student[1] = student[0]
    scale = 2.0 ** torch.frexp(student.abs().max()).exponent.add(-1).item()  # below the largest
    expected = F.smooth_l1_loss(
        relative_distances(student / scale, smallest=1e-6), relative_distances(teacher)
    )
    torch.testing.assert_close(distance_loss(student, teacher), expected, rtol=1e-11, atol=0)


def relative_distances(vectors, smallest=0):
    distances = torch.linalg.vector_norm(vectors[:, None] - vectors, dim=2).clamp(min=smallest)
    distances.fill_diagonal_(0)
    return distances / (distances.sum() / (5 * 4))


def test_short_vectors_among_long_ones_keep_their_direction():
    vectors, _ = features((5, 7), 2.0**30)
    expected = affinities(vectors)
    vectors[1] /= 2.0**31  # of the usual length, but not relative to the scale
    torch.testing.assert_close(affinities(vectors), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("usual", [0.001, 0.5, 1.0, 1000.0, 0.0, torch.inf, torch.nan, 1e-42])
def test_features_of_a_usual_scale_and_exceptions_are_left_as_they_are(usual):
    assert power_of_two(torch.tensor([-usual, 0.0])) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("largest", [1e-37, 3e-20, 7e-4, 3e3, 3e20, 1.7e38])
def test_factors_are_powers_of_two(largest, dtype):
    factor = power_of_two(torch.tensor([0.0, -largest], dtype=dtype))
    assert factor.dtype == dtype
    assert torch.frexp(factor).mantissa == 0.5
    assert 1 <= largest * factor < 2
