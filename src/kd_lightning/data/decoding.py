"""Decoding of image files of any supported format to 8-bit RGB pixels."""

import functools
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from kd_lightning.errors import InputError
from kd_lightning.files import readable

# Formats that Pillow does not decode by itself: EPS and WMF through external programs (Ghostscript,
# the Windows API), which is unsafe for untrusted files; the others only if a plugin is installed.
REFUSED = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "FPX", "MIC"}

COMMON = {"JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM"}

RESIZE = ("squash", "crop", "pad")
"""How an image of any aspect ratio becomes a square; see `to_square`."""

PADDING = (128, 128, 128)
"""Grey, as cut-out pixels: 0 after the default normalisation."""

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

SIGNED = ("FITS", "IM")  # formats whose values beyond 8 bits may be negative, or have an offset

# Pillow scales grey values of low bit depths by these factors, but not the transparent value.
LOW_DEPTHS = {"L;2": 85, "L;4": 17}


def decode(file: Path | BinaryIO, size: int, resize: str = "squash") -> npt.NDArray[np.uint8]:
    """Decode the first frame of an image file, upright, and make it a square.

    Args:
        file: its path, or its content.
        size: height and width of the result, in pixels.
        resize: one of `RESIZE`; see `to_square`.

    Returns:
        (size, size, 3), RGB.

    Raises:
        Exception: any exception of Pillow: the file is damaged, not an image, larger than
            `PIL.Image.MAX_IMAGE_PIXELS` times two, or has a pixel format without a defined
            conversion to 8 bits.
    """
    with Image.open(file, formats=_formats()) as opened:
        raw_mode = opened.tile[0][3] if opened.tile else None
        opened.load()
        info = opened.info
        if raw_mode in LOW_DEPTHS and "transparency" in info:
            info["transparency"] *= LOW_DEPTHS[raw_mode]
        if raw_mode == "RGB;16B" and "transparency" in info:  # the upper halves were read
            info["transparency"] = tuple(value >> 8 for value in info["transparency"])
        image = to_rgb(opened)
        turn = UPRIGHT.get(_orientation(opened))
    if turn is not None:
        image = image.transpose(turn)
    return np.asarray(to_square(image, size, resize))


def read_image(
    path: Path, size: int, resize: str = "squash", content: bytes | None = None
) -> npt.NDArray[np.uint8]:
    """`decode` with a message for people.

    Args:
        path: the file.
        size: height and width of the result, in pixels.
        resize: see `decode`.
        content: its content, if it has been read.

    Raises:
        InputError: the file cannot be decoded.
    """
    try:
        return decode(path if content is None else BytesIO(content), size, resize)
    except MemoryError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{readable(path)} does not exist") from error
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{readable(path)} has more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels; make "
            "it smaller or remove it"
        ) from error
    except Exception as error:  # Pillow may raise anything on damaged files
        reason = (
            "it is damaged or of an unknown format"
            if isinstance(error, UnidentifiedImageError)
            else error
        )
        raise InputError(
            f"{readable(path)} is not a readable image ({reason}); repair or remove it"
        ) from error


def to_square(image: Image.Image, size: int, resize: str = "squash") -> Image.Image:
    """Resize an RGB image, with bilinear interpolation and antialiasing.

    Args:
        image: of any size.
        size: height and width of the result, in pixels.
        resize: ``squash`` changes the aspect ratio, and keeps all of the image. ``crop`` keeps the
            aspect ratio, and the centre of the longer side. ``pad`` keeps the aspect ratio and all
            of the image, in the centre between two bars of `PADDING`.
    """
    width, height = image.size
    if resize == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return _resized(image, (size, size), (left, top, left + side, top + side))
    if resize == "pad":
        longer = max(width, height)
        inner = (max(1, round(width * size / longer)), max(1, round(height * size / longer)))
        square = Image.new("RGB", (size, size), PADDING)
        square.paste(_resized(image, inner), ((size - inner[0]) // 2, (size - inner[1]) // 2))
        return square
    return _resized(image, (size, size))


def _resized(
    image: Image.Image, size: tuple[int, int], box: tuple[int, int, int, int] | None = None
) -> Image.Image:
    """The box (left, top, right, bottom) of an image, by default all of it, at a size."""
    box = box or (0, 0, *image.size)
    if (box[2] - box[0], box[3] - box[1]) == size:
        return image.crop(box)
    return image.resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=3)


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
    signed = kind != UNSIGNED or getattr(image, "format", None) in SIGNED
    if bits > 16 or signed:
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


def is_image_name(name: str) -> bool:
    """Whether a file name has the suffix of a format that is decoded here."""
    return Path(name).suffix.lower() in suffixes()


@functools.cache
def suffixes() -> frozenset[str]:
    """Suffixes of all formats that are decoded here, in lower case: ``.png``, ..."""
    formats = set(_formats())
    if "JPEG" in formats:
        formats.add("MPO")  # several JPEG images in a file, opened by the JPEG plugin
    return frozenset(
        suffix for suffix, name in Image.registered_extensions().items() if name in formats
    )


@functools.cache
def _formats() -> list[str]:
    """The formats that this build of Pillow decodes by itself.

    Tried in this order: those that cannot be recognised by their first bytes are last.
    """
    Image.init()
    usable = [name for name in Image.ID if name in Image.OPEN and name not in REFUSED]
    return sorted(usable, key=lambda name: (name not in COMMON, Image.OPEN[name][1] is None))
