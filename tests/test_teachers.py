"""The teacher store: one training per key, under all circumstances."""

import copy
import errno
import hashlib
import json
import multiprocessing
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from kd_lightning.config.resolve import teacher_recipe
from kd_lightning.data import FolderDataModule
from kd_lightning.data.sources import InMemoryImages
from kd_lightning.errors import InputError
from kd_lightning.storage.teacher_store import TeacherStore, teacher_key
from kd_lightning.storage.weights import weights_sha256

KEY = "0123456789abcdef" * 4


def trainer(calls):
    def train(folder):
        calls.append(folder)
        save_file({"weight": torch.full((3,), float(len(calls)))}, folder / "teacher.safetensors")
        (folder / "checkpoints").mkdir(exist_ok=True)
        return {"val_accuracy": 0.5, "test_accuracy": 0.25}

    return train


def test_stored_teacher_is_reused(tmp_path):
    calls = []
    store = TeacherStore(tmp_path / "teachers")
    first = store.obtain("tiny", KEY, trainer(calls))
    second = store.obtain("tiny", KEY, trainer(calls))
    assert len(calls) == 1
    assert first == second
    assert second.facts["test_accuracy"] == 0.25
    assert second.path.name == "tiny-0123456789abcdef"
    assert not (second.path / "checkpoints").exists()


def test_training_may_write_only_weights(tmp_path):
    def train(folder):
        save_file({"weight": torch.ones(1)}, folder / "teacher.safetensors")
        return {"val_accuracy": 0.5, "test_accuracy": 0.25}

    stored = TeacherStore(tmp_path).obtain("tiny", KEY, train)
    assert sorted(p.name for p in stored.path.iterdir()) == ["teacher.json", "teacher.safetensors"]


def test_another_key_gives_another_teacher(tmp_path):
    calls = []
    store = TeacherStore(tmp_path)
    store.obtain("tiny", KEY, trainer(calls))
    store.obtain("tiny", KEY[::-1], trainer(calls))
    assert len(calls) == 2


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: flip_a_bit(entry / "teacher.safetensors"),
        lambda entry: (entry / "teacher.safetensors").write_bytes(b""),
        lambda entry: (entry / "teacher.safetensors").unlink(),
        lambda entry: (entry / "teacher.json").write_text("{"),
        lambda entry: (entry / "teacher.json").write_text("[]"),
        lambda entry: (entry / "teacher.json").unlink(),
    ],
)
def test_damaged_teacher_is_moved_aside_and_retrained(tmp_path, damage, caplog):
    calls = []
    store = TeacherStore(tmp_path)
    damage(store.obtain("tiny", KEY, trainer(calls)).path)
    again = store.obtain("tiny", KEY, trainer(calls))
    assert len(calls) == 2
    assert load_file(again.weights)["weight"].tolist() == [2, 2, 2]
    place = tmp_path / "tiny-0123456789abcdef"
    assert (tmp_path / f"{place.name}.damaged-1").is_dir()
    (message,) = caplog.messages
    assert message.startswith(f"the stored teacher {place} is damaged")
    assert f"{place.name}.damaged-1" in message


@pytest.mark.parametrize("name", ["teacher.json", "teacher.safetensors"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_intact_teacher_that_cannot_be_read_now_is_kept(tmp_path, monkeypatch, name, number):
    calls = []
    store = TeacherStore(tmp_path)
    stored = store.obtain("tiny", KEY, trainer(calls))
    once = Path.open

    def fail(path, *given, **named):
        if path.name == name:
            raise OSError(number, os.strerror(number))
        return once(path, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fail)
        with pytest.raises(InputError) as refused:
            store.obtain("tiny", KEY, trainer(calls))
    assert str(refused.value) == (
        f"the stored teacher {stored.path / name} cannot be read ({os.strerror(number)}); "
        "run the same command again once it can"
    )
    assert store.obtain("tiny", KEY, trainer(calls)) == stored
    assert len(calls) == 1
    assert not list(tmp_path.glob("*.damaged-*"))


def test_every_damaged_teacher_is_kept(tmp_path):
    store = TeacherStore(tmp_path)
    for number in range(4):
        stored = store.obtain("tiny", KEY, trainer([None] * number))
        (stored.path / "teacher.json").write_text(f"damage {number}")
    aside = sorted(tmp_path.glob("*.damaged-*"))
    assert [path.name[-9:] for path in aside] == ["damaged-1", "damaged-2", "damaged-3"]
    for number, path in enumerate(aside):
        assert (path / "teacher.json").read_text() == f"damage {number}"


@pytest.mark.parametrize("facts", [None, [], "no", {}, {"val_accuracy": 0.5}, {"a": 1.0}])
def test_teacher_without_manifest_is_retrained(tmp_path, facts):
    calls = []
    store = TeacherStore(tmp_path)
    manifest = store.obtain("tiny", KEY, trainer(calls)).path / "teacher.json"
    content = {**json.loads(manifest.read_text()), "facts": facts}
    manifest.write_text(json.dumps(content))
    store.obtain("tiny", KEY, trainer(calls))
    del content["facts"]
    manifest.write_text(json.dumps(content))
    assert store.obtain("tiny", KEY, trainer(calls)).facts["val_accuracy"] == 0.5
    assert len(calls) == 3


def until_said(caplog):
    """Wait for a message of another thread, at most ten seconds."""
    end = time.monotonic() + 10
    while not caplog.messages and time.monotonic() < end:
        time.sleep(0.01)


def test_teacher_in_training_is_waited_for(tmp_path, caplog):
    store, started = TeacherStore(tmp_path), threading.Event()

    def slow(folder):
        started.set()
        until_said(caplog)
        return trainer([])(folder)

    other = threading.Thread(target=store.obtain, args=("tiny", KEY, slow))
    other.start()
    started.wait()
    store.obtain("tiny", KEY, lambda _: pytest.fail("trained twice"))
    other.join()
    assert caplog.messages == [
        "another process is training the teacher tiny-0123456789abcdef; waiting for it"
    ]


def test_store_not_writable_is_reported(tmp_path):
    (tmp_path / "teachers").write_text("in the way")
    with pytest.raises(InputError) as refused:
        TeacherStore(tmp_path / "teachers").obtain("tiny", KEY, trainer([]))
    assert str(refused.value) == (
        f"output_dir: the teacher store {tmp_path / 'teachers'} cannot be written (File exists)"
    )


def test_interrupted_training_stores_no_teacher(tmp_path):
    def interrupted(folder):
        trainer([])(folder)
        raise KeyboardInterrupt

    store = TeacherStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.obtain("tiny", KEY, interrupted)
    assert not (tmp_path / "tiny-0123456789abcdef").exists()
    calls = []
    store.obtain("tiny", KEY, trainer(calls))
    assert len(calls) == 1


def _ask(root, log):
    def train(folder):
        with log.open("a") as file:
            file.write("trained\n")
        time.sleep(1)
        save_file({"weight": torch.zeros(1)}, folder / "teacher.safetensors")
        return {"val_accuracy": 0.5, "test_accuracy": 0.25}

    TeacherStore(root).obtain("tiny", KEY, train)


def test_two_processes_train_one_teacher(tmp_path):
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    workers = [context.Process(target=_ask, args=(tmp_path / "store", log)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert log.read_text() == "trained\n"


CONFIG = {
    "data": {"name": "folder", "root": "here", "batch_size": 8, "seed": 0, "split_seed": 0},
    "trainer": {"precision": "auto", "max_epochs": 9, "accelerator": "auto"},
    "teacher": {
        "model": {"_target_": "torchvision.models.resnet18", "width": 1},
        "seed": 0,
        "optimizer": {"lr": 0.1},
        "scheduler": None,
        "trainer": {"max_epochs": 3},
        "mean": None,
        "std": None,
        "cutout": 0,
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from conftest import write_folder

    module = FolderDataModule(
        str(write_folder(tmp_path_factory.mktemp("images"))), name="f", batch_size=8, image_size=16
    )
    module.setup()
    return module


def key_of(config, images, precision="32-true"):
    teacher = config["teacher"]
    recipe = teacher_recipe(config, precision)
    nodes = tuple(teacher[part] for part in ("model", "optimizer", "scheduler"))
    plan = SimpleNamespace(recipe=recipe, own_nodes=nodes)
    return teacher_key(plan, images)


def changed(path, value):
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("teacher.model.width", 2),
        ("teacher.seed", 1),
        ("teacher.cutout", 8),
        ("teacher.optimizer.lr", 0.2),
        ("teacher.scheduler", {"warmup": 1}),
        ("teacher.trainer.max_epochs", 4),
        ("teacher.trainer.limit_train_batches", 2),
        ("trainer.limit_train_batches", 2),
        ("teacher.trainer.gradient_clip_val", 1),
        ("teacher.mean", [0.1, 0.1, 0.1]),
        ("data.batch_size", 16),
        ("data.split_seed", 1),
        ("data.mean", [0.1, 0.1, 0.1]),  # without a mean of its own the teacher uses it
        ("data.std", [0.1, 0.1, 0.1]),
    ],
)
def test_teacher_key_depends_on_everything_relevant(data, path, value):
    key = key_of(CONFIG, data.fingerprint())
    assert key_of(changed(path, value), data.fingerprint()) != key


def test_teacher_key_is_stable():
    """Existing teachers are found by this key. A change requires a new FORMAT."""
    assert key_of(CONFIG, "the images") == (
        "3a9f9d318f9936d0e9e4c41313c469b5299fbb31dc2ba09d0d07c8fe8b4e4902"
    )


def test_precision_and_images_are_in_the_key(data):
    key = key_of(CONFIG, data.fingerprint())
    assert key_of(CONFIG, data.fingerprint(), "bf16-mixed") != key
    other = data.variant(
        pixel_source=InMemoryImages(data.pixel_source.pixels.clone()), _fingerprint=""
    )
    other.pixel_source.pixels[0, 0, 0, 0] ^= 1
    assert key_of(CONFIG, other.fingerprint()) != key


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("data.root", "elsewhere"),
        ("data.seed", 7),
        ("data.view_seed", 1),  # of the student's views; the teacher has its own
        ("data.cutout", 4),
        ("trainer.max_epochs", 50),  # of the student; the teacher has its own
        ("trainer.accelerator", "cpu"),
    ],
)
def test_teacher_key_ignores_irrelevant_settings(data, path, value):
    expected = key_of(CONFIG, data.fingerprint())
    assert key_of(changed(path, value), data.fingerprint()) == expected


def test_weights_hash_covers_names_dtypes_shapes_and_values():
    def digest(**tensors):
        model = nn.Module()
        for name, tensor in tensors.items():
            model.register_buffer(name, tensor)
        return weights_sha256(model)

    a, b = torch.arange(6.0).view(2, 3), torch.tensor(7)
    expected = hashlib.sha256(b"a torch.float32 (2, 3)")
    expected.update(a.numpy().tobytes())
    expected.update(b"b torch.int64 ()")
    expected.update(b.numpy().tobytes())
    assert digest(a=a, b=b) == digest(b=b, a=a) == expected.hexdigest()
    assert digest(a=a.t().contiguous().t(), b=b) == expected.hexdigest()
    others = [
        digest(c=a, b=b), digest(a=a.view(3, 2), b=b), digest(a=a.view(torch.int32), b=b),
        digest(a=a + 1, b=b), digest(a=a, b=b + 1), digest(a=a),
    ]  # fmt: skip
    assert len({*others, expected.hexdigest()}) == 7
