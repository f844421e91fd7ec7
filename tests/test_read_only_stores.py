"""Teachers and cached outputs of other users, which can be read but not written; and outputs that
cannot be stored.
"""

import errno
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from kd_lightning.errors import InputError
from kd_lightning.storage import teacher_store
from kd_lightning.storage.packing import pack, unpack
from kd_lightning.storage.teacher_cache import TeacherCache, too_large
from kd_lightning.storage.teacher_store import TeacherStore

CPU = torch.device("cpu")
INDEX = torch.arange(6)
OUTPUTS = torch.randn(6, 3).half().float()
KEY = "0123456789abcdef" * 4


@pytest.fixture
def protect(monkeypatch):
    """Make a folder read only; simulated, as root may write anywhere."""

    def protect(folder):
        def refuse(path):
            if Path(path).is_relative_to(folder):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))

        def memmap(path, dtype, mode, shape):
            if mode != "r":
                refuse(path)
            return original(path, dtype, mode, shape=shape)

        original = np.memmap
        monkeypatch.setattr(np, "memmap", memmap)
        for name in ("touch", "mkdir", "rename", "replace"):
            kept = getattr(Path, name)
            monkeypatch.setattr(
                Path, name, lambda path, *a, _kept=kept, **k: refuse(path) or _kept(path, *a, **k)
            )
        monkeypatch.setattr(teacher_store, "hold", lambda path, _: refuse(path))

    return protect


def outputs(root, limit=1e9):
    return TeacherCache.of(root, {"teacher": 1}, len(INDEX), {"logits": (3,)}, limit=limit)


def fetch(cache, index=INDEX, view=0, ask=lambda: {"logits": OUTPUTS}):
    return cache.fetch(index, torch.full_like(index, view), CPU, ask)["logits"]


def test_cached_outputs_are_read(tmp_path, protect, caplog):
    fetch(outputs(tmp_path))
    protect(tmp_path)
    again = fetch(outputs(tmp_path), ask=lambda: pytest.fail("computed again"))
    assert again.equal(OUTPUTS)
    assert not caplog.messages


def test_missing_outputs_are_computed_with_one_warning(tmp_path, protect, caplog):
    fetch(outputs(tmp_path), INDEX[:4], ask=lambda: {"logits": OUTPUTS[:4]})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.rows")}
    protect(tmp_path)
    cache = outputs(tmp_path)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert fetch(cache).equal(OUTPUTS)
            cache.flush()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.rows")} == before
    (message,) = caplog.messages
    assert "read only" in message
    assert fetch(cache, INDEX[:4], ask=lambda: pytest.fail("computed again")).equal(OUTPUTS[:4])


def test_outputs_beyond_the_range_are_computed_with_one_warning(tmp_path, caplog):
    large = torch.cat([OUTPUTS[:5], torch.full((1, 3), 1e5)])
    cache = outputs(tmp_path)
    for _ in range(2):
        assert fetch(cache, ask=lambda: {"logits": large}).equal(large)
        cache.flush()
    (message,) = caplog.messages
    assert "beyond the range of float16 (remember.dtype" in message
    assert fetch(cache, INDEX[:5], ask=lambda: pytest.fail("not cached")).equal(large[:5])


def test_cached_outputs_beyond_the_limit_are_read(tmp_path):
    """The caches of a shared folder may be larger than one's own `remember.disk_gb`."""
    cache = outputs(tmp_path)
    fetch(cache)
    assert too_large(cache.rows, [0], tmp_path, limit=1) == {}
    assert too_large(cache.rows, [0, 1], tmp_path, limit=1).keys() == {"logits"}


def test_unpacked_outputs_are_found(tmp_path, protect):
    fetch(outputs(tmp_path / "first"))
    (folder,) = (tmp_path / "first").iterdir()
    pack(folder, tmp_path / "packed.zip")
    ((there, new, _),) = unpack(tmp_path / "packed.zip", tmp_path / "second")
    assert new == 1
    protect(tmp_path / "second")
    for restore in (False, True):
        assert unpack(tmp_path / "packed.zip", tmp_path / "second", restore) == [(there, 0, 0)]


def test_stored_teacher_is_used(tmp_path, protect):
    def train(folder):
        (folder / "teacher.safetensors").write_bytes(b"weights")
        return {"val_accuracy": 0.5, "test_accuracy": 0.5}

    store = TeacherStore(tmp_path)
    there = store.obtain("tiny", KEY, train)
    protect(tmp_path)
    assert store.obtain("tiny", KEY, lambda _: pytest.fail("trained again")) == there
    with pytest.raises(InputError, match="cannot be written"):
        store.obtain("tiny", KEY[::-1], train)
    there.weights.write_bytes(b"damaged")
    with pytest.raises(InputError, match="cannot be written"):
        store.obtain("tiny", KEY, train)
