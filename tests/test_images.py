"""Image files of all kinds are decoded as displayed; image folders."""

import io
import os
import struct
import unicodedata
import zlib

import numpy as np
import pytest
import torch
from conftest import in_a_new_process, write_folder
from PIL import Image
from test_faults import Disk

from kd_lightning.data import FolderDataModule, ImageDataModule, Images
from kd_lightning.data.decoding import decode
from kd_lightning.data.loading import ViewSampler
from kd_lightning.data.views import Augmentation
from kd_lightning.errors import InputError

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def decoded(tmp_path, image, name="image.png", size=8, **options):
    """Decoded pixels (8, 8, 3) of an image, or of file content, written under this name."""
    path = tmp_path / name
    if isinstance(image, bytes):
        path.write_bytes(image)
    else:
        image.save(path, **options)
    return decode(path, size)


def png(width, height, depth, colour, rows, **chunks):
    """A PNG file of a kind that Pillow cannot write."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    raw = b"".join(b"\0" + row for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(kind.encode(), data) for kind, data in chunks.items())
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def grey(values):
    return np.repeat(np.asarray(values, np.uint8)[:, :, None], 3, axis=2)


# --- pixel formats ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.bmp", "a.webp", "a.ppm", "a.tif"])
@pytest.mark.parametrize("size", [8, 5])
def test_common_images_are_decoded_as_by_pillow(tmp_path, name, size):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    got = decoded(tmp_path, Image.fromarray(pixels), name, size)
    with Image.open(tmp_path / name) as file:
        expected = file.convert("RGB")
    if size != 8:
        expected = expected.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3)
    assert np.array_equal(got, np.asarray(expected))


def test_decoded_pixels_are_stable(folder):
    """Fingerprints identify trained teachers, so this value must never change."""
    for number, path in enumerate(sorted(folder.rglob("*.*"))):
        path.unlink()
        pixels = (np.arange(20 * 20 * 3).reshape(20, 20, 3) * (number + 3) // 7 % 256).astype("u1")
        Image.fromarray(pixels if number % 2 else pixels[:, :, 0]).save(path.with_suffix(".png"))
    data = FolderDataModule(str(folder), name="folder", batch_size=8, image_size=16, padding=2)
    data.setup()
    assert data.fingerprint()[:16] == "4c1d13bc1385f195"


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_16_bit_grey_is_scaled(tmp_path, name):
    values = RAMP.astype(np.uint16) * 257
    assert np.array_equal(decoded(tmp_path, Image.fromarray(values), name), grey(RAMP))
    values = np.full((8, 8), 300, np.uint16)  # would be white if clipped
    assert np.array_equal(decoded(tmp_path, Image.fromarray(values), name), grey(values * 0 + 1))


def test_16_bit_grey_of_either_byte_order_and_white_is_zero(tmp_path):
    values = RAMP.astype(np.uint16) * 257
    big = Image.frombytes("I;16B", (8, 8), values.astype(">u2").tobytes())
    assert np.array_equal(decoded(tmp_path, big, "big.tif"), grey(RAMP))
    inverted = Image.fromarray(values)
    got = decoded(tmp_path, inverted, "inverted.tif", tiffinfo={262: 0})
    assert np.array_equal(got, grey(255 - RAMP))


def test_16_bit_colours_are_scaled(tmp_path):
    rows = [struct.pack(">24H", *([65535, 300, 32768] * 8))] * 8
    got = decoded(tmp_path, png(8, 8, 16, 2, rows))
    assert (got == [255, 1, 128]).all()


def test_16_bit_grey_with_alpha(tmp_path):
    rows = [struct.pack(">16H", *([30000, 65535] * 4 + [30000, 0] * 4))] * 8
    got = decoded(tmp_path, png(8, 8, 16, 4, rows))
    assert (got[:, :4] == 30000 >> 8).all()
    assert (got[:, 4:] == 255).all()


@pytest.mark.parametrize("kind", ["float.tif", "signed.tif", "32-bit.tif"])
def test_pixels_without_a_defined_white_are_rejected(tmp_path, folder, kind):
    if kind == "float.tif":
        image = Image.fromarray(np.zeros((8, 8), np.float32))
        options = {}
    else:
        image = Image.fromarray(np.zeros((8, 8), np.int32))
        options = {"tiffinfo": {339: 2}} if kind == "signed.tif" else {}
    image.save(folder / "train" / "class0" / kind, **options)
    with pytest.raises(InputError, match=rf"{kind} .*convert it to .*8 or 16 bits"):
        folder_data(folder).setup()


def test_black_and_white(tmp_path):
    image = Image.fromarray(RAMP > 100)
    assert image.mode == "1"
    for name in ("a.png", "a.tif", "a.pbm", "a.bmp", "a.gif"):
        assert np.array_equal(decoded(tmp_path, image, name), grey((RAMP > 100) * 255)), name


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_low_bit_depths(tmp_path, depth):
    white = 2**depth - 1
    values = np.arange(8) % (white + 1)
    packed = int("".join(f"{v:0{depth}b}" for v in values), 2).to_bytes(depth, "big")
    got = decoded(tmp_path, png(8, 8, depth, 0, [packed] * 8))
    assert np.array_equal(got[0, :, 0], values * 255 // white)
    key = struct.pack(">H", 1)
    got = decoded(tmp_path, png(8, 8, depth, 0, [packed] * 8, tRNS=key))
    assert np.array_equal(got[0, :, 0], np.where(values == 1, 255, values * 255 // white))


# --- transparency -------------------------------------------------------------------------------


def transparent_right_half(mode):
    """Blue, or grey, whose right half is transparent, and black below."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3], pixels[:, :4, 3] = (0, 0, 200), 255
    pixels[:, 4:, :3] = 0
    image = Image.fromarray(pixels)
    if mode == "LA":
        return image.convert("LA"), image.convert("L").getpixel((0, 0))
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([0, 0, 0, 0, 0, 200])
        image.paste(0, (4, 0, 8, 8))
        image.info["transparency"] = 0
    return image, (0, 0, 200)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.tif", "a.webp"])
def test_transparent_pixels_become_white(tmp_path, mode, name):
    image, colour = transparent_right_half(mode)
    if mode == "LA" and name == "a.gif":
        pytest.skip("Pillow writes no transparency here")
    if mode == "P" and name in ("a.tif", "a.webp"):
        image = image.convert("RGBA")  # as image editors do for these formats
    options = {"lossless": True} if name == "a.webp" else {}
    got = decoded(tmp_path, image, name, **options)
    assert (got[:, 4:] == 255).all()
    assert np.abs(got[:, :4].astype(int) - colour).max() <= 3  # GIF palette


def test_half_transparent_pixels_are_blended_with_white(tmp_path):
    got = decoded(tmp_path, Image.new("RGBA", (8, 8), (0, 100, 200, 128)))
    assert np.abs(got.astype(int) - [127, 177, 227]).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_opaque_alpha_has_no_effect(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    plain = Image.fromarray(pixels).convert("RGB" if mode == "RGBA" else "L")
    with_alpha = decoded(tmp_path, plain.convert(mode), "alpha.png")
    assert np.array_equal(with_alpha, decoded(tmp_path, plain, "plain.png"))


@pytest.mark.parametrize(
    ("mode", "colour", "key"),
    [("RGB", (10, 20, 30), (10, 20, 30)), ("L", 40, 40), ("I;16", 4000, 4000), ("1", 0, 0)],
)
def test_a_transparent_colour(tmp_path, mode, colour, key):
    image = Image.new(mode, (8, 8), colour)
    assert (decoded(tmp_path, image) != 255).all()
    assert (decoded(tmp_path, image, transparency=key) == 255).all()


def test_a_transparent_colour_of_16_bits(tmp_path):
    colours = [0x1234, 0x5678, 0x9ABC], [0x3400, 0x7800, 0xBC00]
    rows = [struct.pack(">6H", *colours[0], *colours[1])] * 2
    (tmp_path / "a.png").write_bytes(png(2, 2, 16, 2, rows, tRNS=struct.pack(">3H", *colours[0])))
    got = decode(tmp_path / "a.png", 2)
    assert got[0].tolist() == [[255, 255, 255], [0x34, 0x78, 0xBC]]


# --- colours, orientation, frames ---------------------------------------------------------------


def test_cmyk(tmp_path):
    """As written by print software, inverted, with Adobe's marker; and TIFF, not inverted."""
    for name in ("a.jpg", "a.tif"):
        got = decoded(tmp_path, Image.new("RGB", (8, 8), (200, 30, 40)).convert("CMYK"), name)
        assert np.abs(got.astype(int) - [200, 30, 40]).max() <= 3, name


def test_ycck(tmp_path):
    """Adobe's other encoding: YCbCr of RGB in place of CMY, all inverted."""
    bands = Image.new("RGB", (8, 8), (200, 30, 40)).convert("YCbCr").split()
    image = Image.merge("CMYK", (*bands, Image.new("L", (8, 8), 0)))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=100, subsampling=0)
    content = bytearray(file.getvalue())
    marker = content.index(b"Adobe")
    assert content[marker + 11] == 0
    content[marker + 11] = 2  # the transform: YCCK
    got = decoded(tmp_path, bytes(content), "a.jpg")
    assert np.abs(got.astype(int) - [200, 30, 40]).max() <= 4


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, name, orientation):
    upright = np.zeros((8, 16), np.uint8)
    upright[:4, :8] = 255
    upright[4:, 8:] = 120
    undo = {  # what the camera did
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: np.transpose, 6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, 3),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(undo(upright))).convert("RGB")
    got = decoded(tmp_path, image, name, size=16, exif=exif, **(
        {"lossless": True} if name == "a.webp" else {"quality": 100} if name == "a.jpg" else {}
    ))  # fmt: skip
    stretched = Image.fromarray(upright).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(got.astype(int) - np.asarray(stretched)).max() <= 6


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"\0" * 99]
)
def test_damaged_metadata_do_not_reject_the_image(tmp_path, exif):
    got = decoded(tmp_path, Image.fromarray(grey(RAMP)), "a.jpg", exif=exif, quality=100)
    assert np.abs(got.astype(int) - grey(RAMP)).max() <= 3


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_invalid_orientation_is_ignored(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decoded(tmp_path, Image.fromarray(grey(RAMP)), exif=exif), grey(RAMP))


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_first_frame_of_several_is_used(tmp_path, name):
    first, second = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    got = decoded(tmp_path, first, name, save_all=True, append_images=[second])
    assert np.abs(got.astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize(
    "suffix",
    [".bmp", ".gif", ".jpg", ".jfif", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"],
)
@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_truncated_files_of_every_format_are_rejected(folder, suffix, keep):
    format = Image.registered_extensions()[suffix]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = folder / "train" / "class0" / f"cut{suffix}"
    Image.fromarray(pixels).save(path, format)
    decode(path, 8)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match=f"cut{suffix} is not a readable image"):
        folder_data(folder).setup()


def test_postscript_is_not_executed(folder, monkeypatch):
    """Pillow would read PostScript, whatever the file's suffix, with Ghostscript."""
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_: pytest.fail("it ran"))
    path = folder / "train" / "class0" / "0.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    with pytest.raises(InputError, match=r"0\.png is not a readable image"):
        folder_data(folder).setup()


# --- folders --------------------------------------------------------------------------------------


def folder_data(root, **settings):
    settings = {"batch_size": 8, "image_size": 16, "padding": 2, **settings}
    return FolderDataModule(str(root), name="folder", **settings)


def sizes(data):
    data.setup()
    return {name: len(index) for name, index in data.splits.items()}


def of_colour(root, part, name, colour, count=2):
    (root / part / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        Image.new("RGB", (8, 8), colour).save(root / part / name / f"{number}.png")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_validation_folder_is_the_validation_set(folder, name):
    before = folder_data(folder)
    before.setup()
    for label in range(3):
        of_colour(folder, name, f"class{label}", "white", count=label + 1)
    data = folder_data(folder, val_fraction=0.5)
    assert sizes(data) == {"train": 36, "val": 6, "test": 12}
    assert data.train_size == 42
    parts = [set(index.tolist()) for index in data.splits.values()]
    assert [min(part) for part in parts] == [0, 36, 42]
    (batch,) = list(data.val_dataloader())
    assert (batch["images"] > 0.999).all()
    assert batch["labels"].tolist() == [0, 1, 1, 2, 2, 2]
    # Training uses exactly the images of train.
    seen = torch.cat([batch["shown"].index for batch in data.train_dataloader()])
    assert sorted(seen.tolist()) == list(range(36))
    assert data.fingerprint() != before.fingerprint()


def test_run_with_a_validation_folder(train, folder):
    """Including the teacher and its cached outputs."""
    for label in range(3):
        of_colour(folder, "val", f"class{label}", "white", count=2)
    done = train("method=combined", "trainer.precision=32-true", "trainer.max_epochs=1")
    assert done.code == 0, done.err
    accuracies = [done.metrics[f"{role}val_accuracy"] for role in ("", "teacher_")]
    # White images of three classes: any prediction is right for a third of them.
    assert accuracies == [pytest.approx(1 / 3), pytest.approx(1 / 3)]


def test_fingerprint_includes_the_validation_split():
    class Data(ImageDataModule):
        classes = ("a", "b")
        val_size = 0

        def load(self):
            generator = torch.Generator().manual_seed(0)
            pixels = torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=generator)
            return Images(pixels, torch.arange(20) % 2, 16, self.val_size)

    prints = set()
    for size in (0, 2, 4):
        data = Data(name="own", batch_size=2, image_size=8)
        data.val_size = size
        data.setup()
        assert len(data.splits["val"]) == size or not size
        prints.add(data.fingerprint())
    assert len(prints) == 3


def test_a_source_without_test_images_is_rejected():
    class Data(ImageDataModule):
        classes = ("a", "b")

        def load(self):
            pixels = torch.zeros(20, 8, 8, 3, dtype=torch.uint8)
            return Images(pixels, torch.arange(20) % 2, train_size=20)

    with pytest.raises(InputError, match="own has no test images"):
        Data(name="own", batch_size=2, image_size=8).setup()


def test_class_with_one_image_and_a_validation_folder(tmp_path):
    for part in ("train", "val", "test"):
        for name in ("a", "b"):
            of_colour(tmp_path, part, name, "red", count=1)
    assert sizes(folder_data(tmp_path, batch_size=2)) == {"train": 2, "val": 2, "test": 2}


def test_validation_folder_must_have_the_same_classes(folder):
    of_colour(folder, "val", "class0", "white")
    with pytest.raises(InputError, match=r"train and .*val must have the same.*class1, class2"):
        folder_data(folder)


def test_two_validation_folders_are_rejected(folder):
    for name in ("val", "valid"):
        for label in range(3):
            of_colour(folder, name, f"class{label}", "white")
    with pytest.raises(InputError, match="'val' and 'valid'"):
        folder_data(folder)


def test_broken_link_as_validation_folder_is_rejected(folder):
    (folder / "val").symlink_to(folder / "moved")
    with pytest.raises(InputError, match=r"val is a broken link"):
        folder_data(folder)


def test_validation_without_test_folder_gets_a_suggestion(folder):
    (folder / "test").rename(folder / "val")
    with pytest.raises(InputError, match=r"no folder 'test'.*data.test_folder=val"):
        folder_data(folder)


def test_class_folders_without_a_split_are_recognised(folder):
    with pytest.raises(InputError, match=r"no folder 'train'.*class0 looks like a class"):
        folder_data(folder / "train")


def test_unused_folders_and_images_cause_a_warning(folder, caplog):
    (folder / "dev" / "class0").mkdir(parents=True)
    (folder / "__MACOSX").mkdir()
    (folder / "README.txt").write_text("nothing to do with it")
    Image.new("RGB", (8, 8)).save(folder / "train" / "loose.png")
    folder_data(folder).setup()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert str(folder / "dev") in said[0]
    assert "__MACOSX" not in said[0]
    assert "loose.png" in said[1]


@pytest.mark.parametrize(
    "name", ["Thumbs.db", "desktop.ini", ".DS_Store", "Icon\r", "._0.png", ".hidden", "ehthumbs.db"]
)
def test_files_of_file_managers_are_skipped(folder, name):
    (folder / "train" / "class0" / name).write_bytes(b"")
    (folder / "test" / name).write_bytes(b"")
    assert sizes(folder_data(folder)) == {"train": 33, "val": 3, "test": 12}


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".ipynb_checkpoints"])
def test_folders_of_file_managers_are_not_classes(folder, name):
    (folder / "train" / name).mkdir()
    (folder / "train" / "class0" / name).mkdir()
    assert folder_data(folder).classes == ["class0", "class1", "class2"]
    assert sizes(folder_data(folder)) == {"train": 33, "val": 3, "test": 12}


@pytest.mark.parametrize("make", [lambda p: p.write_bytes(b""), lambda p: p.mkdir(), os.mkfifo])
def test_non_image_with_image_suffix_is_rejected(folder, make):
    make(folder / "train" / "class0" / "odd.png")
    with pytest.raises(InputError, match=r"odd\.png is "):
        folder_data(folder).setup()


def test_class_names_are_unicode_normalised(folder):
    for part, name in (("train", NFD), ("test", NFC), ("val", NFD)):
        (folder / part).mkdir(exist_ok=True)
        of_colour(folder, part, name, "white")
    for label in range(3):
        of_colour(folder, "val", f"class{label}", "white")
    data = folder_data(folder)
    assert data.classes == [NFC, "class0", "class1", "class2"]
    data.setup()
    (batch,) = list(data.test_dataloader())
    assert (batch["images"][batch["labels"] == 0] > 0.999).all()


def test_class_in_two_unicode_forms_is_rejected(folder):
    for name in (NFC, NFD):
        of_colour(folder, "train", name, "white")
    with pytest.raises(InputError, match=f"two folders for the class '{NFC}'"):
        folder_data(folder)


# --- names that are not UTF-8 ---------------------------------------------------------------------


def latin_1(path, name):
    return path / os.fsdecode(name.encode("latin-1"))


def test_file_and_class_names_with_arbitrary_bytes(folder, tmp_path):
    (folder / "train" / "class0").rename(latin_1(folder / "train", "café"))
    (folder / "test" / "class0").rename(latin_1(folder / "test", "café"))
    (folder / "train" / "class1" / "1.png").rename(latin_1(folder / "train" / "class1", "é.png"))
    for _ in range(2):  # the second iteration reads the cache
        data = folder_data(folder, cache_dir=str(tmp_path / "decoded"))
        assert sizes(data) == {"train": 33, "val": 3, "test": 12}
        assert data.classes == [r"caf\xe9", "class1", "class2"]
    assert len(list((tmp_path / "decoded").iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_message_with_arbitrary_bytes_is_printable(folder, content):
    latin_1(folder / "train" / "class1", "é.png").write_bytes(content)
    with pytest.raises(InputError) as refused:
        folder_data(folder).setup()
    assert r"\xe9.png" in str(refused.value)
    str(refused.value).encode()


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_non_ascii_names_in_an_ascii_locale(folder, tmp_path, fresh):
    """Only a fresh interpreter decodes names by the locale; the output is ASCII in both."""
    root = folder.rename(tmp_path / "été")
    (root / "dev").mkdir()
    (root / "train" / "class1" / "é.png").write_bytes(b"")
    done = in_a_new_process(
        "train.py", "data=folder", "method=none", "data.image_size=16", "data.batch_size=8",
        f"data.root='{root}'", f"output_dir={tmp_path / 'outputs'}", f"data_dir={tmp_path}",
        LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0", PYTHONIOENCODING="ascii", fresh=fresh,
    )  # fmt: skip
    assert done.code == 2
    assert "Traceback" not in done.err
    assert r"\xe9.png is empty" in done.err
    assert r"\xe9t\xe9/dev" in done.err


def test_control_characters_in_names_are_escaped(folder):
    (folder / "train" / "class1" / "\x1b[2J\n.png").write_bytes(b"")
    with pytest.raises(InputError) as refused:
        folder_data(folder).setup()
    assert r"\x1b[2J\n.png is empty" in str(refused.value)


# --- storing decoded images -----------------------------------------------------------------------


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


# --- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["view_seed", "split_seed", "seed"])
@pytest.mark.parametrize("seed", [-1, 2**32, 2**63, 2**64 + 1, 1.5])
def test_seeds_beyond_32_bits_are_rejected(folder, key, seed):
    with pytest.raises(ValueError, match=f"^{key} must be a whole number from 0 to 2"):
        folder_data(folder, **{key: seed})


@pytest.mark.parametrize("key", ["view_seed", "split_seed", "seed"])
def test_the_largest_seed_works(folder, key):
    data, other = folder_data(folder, **{key: 2**32 - 1}), folder_data(folder)
    for each in (data, other):
        each.setup()
        each.loader = each.train_dataloader()
        each.loader.sampler.set_epoch(10**6)
    one, two = (torch.cat([batch["images"] for batch in each.loader]) for each in (data, other))
    assert not torch.equal(one, two)


def test_largest_seed_shuffles_every_epoch():
    sampler = ViewSampler(torch.arange(50), 50, shuffle=True, seed=2**32 - 1)
    orders = set()
    for epoch in (0, 1, 10**6, 2**31):
        sampler.set_epoch(epoch)
        (batch,) = sampler
        orders.add(tuple(batch["shown"].index.tolist()))
    assert len(orders) == 4


def test_seeds_do_not_wrap_around():
    with pytest.raises(ValueError, match="seed"):
        Augmentation(seed=2**32)


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
