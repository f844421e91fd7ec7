"""The negative control: a cache that is keyed by the image alone."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REPOSITORY

from kd_lightning.distill.module import DistillationModule
from kd_lightning.errors import InputError
from kd_lightning.storage.teacher_cache import TeacherCache


@pytest.fixture
def control(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    yield __import__("image_keyed").KeyByImage()
    sys.modules.pop("image_keyed")


def test_every_view_gets_the_outputs_of_the_first(tmp_path, control):
    cache = TeacherCache.of(tmp_path, {}, 4, {"logits": (3,)})
    module = DistillationModule.__new__(DistillationModule)
    vars(module).update(cache=cache, teacher=SimpleNamespace())
    control.on_fit_start(None, module)
    index, cpu = torch.arange(4), torch.device("cpu")

    def fetch(view, value):
        views = torch.full_like(index, view)
        outputs = {"logits": torch.full((4, 3), value)}
        return cache.fetch(index, views, cpu, lambda: outputs)["logits"]

    with pytest.raises(InputError):  # nothing is known, and view 1 must not be stored as view 0
        fetch(1, 5.0)
    assert fetch(0, 7.0).eq(7).all()
    assert fetch(1, 5.0).eq(7).all()


def test_teacherless_training_is_left_alone(control):
    module = DistillationModule.__new__(DistillationModule)
    vars(module).update(cache=None, teacher=None)
    control.on_fit_start(None, module)
    vars(module).update(teacher=SimpleNamespace())
    with pytest.raises(InputError):
        control.on_fit_start(None, module)
