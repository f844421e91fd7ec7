"""Training with cached teacher outputs: unchanged students, and which runs share a cache."""

import contextlib
import logging
import shutil
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FOLDER, TINY, write_folder

from kd_lightning import api
from kd_lightning.data import FolderDataModule
from kd_lightning.data.views import PLAIN
from kd_lightning.distill.caching import _term_key, used_views
from kd_lightning.distill.teacher import FrozenTeacher
from kd_lightning.errors import InputError
from kd_lightning.losses import DIST, DKD, MLKD, NKD, HardLabel, Logit
from kd_lightning.models import ConvNet
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_cache import stored
from kd_lightning.storage.teacher_store import teacher_key
from kd_lightning.workflows import student

CPU = torch.device("cpu")


def remembered(tmp_path):
    return {entry.folder.name for entry in stored(tmp_path / "outputs" / "teachers" / "remembered")}


@contextlib.contextmanager
def counting():
    """Number of images that the teacher processed, in training and in evaluation."""
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in (("training", "answer"), ("evaluation", "__call__")):
            original = getattr(FrozenTeacher, name)

            def count(self, images, kind=kind, original=original):
                counts[kind] += len(images)
                return original(self, images)

            patch.setattr(FrozenTeacher, name, count)
        yield counts


@pytest.fixture
def asked():
    with counting() as counts:
        yield counts


SHAPES = 8  # images used to determine output shapes
SMALL = (*FOLDER, *TINY)


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The folder of a distilled student, and what it asked its teacher; its caches are complete."""
    root = tmp_path_factory.mktemp("cached")
    place = f"data.root={write_folder(root / 'images')}", f"output_dir={root / 'outputs'}"
    with counting() as counts:
        found = api.run(*SMALL, *place, "method=combined")
    return Path(found["folder"]), counts


def student_of(folder):
    return (folder / "student.safetensors").read_bytes()


def test_second_training_uses_only_the_cache(train, tmp_path, asked, cached):
    folder, counts = cached
    assert counts == {"training": 2 * 33 + SHAPES, "evaluation": 12}
    shutil.copytree(folder.parents[2] / "teachers", tmp_path / "outputs" / "teachers")
    done = train("method=combined")
    assert done.code == 0, done.err
    assert asked == {"training": SHAPES}
    assert student_of(done.runs[0]) == student_of(folder)
    first = RunDirectory(folder).read_metrics()
    for key in ("agreement", "teacher_test_accuracy"):
        assert done.metrics[key] == first[key]
    assert sorted(name.split("-")[1] for name in remembered(tmp_path)) == [
        "attention", "evaluation", "logit",
    ]  # fmt: skip


def test_float32_cache_is_bit_identical(train, asked):
    """Of vectors, and of maps with several channels."""
    exact = (
        "method=combined", "+method.terms.vid={_target_: kd_lightning.losses.VID, weight: 1}",
        "trainer.precision=32-true", "trainer.max_epochs=1",
    )  # fmt: skip
    students = []
    for stored_as in ("remember.disk_gb=0", "remember.dtype=float32", "remember.dtype=float32"):
        asked.clear()
        done = train(*exact, stored_as)
        assert done.code == 0, done.err
        students.append(student_of(done.runs[0]))
    assert asked == {"training": SHAPES}
    assert students[0] == students[1] == students[2]


@pytest.mark.slow  # needs students that have learned
def test_rounding_does_not_reduce_accuracy(train):
    """Digits, 14 steps per epoch; the two students differ only in float16 targets."""
    command = (
        "method=combined", "data=digits", "student=small", "data.image_size=16",
        "data.padding=2", "optimizer.lr=0.05",
        "trainer.max_epochs=5", "trainer.precision=32-true", "trainer.accelerator=cpu",
        "teacher.model.channels=[16,32]", "teacher.model.hidden=32",
        "teacher.layers=[stage1,stage2]", "teacher.trainer.max_epochs=3",
        "student.model.channels=[16,32]", "student.model.hidden=32",
    )  # fmt: skip
    exact, rounded = (
        train(*command, setting, data=False, tiny=False)
        for setting in ("remember.disk_gb=0", "remember.dtype=float16")
    )
    assert (exact.code, rounded.code) == (0, 0), exact.err + rounded.err
    weights = [(done.runs[0] / "student.safetensors").read_bytes() for done in (exact, rounded)]
    assert weights[0] != weights[1]  # rounding has an effect
    assert exact.metrics["test_accuracy"] > 0.8
    for part in ("val_accuracy", "test_accuracy"):
        assert abs(exact.metrics[part] - rounded.metrics[part]) <= 0.01, part


def test_cache_decides_before_training_what_fits(train, tmp_path, asked, cached):
    """36 + 12 images of 3 logits or 8 x 8 attention maps: 700 bytes and 5 kB per view."""
    done = train("method=combined", "remember.disk_gb=8e-6")
    assert done.code == 0, done.err
    sentences = [line for line in done.err.splitlines() if "are not cached" in line]
    assert len(sentences) == 1
    assert "attention" in sentences[0]
    assert asked["training"] == 2 * 33 + SHAPES
    assert {name.split("-")[1] for name in remembered(tmp_path)} == {"logit", "evaluation"}
    assert student_of(done.runs[0]) == student_of(cached[0])
    asked.clear()
    assert train("method=logit").code == 0
    assert asked["training"] == SHAPES


def test_k_views_are_repeated_cyclically(train, tmp_path, asked):
    assert train("method=logit", "data.views=2", "trainer.max_epochs=3").code == 0
    assert asked["training"] == 2 * 33 + SHAPES
    views = {
        entry.folder.name.split("-")[1]: entry.views
        for entry in stored(tmp_path / "outputs" / "teachers" / "remembered")
    }
    assert views == {"logit": 2, "evaluation": 1}


def test_views_that_no_epoch_uses_are_not_wanted():
    plan = SimpleNamespace(student=SimpleNamespace(trainer=SimpleNamespace(arguments={})))
    for epochs, views, used in ((2, 9, 2), (9, 2, 2), (3, None, 3)):
        plan.student.trainer.arguments["max_epochs"] = epochs
        assert used_views(plan, SimpleNamespace(views=views)) == range(used)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Prepare a run in bfloat16, with the weights of a file as its teacher, and open its caches."""
    root = tmp_path_factory.mktemp("opened")
    given = (*SMALL, f"data.root={write_folder(root / 'images')}", f"output_dir={root}")
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = ConvNet([8, 16], hidden=16, num_classes=3, image_size=16).state_dict()
        torch.save(state, root / f"{seed}.pt")

    def prepare(*overrides, weights=0):
        base = [f"{owner}trainer.precision=bf16-mixed" for owner in ("", "+teacher.")]
        file = [] if weights is None else [f"teacher.checkpoint={root / str(weights)}.pt"]
        job = student.prepare(api.compose(*given, *base, *file, *overrides))
        if weights is not None:
            student.open_caches(job.module, job.plan, job.data, CPU)
        return job

    return prepare


@pytest.fixture(scope="module")
def opened(prepared):
    """The folder of the cache that a run opens."""

    @cache
    def folder(*overrides, method="attention", weights=0):
        job = prepared(f"method={method}", *overrides, weights=weights)
        (rows,) = job.module.cache.rows.values()
        return rows.folder

    return folder


OTHER_OUTPUTS = [
    "data.padding=1", "data.flip=false", "data.cutout=4", "data.view_seed=1",
    "data.val_fraction=0.2", "data.mean=[0.4,0.5,0.5]", "teacher.layers=[stage1]",
    "data.split_seed=1", "data.std=[0.4,0.5,0.5]", "teacher.mean=[0.4,0.5,0.5]",
    "teacher.std=[0.4,0.5,0.5]",
    "remember.dtype=bfloat16", "trainer.precision=32-true",
]  # fmt: skip
SAME_OUTPUTS = [
    "seed=3", "optimizer.lr=0.001", "student.model.channels=[4,6]",
    "+method.terms.attention.distance=norm", "data.eval_batch_size=7",
    "data.batch_size=11",
]  # fmt: skip


@pytest.mark.parametrize("override", OTHER_OUTPUTS + SAME_OUTPUTS)
def test_equal_outputs_share_a_cache(opened, override):
    assert (opened(override) == opened()) == (override in SAME_OUTPUTS)


def test_other_teachers_have_other_caches(opened, prepared):
    assert opened(weights=1) != opened()
    keys = [
        teacher_key(job.plan.teachers[0], job.data.fingerprint())
        for job in (
            prepared("method=logit", *training, weights=None)
            for training in ((), ("teacher.seed=1",), ("data.batch_size=11",))
        )
    ]
    assert keys[0] not in keys[1:]


def test_methods_share_the_caches_of_their_terms(opened, prepared):
    rows = prepared("method=combined").module.cache.rows
    assert {part.folder for part in rows.values()} == {opened(), opened(method="logit")}


def test_logit_terms_share_a_cache(opened):
    logits = opened(method="logit")
    assert logits != opened()
    assert opened(method="mlkd") == logits
    # A fixed name, so that existing caches remain valid.
    for term in (Logit, HardLabel, DKD, DIST, NKD, MLKD):
        assert _term_key(term()) == {"class": "kd_lightning.losses.logit.Logit"}


class Restless(FolderDataModule):
    """Images with random noise."""

    reproducible = False


class Noise:
    """Another view each time, which nobody declares."""

    def render(self, images, index, view):
        noise = torch.randint(0, 2, (len(index), 3, *images.shape[1:3]), dtype=torch.uint8)
        return images[index].permute(0, 3, 1, 2) ^ (noise * (view != PLAIN)[:, None, None, None])


class InOrder:
    """Views that depend on their place in the batch."""

    def render(self, images, index, view):
        place = torch.arange(len(index), dtype=torch.uint8) * (view != PLAIN)
        return images[index].permute(0, 3, 1, 2) ^ place[:, None, None, None]


@pytest.mark.parametrize(
    "chosen",
    [
        "data._target_=test_cached_training.Restless",
        "data.augmentation={_target_: test_cached_training.Noise}",
        "data.augmentation={_target_: test_cached_training.InOrder}",
    ],
)
def test_non_reproducible_views_are_not_cached(prepared, caplog, chosen):
    with caplog.at_level(logging.WARNING):
        job = prepared("method=logit", chosen)
    assert "not reproducible" in caplog.text
    assert job.module.cache is None
    assert job.module.evaluation_cache is not None


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("remember.disk_gb=-1", ["remember.disk_gb", "at least 0"]),
        ("remember.disk_gb=lots", ["remember.disk_gb", "lots"]),
        ("remember.dtype=int8", ["remember.dtype", "float16"]),
        ("data.views=0", ["views", "at least 1"]),
    ],
)
def test_invalid_cache_settings_are_rejected(prepared, override, words):
    with pytest.raises(InputError) as error:
        prepared("method=logit", override)
    assert all(word in str(error.value) for word in words), error.value
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("views", "warned"), [(1, True), (2, False)])
def test_warning_if_views_repeat_often(train, monkeypatch, views, warned):
    monkeypatch.setattr(student, "OFTEN", 1)
    done = train("method=none", f"data.views={views}")  # two epochs
    assert done.code == 0
    assert ("data.views=2" in done.err) == warned
