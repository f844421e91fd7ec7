"""Losses on logits, compared with values of the authors' own implementations."""

import pytest
from reference_cases import cases

from kd_lightning.losses.logit import soft_target_loss

# These leave out T^2, average over classes too, or compute a cross-entropy instead.
OTHER_KD = ("yoshitomo-matsubara/torchdistill", "yuanli2333/Teacher-free-Knowledge-Distillation",
            "peterliht/knowledge-distillation-pytorch", "facebookresearch/deit",
            "yzd-v/cls_KD", "passalis/probabilistic_kt", "SforAiDl/KD_Lib")  # fmt: skip


@pytest.mark.parametrize(
    "case", cases("logits", "KD", where=lambda case: not case.from_repository(*OTHER_KD))
)
def test_kd(case):
    temperature = case.params.get("T", 1.0)
    case.check(lambda student, teacher: soft_target_loss(student, teacher, temperature))
