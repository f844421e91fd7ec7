"""Packed caches: what is written, verified and added."""

import errno
import json
import os
import resource
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_lightning.errors import InputError
from kd_lightning.storage import packing
from kd_lightning.storage.packing import pack, unpack
from kd_lightning.storage.rows import Rows
from kd_lightning.storage.teacher_cache import TeacherCache, folder_name, stored, used_bytes

CPU = torch.device("cpu")
INDEX = torch.arange(20)


@pytest.fixture
def packed(tmp_path):
    cache = TeacherCache.of(tmp_path / "one", {"for": "a test"}, 20, {"logits": (3,)})
    for view in (0, 1):
        cache.fetch(INDEX, INDEX * 0 + view, CPU, lambda: {"logits": torch.randn(20, 3)})
    (entry,) = stored(tmp_path / "one")
    pack(entry.folder, tmp_path / "packed.zip")
    return tmp_path / "packed.zip"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_file_adds_nothing(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("packed")
    cache = TeacherCache.of(root / "one", {"for": "a test"}, 20, {"logits": (3,)})
    cache.fetch(INDEX, INDEX * 0, CPU, lambda: {"logits": torch.arange(60.0).view(20, 3)})
    (entry,) = stored(root / "one")
    pack(entry.folder, root / "packed.zip")
    content = bytearray((root / "packed.zip").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    (root / "packed.zip").write_bytes(content)
    try:
        unpack(root / "packed.zip", root / "two")
    except InputError:
        assert not stored(root / "two")
        return
    rows = next((root / "two").rglob("view-00000.rows"))
    assert rows.read_bytes() == (entry.folder / "view-00000.rows").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../x-logits-0123456789abcdef"},
        {"name": "other-logits-0123456789abcdef"},
        {"key": {"for": "another teacher"}},
        {"files": {"../view-00000.rows": "0" * 64}},
        {"files": {"view-00000.rows": "0" * 64}},
        {"files": {"key.json": "0" * 64}},
        {"rows": {"images": 19, "shape": [3], "dtype": "float16"}},
        {"rows": {"images": 20, "shape": [3], "dtype": "int8"}},
        {"rows": {"images": 0, "shape": [3], "dtype": "float16"}, "files": {}},
        {"rows": {"images": 20, "shape": [0], "dtype": "float16"}, "files": {}},
        {"rows": {"images": 10**9, "shape": [3], "dtype": "float16"}, "files": {}},
        {"format": 2},
        {"files": None},
    ],
)
def test_forged_manifest_is_rejected(tmp_path, packed, change):
    with zipfile.ZipFile(packed) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    manifest = {**json.loads(parts.pop("manifest.json")), **change}
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
        archive.writestr("manifest.json", json.dumps(manifest))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="damaged, or not a packed cache"):
        unpack(packed, tmp_path / "two" / "deep")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("name", "its name does not match its key"),
        ("member", r"it contains \.\./view-00000\.rows"),
        ("shape", "larger than the file"),
        ("format", "its format 3 is not known"),
    ],
)
def test_a_manifest_with_valid_hashes_does_not_lead_outside(tmp_path, packed, change, message):
    with zipfile.ZipFile(packed) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(parts.pop("manifest.json"))
    if change == "name":
        digest = folder_name("x", "logits", manifest["key"]).rpartition("-")[2]
        manifest["name"] = f"../../x-logits-{digest}"
    elif change == "member":
        manifest["files"] = {"../view-00000.rows": manifest["files"]["view-00000.rows"]}
        parts["../view-00000.rows"] = parts["view-00000.rows"]
    elif change == "shape":
        manifest["rows"]["shape"] = [2**33]
    else:
        manifest["format"] = 3
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in {**parts, "manifest.json": json.dumps(manifest)}.items():
            archive.writestr(name, content)
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        unpack(packed, tmp_path / "a" / "two")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_processes_may_unpack_the_same_cache(tmp_path, packed, monkeypatch):
    extract = packing._extract

    other = threading.Thread(target=lambda: found.append(unpack(packed, tmp_path / "two")))
    found = []

    def interrupted(*arguments):
        monkeypatch.setattr(packing, "_extract", extract)
        other.start()  # waits
        extract(*arguments)

    monkeypatch.setattr(packing, "_extract", interrupted)
    found.append(unpack(packed, tmp_path / "two"))
    other.join()
    (entry,) = stored(tmp_path / "two")
    assert entry.views == 2
    assert sorted(entry.folder.parent.iterdir()) == [entry.folder]
    assert len(found) == 2


def test_leftovers_of_killed_processes(tmp_path, packed):
    root = tmp_path / "two"
    unpack(packed, root)
    (place,) = root.iterdir()
    size, left = used_bytes(root), root / ".other-logits-0.0a1b2c3d.unpacked"
    left.mkdir()
    (left / "view-00000.rows").write_bytes(bytes(1000))
    assert used_bytes(root) == size
    (place / "view-00000.rows").unlink()
    unpack(packed, root)
    assert sorted(root.iterdir()) == [place]
    left = tmp_path / ".again.zip.0a1b2c3d.partial"
    left.touch()
    pack(place, tmp_path / "again.zip")
    assert not left.exists()
    assert not list(tmp_path.glob(".*"))


def test_name_of_a_teacher_may_contain_hyphens(tmp_path):
    key = {"for": "a test"}
    folder = tmp_path / "one" / folder_name("wrn-40-2", "logits", key)
    Rows(folder, key, 20, (3,), torch.float16).reserve(0)
    assert pack(folder, tmp_path / "packed.zip") == 1
    place = tmp_path / "two" / folder.name
    assert unpack(tmp_path / "packed.zip", tmp_path / "two") == [(place, 1, 0)]
    assert unpack(tmp_path / "packed.zip", tmp_path / "two") == [(place, 0, 0)]


@pytest.mark.parametrize("missing", ["rows.json", "key.json", ""])
def test_incomplete_cache_is_not_packed(tmp_path, missing):
    rows = Rows(tmp_path / "one" / "teacher-logits-0", {"for": "a test"}, 2, (3,), torch.float16)
    rows.reserve(0)
    folder = rows.folder if missing else tmp_path / "one" / "other"
    (rows.folder / (missing or "key.json")).unlink()
    with pytest.raises(InputError, match=f"{folder} cannot be packed"):
        pack(folder, tmp_path / "packed.zip")
    assert not (tmp_path / "packed.zip").exists()


def test_file_that_cannot_be_written_is_named(tmp_path, packed):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=r"File too large.*view-00000\.rows"):
            unpack(packed, tmp_path / "two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_reported_as_such(tmp_path, packed, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(packed, tmp_path / "two")


def test_same_cache_makes_the_same_file(tmp_path, packed, monkeypatch):
    """Whose SHA-256 is part of the identity of the students."""
    (entry,) = stored(tmp_path / "one")
    monkeypatch.setattr(time, "time", lambda: 2e9)
    pack(entry.folder, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_missing_and_damaged_rows_are_restored(tmp_path, packed):
    (place,) = [found.folder for found in unpack(packed, tmp_path / "two")]
    path, content = place / "view-00001.rows", (place / "view-00001.rows").read_bytes()
    size = len(content) // 20
    for damaged, count in (
        (bytes(len(content)), 20),
        (content[: 7 * size] + bytes(len(content) - 7 * size), 13),
        (bytes([content[0] ^ 1]) + content[1:], 1),
        (content, 0),
    ):
        path.write_bytes(damaged)
        assert unpack(packed, tmp_path / "two") == [(place, 0, 0)]  # only sizes are compared
        assert path.read_bytes() == damaged
        assert unpack(packed, tmp_path / "two", restore=True) == [(place, 0, count)]
        assert path.read_bytes() == content
    assert not list(place.parent.glob(".*"))


def test_valid_rows_of_the_cache_are_not_replaced(tmp_path, packed):
    cache = TeacherCache.of(tmp_path / "two", {"for": "a test"}, 20, {"logits": (3,)})
    own = torch.randn(10, 3)
    cache.fetch(INDEX[:10], INDEX[:10] * 0, CPU, lambda: {"logits": own})
    assert unpack(packed, tmp_path / "two", restore=True)[0][1:] == (1, 10)
    found = cache.rows["logits"].read(INDEX, INDEX * 0)
    assert found[1].all()
    assert torch.equal(found[0][:10], own.half())


def test_rows_of_another_shape_are_not_mixed(tmp_path, packed):
    (place,) = [found.folder for found in unpack(packed, tmp_path / "two")]
    (place / "rows.json").write_text('{"images": 10, "shape": [10], "dtype": "float16"}')
    with pytest.raises(InputError, match="another shape"):
        unpack(packed, tmp_path / "two", restore=True)


def test_truncated_views_are_not_packed(tmp_path):
    cache = TeacherCache.of(tmp_path / "one", {"for": "a test"}, 20, {"logits": (3,)})
    cache.fetch(INDEX, INDEX * 0, CPU, lambda: {"logits": torch.randn(20, 3)})
    (entry,) = stored(tmp_path / "one")
    for number, size in ((1, 0), (2, 16)):
        (entry.folder / f"view-{number:05d}.rows").write_bytes(bytes(size))
    assert pack(entry.folder, tmp_path / "packed.zip") == 1
    unpack(tmp_path / "packed.zip", tmp_path / "two")
    assert len(list((tmp_path / "two").rglob("*.rows"))) == 1
