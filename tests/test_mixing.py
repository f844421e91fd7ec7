"""Mixtures of training views: functions of index and view number, with the right distribution."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, write_folder

from kd_lightning import api
from kd_lightning.config.checks import check
from kd_lightning.data import Augmentation, CutMix, FolderDataModule, Mixup
from kd_lightning.data.mixing import LEVELS, Mixture, blend
from kd_lightning.data.views import PLAIN
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.losses import CrossEntropy, TermBatch
from kd_lightning.models import Output
from kd_lightning.storage.teacher_store import teacher_key
from kd_lightning.workflows.assembly import build_data
from kd_lightning.workflows.jobs import prepare

TRAIN = torch.arange(0, 900, 3)
SIZE = (32, 32)


@pytest.fixture
def data(tmp_path):
    def make(**arguments):
        module = FolderDataModule(
            name="x", root=str(write_folder(tmp_path / "images") if not
            (tmp_path / "images").exists() else tmp_path / "images"),
            cache_dir=str(tmp_path), image_size=16, padding=2, batch_size=8, **arguments,
        )  # fmt: skip
        module.setup()
        return module

    return make


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_mixture_depends_only_on_index_view_and_seed(kind):
    index, view = torch.randint(0, 900, (500,)), torch.randint(0, 50, (500,))
    together = kind(seed=3).mixture(index, view, TRAIN, SIZE)
    for k in range(0, 500, 50):
        alone = kind(seed=3).mixture(index[k : k + 1], view[k : k + 1], TRAIN, SIZE)
        for one, many in zip(alone, together, strict=True):
            assert (one is None and many is None) or torch.equal(one[0], many[k])
    other = kind(seed=4).mixture(index, view, TRAIN, SIZE)
    assert (other.partner != together.partner).float().mean() > 0.9
    assert (other.ratio != together.ratio).float().mean() > 0.9


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_partners_are_uniform_training_images(kind):
    index, view = torch.arange(3000).repeat(20), torch.arange(20).repeat_interleave(3000)
    partner = kind().mixture(index, view, TRAIN, SIZE).partner
    counts = torch.bincount(partner, minlength=900)
    assert not counts[torch.arange(900) % 3 != 0].any()
    expected = len(index) / len(TRAIN)
    chi_square = float(((counts[TRAIN] - expected) ** 2 / expected).sum())
    assert chi_square < 385  # 299 degrees of freedom: exceeded by chance once in 2,000 times


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_ratios_are_beta_distributed(alpha):
    from scipy.stats import beta, kstest

    index = torch.arange(20_000)
    ratio = Mixup(alpha=alpha).mixture(index, torch.zeros_like(index), TRAIN, SIZE).ratio
    # Rounded to multiples of 1 / 128: compare with exact values within half a step.
    jitter = (torch.rand(len(ratio)) - 0.5) / LEVELS
    distance = kstest((ratio + jitter).clamp(0, 1).numpy(), beta(alpha, alpha).cdf).statistic
    assert distance < (0.02 if alpha >= 1 else 0.1)
    assert float(ratio.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(ratio.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.03)


def test_probability_is_the_share_of_mixed_views():
    index = torch.arange(20_000)
    for kind in (Mixup, CutMix):
        mixing = kind(probability=0.3, alpha=4.0)
        ratio = mixing.mixture(index, torch.ones_like(index), TRAIN, SIZE).ratio
        assert float((ratio < 1).float().mean()) == pytest.approx(0.3, abs=0.02)


def test_ratios_of_mixed_views_do_not_depend_on_the_probability():
    index = torch.arange(20_000)
    ratio = Mixup(probability=0.3).mixture(index, torch.ones_like(index), TRAIN, SIZE).ratio
    mixed = ratio[ratio < 1]
    assert float(mixed.mean()) == pytest.approx(0.5, abs=0.02)
    assert float(mixed.var()) == pytest.approx(1 / 12, rel=0.05)


@pytest.mark.parametrize("kind", [Mixup, CutMix])
def test_plain_views_are_not_mixed(kind):
    index = torch.arange(50)
    mixture = kind().mixture(index, torch.full_like(index, PLAIN), TRAIN, SIZE)
    assert (mixture.ratio == 1).all()
    own, other = torch.randint(0, 256, (2, 50, 3, *SIZE), dtype=torch.uint8)
    assert torch.equal(blend(own, other, mixture), own)


def test_mixup_is_the_rounded_average():
    own, other = torch.randint(0, 256, (2, LEVELS + 1, 3, 5, 7), dtype=torch.uint8)
    ratio = torch.arange(LEVELS + 1) / LEVELS
    mixed = blend(own, other, Mixture(torch.zeros(LEVELS + 1), ratio))
    weight = ratio.double().view(-1, 1, 1, 1)
    exact = weight * own.double() + (1 - weight) * other.double()
    assert mixed.dtype == torch.uint8
    assert ((mixed.double() - exact).abs() <= 0.5).all()
    assert torch.equal(mixed[0], other[0])
    assert torch.equal(mixed[-1], own[-1])


def test_cutmix_pastes_the_rectangle_and_reports_its_share():
    index = torch.arange(300)
    mixture = CutMix().mixture(index, torch.zeros_like(index), TRAIN, (20, 30))
    own = torch.zeros(300, 3, 20, 30, dtype=torch.uint8)
    mixed = blend(own, own + 1, mixture)
    for image, ratio, box in zip(mixed, mixture.ratio, mixture.box.tolist(), strict=True):
        expected = np.zeros((20, 30), dtype=np.uint8)
        expected[box[0] : box[2], box[1] : box[3]] = 1
        np.testing.assert_array_equal(image[1].numpy(), expected)
        assert float(ratio) == pytest.approx(1 - expected.mean(), abs=1e-6)
    centres = (mixture.box[:, :2] + mixture.box[:, 2:]).double().mean(dim=0) / 2
    assert centres.tolist() == pytest.approx([10, 15], abs=1.5)


def test_blend_keeps_the_memory_format():
    own = torch.zeros(2, 3, 4, 4, dtype=torch.uint8).to(memory_format=torch.channels_last)
    for box in (None, torch.tensor([[0, 0, 2, 2]] * 2)):
        mixed = blend(own, own, Mixture(torch.zeros(2), torch.full((2,), 0.5), box))
        assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_training_batches_are_mixed_and_others_are_not(data):
    module = data(mixing=Mixup())
    plain = data()
    for batch in (next(iter(module.val_dataloader())), next(iter(module.test_dataloader()))):
        assert "ratio" not in batch
        same = plain.render(batch["shown"].index, batch["shown"].view)
        assert torch.equal(batch["images"], same["images"])
    batch = next(iter(module.train_dataloader()))
    mixture = Mixup().mixture(
        batch["shown"].index, batch["shown"].view, module.splits["train"], (16, 16)
    )
    assert torch.equal(batch["ratio"], mixture.ratio)
    assert torch.equal(batch["labels"], module.labels[batch["shown"].index])
    assert torch.equal(batch["partner_labels"], module.labels[mixture.partner])
    own, other = (
        plain.render(i, batch["shown"].view)["images"]
        for i in (batch["shown"].index, mixture.partner)
    )
    weight = mixture.ratio.view(-1, 1, 1, 1)
    torch.testing.assert_close(
        batch["images"], weight * own + (1 - weight) * other, atol=1 / 255 + 1e-5, rtol=0
    )


def test_partners_are_never_validation_or_test_images(data):
    module = data(mixing=CutMix(probability=1.0))
    for epoch in range(30):
        index = module.splits["train"]
        partner = module.mixing.mixture(
            index, torch.full_like(index, epoch), module.splits["train"], (16, 16)
        ).partner
        assert set(partner.tolist()) <= set(index.tolist())


def test_cross_entropy_of_a_mixture_is_the_weighted_average():
    logits = torch.randn(6, 4)
    labels, partner_labels = torch.randint(0, 4, (2, 6))
    ratio = torch.rand(6)
    batch = TermBatch(labels, labels, labels, 0.0, partner_labels, ratio)
    target = ratio[:, None] * F.one_hot(labels, 4) + (1 - ratio[:, None]) * F.one_hot(
        partner_labels, 4
    )
    for smoothing in (0.0, 0.1):
        loss = CrossEntropy(label_smoothing=smoothing)(Output(logits, {}), None, batch)
        expected = F.cross_entropy(logits, target, label_smoothing=smoothing)
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(
    ("wrong", "name"),
    [({"alpha": 0.0}, "alpha"), ({"probability": 1.5}, "probability"), ({"seed": -1}, "seed"),
     ({"alpha": float("nan")}, "alpha")],
)  # fmt: skip
def test_invalid_settings_are_rejected(wrong, name):
    for kind in (Mixup, CutMix):
        with pytest.raises(ValueError, match=name):
            kind(**wrong)


def built(*overrides):
    config = api.compose("data=digits", *overrides)
    check(config)
    return build_data(config["data"])


def test_group_of_augmentations():
    # Digits are never flipped, unless asked for.
    standard = built("augmentation=standard").augmentation
    assert standard == Augmentation(padding=3, flip=False)
    larger = ("data.padding=8", "data.flip=true")
    assert built("augmentation=standard", *larger).augmentation == Augmentation(8, True)
    assert built("augmentation=cutout", *larger).augmentation == Augmentation(8, True, 8)
    assert built("augmentation=none").augmentation == Augmentation(padding=0, flip=False)
    own = Augmentation(padding=3, flip=False, seed=5)
    for name, mixing in (("mixup", Mixup(seed=5)), ("cutmix", CutMix(seed=5))):
        data = built(f"augmentation={name}", "data.view_seed=5")
        assert (data.augmentation, data.mixing) == (own, mixing)
    strong = built("augmentation=strong", "data.view_seed=5")
    assert strong.augmentation.of == Augmentation(padding=3, flip=False, seed=5)
    assert (strong.augmentation.cutout, strong.augmentation.seed) == (8, 5)
    mild = built("augmentation=mixup", "data.mixing.alpha=0.2", "data.mixing.probability=0.5")
    assert mild.mixing == Mixup(alpha=0.2, probability=0.5)


@pytest.mark.parametrize("name", ["mixup", "strong"])
def test_outputs_on_augmented_views_are_cached(train, name, monkeypatch):
    command = ("method=combined", f"augmentation={name}", "trainer.max_epochs=1")
    first = train(*command)
    assert first.code == 0, first.err
    monkeypatch.setattr(FrozenTeacher, "answer", lambda *_: pytest.fail("the teacher was asked"))
    monkeypatch.setattr(DistillationModule, "ask_teacher", shapes_only(first))
    second = train(*command)
    assert second.code == 0, second.err
    weights = [(done.runs[0] / "student.safetensors").read_bytes() for done in (first, second)]
    assert weights[0] == weights[1]


def shapes_only(done):
    """Targets of the right shapes, for the check of the cache before the training."""
    return lambda self, images: {
        "logit": torch.zeros(len(images), 3), "attention": torch.zeros(len(images), 8 * 8)
    }  # fmt: skip


def test_teacher_does_not_depend_on_the_augmentation_of_the_student():
    keys = []
    for overrides in (
        (),
        ("augmentation=mixup",),
        ("augmentation=none",),
        ("teacher.mixing={_target_: kd_lightning.data.Mixup}",),
    ):
        job = prepare(api.compose("data=digits", "method=logit", *TINY, *overrides))
        keys.append(teacher_key(job.plan.teachers[0], job.data.fingerprint()))
    assert keys[0] == keys[1] == keys[2] != keys[3]
