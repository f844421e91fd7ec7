"""Decoding of image files of any supported format to 8-bit RGB pixels."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from kd_lightning.errors import InputError
from kd_lightning.files import readable

SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm",
}  # fmt: skip

# Accepted formats, whatever the suffix. Pillow supports more, some through external programs (EPS
# through Ghostscript), which is unsafe for untrusted files.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "MPO", "DIB", "JPEG2000", "AVIF")

BACKGROUND = (255, 255, 255)
"""Transparent images are composited over white, as img2dataset does."""

ORIENTATION = 0x0112  # the EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# TIFF tags, and the values that matter here.
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, UNSIGNED = 0, 1

# Pillow scales grey values of low bit depths by these factors, but not the transparent value.
LOW_DEPTHS = {"L;2": 85, "L;4": 17}


def decode(path: Path, size: int, resize: str = "squash") -> npt.NDArray[np.uint8]:
    """Decode the first frame of an image file, upright, and resize it.

    Args:
        path: the file.
        size: height and width of the result, in pixels.
        resize: see `to_square`.

    Returns:
        (size, size, 3), RGB.

    Raises:
        Exception: any exception of Pillow: the file is damaged, not an image, or has a pixel
            format without a defined conversion to 8 bits.
    """
    with Image.open(path, formats=_available()) as file:
        raw_mode = file.tile[0][3] if file.tile else None
        file.load()
        if raw_mode in LOW_DEPTHS and "transparency" in file.info:
            file.info["transparency"] *= LOW_DEPTHS[raw_mode]
        if raw_mode == "RGB;16B" and "transparency" in file.info:  # the upper halves were read
            file.info["transparency"] = tuple(value >> 8 for value in file.info["transparency"])
        image = to_rgb(file)
        turn = UPRIGHT.get(_orientation(file))
    if turn is not None:
        image = image.transpose(turn)
    return np.asarray(to_square(image, size, resize))


def read_image(path: Path, size: int, resize: str = "squash") -> npt.NDArray[np.uint8]:
    """`decode` with a message for people.

    Raises:
        InputError: the file cannot be decoded.
    """
    try:
        return decode(path, size, resize)
    except MemoryError:
        raise
    except Exception as error:  # Pillow may raise anything on damaged files
        raise InputError(
            f"{readable(path)} is not a readable image ({error}); repair or remove it"
        ) from error


def to_square(image: Image.Image, size: int, resize: str = "squash") -> Image.Image:
    """Resize an RGB image, with bilinear interpolation and antialiasing."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR, reducing_gap=3)
    return image


def is_image_name(name: str) -> bool:
    """Whether a file name has the suffix of a format that is decoded here."""
    return Path(name).suffix.lower() in SUFFIXES


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB.

    16-bit values are scaled to 8 bits, transparent pixels are composited over `BACKGROUND`.

    Raises:
        ValueError: the conversion is not defined, e.g. for floating-point pixels.
    """
    transparency = image.info.get("transparency")
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = _scale_to_8_bits(image)
        if isinstance(transparency, int):  # the PNG's transparent grey value
            grey[np.asarray(image) == transparency] = BACKGROUND[0]
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; convert it to 8 or 16 bits")
    if image.mode == "La":
        image = image.convert("LA")
    if transparency is not None or image.mode in ("LA", "PA", "RGBA", "RGBa"):
        image = image.convert("RGBA")
        return Image.alpha_composite(
            Image.new("RGBA", image.size, (*BACKGROUND, 255)), image
        ).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Scale unsigned grey values (H, W) of up to 16 bits to 8 bits, rounded."""
    tags: Any = getattr(image, "tag_v2", {})
    (bits, *_), (kind, *_) = tags.get(BITS_PER_SAMPLE, (16,)), tags.get(SAMPLE_FORMAT, (UNSIGNED,))
    if bits > 16 or kind != UNSIGNED:
        raise ValueError(
            "its pixels are signed or 32-bit integers without a defined white level; "
            "convert it to unsigned 8 or 16 bits"
        )
    white = 2**bits - 1
    values = np.asarray(image).astype(np.uint32).clip(0, white)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts 8-bit images only
        values = white - values
    return ((values * 255 + white // 2) // white).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 (upright) if missing or unreadable."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged metadata may raise anything, but the image is intact
        return 1
    return value if isinstance(value, int) else 1


@functools.cache
def _available() -> list[str]:
    """The subset of `FORMATS` that this build of Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
