"""Losses on logits, compared with values of the authors' own implementations."""

import pytest
import torch
from reference_cases import cases

from kd_lightning.losses import DKD, MLKD, CrossEntropy, Logit, TermBatch, TfKD
from kd_lightning.losses.dist import dist_loss
from kd_lightning.losses.dkd import decoupled_losses
from kd_lightning.losses.hard import hard_label_loss
from kd_lightning.losses.logit import soft_target_loss
from kd_lightning.losses.mlkd import batch_relation_loss, class_relation_loss
from kd_lightning.losses.nkd import normalized_losses
from kd_lightning.models.features import Output

TORCHDISTILL = "yoshitomo-matsubara/torchdistill"  # its KD leaves out T^2, its DIST floors norms
TFKD = "yuanli2333/Teacher-free-Knowledge-Distillation"
# These average over classes too, or compute a cross-entropy or the error of probabilities.
OTHER_KD = (TORCHDISTILL, TFKD, "peterliht/knowledge-distillation-pytorch",
            "facebookresearch/deit", "yzd-v/cls_KD", "passalis/probabilistic_kt",
            "SforAiDl/KD_Lib")  # fmt: skip


def not_of(*repositories):
    return lambda case: not case.from_repository(*repositories)


@pytest.mark.parametrize("case", cases("logits", "KD", where=not_of(*OTHER_KD)))
def test_kd(case):
    temperature = case.params.get("T", 1.0)
    case.check(lambda student, teacher: soft_target_loss(student, teacher, temperature))


@pytest.mark.parametrize(
    "case", cases("logits", "KD+logit standardization", where=not_of(TORCHDISTILL))
)
def test_kd_with_standardized_logits(case):
    term = Logit(case.params["temperature"], standardize=True)
    case.check(lambda student, teacher: term(Output(student, {}), teacher, None))


@pytest.mark.parametrize("case", cases("logits", "DKD"))
def test_dkd(case):
    case.check(
        lambda student, teacher, target: decoupled_losses(
            student, teacher, target, **case.params
        ).mean()
    )


@pytest.mark.parametrize("case", cases("logits", "DKD+logit standardization"))
def test_dkd_with_standardized_logits(case):
    term = DKD(**case.params, warmup=0, standardize=True)
    case.check(
        lambda student, teacher, target: term(Output(student, {}), teacher, labelled(target))
    )


@pytest.mark.parametrize("case", cases("logits", "DIST", where=not_of(TORCHDISTILL)))
def test_dist(case):
    beta, gamma, temperature = (case.params[name] for name in ("beta", "gamma", "tau"))
    case.check(lambda student, teacher: dist_loss(student, teacher, beta, gamma, temperature))


@pytest.mark.parametrize("case", cases("logits", "NKD"))
def test_nkd(case):
    def loss(student, teacher, target):
        labels = target if target.ndim == 1 else target.argmax(dim=1)
        gamma, temperature = case.params["gamma"], case.params["temp"]
        return normalized_losses(student, teacher, labels, gamma, temperature).mean()

    case.check(loss)


@pytest.mark.parametrize("case", cases("logits", "MLKD part"))
def test_mlkd(case):
    part = next(
        function
        for name, function in {
            "instance": soft_target_loss,
            "class": class_relation_loss,
            "batch": batch_relation_loss,
        }.items()
        if f"/{name}/" in case.id
    )
    temperature = case.params["temperature"]
    case.check(lambda student, teacher: part(student, teacher, temperature))


@pytest.mark.parametrize("case", cases("logits", "MLKD total"))
def test_mlkd_total(case):
    """The parts of `MLKD`, put together as in the authors' code, whose masks scale by 1/2."""
    scale = case.params["kd_weight"]

    def loss(student, student_strong, teacher, teacher_strong, target):
        weak, strong = (student, teacher), (student_strong, teacher_strong)
        total = case.params["ce_weight"] * sum(
            torch.nn.functional.cross_entropy(logits, target)
            for logits in (student, student_strong)
        )
        term = MLKD()
        total = total + scale / 2 * term(Output(student, {}), teacher, None)
        for temperature in term.temperatures:  # two of them read the wrong view
            view = weak if temperature in (2, 6) else strong
            total = total + scale * soft_target_loss(*view, temperature)
        return total

    case.check(loss)


@pytest.mark.parametrize("case", cases("logits", "Tf-KD reg"))
def test_tfkd(case):
    share, scale = case.params["reg_alpha"], case.params["multiplier"]
    term = TfKD(case.params["reg_temperature"])

    def loss(student, target):
        output, batch = Output(student, {}), labelled(target)
        hard = torch.nn.functional.cross_entropy(student, target)
        return (1 - share) * hard + share * scale * term(output, None, batch)

    case.check(loss)


@pytest.mark.parametrize("case", cases("logits", "DeiT hard"))
def test_hard_labels(case):
    def loss(student, student_dist, teacher, target):
        hard = torch.nn.functional.cross_entropy(student, target)
        return 0.5 * hard + 0.5 * hard_label_loss(student_dist, teacher)

    case.check(loss)


@pytest.mark.parametrize("case", cases("logits", "label smoothing", where=not_of(TFKD)))
def test_label_smoothing(case):
    term = CrossEntropy(label_smoothing=0.1)
    case.check(lambda student, target: term(Output(student, {}), None, labelled(target)))


@pytest.mark.parametrize("case", cases("logits", "KD total", "KD+logit standardization total"))
def test_total_with_cross_entropy(case):
    params = case.params
    if "kd_weight" in params:
        weights = params["ce_weight"], params["kd_weight"]
    else:  # alpha is the weight of the cross-entropy in torchdistill, of the KD term elsewhere
        alpha = params["alpha"] if case.from_repository(TORCHDISTILL) else 1 - params["alpha"]
        weights = alpha, 1 - alpha
    term = Logit(params.get("temperature", params.get("T")), "standardization" in case.method)

    def loss(student, teacher, target):
        hard = torch.nn.functional.cross_entropy(student, target)
        return weights[0] * hard + weights[1] * term(Output(student, {}), teacher, None)

    case.check(loss)


@pytest.mark.parametrize("case", cases("logits", "DKD total"))
def test_dkd_warm_up(case):
    params = dict(case.params)
    epoch, warmup = params.pop("epoch"), params.pop("warmup")
    term = DKD(**params)  # by default the authors' 20 of 240 epochs
    assert term.warmup == warmup / 240

    def loss(student, teacher, target):
        hard = torch.nn.functional.cross_entropy(student, target)
        return hard + term(Output(student, {}), teacher, labelled(target, epoch / 240))

    case.check(loss)


def labelled(labels, progress=0.0):
    index = torch.arange(len(labels))
    return TermBatch(labels, index, torch.zeros_like(index), progress)
