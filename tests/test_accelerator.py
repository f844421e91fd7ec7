"""Training on an emulated accelerator; see `emulated_device`."""

import shutil

import pytest
import torch
import torchmetrics
from conftest import TINY, write_folder
from emulated_accelerator import CountSteps, install
from emulated_device import DEVICE, GARBAGE, EmulatedDevice
from lightning.pytorch import Callback
from packaging.version import Version
from torch import distributed

from kd_lightning import api
from kd_lightning.data import loading
from kd_lightning.data import module as data_module
from kd_lightning.transfer import ToHost, to_device
from kd_lightning.workflows import student

pytestmark = pytest.mark.filterwarnings("ignore:.*to a meta parameter in the current model")

STEPS = 10  # per training: two epochs of 33 images, batch size 8
EVERY = 5  # log_every_n_steps
# torchmetrics 1.8 copies constants to the device, asynchronously unless its type is "mps".
COPIES_CONSTANTS = Version(torchmetrics.__version__) < Version("1.9")
BETWEEN = 46 if COPIES_CONSTANTS else 42  # synchronisations at the ends of both epochs

COMBINED = ("method=combined",)
# With BatchNorm, whose statistics are re-estimated at the end.
RESNET = (
    "method=none", "update_bn=true", "pictures=true",
    "student.model={_target_: kd_lightning.models.CifarResNet, depth: 8, num_classes: 3}",
)  # fmt: skip


def run(root, folder, accelerator, *overrides, callbacks=(), goes_on=False):
    """Run the tiny job, from the beginning unless `goes_on`; returns the bytes of its student.

    Teachers and their cached outputs stay in `root`, where a second job finds them.
    """
    if not goes_on:
        shutil.rmtree(root / "run", ignore_errors=True)
    config = api.compose(
        "data=folder", f"data.root={folder}", "data.image_size=16", "data.padding=2",
        "data.batch_size=8", "data.eval_batch_size=4", f"output_dir={root / 'outputs'}",
        f"data_dir={root / 'data'}", *TINY, f"trainer.accelerator={accelerator}",
        "trainer.precision=32-true",
        "trainer.memory_format=channels_last", f"trainer.log_every_n_steps={EVERY}", *overrides,
    )  # fmt: skip
    metrics = student.run(config, root / "run", callbacks=callbacks)
    assert metrics["status"] == "finished"
    return (root / "run" / "student.safetensors").read_bytes()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """36 training and 12 test images."""
    return write_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, images):
    """The bytes of the student of a job on the CPU."""
    known = {}

    def student_of(*overrides):
        if overrides not in known:
            root = tmp_path_factory.mktemp("cpu")
            known[overrides] = root, run(root, images, "cpu", *overrides, "pictures=false")
        return known[overrides][1]

    student_of.known = known
    return student_of


@pytest.fixture
def trained(tmp_path, on_cpu):
    """The folder of a test, with the teacher of the combined job but none of its outputs.

    The first test below compares a teacher that is trained on the device.
    """
    on_cpu(*COMBINED)
    teachers = on_cpu.known[COMBINED][0] / "outputs" / "teachers"
    without = shutil.ignore_patterns("remembered")
    shutil.copytree(teachers, tmp_path / "outputs" / "teachers", ignore=without)
    return tmp_path


@pytest.fixture
def device(request, monkeypatch):
    """The emulated device, active; `indirect` says with which settings."""
    emulated = EmulatedDevice(**getattr(request, "param", {}))
    install(monkeypatch, emulated)
    with emulated:
        yield emulated


def needless_waits(device):
    """Description of unnecessary synchronisations in training steps; empty if none.

    The first step is left out: the teacher is brought there and looked at. In a logged step the
    losses are looked at before they change the weights (`StopWhenDiverged`).
    """
    lines = []
    for step, found in sorted(device.waits_by_step().items()):
        looks = [wait for wait in found if "callbacks/divergence.py" in wait.where]
        allowed = looks[:1] if step % EVERY == 0 else []
        lines += [
            f"step {step}, {wait.what}: {wait.where}"
            for wait in found
            if step > 0 and wait not in allowed
        ]
    return "\n".join(lines)


@pytest.mark.parametrize("job", [COMBINED, RESNET], ids=["combined", "batchnorm"])
def test_training_on_a_device_gives_the_cpu_student(tmp_path, images, on_cpu, device, job):
    expected = on_cpu(*job)
    for outputs in ("absent", "stored", "half lost") if job == COMBINED else ("not needed",):
        if outputs == "half lost":
            for file in tmp_path.glob("outputs/teachers/remembered/*/view-*.rows"):
                content = file.read_bytes()
                file.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))
        device.waits.clear()
        device.background.clear()
        found = run(tmp_path, images, "emulated", *job, callbacks=[CountSteps(device)])
        assert found == expected, f"another student where the teacher's outputs are {outputs}"
        assert not (places := needless_waits(device)), (
            f"where the teacher's outputs are {outputs}, the host waits for the device:\n{places}"
        )
        copied = device.background["to host"]
        if outputs == "absent":  # the targets of two terms, in every step
            assert copied >= 2 * STEPS
        elif outputs == "stored":  # curves only
            assert copied <= STEPS
        # Validation, checks, history, checkpoints; nothing for a batch of the validation.
        between = [f"{w.what}: {w.where}" for w in device.waits if w.during == "between"]
        assert len(between) <= BETWEEN, "between the epochs' steps:\n" + "\n".join(between)


def test_margins_of_a_teacher_do_not_wait(tmp_path, images, device):
    job = (
        "method=ofd", "+method.terms.ofd.student_layers=[stage1]",
        "+method.terms.ofd.teacher_layers=[layer1.0.bn2]",
        "teacher.model={_target_: kd_lightning.models.CifarResNet, depth: 8, num_classes: 3}",
    )  # fmt: skip
    run(tmp_path, images, "emulated", *job, "pictures=false", callbacks=[CountSteps(device)])
    assert device.background["to host"] >= STEPS  # the teacher has computed
    assert not (places := needless_waits(device)), f"the host waits for the device:\n{places}"


@pytest.mark.skipif(COPIES_CONSTANTS, reason="the emulated device is not of the type mps")
@pytest.mark.parametrize("device", [{"apple": True}], indirect=True)
@pytest.mark.parametrize("job", [COMBINED, RESNET], ids=["combined", "batchnorm"])
def test_no_float64_or_unpinned_copies_on_apple_gpus(tmp_path, images, on_cpu, device, job):
    for _ in range(2 if job == COMBINED else 1):
        assert run(tmp_path, images, "emulated", *job) == on_cpu(*job)
    assert not device.background


class Fail(Callback):
    """Interrupts a training in its second epoch."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            raise InterruptedError("a test")


def test_resume_on_a_device_gives_the_same_student(trained, images, on_cpu, device):
    with pytest.raises(InterruptedError):
        run(trained, images, "emulated", *COMBINED, callbacks=[Fail()])
    assert (trained / "run" / "checkpoints" / "last.ckpt").exists()
    found = run(trained, images, "emulated", *COMBINED, goes_on=True)
    assert found == on_cpu(*COMBINED)


# --- mistakes are detected ------------------------------------------------------------------------


def test_storing_outputs_before_they_arrive_is_detected(
    trained, images, on_cpu, device, monkeypatch
):
    with monkeypatch.context() as broken:
        broken.setattr(ToHost, "ready", lambda self: True)
        broken.setattr(ToHost, "wait", lambda self: self._values.cpu())
        run(trained, images, "emulated", *COMBINED)
    assert run(trained, images, "emulated", *COMBINED) != on_cpu(*COMBINED)


def test_synchronisation_is_reported_with_its_place(tmp_path, images, device, monkeypatch):
    monkeypatch.setattr(data_module, "to_device", lambda values, there: values.to(there))
    monkeypatch.setattr(loading, "AHEAD", 1)  # render in every step
    job = (*RESNET, "pictures=false")
    run(tmp_path, images, "emulated", *job, callbacks=[CountSteps(device)])
    assert "step 1, a copy to the device: kd_lightning/data/module.py" in needless_waits(device)


def test_asynchronous_copy_arrives_late(device):
    coming = ToHost(torch.arange(3.0, device=DEVICE))
    assert coming._values.tolist() == [GARBAGE] * 3
    assert not coming.ready()
    assert coming.wait().tolist() == [0, 1, 2]
    coming = ToHost(torch.arange(3.0, device=DEVICE))
    assert [coming.ready() for _ in range(3)] == [False, False, True]
    assert len(device.waits) == 1
    source = torch.zeros(3).pin_memory()
    there = source.to(DEVICE, non_blocking=True)
    source += 1
    with pytest.raises(RuntimeError, match="before the copy was done"):
        there.cpu()


def test_mixed_devices_raise(device):
    there, here = to_device(torch.ones(3), DEVICE), torch.ones(3)
    for mix in (
        lambda: there + here,
        lambda: torch.cat([there, here]),
        lambda: torch.stack([there[0], here[0]]),
        lambda: here[there.long()],
    ):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    assert (there * here[0]).tolist() == [1, 1, 1]  # a scalar may be on any device
    with pytest.raises((RuntimeError, TypeError)):
        there.numpy()


@pytest.mark.parametrize(
    ("what", "wait"),
    [
        (lambda t: float(t.sum()), "looked at"),
        (lambda t: bool((t > 0).all()), "looked at"),
        (lambda t: t.tolist(), "to the host"),
        (lambda t: t[t > 0], "a mask"),
        (lambda t: t[torch.tensor([0])], "on the CPU"),
        (lambda t: t.nonzero(), "nonzero"),
        (lambda t: torch.tensor([1.0], device=t.device), "to the device"),
        (lambda t: t.to("cpu"), "to the host"),
    ],
)
def test_synchronisations_are_counted(device, what, wait):
    there = to_device(torch.ones(3), DEVICE)
    assert not device.waits
    what(there)
    assert [wait in found.what for found in device.waits] == [True]


@pytest.mark.parametrize("device", [{"apple": True}], indirect=True)
@pytest.mark.parametrize(
    "what",
    [
        lambda: torch.zeros(2, dtype=torch.float64, device=DEVICE),
        lambda: torch.zeros(2).to(DEVICE).double(),
        lambda: torch.zeros(2, dtype=torch.float64).to(DEVICE),
        lambda: torch.zeros(2).to(DEVICE).mean(dtype=torch.float64),
        lambda: torch.zeros(2).to(DEVICE, non_blocking=True),
        lambda: torch.zeros(2).to(DEVICE).to("cpu", non_blocking=True),
        lambda: torch.zeros(2).pin_memory(),
    ],
)
def test_unsupported_on_apple_gpus_raises(device, what):
    with pytest.raises((RuntimeError, TypeError), match=r"Apple|asynchronous"):
        what()


def test_metrics_are_exchanged_on_the_device(tmp_path, images, device, monkeypatch):
    """NCCL does not exchange tensors on the CPU."""
    exchanged = []

    def gather(value, group=None):
        exchanged.append(value.device)
        return [value]

    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", gather)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        run(tmp_path, images, "emulated", *COMBINED, "trainer.max_epochs=1")
    finally:
        distributed.destroy_process_group()
    assert set(exchanged) == {DEVICE}
