"""Moving average of the weights: what is validated, tested, saved and resumed."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, write_folder
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from safetensors.torch import load_file
from test_resume import Ask

from kd_lightning import api
from kd_lightning.config.naming import config_key
from kd_lightning.engine.callbacks.averaging import AverageWeights
from kd_lightning.errors import InputError, Stopped
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import student

DECAY = 0.8


def configuration(root, *overrides):
    images = root / "images"
    if not images.exists():
        write_folder(images)
    return api.compose(
        *TINY, "method=logit", "data=folder", f"data.root={images}", "data.image_size=16",
        "data.padding=2", "data.batch_size=7", "trainer.max_epochs=3", "pictures=false",
        "trainer.precision=32-true", f"ema={DECAY}", f"data_dir={root / 'data'}",
        f"output_dir={root / 'outputs'}", *overrides,
    )  # fmt: skip


class Track(Callback):
    """Averages the weights of every step in the plain way."""

    def __init__(self):
        self.average, self.last = {}, {}

    def on_train_start(self, trainer, module):
        self.average = {k: v.clone() for k, v in module.student.state_dict().items()}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.last = {k: v.clone() for k, v in module.student.state_dict().items()}
        for name, value in self.last.items():
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * value


RESNET = (
    "student.model={_target_: kd_lightning.models.CifarResNet, depth: 8, num_classes: 3}",
    "method=none",
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    track = Track()
    metrics = student.run(configuration(root), root / "run", callbacks=[track])
    return root, metrics, track


def weights(folder):
    return load_file(folder / "student.safetensors")


def test_saved_student_is_the_average(whole):
    root, metrics, track = whole
    saved = weights(root / "run")
    for name, value in saved.items():
        torch.testing.assert_close(value, track.average[name])
    assert any(not torch.allclose(saved[name], value) for name, value in track.last.items())
    assert config_key(configuration(root)) == metrics["config_key"]
    assert config_key(configuration(root, "ema=null")) != metrics["config_key"]


def test_best_checkpoint_contains_what_was_validated(whole):
    root, metrics, _ = whole
    best = torch.load(root / "run" / "checkpoints" / "best.ckpt", weights_only=True)
    assert metrics["best_val_accuracy"] >= metrics["val_accuracy"]
    module, data = api_module(root, best["state_dict"])
    correct = [
        (module(batch["images"]).argmax(dim=1) == batch["labels"]).float()
        for batch in data.val_dataloader()
    ]
    assert float(torch.cat(correct).mean()) == pytest.approx(metrics["best_val_accuracy"])


def api_module(root, state):
    job = student.prepare(configuration(root))
    job.module.student.load_state_dict(
        {k.removeprefix("student."): v for k, v in state.items() if k.startswith("student.")}
    )
    return job.module.eval(), job.data


def test_resume_is_bit_identical(tmp_path, whole):
    root, metrics, _ = whole
    for step, validation in ((3, False), (5, True), (8, False), (15, True)):
        with pytest.raises(Stopped):
            student.run(configuration(root), tmp_path / "run", callbacks=[Ask(step, validation)])
    again = student.run(configuration(root), tmp_path / "run")
    assert weights(tmp_path / "run").keys() == weights(root / "run").keys()
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (
        root / "run" / "student.safetensors"
    ).read_bytes()
    for key in ("val_accuracy", "test_accuracy", "best_val_accuracy", "test_accuracy_at_best"):
        assert again[key] == metrics[key]


def test_batchnorm_statistics_of_the_average_are_reestimated(tmp_path):
    config = configuration(tmp_path, *RESNET, "trainer.max_epochs=1")
    student.run(config, tmp_path / "run")
    saved = weights(tmp_path / "run")
    name = next(name for name in saved if name.endswith("running_mean"))
    trained = RunDirectory(tmp_path / "run").load_student()[0]
    data = student.prepare(config).data
    index = data.splits["train"]
    images = data.render(index, torch.zeros_like(index))["images"]
    first = next(m for m in trained.modules() if isinstance(m, torch.nn.Conv2d))
    expected = first(images).mean(dim=(0, 2, 3))
    torch.testing.assert_close(saved[name], expected, atol=0.02, rtol=0.1)


@pytest.mark.parametrize("wrong", ["1", "0", "-0.5", "true", "often"])
def test_invalid_decay_is_rejected(tmp_path, wrong):
    with pytest.raises(InputError, match="ema"):
        student.prepare(configuration(tmp_path, f"ema={wrong}"))


def test_shared_weights_are_exchanged_once():
    shared = torch.nn.Linear(2, 2)
    student_ = torch.nn.Sequential(shared, torch.nn.Linear(2, 2))
    student_[1].weight = shared.weight
    module = SimpleNamespace(student=student_)
    average = AverageWeights(0.5)
    fitting = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.FITTING), global_step=1)
    average.on_train_start(fitting, module)
    with torch.no_grad():
        shared.weight += 1
    trained = shared.weight.clone()
    average.on_train_batch_end(fitting, module, None, None, 0)
    average.on_validation_start(fitting, module)
    torch.testing.assert_close(shared.weight, trained - 0.5)
    average.on_train_batch_start(fitting, module, None, 1)
    assert torch.equal(shared.weight, trained)
