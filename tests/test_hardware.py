"""Precision and memory format follow what the machine is fast at."""

import pytest
import torch
import torchvision

from kd_lightning.config import hardware
from kd_lightning.config.resolve import resolve_trainer
from kd_lightning.errors import InputError
from kd_lightning.models import CifarResNet, ConvNet, ResNet9


@pytest.fixture
def machine(monkeypatch):
    def pretend(cuda=None, cpu=(), mps=False):
        """`cuda`: None, or whether it has native bfloat16; `cpu`: its capabilities."""

        def bf16(including_emulation=True):
            return including_emulation or bool(cuda)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda is not None)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", bf16)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
        capabilities = dict.fromkeys(cpu, True)
        monkeypatch.setattr(
            torch.cpu,
            "get_capabilities",
            lambda: {"amx_bf16": False, **capabilities},
            raising=False,
        )

    return pretend


@pytest.mark.parametrize(
    ("what", "precision", "memory_format"),
    [
        ({"cuda": True}, "bf16-mixed", torch.channels_last),
        ({"cuda": False}, "16-mixed", torch.channels_last),  # a T4 reports bf16, but emulates it
        ({"cpu": ["avx512_bf16"]}, "bf16-mixed", torch.channels_last),
        ({"cpu": ["amx_bf16"]}, "bf16-mixed", torch.channels_last),
        ({"cpu": ["avx2"]}, "32-true", torch.channels_last),
        ({"mps": True, "cpu": ["avx2"]}, "32-true", torch.contiguous_format),
        ({"mps": True, "cpu": ["avx512_bf16"]}, "32-true", torch.contiguous_format),
    ],
)
def test_choice_of_precision_and_memory_format(machine, what, precision, memory_format):
    machine(**what)
    assert hardware.choose_precision() == precision
    assert hardware.choose_memory_format(precision) == memory_format


@pytest.mark.parametrize("best", [{"cuda": True}, {"cuda": False}, {"mps": True}])
def test_cpu_can_be_selected_on_a_gpu_machine(machine, best):
    machine(**best, cpu=["avx2"])
    assert hardware.choose_precision("cpu") == "32-true"
    # The selected accelerator matters, not the best available one.
    assert hardware.choose_memory_format("32-true", "cpu") == torch.channels_last
    assert hardware.choose_memory_format("32-true", "gpu") == torch.contiguous_format
    trainer = {"accelerator": "cpu", "devices": 1, "precision": "auto", "memory_format": "auto"}
    assert resolve_trainer(trainer, {}).channels_last


@pytest.mark.parametrize("accelerator", ["mps", "tpu", "emulated"])
def test_cpu_capabilities_do_not_affect_other_devices(machine, accelerator):
    machine(cpu=["avx512_bf16", "amx_bf16"])
    assert hardware.choose_precision(accelerator) == "32-true"
    for precision in ("32-true", "bf16-mixed"):
        chosen = hardware.choose_memory_format(precision, accelerator)
        assert chosen == torch.contiguous_format


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("cpu", "cpu", [("32-true", True), ("32-true", True)]),
        ("gpu", "cpu", [("bf16-mixed", True), ("32-true", True)]),
        ("cpu", "gpu", [("32-true", True), ("bf16-mixed", True)]),
    ],
)
def test_student_and_teacher_use_their_own_accelerators(machine, student, teacher, expected):
    """On a machine with a GPU."""
    machine(cuda=True, cpu=["avx2"])
    plans = [resolve_trainer({**AUTO, "accelerator": a}, {}) for a in (student, teacher)]
    assert [(plan.precision, plan.channels_last) for plan in plans] == expected


def test_float16_autocast_falls_back_to_bfloat16_on_a_cpu(machine):
    machine(cuda=True)
    for accelerator in ("cpu", "gpu"):
        trainer = {**AUTO, "accelerator": accelerator, "precision": "16-mixed"}
        expected = "bf16-mixed" if accelerator == "cpu" else "16-mixed"
        assert resolve_trainer(trainer, {}).precision == expected


AUTO = {"accelerator": "auto", "devices": 1, "precision": "auto", "memory_format": "auto"}
GROUPED = {
    "mobilenet_v3_small": True,
    "mobilenet_v2": True,
    "shufflenet_v2_x0_5": True,
    "efficientnet_b0": True,
    "mnasnet0_5": True,
    "convnext_tiny": True,
    "regnet_x_400mf": True,
    "resnext50_32x4d": True,
    "resnet18": False,
    "squeezenet1_1": False,
    "vgg11_bn": False,
    "densenet121": False,
}


@pytest.mark.parametrize(("name", "grouped"), GROUPED.items())
def test_grouped_convolutions_are_detected(name, grouped):
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # it computes its widths
        assert hardware.has_groups(getattr(torchvision.models, name)()) == grouped


@pytest.mark.parametrize(
    ("student", "what", "trainer", "precision"),
    [
        ("mobilenet_v3_small", {"cpu": ["avx512_bf16"]}, {}, "32-true"),
        ("squeezenet1_1", {"cpu": ["avx512_bf16"]}, {}, "bf16-mixed"),
        ("mobilenet_v3_small", {"cpu": ["avx2"]}, {}, "32-true"),
        ("mobilenet_v3_small", {"cuda": True}, {}, "bf16-mixed"),
        ("mobilenet_v3_small", {"cuda": False}, {}, "16-mixed"),
        ("mobilenet_v3_small", {"cuda": True, "cpu": ["amx_bf16"]}, {"accelerator": "cpu"},
         "32-true"),
        ("mobilenet_v3_small", {"cpu": ["amx_bf16"]}, {"precision": "bf16-mixed"}, "bf16-mixed"),
    ],
)  # fmt: skip
def test_grouped_convolutions_use_float32_on_a_cpu(machine, student, what, trainer, precision):
    machine(**what)
    node = {"_target_": f"torchvision.models.{student}", "num_classes": 3}
    state = torch.get_rng_state()
    assert resolve_trainer({**AUTO, **trainer}, node).precision == precision
    assert torch.equal(torch.get_rng_state(), state)  # inspecting a model draws no random numbers


def test_precision_of_every_configured_network(machine):
    machine(cpu=["avx512_bf16"])
    for model in (ConvNet([4], 8), ResNet9(), CifarResNet(depth=20)):
        assert hardware.choose_precision("auto", model) == "bf16-mixed"


@pytest.mark.parametrize(
    ("accelerator", "devices", "part"),
    [
        ("gpu", 1, "no GPU"),
        ("cuda", 1, "no CUDA GPU"),
        ("mps", 1, "no Apple GPU"),
        ("tpu", 1, "no TPU"),
        ("quantum", 1, "one of auto, gpu"),
        (5, 1, "one of auto, gpu"),
    ],
)
def test_unavailable_accelerator_is_rejected(machine, accelerator, devices, part):
    machine()
    with pytest.raises(InputError, match=part):
        hardware.check_accelerator(accelerator, devices, "trainer")


def test_too_many_devices_are_rejected(machine, monkeypatch):
    machine(cuda=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    hardware.check_accelerator("gpu", 2, "trainer")
    hardware.check_accelerator("gpu", "auto", "trainer")
    with pytest.raises(InputError, match="devices=4"):
        hardware.check_accelerator("gpu", 4, "trainer")
    hardware.check_accelerator("cpu", 4, "trainer")  # processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_reported_before_loading_data(train, monkeypatch):
    from kd_lightning.data.module import ImageDataModule

    monkeypatch.setattr(ImageDataModule, "setup", lambda *_: pytest.fail("data were loaded"))
    done = train("trainer=gpu", "trainer.accelerator=gpu")
    assert done.code == 2
    assert "finds no GPU here" in done.err
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize(("override", "expected"), [("32-true", "32-true"), ("auto", None)])
def test_precision_can_be_overridden(train, override, expected):
    metrics = train("method=none", f"trainer.precision={override}", "trainer.max_epochs=1").metrics
    assert metrics["precision"] == (expected or hardware.choose_precision())


def test_kernel_options_change_nothing_on_a_cpu(train, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    command = ("method=combined", "trainer.max_epochs=1")
    (plain,) = train(*command).runs
    for override in ("deterministic=true", "deterministic=warn", "benchmark=true"):
        try:
            switched = train(*command, f"+trainer.{override}")
            assert switched.code == 0, switched.err
            used = torch.are_deterministic_algorithms_enabled()
        finally:
            torch.use_deterministic_algorithms(False)
        assert used == override.startswith("deterministic")
        # No output except Lightning's warning about speed.
        assert len(switched.err.splitlines()) == 2, switched.err
        weights = [(run / "student.safetensors").read_bytes() for run in (plain, *switched.runs)]
        assert weights[0] == weights[1]


def test_keep_freed_memory_without_glibc(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(hardware.ctypes, "CDLL", missing)
    hardware.keep_freed_memory()
