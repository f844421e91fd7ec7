"""The DistillationModule: frozen teacher, checkpoints of the student only, weighted terms."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from kd_lightning.data import FolderDataModule
from kd_lightning.distill.module import DistillationModule
from kd_lightning.distill.optimizers import build_optimizer
from kd_lightning.distill.teacher import FrozenTeacher, Normalization
from kd_lightning.engine.callbacks.divergence import StopWhenDiverged
from kd_lightning.errors import InputError, RunError
from kd_lightning.models import CifarResNet

HALF = Normalization((0.5,) * 3, (0.5,) * 3)
STUDENT = {
    "_target_": "kd_lightning.models.ConvNet",
    "channels": [4, 8],
    "hidden": 8,
    "num_classes": 3,
    "image_size": 16,
}
CROSS_ENTROPY = {"_target_": "kd_lightning.losses.CrossEntropy", "weight": 0.5}
LOGIT = {"_target_": "kd_lightning.losses.Logit", "weight": 0.25, "temperature": 3.0}
ATTENTION = {
    "_target_": "kd_lightning.losses.Attention",
    "weight": 10.0,
    "student_layers": ["stage1", "stage2"],
    "teacher_layers": ["layer1", "layer2"],
}
COMBINED = {"cross_entropy": CROSS_ENTROPY, "logit": LOGIT, "attention": ATTENTION}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9, "nesterov": True}
ONE_CYCLE = {"_target_": "kd_lightning.schedules.one_cycle", "warmup_fraction": 0.2}
COSINE = {"_target_": "kd_lightning.schedules.cosine", "warmup_fraction": 0.2}


def frozen(expects=HALF):
    torch.manual_seed(1)
    return FrozenTeacher(CifarResNet(8, num_classes=3), expects=expects, given=HALF)


def make_module(teacher=None, terms=COMBINED, **settings):
    seed_everything(0, verbose=False)
    settings = {"student": STUDENT, "optimizer": SGD, "scheduler": COSINE, **settings}
    return DistillationModule(
        terms=terms, num_classes=3, image_size=16, teacher=teacher, **settings
    )


def make_data(folder):
    return FolderDataModule(str(folder), name="folder", batch_size=8, image_size=16, padding=2)


def make_trainer(path, epochs=2, **settings):
    return Trainer(
        default_root_dir=path,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **settings},
    )


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_teacher_is_unchanged_after_training(folder, tmp_path):
    teacher = frozen()
    module = make_module(teacher)
    before, student = snapshot(teacher.model), snapshot(module.student)
    assert any("running_mean" in name for name in before)
    module.train()  # as Lightning does, and as a user might
    make_trainer(tmp_path).fit(module, make_data(folder))
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(part.training for part in teacher.model.modules())
    after = module.student.state_dict()
    assert all(not torch.equal(after[name], value) for name, value in student.items())


def test_optimised_teacher_copy_is_unchanged_after_training(folder, tmp_path):
    teacher = frozen()
    module = make_module(teacher)
    teacher.prepare(torch.device("cpu"), module.memory_format, None)
    teacher(torch.randn(8, 3, 16, 16))
    running = teacher._reader.model
    assert running is not teacher.model
    before = snapshot(running)
    make_trainer(tmp_path).fit(module, make_data(folder))
    assert teacher._reader.model is running
    for name, value in running.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_teacher_is_neither_optimised_nor_saved_nor_a_submodule(folder, tmp_path):
    teacher = frozen()
    module = make_module(teacher)
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.fit(module, make_data(folder))
    path = tmp_path / "student.ckpt"
    trainer.save_checkpoint(path)
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in module.student.parameters()}
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert {name.split(".")[0] for name in saved} == {"student"}
    assert not any(p.requires_grad for p in teacher.model.parameters())


def test_checkpoint_loads_tests_and_resumes_with_weights_only(folder, tmp_path):
    data = make_data(folder)
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.fit(make_module(frozen()), data)
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    loaded = DistillationModule.load_from_checkpoint(path, teacher=frozen(), weights_only=True)
    make_trainer(tmp_path).test(loaded, data, ckpt_path=path, verbose=False, weights_only=True)
    resumed = make_trainer(tmp_path, epochs=2)
    resumed.fit(make_module(frozen()), data, ckpt_path=path, weights_only=True)
    assert resumed.current_epoch == 2


@pytest.mark.parametrize("part", ["student", "optimizer", "terms"])
def test_untrusted_lightning_checkpoint_cannot_name_code(folder, tmp_path, part):
    trainer = make_trainer(tmp_path, epochs=1)
    trainer.fit(make_module(frozen()), make_data(folder))
    path = tmp_path / "one.ckpt"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    evil = {"_target_": "os.mkdir", "path": str(tmp_path / "made"), "weight": 1.0}
    content["hyper_parameters"][part] = {"logit": evil} if part == "terms" else evil
    torch.save(content, path)
    for kwargs in ({}, {"weights_only": False}, {"trust": ["numpy"]}):
        with pytest.raises(InputError, match=r"hyper_parameters\._target_=os\.mkdir .* rejected"):
            DistillationModule.load_from_checkpoint(path, teacher=frozen(), **kwargs)
    for key in ("hparams", "module_arguments"):  # Lightning takes these, too
        torch.save({**content, "hyper_parameters": {}, key: {"student": evil}}, path)
        with pytest.raises(InputError, match=rf"{key}\._target_=os\.mkdir .* rejected"):
            DistillationModule.load_from_checkpoint(path, teacher=frozen())
    with pytest.raises(InputError, match="hparams_file is not supported"):
        DistillationModule.load_from_checkpoint(path, hparams_file=tmp_path / "other.yaml")
    assert not (tmp_path / "made").exists()

    class Bomb:
        def __reduce__(self):
            return (print, ("the checkpoint ran code",))

    torch.save({**content, "bomb": Bomb()}, path)
    with pytest.raises(pickle.UnpicklingError):
        DistillationModule.load_from_checkpoint(path, teacher=frozen(), weights_only=False)


def test_loss_is_the_weighted_sum_of_its_terms(folder):
    data = make_data(folder)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    module = make_module(frozen())
    losses, logits = module.losses(batch)
    assert list(losses) == ["cross_entropy", "logit", "attention"]
    assert all(loss.dtype == torch.float32 and loss.ndim == 0 for loss in losses.values())
    assert logits.shape == (8, 3)
    teacher_logits = frozen()(batch["images"]).clone()
    from kd_lightning.losses.logit import soft_target_loss

    torch.testing.assert_close(losses["logit"], soft_target_loss(logits, teacher_logits, 3.0))


def test_without_a_teacher_it_is_supervised_training(folder, tmp_path):
    module = make_module(terms={"cross_entropy": CROSS_ENTROPY})
    make_trainer(tmp_path).fit(module, make_data(folder))


def test_missing_teacher_is_reported():
    with pytest.raises(InputError, match="teacher"):
        make_module(teacher=None)


def test_teacher_may_have_its_own_normalisation():
    torch.manual_seed(0)
    expects = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    pixels = torch.rand(4, 3, 16, 16)
    own = (pixels - torch.tensor(expects.mean).view(3, 1, 1)) / torch.tensor(expects.std).view(
        3, 1, 1
    )
    teacher = frozen(expects=expects)
    answer = teacher((pixels - 0.5) / 0.5)
    torch.testing.assert_close(answer, teacher.model(own), rtol=1e-4, atol=1e-5)


def test_weights_converted_for_autocast_give_equal_outputs():
    images = torch.randn(4, 3, 16, 16)
    converted = frozen()
    plain = FrozenTeacher(copy.deepcopy(converted.model), expects=HALF, given=HALF)
    converted.prepare(torch.device("cpu"), torch.channels_last, torch.bfloat16)
    plain.prepare(torch.device("cpu"), torch.channels_last, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(converted(images), plain(images))


def test_nonfinite_loss_stops_the_run_and_names_the_term(folder, tmp_path):
    module = make_module(frozen())
    module.terms["logit"].forward = lambda *_: torch.tensor(float("nan"))
    with pytest.raises(RunError, match=r"step 0 \(term: logit\)"):
        make_trainer(tmp_path, callbacks=[StopWhenDiverged()]).fit(module, make_data(folder))


@pytest.mark.parametrize("scheduler", [None, COSINE, ONE_CYCLE])
def test_schedules_end_low_and_peak_at_the_learning_rate(folder, tmp_path, scheduler):
    rates = []

    class Spy(DistillationModule):
        def on_before_optimizer_step(self, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    seed_everything(0, verbose=False)
    module = Spy(STUDENT, {"cross_entropy": CROSS_ENTROPY}, SGD, scheduler, 3, 16)
    make_trainer(tmp_path, epochs=4).fit(module, make_data(folder))
    assert len(rates) == 20
    assert max(rates) == pytest.approx(0.05, rel=0.05)
    if scheduler:
        assert rates[0] < 0.03
        assert rates[-1] < 0.005
    else:
        assert min(rates) == 0.05


def test_adamw_trains_too(folder, tmp_path):
    adamw = {"_target_": "torch.optim.AdamW", "lr": 1e-3}
    module = make_module(frozen(), optimizer=adamw)
    before = snapshot(module.student)
    make_trainer(tmp_path, epochs=1).fit(module, make_data(folder))
    assert not torch.equal(
        module.student.state_dict()["stage1.0.weight"], before["stage1.0.weight"]
    )


@pytest.mark.parametrize(
    ("settings", "precision", "fused"),
    [
        (SGD, "32-true", True),
        (SGD, "bf16-mixed", True),
        (SGD, "16-mixed", None),  # a fused optimizer is incompatible with clipping here
        ({**SGD, "fused": False}, "32-true", False),
        ({**SGD, "foreach": True}, "32-true", None),
        ({"_target_": "torch.optim.Adagrad", "lr": 0.1}, "32-true", None),
    ],
)
def test_optimizer_is_fused_if_supported(settings, precision, fused):
    layer = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(settings, layer.parameters(), precision)
    assert optimizer.param_groups[0]["fused"] == fused
    layer(torch.randn(4, 3)).square().sum().backward()
    before = snapshot(layer)
    optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in snapshot(layer).items())


def test_model_with_wrong_number_of_classes_is_rejected():
    with pytest.raises(InputError, match=r"student.model must return logits .* 3 classes"):
        make_module(terms={"cross_entropy": CROSS_ENTROPY}, student={**STUDENT, "num_classes": 5})


def test_torchvision_student_and_teacher(folder, tmp_path):
    from torchvision.models import resnet18

    teacher = FrozenTeacher(resnet18(num_classes=3), expects=HALF, given=HALF)
    terms = {
        "cross_entropy": CROSS_ENTROPY,
        "attention": {**ATTENTION, "student_layers": ["features.3"], "teacher_layers": ["layer2"]},
    }
    student = {"_target_": "torchvision.models.squeezenet1_1", "num_classes": 3}
    seed_everything(0, verbose=False)
    module = DistillationModule(student, terms, SGD, None, 3, 32, teacher=teacher)
    data = FolderDataModule(str(folder), name="folder", batch_size=8, image_size=32)
    make_trainer(tmp_path, epochs=1).fit(module, data)
