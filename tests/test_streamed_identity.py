"""The identity of streamed images: the contents of their files, and their decoder."""

import os

import pytest
from conftest import write_folder
from PIL import Image
from streamed_folder import module

from kd_lightning.data import (
    file_digests,
    streamed,
)
from kd_lightning.errors import InputError


def test_identity_depends_on_contents_and_not_on_paths(tmp_path):
    one, other = (write_folder(tmp_path / name) for name in ("one", "other"))
    first = module(one, tmp_path / "cache").fingerprint()
    assert module(other).fingerprint() == first
    assert module(one, tmp_path / "cache").fingerprint() == first
    # In place, with the same size and the same time of the last change.
    path = one / "train" / "class0" / "0.jpg"
    content, times = path.read_bytes(), path.stat()
    path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert module(one, tmp_path / "cache").fingerprint() != first
    path.write_bytes(content)
    assert module(one, tmp_path / "cache").fingerprint() == first
    relabelled = other / "train" / "class0" / "0.jpg"
    relabelled.rename(other / "train" / "class1" / "00.jpg")
    assert module(other).fingerprint() != first
    assert module(one, image_size=15).fingerprint() != first
    assert module(one, resize="crop").fingerprint() != first


def test_identity_depends_on_the_behaviour_of_the_decoder(original_folder, monkeypatch):
    first = module(original_folder).fingerprint()
    original = streamed.decode
    monkeypatch.setattr(streamed, "decode", lambda *given: original(*given) ^ 1)
    streamed._decoder_behaviour.cache_clear()
    assert module(original_folder).fingerprint() != first
    streamed._decoder_behaviour.cache_clear()


def test_unchanged_files_are_read_once(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "images")
    read = []
    original = file_digests._read_digests
    monkeypatch.setattr(
        file_digests,
        "_read_digests",
        lambda paths, numbers, workers: [
            read.append(len(numbers)), original(paths, numbers, workers)
        ][1],
    )  # fmt: skip
    monkeypatch.setattr(file_digests, "RECENT", -(10**18))
    first = module(root, tmp_path / "cache").fingerprint()
    assert module(root, tmp_path / "cache").fingerprint() == first
    assert read == [48]
    Image.new("RGB", (16, 16)).save(root / "train" / "class1" / "1.png")
    assert module(root, tmp_path / "cache").fingerprint() != first
    assert read == [48, 1]
    (memo,) = (tmp_path / "cache").glob("*.digests")
    memo.write_bytes(memo.read_bytes()[:-1])
    module(root, tmp_path / "cache")
    assert read == [48, 1, 48]


def test_digests_in_a_read_only_cache_are_used(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "images")
    monkeypatch.setattr(file_digests, "RECENT", -(10**18))
    first = module(root, tmp_path / "cache").fingerprint()

    def refuse(*_):
        raise PermissionError("read only")

    monkeypatch.setattr(file_digests, "hold", refuse)
    monkeypatch.setattr(file_digests, "_read_digests", lambda *_: pytest.fail("read the images"))
    assert module(root, tmp_path / "cache").fingerprint() == first


def test_files_that_changed_a_moment_ago_are_read_again(tmp_path, monkeypatch):
    """Their times may not change with the next change."""
    monkeypatch.setattr(file_digests, "RECENT", 10**18)
    root = write_folder(tmp_path / "images")
    module(root, tmp_path / "cache")
    (memo,) = (tmp_path / "cache").glob("*.digests")
    assert len(file_digests._read_memo(memo)) == 0


def test_a_file_that_changes_during_the_run_is_an_error(tmp_path):
    data = module(write_folder(tmp_path / "images"), tmp_path / "cache")
    path = tmp_path / "images" / "test" / "class1" / "2.jpg"
    Image.new("RGB", (16, 16)).save(path)
    with pytest.raises(InputError, match=r"2\.jpg has changed since the start of the run"):
        list(data.test_dataloader())


def test_a_damaged_file_is_an_error_of_one_sentence(tmp_path):
    root = write_folder(tmp_path / "images")
    (root / "test" / "class1" / "2.jpg").write_bytes(b"no image")
    data = module(root, tmp_path / "cache")
    with pytest.raises(InputError, match=r"2\.jpg is not a readable image"):
        list(data.test_dataloader())
    (root / "test" / "class1" / "2.jpg").unlink()
    with pytest.raises(InputError, match=r"2\.jpg cannot be read"):
        list(data.test_dataloader())
