"""Storing decoded images: outdated and damaged ones are not used; a failed write is a warning."""

import pytest
import torch
from image_folders import folder_data, sizes
from test_faults import Disk

from kd_lightning.data import FolderDataModule


def test_cache_of_an_older_decoder_is_not_used(folder, tmp_path, monkeypatch):
    data = folder_data(folder, cache_dir=str(tmp_path / "decoded"))
    with monkeypatch.context() as patch:
        patch.setattr("kd_lightning.data.folder.DECODER", "1")
        data.setup()
    folder_data(folder, cache_dir=str(tmp_path / "decoded")).setup()
    assert len(list((tmp_path / "decoded").iterdir())) == 2


@pytest.mark.parametrize("error", [OSError(30, "Read-only file system"), OSError(28, "No space")])
def test_failed_cache_write_is_not_an_error(folder, tmp_path, monkeypatch, caplog, error):
    whole = folder_data(folder)
    whole.setup()

    def fail(*_):
        raise error

    monkeypatch.setattr("kd_lightning.data.folder.replacing", fail)
    data = folder_data(folder, cache_dir=str(tmp_path / "decoded"))
    data.setup()
    assert data.fingerprint() == whole.fingerprint()
    assert "cannot be cached" in caplog.text


@pytest.mark.parametrize("how", ["read-only", "full"])
def test_decoded_images_on_a_full_or_read_only_file_system(folder, tmp_path, caplog, how):
    disk = Disk(tmp_path / "disk")
    try:
        disk.mount("ro") if how == "read-only" else disk.fill()
        data = folder_data(folder, cache_dir=str(disk.place))
        assert sizes(data)["train"] == 33
        assert "cannot be cached" in caplog.text
        assert not list(disk.place.glob("*safetensors*"))
        assert not list(disk.place.glob(".*partial"))
    finally:
        disk.remove()


def test_file_at_the_path_of_the_decoded_images_folder(folder, tmp_path, caplog):
    (tmp_path / "decoded").write_text("in the way")
    data = folder_data(folder, cache_dir=str(tmp_path / "decoded"))
    assert sizes(data)["train"] == 33
    assert "cannot be cached" in caplog.text
    assert (tmp_path / "decoded").read_text() == "in the way"


def test_damaged_pixels_in_the_cache_are_decoded_again(tmp_path, folder):
    def load():
        data = FolderDataModule(
            name="folder", root=folder, image_size=16, batch_size=4, cache_dir=str(tmp_path)
        )
        return data.load().pixels

    whole = load()
    (cached,) = tmp_path.glob("*.safetensors")
    content = bytearray(cached.read_bytes())
    content[-1000:-900] = bytes(byte ^ 0xFF for byte in content[-1000:-900])
    cached.write_bytes(content)
    assert torch.equal(load(), whole)
    assert cached.read_bytes() != content  # repaired
