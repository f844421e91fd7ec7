"""Differences between the settings of runs: `optimizer.lr 0.1` against `optimizer.lr 0.05`.

Settings are read from each run's `config.yaml`, flattened to dotted keys, and compared only where
meaningful: the momentum of one SGD with that of another, but not with AdamW, which has none.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from kd_lightning.config.stored import parse_yaml
from kd_lightning.config.tree import tree

Settings = dict[str, str]
"""Dotted keys to human-readable values."""

ALWAYS = ("optimizer.lr", "data.batch_size", "trainer.max_epochs")
"""Always compared and shown, whether or not they differ."""

NAMED = ("method", "student", "teacher", "data")
"""Sections that have a name."""

# Names, paths, and the axes of a comparison.
_LEFT_OUT = ("seed", "output_dir", "data_dir", "name", "setting", "hydra", "logger")
_LEFT_OUT_BELOW = {"data": ("seed", "cache_dir", "streamed", "workers"), "remember": ("disk_gb",)}
# Hardware settings: runs that differ in these may share a cell.
_MACHINE = (
    "trainer.precision", "trainer.accelerator", "trainer.devices", "trainer.strategy",
    "trainer.memory_format", "trainer.log_every_n_steps", "data.eval_batch_size", "data.root",
)  # fmt: skip
# Shown for every run anyway; used only to determine which runs can be compared.
_FACTS = ("setting", "method", "student")
_LARGEST = 2**17  # bytes; typically about 3,000
_MOST = 500  # keys; typically about 60
_LONGEST = 60  # displayed characters of a key or a value
NOT_SET = "not set"


class SettingsReader:
    """Reads the settings of many runs, parsing shared sections only once."""

    def __init__(self) -> None:
        self._parsed: dict[str, dict[Any, Any] | None] = {}
        self._known: dict[tuple[str, ...], Settings] = {}

    def read(self, run: Path) -> Settings:
        """Read the settings of a run; empty if its `config.yaml` is missing or unreadable.

        Args:
            run: folder of the run.
        """
        try:
            with (run / "config.yaml").open(encoding="utf-8") as file:
                text = file.read(_LARGEST)
        except (OSError, ValueError):
            return {}
        sections = tuple(
            re.sub(r"(?m)^  seed: .*\n", "", part) if part.startswith("data:") else part
            for part in re.split(r"(?m)^(?=\w+:)", text)
            if part.partition(":")[0] not in _LEFT_OUT or part.startswith("data_dir:")
        )
        if sections not in self._known:
            self._known[sections] = self._flatten(sections)
        return self._known[sections]

    def _flatten(self, sections: Sequence[str]) -> Settings:
        config: dict[Any, Any] = {}
        for part in sections:
            if part not in self._parsed:
                self._parsed[part] = _parse(part)
            parsed = self._parsed[part]
            if parsed is None:
                return {}
            config |= parsed
        return flatten(config)


def _parse(text: str) -> dict[Any, Any] | None:
    """Parse a YAML mapping; None if it is not a mapping, or is suspicious."""
    try:
        parsed = parse_yaml(text) or {}
        return parsed if isinstance(parsed, dict) else None
    except (yaml.YAMLError, ValueError, TypeError):
        return None


def flatten(settings: Mapping[Any, Any]) -> Settings:
    """Flatten a configuration to dotted keys and human-readable values.

    Names, paths, the seed, and values derived from the data or the axes are left out. A `_target_`
    represents its section, without its module: `optimizer SGD`.
    """
    data = settings.get("data")
    data = data if isinstance(data, Mapping) else {}
    found: Settings = {}

    def walk(node: Mapping[Any, Any], path: str) -> None:
        for name, value in node.items():
            if not isinstance(name, str) or not name or len(found) >= _MOST:
                continue
            if (not path and name in _LEFT_OUT) or name in _LEFT_OUT_BELOW.get(path, ()):
                continue
            key = _line(f"{path}.{name}" if path else name)
            if name == "_target_":
                if path not in NAMED:
                    found[path] = word(str(value).rpartition(".")[2])
            elif isinstance(value, Mapping):
                walk(value, key)
            elif key == "teacher.members" and isinstance(value, list):
                walk({str(number): member for number, member in enumerate(value)}, key)
            elif not (
                (name == "name" and path in NAMED)
                or (name in ("num_classes", "image_size") and path and path != "data"
                    and value == data.get(name))
                or (key == "data.root" and value == settings.get("data_dir"))
            ):  # fmt: skip
                found[key] = word(value)

    walk(settings, "")
    return found


def word(value: Any) -> str:
    """Format a value for display, on one line of limited length."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return _line(text) or "empty"


def _line(text: str) -> str:
    """Make text printable on one line of limited length."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def differences(rows: Sequence[Mapping[str, str]]) -> list[Settings]:
    """For each row, the settings in which it differs from a comparable row.

    Rows are comparable in a key if they have the same parent: `optimizer.momentum` if they have the
    same optimizer, `teacher.layers` if the same teacher. Keys of `ALWAYS` are always compared. A
    key that is missing in an older row, and has its default value in the others, is no difference.
    """
    distinct = {tuple(sorted(row.items())): row for row in rows}
    if len(distinct) < 2:
        return [{} for _ in rows]
    keys = dict.fromkeys(key for row in distinct.values() for key in row)
    shown: dict[tuple[str, Any], bool] = {}
    for key in keys:
        places: dict[Any, list[str | None]] = defaultdict(list)
        for row in distinct.values():
            places[_context(key, row)].append(row.get(key))
        for context, values in places.items():
            present = {value for value in values if value is not None}
            absent = len(present) == 1 and None in values and not present <= _defaults(key)
            shown[key, context] = key not in _FACTS and (len(present) > 1 or absent)
    order = sorted(
        {key for (key, _), differs in shown.items() if differs},
        key=lambda key: (
            ALWAYS.index(key) if key in ALWAYS else len(ALWAYS),
            list(keys).index(key),
        ),
    )
    return [
        {key: row.get(key, NOT_SET) for key in order if shown[key, _context(key, row)]}
        for row in rows
    ]


def _context(key: str, row: Mapping[str, str]) -> tuple[Any, ...]:
    """The values that must be equal for rows to be comparable in a key."""
    if key in ALWAYS:
        return ()
    parts = key.split(".")
    above = (".".join(parts[:end]) for end in range(1, len(parts)))
    return tuple(row.get(prefix) for prefix in (*above, *_CONTEXTS.get(key, ())))


IMAGES, TEACHER, CODE = "images", "teacher's weights", "code"
"""Names of content differences, which are shown by the first digits of a SHA-256."""
_CONTEXTS = {IMAGES: ("data", "data.root", "data.image_size"), TEACHER: ("setting",)}


def recipe(settings: Mapping[str, str]) -> Settings:
    """The settings without hardware settings."""
    return {key: value for key, value in settings.items() if key not in _MACHINE}


def follow_the_seed(rows: Sequence[Mapping[str, str]], seeds: Sequence[str]) -> set[str]:
    """The keys of further seeds that have the seed of the run in every row: `data.view_seed`."""
    return {
        key
        for key in union(rows)
        if key.endswith("seed")
        and all(row.get(key) == seed for row, seed in zip(rows, seeds, strict=True))
    }


def in_words(settings: Mapping[str, str], most: int = 8) -> str:
    """`optimizer.lr 0.1, data.batch_size 64`, with at most `most` settings."""
    words = [f"{key} {value}" for key, value in settings.items()]
    more = [f"and {len(words) - most} more differences"] if len(words) > most else []
    return ", ".join(words[:most] + more)


def union(rows: Iterable[Mapping[str, str]]) -> list[str]:
    """All keys, in order of first occurrence."""
    return list(dict.fromkeys(key for row in rows for key in row))


@cache
def _defaults(key: str) -> frozenset[str]:
    """The values of a key in the configuration tree of the package."""
    return frozenset({"none", *(row[key] for row in _shipped() if key in row)})


@cache
def _shipped() -> list[Settings]:
    packaged = tree().removeprefix("pkg://")
    root = Path(tree()) if packaged == tree() else Path(str(resources.files(packaged)))
    rows = []
    for path in sorted(root.rglob("*.yaml")):
        try:
            node = parse_yaml(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, ValueError):
            continue
        if not isinstance(node, dict) or path.parent.name in ("hydra", "experiment"):
            continue
        group = path.stem if path.parent.name == "base" else path.parent.name
        for place in ("",) if path.parent == root else (group, f"teacher.{group}"):
            nested: dict[str, Any] = node
            for part in reversed(place.split(".") if place else []):
                nested = {part: nested}
            rows.append(flatten(nested))
    return rows
