"""What inference needs besides the network: classes, preprocessing, temperature."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from kd_lightning.data.decoding import RESIZE
from kd_lightning.errors import InputError

LARGEST = 4096  # pixels

PIXELS = "uint8 RGB (batch, height, width, 3)"
"""Input of every exported file."""


@dataclass(frozen=True)
class Description:
    """Classes and preprocessing of a student; stored in the metadata of exported files.

    Attributes:
        class_names: in the order of the logits; empty if the run does not store them.
        image_size: input height and width, in pixels.
        mean: per-channel mean of pixel values scaled to [0, 1].
        std: per-channel standard deviation.
        resize: how an image of any size becomes a square; see `data.decoding`.
        stored_size: height and width of that square, of which the input is the centre; None: the
            square is the input.
        temperature: divisor of the logits that calibrates the probabilities.
        run: setting and name of the run.
    """

    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "squash"
    stored_size: int | None = None
    temperature: float = 1.0
    run: str = ""

    def as_metadata(self) -> dict[str, str]:
        """As text: JSON by key, which other programs can read."""
        return {key: json.dumps(value) for key, value in asdict(self).items()} | {
            "input": json.dumps(PIXELS)
        }

    def check(self) -> None:
        """Check the preprocessing.

        Raises:
            ValueError: a value is out of range.
        """
        edge = self.stored_size or self.image_size
        if not 1 <= self.image_size <= edge <= LARGEST:
            raise ValueError(f"image_size {self.image_size}, stored_size {self.stored_size}")
        if self.resize not in RESIZE or min(self.std) <= 0:
            raise ValueError(f"resize {self.resize}, std {self.std}")

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], file: str) -> "Description":
        """Inverse of `as_metadata`.

        Raises:
            InputError: a key is missing or invalid.
        """
        try:
            values = {part.name: json.loads(metadata[part.name]) for part in fields(cls)}
            found = cls(
                class_names=tuple(map(str, list(values["class_names"]))),
                image_size=int(values["image_size"]),
                mean=_three(values["mean"]),
                std=_three(values["std"]),
                resize=str(values["resize"]),
                stored_size=None if values["stored_size"] is None else int(values["stored_size"]),
                temperature=valid_temperature(values["temperature"]),
                run=str(values["run"]),
            )
            found.check()
            return found
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"{file} was not written by scripts/export.py: its metadata have no valid "
                "class_names, image_size, mean, std, resize, stored_size, temperature and run"
            ) from error


def valid_temperature(value: Any) -> float:
    """A number from 0.001 to 1000.

    Raises:
        ValueError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"the temperature is {value!r}")
    if not 1e-3 <= value <= 1e3:
        raise ValueError(f"the temperature is {value}")
    return float(value)


def _three(values: Sequence[float]) -> tuple[float, ...]:
    numbers = tuple(map(float, values))
    if len(numbers) != 3:
        raise ValueError(f"{len(numbers)} channels")
    return numbers
