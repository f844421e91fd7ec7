"""The cache key of views covers everything that renders them."""

import importlib
import json
import sys

import pytest
from conftest import FOLDER, TINY, write_folder

from kd_lightning import api
from kd_lightning.distill.caching import _views_key
from kd_lightning.storage.teacher_store import teacher_key
from kd_lightning.workflows import student

CODE = """
import json
from pathlib import Path
import torch
from kd_lightning.data import Augmentation, FolderDataModule, Mixup
from kd_lightning.data.views import PLAIN

class Dark(Augmentation):
    def render(self, images, index, view):
        shift = (view != PLAIN).to(torch.uint8)[:, None, None, None]
        return super().render(images, index, view) >> shift

class Bright(Augmentation):
    def render(self, images, index, view):
        change = (view != PLAIN)[:, None, None, None] * torch.tensor(255, dtype=torch.uint8)
        return super().render(images, index, view) ^ change

class Amount(Augmentation):
    def __init__(self, amount):
        super().__init__()
        object.__setattr__(self, "amount", amount)

class FromFile(Augmentation):
    def __init__(self, file):
        super().__init__()
        object.__setattr__(self, "amount", json.loads(Path(file).read_text()))

class Own(Mixup):
    pass

class Data(FolderDataModule):
    def __init__(self, amount=1, **settings):
        super().__init__(**settings)
        self.augmentation = Amount(amount)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    (tmp_path / "users_views.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    images = write_folder(tmp_path / "images")

    def prepared(*overrides):
        given = (*FOLDER, *TINY, f"data.root={images}", f"output_dir={tmp_path / 'outputs'}")
        return student.prepare(api.compose(*given, "method=logit", *overrides))

    yield prepared
    sys.modules.pop("users_views", None)


def key(job):
    return json.dumps(_views_key(job.plan, job.data), sort_keys=True)


def views(kind, **arguments):
    node = ", ".join(
        [f"_target_: users_views.{kind}", *(f"{k}: {v}" for k, v in arguments.items())]
    )
    return f"data.augmentation={{{node}}}"


def test_every_class_and_argument_has_its_own_key(job):
    keys = [
        key(job(*overrides))
        for overrides in (
            (),
            (views("Dark"),),
            (views("Bright"),),
            (views("Amount", amount=2),),
            (views("Amount", amount=15),),
            ("data._target_=users_views.Data",),
            ("data._target_=users_views.Data", "+data.amount=15"),
            ("data.mixing={_target_: users_views.Own}",),
            ("data.mixing={_target_: kd_lightning.data.Mixup}",),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert key(job("seed=3", "data.batch_size=9")) == keys[0]
    assert key(job("augmentation=standard", "data.augmentation.padding=2")) == keys[0]


def test_file_of_the_views_is_hashed(job, tmp_path):
    file = tmp_path / "amount.json"
    found = []
    for amount in (2, 3, 2):
        file.write_text(str(amount))
        prepared = job(views("FromFile", file=file))
        found.append((key(prepared), prepared.contents.code))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


def test_code_of_the_teachers_own_views_is_in_its_key(job, tmp_path):
    found = []
    for addition in ("", "\nCHANGED = 1\n", ""):
        (tmp_path / "users_views.py").write_text(CODE + addition)
        sys.modules.pop("users_views", None)
        importlib.invalidate_caches()
        prepared = job("teacher.mixing={_target_: users_views.Own}")
        (plan,) = prepared.plan.teachers
        found.append((teacher_key(plan, "images"), prepared.contents.teacher))
    assert found[0] == found[2]
    assert found[0][0] != found[1][0]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize("wrong", ["data.mixing=mixup", "data.mixing={_target_: builtins.dict}"])
def test_mixing_must_be_an_object_that_mixes(train, wrong):
    done = train("method=none", wrong)
    assert done.code == 2
    assert "mixing" in done.err
