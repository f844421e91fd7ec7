"""Image files of all kinds are decoded as displayed."""

import io
import struct
import zlib

import numpy as np
import pytest
from image_folders import folder_data
from PIL import Image

from kd_lightning.data import FolderDataModule
from kd_lightning.data.decoding import decode
from kd_lightning.errors import InputError

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


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_fits_is_decoded_from_8_bits_only(tmp_path, bits):
    """Its larger values are signed, with an offset that Pillow does not apply."""
    cards = ("SIMPLE = T", f"BITPIX = {bits}", "NAXIS = 2", "NAXIS1 = 8", "NAXIS2 = 8", "END")
    header = "".join(f"{card.partition(' = ')[0]:8}= {card.partition(' = ')[2]:>20}".ljust(80)
                     if "=" in card else card.ljust(80) for card in cards)  # fmt: skip
    pixels = np.full(64 * bits // 8, 3, np.uint8).tobytes()
    (tmp_path / "a.fits").write_bytes(header.ljust(2880).encode() + pixels.ljust(2880, b"\0"))
    if bits == 8:
        assert (decode(tmp_path / "a.fits", 8) == 3).all()
        return
    with pytest.raises(ValueError, match="convert it to unsigned 8 or 16 bits"):
        decode(tmp_path / "a.fits", 8)


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
