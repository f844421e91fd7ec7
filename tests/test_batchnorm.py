"""BatchNorm: lagging statistics are detected and re-estimated; small batches are handled."""

import copy

import pytest
import torch
from conftest import trainer_plan
from lightning.pytorch import Callback, seed_everything
from test_distillation import CROSS_ENTROPY, SGD, make_data, make_module
from test_resume import Ask, configuration, left
from test_tensorboard import CPU
from torch import nn

from kd_lightning.data.loading import ViewSampler
from kd_lightning.distill.batchnorm import Lag, batch_statistics, min_batch_size, update_bn
from kd_lightning.engine.callbacks.pictures import Pictures
from kd_lightning.engine.fitting import fit, test
from kd_lightning.engine.trainer import build_trainer
from kd_lightning.errors import InputError, Stopped
from kd_lightning.models.features import layer_shapes
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.weights import load_weights
from kd_lightning.workflows import student as training

test.__test__ = False


class Lagging(nn.Sequential):
    """Running statistics are initially wrong, and the momentum is small."""

    def __init__(self, num_classes=3, momentum=1e-4, dropout=0.1):
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=momentum), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8, momentum=momentum),
            nn.Dropout(dropout), nn.Linear(8, num_classes),
        )  # fmt: skip
        self[5].running_mean.fill_(5.0)


STUDENT = {"_target_": "test_batchnorm.Lagging", "num_classes": 3}


def trained(folder, path, update=False, epochs=6, **student):
    directory = RunDirectory(path)
    trainer = build_trainer(trainer_plan({**CPU, "max_epochs": epochs}), path, "x", pictures=False)
    terms = {"cross_entropy": CROSS_ENTROPY}
    module = make_module(terms=terms, student={**STUDENT, **student}, optimizer={**SGD, "lr": 0.2})
    data = make_data(folder)
    results = fit(trainer, module, data, directory, "student", update_bn=update)
    results |= test(trainer, module, data, directory, results, update)
    return results, module


def test_lagging_statistics_are_detected_and_reestimated(folder, tmp_path, caplog):
    results, module = trained(folder, tmp_path / "lagging")
    assert results["val_accuracy"] < 0.7
    assert results["val_accuracy_batch_statistics"] > 0.9
    assert "re-estimate them with update_bn=true" in caplog.text
    caplog.clear()
    updated, again = trained(folder, tmp_path / "updated", update=True)
    assert updated["val_accuracy"] == updated["best_val_accuracy"] > 0.9
    assert updated["test_accuracy"] > 0.9
    assert updated["best_epoch"] == 6
    assert "running statistics" not in caplog.text
    # Nothing else has changed, and the file has the new statistics.
    for (name, one), two in zip(
        module.student.named_parameters(), again.student.parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    loaded = Lagging()
    load_weights(loaded, tmp_path / "updated" / "student.safetensors")
    assert torch.equal(loaded[1].running_mean, again.student[1].running_mean)
    assert not torch.equal(loaded[1].running_mean, module.student[1].running_mean)
    assert loaded[1].momentum == 1e-4


def test_no_warning_if_statistics_do_not_lag(folder, tmp_path, caplog):
    results, _ = trained(folder, tmp_path, momentum=0.1)
    assert results["val_accuracy"] > 0.9
    assert "running statistics" not in caplog.text


def test_best_epoch_is_tested_with_its_own_statistics(folder, tmp_path):
    directory, data = RunDirectory(tmp_path), make_data(folder)
    trainer = build_trainer(trainer_plan({**CPU, "max_epochs": 4}), tmp_path, "x", pictures=False)
    terms = {"cross_entropy": CROSS_ENTROPY}
    module = make_module(terms=terms, student=STUDENT, optimizer={**SGD, "lr": 0.2})
    results = fit(trainer, module, data, directory, "student", update_bn=True)
    last = copy.deepcopy(module.state_dict())
    tested = test(trainer, module, data, directory, {**results, "best_epoch": 3}, True)
    assert tested["test_accuracy_at_best"] > 0.5  # the stored weights are at chance level
    assert all(torch.equal(value, last[name]) for name, value in module.state_dict().items())


class Spoiled(Callback):
    """The last step of an epoch makes a student that always predicts the same class."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.is_last_batch:
            for weight in module.student.parameters():
                weight.data.zero_()


def test_best_weights_within_the_last_epoch_are_tested(folder, tmp_path, monkeypatch):
    """And then the last ones, of which the figures are drawn."""
    drawn = []
    monkeypatch.setattr(Pictures, "on_train_start", lambda *_: None)
    monkeypatch.setattr(
        Pictures,
        "on_test_epoch_end",
        lambda _, trainer, module: drawn.append(module.confusion.compute().clone()),
    )
    directory, data = RunDirectory(tmp_path), make_data(folder).variant(batch_size=4)
    plan = trainer_plan({**CPU, "max_epochs": 1, "val_check_interval": 4})
    trainer = build_trainer(plan, tmp_path, "x", callbacks=[Spoiled()])
    module = make_module(terms={"cross_entropy": CROSS_ENTROPY}, optimizer={**SGD, "lr": 0.2})
    results = fit(trainer, module, data, directory, "student")
    tested = test(trainer, module, data, directory, results, False)
    assert results["best_val_accuracy"] > results["val_accuracy"]
    assert tested["test_accuracy_at_best"] > tested["test_accuracy"]
    (counts,) = drawn
    assert float(counts.diagonal().sum() / counts.sum()) == pytest.approx(tested["test_accuracy"])


def test_update_bn_is_a_cumulative_average_without_dropout():
    seed_everything(0, verbose=False)
    model, reference = Lagging(dropout=0.5), Lagging(dropout=0.0)
    reference.load_state_dict(model.state_dict())
    batches = [torch.randn(6, 3, 8, 8) for _ in range(3)]
    update_bn(model, batches)
    torch.optim.swa_utils.update_bn(batches, reference)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, reference.state_dict()[name], msg=name)
    assert all(module.training for module in model.modules())


def test_frozen_and_unused_layers_keep_their_statistics():
    model = nn.ModuleDict(
        {"used": Lagging(), "frozen": nn.BatchNorm2d(3), "aux": nn.BatchNorm2d(3)}
    )
    model["frozen"].eval()
    for name in ("frozen", "aux"):
        model[name].running_mean.fill_(7.0)
    model.forward = lambda images: model["used"](model["frozen"](images))
    update_bn(model, [torch.randn(6, 3, 8, 8)])
    assert model["frozen"].running_mean.tolist() == model["aux"].running_mean.tolist() == [7.0] * 3
    assert not model["frozen"].training
    assert model["used"][1].num_batches_tracked == 1


def test_batch_statistics_context_has_no_side_effects():
    model = Lagging()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad(), batch_statistics(model) as layers:
        assert not model[6].training  # dropout
        model(torch.randn(6, 3, 8, 8))
        assert set(layers) == {"1", "5"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("evaluation", "batch", "significant"),
    [
        (50, 94, True),
        (90, 94, False),  # fewer than 5 points
        (85, 94, False),  # within 3 standard errors
        (94, 50, False),
    ],
)
def test_lag_must_be_large_and_significant(evaluation, batch, significant):
    right = torch.arange(100)
    assert Lag(right < evaluation, right < batch, 10).significant == significant


def test_resume_with_update_bn_is_bit_identical(tmp_path):
    config = configuration(tmp_path, "method=none", "trainer.max_epochs=2")
    config = {**config, "update_bn": True}
    training.run(copy.deepcopy(config), tmp_path / "whole")
    for step in (7, 10):
        with pytest.raises(Stopped):
            training.run(copy.deepcopy(config), tmp_path / "run", callbacks=[Ask(step)])
    training.run(copy.deepcopy(config), tmp_path / "run")
    assert left(tmp_path / "run") == left(tmp_path / "whole")
    training.run({**config, "update_bn": False}, tmp_path / "without")
    assert left(tmp_path / "without")[0] != left(tmp_path / "whole")[0]


@pytest.mark.parametrize(
    ("images", "batch", "smallest", "sizes"),
    [
        (9, 4, 1, [4, 4, 1]),
        (9, 4, 2, [4, 5]),
        (10, 4, 2, [4, 4, 2]),
        (8, 4, 2, [4, 4]),
        (4, 4, 2, [4]),
        (5, 4, 2, [5]),
        (11, 4, 4, [4, 7]),
    ],
)
def test_small_last_batch_is_merged_into_the_previous_one(images, batch, smallest, sizes):
    sampler = ViewSampler(torch.arange(images), batch, shuffle=True, smallest=smallest)
    batches = [part["shown"].index for part in sampler]
    assert [len(part) for part in batches] == sizes
    assert len(sampler) == len(sizes)
    assert torch.cat(batches).sort().values.tolist() == list(range(images))


@pytest.mark.parametrize("images", range(8, 17))
def test_every_process_has_enough_images_and_the_right_weight(images):
    parts = [
        list(ViewSampler(torch.arange(images), 4, True, rank=rank, world=2, smallest=4))
        for rank in (0, 1)
    ]
    for one, two in zip(*parts, strict=True):
        total = len(one["shown"].index) + len(two["shown"].index)
        assert min(len(one["shown"].index), len(two["shown"].index)) >= 2
        for part in (one, two):
            assert float(part["loss_weight"]) == pytest.approx(2 * len(part["shown"].index) / total)


def needed(model, size=16):
    return min_batch_size(model, layer_shapes(model, size))


def test_two_images_needed_if_a_layer_sees_one_value_per_image():
    from torchvision.models import resnet18

    assert needed(Lagging()) == 2
    assert needed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))) == 1
    assert needed(nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4))) == 2
    assert needed(nn.Sequential(nn.Conv2d(3, 4, 16), nn.BatchNorm2d(4).eval())) == 1
    assert needed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))) == 1
    assert needed(resnet18(num_classes=3), size=32) == 2  # its last stage is 1x1
    assert needed(resnet18(num_classes=3), size=64) == 1


@pytest.mark.parametrize("batch_size", [4, 31, 32])
def test_batchnorm_student_trains_with_any_last_batch(folder, tmp_path, batch_size):
    """33 images: batches of 4 and 32 leave a last batch of 1."""
    data = make_data(folder).variant(batch_size=batch_size)
    trainer = build_trainer(trainer_plan({**CPU, "max_epochs": 1}), tmp_path, "x", pictures=False)
    module = make_module(terms={"cross_entropy": CROSS_ENTROPY}, student=STUDENT)
    fit(trainer, module, data, RunDirectory(tmp_path), "student")
    assert trainer.global_step == {4: 8, 31: 2, 32: 1}[batch_size]


def test_batch_size_of_one_is_rejected(folder, tmp_path):
    data = make_data(folder).variant(batch_size=1)
    trainer = build_trainer(trainer_plan({**CPU, "max_epochs": 1}), tmp_path, "x", pictures=False)
    module = make_module(terms={"cross_entropy": CROSS_ENTROPY}, student=STUDENT)
    with pytest.raises(InputError, match=r"data\.batch_size=1 is too small: .* at least 2"):
        fit(trainer, module, data, RunDirectory(tmp_path), "student")
