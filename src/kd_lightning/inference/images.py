"""Conversion of files, Pillow images, arrays and tensors to pixels of the student's size."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch import Tensor

from kd_lightning.data.decoding import read_image, to_rgb, to_square
from kd_lightning.errors import InputError
from kd_lightning.inference.description import Description

Pixels: TypeAlias = npt.NDArray[np.uint8]

AnImage: TypeAlias = str | Path | Image.Image | Pixels
"""A file, a Pillow image of any mode, or RGB pixels (H, W, 3), uint8; of any size."""

Images: TypeAlias = Sequence[AnImage] | AnImage | Tensor
"""Several images; one; or a tensor (B, 3, H, W), uint8, or floating-point in [0, 1]."""


def batches(images: Images, description: Description, size: int) -> Iterator[Tensor]:
    """Convert images to batches of at most `size` in the input layout of `PixelNetwork`.

    Files, Pillow images and arrays are resized as in the training; files are decoded in threads.

    Yields:
        Pixels (B, H, W, 3), 0 to 255, uint8, or float32 if floating-point tensors are given.

    Raises:
        InputError: a file cannot be decoded, or a tensor or array has another shape or type.
    """
    if isinstance(images, Tensor):
        yield from _of_tensor(images, description.image_size).split(size)
        return
    if isinstance(images, str | Path | Image.Image) or _is_array(images, 3):
        images = [images]  # type: ignore[list-item]
    if isinstance(images, np.ndarray) and images.ndim < 4:
        _checked(images, 3)  # a grey image, whose rows would be taken for images
    if not hasattr(images, "__getitem__"):
        raise InputError(
            f"images must be one image, a list of them, an array or a tensor, not "
            f"{type(images).__name__}"
        )
    as_they_are = (
        description.stored_size is None
        and _is_array(images, 4)
        and images.shape[1:3] == (description.image_size,) * 2  # type: ignore[union-attr]
    )
    if as_they_are:
        yield from torch.from_numpy(np.ascontiguousarray(_checked(images, 4))).split(size)
        return
    with ThreadPoolExecutor() as pool:  # Pillow releases the GIL while decoding
        for start in range(0, len(images), size):
            part = images[start : start + size]
            arrays = pool.map(lambda image: to_pixels(image, description), part)
            yield torch.from_numpy(np.stack(list(arrays)))


def to_pixels(image: AnImage, description: Description) -> Pixels:
    """Decode and resize one image to (H, W, 3).

    Raises:
        InputError: it cannot be decoded, or is an array of another shape or type.
    """
    size = description.stored_size or description.image_size
    edge = (size - description.image_size) // 2
    centre = slice(edge, edge + description.image_size)
    return _to_square_pixels(image, size, description.resize)[centre, centre]


def _to_square_pixels(image: AnImage, size: int, resize: str) -> Pixels:
    if isinstance(image, str | Path):
        return read_image(Path(image), size, resize)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(_checked(image, 3))
    if not isinstance(image, Image.Image):
        raise InputError(
            "images must be files, Pillow images, uint8 arrays or a tensor, not "
            f"{type(image).__name__}"
        )
    try:
        return np.asarray(to_square(to_rgb(ImageOps.exif_transpose(image)), size, resize))
    except Exception as error:  # Pillow may raise anything
        raise InputError(f"a Pillow image of mode {image.mode} is not readable: {error}") from error


def _is_array(images: Any, axes: int) -> bool:
    return isinstance(images, np.ndarray) and images.ndim == axes


def _checked(array: Any, axes: int) -> Pixels:
    if array.dtype != np.uint8 or array.ndim != axes or array.shape[-1] != 3:
        raise InputError(
            "arrays must have the type uint8 and the shape (height, width, 3), or (images, height, "
            f"width, 3), not {array.dtype} and {array.shape}"
        )
    return array


def _of_tensor(images: Tensor, size: int) -> Tensor:
    if images.shape[1:] != (3, size, size):
        raise InputError(
            f"a tensor of images must have the shape (B, 3, {size}, {size}), not "
            f"{tuple(images.shape)}"
        )
    if images.dtype == torch.uint8:
        return images.permute(0, 2, 3, 1)
    if not images.is_floating_point():
        raise InputError(
            f"a tensor of images must be uint8, or floating-point in [0, 1], not {images.dtype}"
        )
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise InputError("a floating-point tensor of images must be in [0, 1]; or give it as uint8")
    return images.permute(0, 2, 3, 1).float() * 255
