"""Image files become squares, and further formats: see also test_images.py."""

import struct

import numpy as np
import pytest
from conftest import TINY
from PIL import Image

from kd_lightning import api
from kd_lightning.config.naming import config_key
from kd_lightning.config.resolve import teacher_recipe
from kd_lightning.data import FolderDataModule
from kd_lightning.data.decoding import decode, is_image_name, read_image, suffixes
from kd_lightning.errors import InputError

RED, BLUE, GREY = (200, 0, 0), (0, 0, 200), (128, 128, 128)


def two_colours(path, size=(48, 16), box=(16, 0, 32, 16)):
    """Blue, with a red box (left, top, right, bottom)."""
    image = Image.new("RGB", size, BLUE)
    image.paste(RED, box)
    image.save(path)
    return path


def near(pixels, colour):
    return np.abs(pixels.astype(int) - colour).max() <= 1


# --- geometry -----------------------------------------------------------------------------------


def test_squash_keeps_all_of_the_image(tmp_path):
    got = decode(two_colours(tmp_path / "a.png"), 24)
    assert np.array_equal(got, decode(tmp_path / "a.png", 24, "squash"))
    # The box is a third of the width.
    assert near(got[:, 9:15], RED)
    assert near(got[:, :7], BLUE)
    assert near(got[:, 17:], BLUE)


@pytest.mark.parametrize("size", [8, 16, 32])
@pytest.mark.parametrize("upright", [False, True])
def test_crop_keeps_the_centre_of_the_longer_side(tmp_path, size, upright):
    wide = ((48, 16), (16, 0, 32, 16))
    tall = ((16, 48), (0, 16, 16, 32))
    path = two_colours(tmp_path / "a.png", *(tall if upright else wide))
    got = decode(path, size, "crop")
    assert near(got[1:-1, 1:-1], RED)
    # As torchvision's Resize and CenterCrop: the first reads pixels beside the crop.
    with Image.open(path) as image:
        whole = [side * size // 16 for side in image.size]
        resized = np.asarray(image.resize(whole, Image.Resampling.BILINEAR, reducing_gap=3))
    middle = resized[size : 2 * size] if upright else resized[:, size : 2 * size]
    assert np.abs(got.astype(int) - middle).max() <= 1


def test_crop_of_an_odd_difference_copies_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 13, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(decode(tmp_path / "a.png", 8, "crop"), pixels[:, 2:10])


def test_pad_adds_equal_bars(tmp_path):
    path = two_colours(tmp_path / "a.png")
    got = decode(path, 48, "pad")
    assert near(got[:16], GREY)
    assert near(got[32:], GREY)
    assert near(got[16:32, 16:32], RED)
    assert near(got[16:32, :16], BLUE)
    assert near(got[16:32, 32:], BLUE)
    # A tall image, half as large.
    got = decode(two_colours(tmp_path / "b.png", (16, 48), (0, 16, 16, 32)), 24, "pad")
    assert near(got[:, :8], GREY)
    assert near(got[:, 16:], GREY)
    assert near(got[9:15, 8:16], RED)


def test_pad_of_an_extreme_ratio_keeps_a_line(tmp_path):
    Image.new("RGB", (500, 1), RED).save(tmp_path / "a.png")
    got = decode(tmp_path / "a.png", 8, "pad")
    assert [near(row, RED) for row in got] == [number == 3 for number in range(8)]


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("size", [8, 5, 20])
def test_squares_are_resized_in_the_same_way(tmp_path, resize, size):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(
        decode(tmp_path / "a.png", size, resize), decode(tmp_path / "a.png", size)
    )


@pytest.mark.parametrize("orientation", [6, 8])
def test_images_are_turned_before_they_are_cropped(tmp_path, orientation):
    """Red above, and blue below, once upright: the crop must keep half of both."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.new("RGB", (16, 48), RED)
    image.paste(BLUE, (0, 24, 16, 48))
    turn = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[orientation]
    image.transpose(turn).save(tmp_path / "a.png", exif=exif)
    got = decode(tmp_path / "a.png", 16, "crop")
    assert near(got[:8], RED)
    assert near(got[8:], BLUE)


# --- in data sets, runs and students ------------------------------------------------------------


def folder_data(root, **settings):
    settings = {"batch_size": 8, "image_size": 16, "padding": 2, **settings}
    return FolderDataModule(str(root), name="folder", **settings)


def test_each_way_has_its_own_cache_and_fingerprint(folder, tmp_path):
    two_colours(folder / "train" / "class0" / "wide.png")
    prints = {}
    for resize in ("squash", "crop", "pad"):
        for _ in range(2):  # decoded, and read again
            data = folder_data(folder, resize=resize, cache_dir=str(tmp_path / "decoded"))
            data.setup()
            prints.setdefault(resize, set()).add(data.fingerprint())
    assert all(len(found) == 1 for found in prints.values())
    assert len(set.union(*prints.values())) == 3
    assert len(list((tmp_path / "decoded").iterdir())) == 3


def test_an_unknown_way_is_rejected(folder):
    with pytest.raises(InputError, match="resize must be one of squash, crop, pad, not stretch"):
        api.run("data=folder", f"data.root={folder}", "data.resize=stretch")


def test_defaults_rename_no_run_and_retrain_no_teacher(tmp_path):
    config = api.compose("data=folder", f"data.root={tmp_path}")
    old = {**config, "data": dict(config["data"])}
    assert old["data"].pop("resize") == "squash"
    assert old["data"].pop("test_folder") is None
    assert config_key(old) == config_key(config)
    recipes = [teacher_recipe(each, "32-true") for each in (old, config)]
    assert recipes[0] == recipes[1]
    for changed in ({"resize": "crop"}, {"test_folder": "val"}):
        assert config_key({**config, "data": {**config["data"], **changed}}) != config_key(config)


def test_student_resizes_files_as_its_training(folder, tmp_path):
    metrics = api.run(
        *TINY, "method=none", "data=folder", f"data.root={folder}", "data.image_size=16",
        "data.padding=2", "data.batch_size=16", "data.resize=crop", "trainer.max_epochs=1",
        f"output_dir={tmp_path / 'outputs'}", f"data_dir={tmp_path / 'data'}",
    )  # fmt: skip
    student = api.load_student(metrics["folder"])
    images = student.preprocess([two_colours(tmp_path / "a.png")])
    assert np.abs((images * 0.5 + 0.5).numpy() * 255 - np.reshape(RED, (1, 3, 1, 1))).max() <= 1
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"b\.png is not a readable image"):
        student.predict([tmp_path / "b.png"])


# --- formats --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "suffix", [".avif", ".jp2", ".tga", ".qoi", ".ico", ".dds", ".pcx", ".sgi", ".icns", ".ras"]
)
def test_further_formats(folder, suffix):
    """ICO and ICNS have prescribed sizes; the rest of the list is that of Pillow."""
    if suffix not in suffixes():
        pytest.skip("not supported by this build of Pillow")
    path = folder / "train" / "class0" / f"a{suffix.upper()}"
    if suffix == ".ras":  # Sun raster: cannot be written by Pillow
        header = (0x59A66A95, 16, 16, 24, 16 * 48, 1, 0, 0)
        path.write_bytes(struct.pack(">8I", *header) + bytes(RED[::-1]) * 256)
    else:
        image = Image.new("RGB", (16, 16), RED)
        image.save(path, Image.registered_extensions()[suffix])
    assert np.abs(decode(path, 16).astype(int) - RED).max() <= 6
    data = folder_data(folder)
    data.setup()
    assert data.train_size == 37


@pytest.mark.parametrize("name", ["a.eps", "a.ps", "a.wmf", "a.mpg", "a.h5", "a.pdf", "a.txt", "a"])
def test_formats_that_need_other_programs_are_no_images(name):
    assert not is_image_name(name)
    assert is_image_name(f"{name}.JPeG")


def test_pixel_values_of_16_bit_tiff_colours(tmp_path):
    """Of both byte orders, 16 bits per channel; written here, as Pillow cannot."""
    values = (60000, 30000, 300)
    for order, mark in (("<", b"II*\0"), (">", b"MM\0*")):
        pixels = struct.pack(f"{order}3H", *values) * 64
        tags = [
            (256, 4, 8), (257, 4, 8), (258, 3, None), (259, 3, 1), (262, 3, 2), (273, 4, 8),
            (277, 3, 3), (278, 4, 8), (279, 4, len(pixels)),
        ]  # fmt: skip
        directory = struct.pack(f"{order}H", len(tags))
        end = 8 + len(pixels) + 2 + 12 * len(tags) + 4
        for tag, kind, value in tags:
            short = kind == 3 and value is not None
            directory += struct.pack(f"{order}HHI", tag, kind, 3 if value is None else 1)
            directory += struct.pack(
                f"{order}{'H2x' if short else 'I'}", end if value is None else value
            )
        content = mark + struct.pack(f"{order}I", 8 + len(pixels)) + pixels + directory
        path = tmp_path / "a.tif"
        path.write_bytes(content + struct.pack(f"{order}I3H", 0, 16, 16, 16))
        assert (decode(path, 8) == [234, 117, 1]).all(), order


def test_images_of_too_many_pixels_are_rejected(tmp_path, monkeypatch):
    Image.new("L", (50, 50)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match=r"a\.png has more than 2,000 pixels"):
        read_image(tmp_path / "a.png", 8)


@pytest.mark.parametrize(
    "content", [b"", b"no image", bytes(1000), b"P6\n1 1", b"<svg></svg>", b"%!PS-Adobe-3.0 EPSF"]
)
def test_other_content_is_rejected(tmp_path, content):
    """Some formats have no signature: nothing must pass for one of them."""
    for name in ("a.png", "a.tga", "a.pcd"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} is not a readable image"):
            read_image(tmp_path / name, 8)
