"""User-defined students and teachers of many kinds: trained, validated and tested by Lightning."""

from collections import namedtuple

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader

from kd_lightning.config.nodes import build
from kd_lightning.data.loading import Shown
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.teacher import FrozenTeacher, Normalization
from kd_lightning.errors import InputError
from kd_lightning.models.preparing import materialize

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
Classified = namedtuple("Classified", "loss logits")


class Base(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )
        self.fc = nn.Linear(4, 10)

    def forward(self, images):
        features = self.body(images)
        return self.returns(self.fc(features.mean((2, 3))), features)

    def returns(self, logits, _features):
        return logits


class Pair(Base):
    """(logits, features)"""

    def returns(self, logits, features):
        return logits, {"features": [features]}


class FeaturesFirst(Base):
    """(features, logits)"""

    def returns(self, logits, features):
        return features, logits


class Named(Base):
    """Like Hugging Face transformers."""

    def returns(self, logits, _features):
        return Classified(None, logits)


class Auxiliary(Base):
    """Additional outputs in training mode, like GoogLeNet."""

    def returns(self, logits, _features):
        return (logits, logits * 0.5) if self.training else logits


class Lazy(Base):
    """Lazy: channels are inferred from the first images."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.LazyConv2d(4, 3, 2, bias=False), nn.LazyBatchNorm2d(), nn.ReLU()
        )
        self.fc = nn.LazyLinear(10)


class KeepsGrid(Base):
    """Creates a grid, a plain attribute, from the first images."""

    def __init__(self):
        super().__init__()
        self.grid, self.scale = None, nn.Parameter(torch.ones(1))

    def forward(self, images):
        if self.grid is None:
            self.grid = torch.linspace(0, 1, images.shape[-1])
        return super().forward(images + self.grid * self.scale)


def batches(count):
    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "images": torch.randn(8, 3, 16, 16, generator=generator),
            "labels": torch.arange(8),
            "shown": Shown(torch.arange(8), torch.zeros(8, dtype=torch.long)),
            "loss_weight": 1.0,
        }
        for _ in range(count)
    ]
    return DataLoader(rows, batch_size=None)


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "kind", [Base, Pair, FeaturesFirst, Named, Auxiliary, Lazy, KeepsGrid], ids=lambda k: k.__name__
)
def test_any_model_works_as_student_and_teacher(kind, role, precision, tmp_path):
    seed_everything(0, verbose=False)
    nodes = {name: {"_target_": f"{__name__}.Base"} for name in ("student", "teacher")}
    nodes[role] = {"_target_": f"{__name__}.{kind.__name__}"}
    model = build(nodes["teacher"], "teacher.model")
    materialize(model, 16, "teacher.model")
    teacher = FrozenTeacher(model, HALF, HALF)
    terms = {
        "cross_entropy": {"_target_": "kd_lightning.losses.CrossEntropy", "weight": 1.0},
        "logit": {"_target_": "kd_lightning.losses.Logit", "weight": 1.0},
        "attention": {
            "_target_": "kd_lightning.losses.Attention",
            "weight": 1.0,
            "pairs": [["body.1", "body.1"]],
        },
    }
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.01}
    module = DistillationModule(nodes["student"], terms, sgd, None, 10, 16, teacher=teacher)
    before = [weight.detach().clone() for weight in module.student.parameters()]
    module.ask_teacher(torch.zeros(1, 3, 16, 16))
    trainer = Trainer(
        default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", precision=precision,
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, inference_mode=False,
    )  # fmt: skip
    trainer.validate(module, batches(1), verbose=False)
    trainer.fit(module, batches(2), batches(1))
    trainer.test(module, batches(1), verbose=False)
    after = list(module.student.parameters())
    assert len(after) == len(before)
    assert all(not torch.equal(*pair) for pair in zip(before, after, strict=True))


class ExtraState(Base):
    """Its state is not only tensors."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def test_a_state_that_cannot_be_stored_is_refused():
    with pytest.raises(InputError, match=r"student\.model cannot be stored.*_extra_state.*dict"):
        materialize(ExtraState(), 16, "student.model")
