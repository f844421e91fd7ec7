"""Checks of the keys that say which weights a network starts from and which input it expects."""

import math
from typing import Any

from kd_lightning.config.nodes import Node
from kd_lightning.errors import InputError


def check_initial(section: Node, path: str) -> None:
    """Check the keys of a section, student or teacher, at a path.

    Raises:
        InputError: a value is invalid, or two keys contradict each other.
    """
    for key in ("pretrained", "finetune"):
        if not isinstance(section.get(key) or False, bool):
            raise InputError(f"{path}.{key} must be true or false, not {section[key]}")
    checkpoint, pretrained = section.get("checkpoint"), section.get("pretrained")
    if checkpoint is not None and pretrained:
        raise InputError(f"{path}.checkpoint cannot be used with {path}.pretrained: omit one")
    if section.get("finetune") and checkpoint is None and not pretrained:
        raise InputError(
            f"{path}.finetune needs weights to start from: {path}.pretrained=true or "
            f"{path}.checkpoint=FILE"
        )
    if section.get("decay") is not None and (pretrained or section.get("finetune")):
        raise InputError(f"{path}.decay: a teacher that follows the student has no weights")
    size: Any = section.get("image_size")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise InputError(f"{path}.image_size must be null or a number of pixels, not {size}")
    for key in ("mean", "std"):
        values: Any = section.get(key)
        if values is not None and not _is_colour(values, positive=key == "std"):
            above = " above 0" if key == "std" else ""
            raise InputError(f"{path}.{key} must be null or three numbers{above}, not {values}")
    renamed, ignored = section.get("rename_keys") or {}, section.get("ignore_keys") or []
    if not isinstance(renamed, dict) or not all(isinstance(new, str) for new in renamed.values()):
        raise InputError(
            f"{path}.rename_keys must be a dictionary from key prefixes to replacements, "
            f"e.g. '{path}.rename_keys={{model.: \"\"}}', not {renamed!r}"
        )
    if not isinstance(ignored, list) or not all(isinstance(part, str) for part in ignored):
        raise InputError(
            f"{path}.ignore_keys must be a list of patterns, as [total_*,head.*], not {ignored!r}"
        )


def _is_colour(values: Any, positive: bool) -> bool:
    return (
        isinstance(values, list | tuple)
        and len(values) == 3
        and all(type(value) in (int, float) and math.isfinite(value) for value in values)
        and (min(values) > 0 or not positive)
    )
