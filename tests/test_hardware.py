"""Precision and memory format follow what the machine is fast at."""

import pytest
import torch

from kd_lightning import hardware


@pytest.fixture
def machine(monkeypatch):
    def pretend(cuda=None, cpu=(), mps=False):
        """`cuda`: None, or whether it has bfloat16 of its own; `cpu`: its capabilities."""

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
        ({"cuda": False}, "16-mixed", torch.channels_last),  # a T4 claims bf16, and emulates it
        ({"cpu": ["avx512_bf16"]}, "bf16-mixed", torch.channels_last),
        ({"cpu": ["amx_bf16"]}, "bf16-mixed", torch.channels_last),
        ({"cpu": ["avx2"]}, "32-true", torch.channels_last),
        ({"mps": True, "cpu": ["avx2"]}, "32-true", torch.contiguous_format),
    ],
)
def test_what_is_chosen(machine, what, precision, memory_format):
    machine(**what)
    assert hardware.choose_precision() == precision
    assert hardware.choose_memory_format(precision) == memory_format


def test_the_cpu_can_be_asked_for_on_a_machine_with_a_gpu(machine):
    machine(cuda=True, cpu=["avx2"])
    assert hardware.choose_precision("cpu") == "32-true"


@pytest.mark.parametrize(("override", "expected"), [("32-true", "32-true"), ("auto", None)])
def test_one_key_overrides_it(train, override, expected):
    metrics = train("method=none", f"trainer.precision={override}", "trainer.max_epochs=1").metrics
    assert metrics["precision"] == (expected or hardware.choose_precision())


def test_another_c_library_is_left_alone(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(hardware.ctypes, "CDLL", missing)
    hardware.keep_freed_memory()
