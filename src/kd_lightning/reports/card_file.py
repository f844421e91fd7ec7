"""The file of a model card, which is not replaced once somebody has edited it."""

import hashlib
import re
from pathlib import Path

from kd_lightning.errors import InputError
from kd_lightning.files import write_text

_END = "\n<!-- generated: {} -->\n"
_GENERATED = re.compile(re.escape(_END).replace(r"\{\}", "([0-9a-f]{16})"))


def write_card(path: Path, card: str, overwrite: bool = False) -> None:
    """Write a model card, with a hash of its text in a comment at its end.

    Args:
        path: the file.
        card: Markdown.
        overwrite: whether to replace a file of other content, too.

    Raises:
        InputError: the file is no generated card, or was edited since.
        OSError: it cannot be read or written.
    """
    check_card(path, overwrite)
    write_text(path, card + _END.format(_digest(card)))


def check_card(path: Path, overwrite: bool = False) -> None:
    """Check that `write_card` may replace a file; errors as there."""
    if not overwrite and path.exists() and not _is_generated(path.read_text("utf-8", "replace")):
        raise InputError(
            f"{path} is no generated card, or was edited since: add --overwrite to replace it, or "
            "--out FILE to write another file"
        )


def _is_generated(text: str) -> bool:
    card, *found = _GENERATED.split(text, maxsplit=1)
    return found == [_digest(card), ""]


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode("utf-8", "replace")).hexdigest()[:16]
