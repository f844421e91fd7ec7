"""How command-line overrides change the configuration; extends Hydra's rules.

- A dictionary may add new keys. It is merged key by key, but a node with a different `_target_` is
  replaced: another optimizer does not inherit the default's ``momentum``.
- ``GROUP=null`` removes a group: ``scheduler=null`` is a constant learning rate.
- An unknown key is rejected, with the closest known one as a suggestion.

Hydra has no hook between composing the groups and applying the overrides, so `install` patches two
methods of its configuration loader, and the parsers of overrides and interpolations, to parse each
text once. This covers single runs, sweeps and `hydra.compose`.
"""

import copy
import difflib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import omegaconf.base
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, ListConfig, OmegaConf, ValueNode, grammar_parser, open_dict

from kd_lightning.config.checks import OPTIONAL
from kd_lightning.errors import InputError
from kd_lightning.files import home

REPLACED = ("rename_keys",)
"""Dictionaries that an override replaces instead of merging into."""

_parse = ConfigLoaderImpl._parse_overrides_and_create_caching_repo
_parse_rule_as_hydra = OverridesParser.parse_rule
_apply_as_hydra = ConfigLoaderImpl._apply_overrides_to_config
# The trees are only read. Interpolations are the same in every run of a grid.
_parsed_interpolation = functools.lru_cache(maxsize=4096)(grammar_parser.parse)


def install() -> None:
    """Patch Hydra, in this process, to apply overrides by these rules."""

    def parse(self: ConfigLoaderImpl, config_name: str | None, overrides: list[str]) -> Any:
        parsed, repository = _parse(self, config_name, overrides)
        for override in parsed:
            if repository.group_exists(override.key_or_group):
                _check_choice(override, repository)
            elif "/" in override.key_or_group:
                parent, _, group = override.key_or_group.rpartition("/")
                groups = repository.get_group_options(parent, ObjectType.GROUP)
                near = difflib.get_close_matches(group, groups, n=1)
                hint = f"; did you mean {parent}/{near[0]}?" if near else ""
                raise InputError(f"there is no group '{override.key_or_group}'{hint}")
        unset = [o for o in parsed if o.is_delete() and o.key_or_group == "experiment"]
        return [override for override in parsed if override not in unset], repository

    def parse_rule(self: OverridesParser, s: str, rule_name: str) -> Any:
        if rule_name != "override":
            return _parse_rule_as_hydra(self, s, rule_name)
        return copy.copy(_parsed(s))  # some are changed later

    OverridesParser.parse_rule = parse_rule  # type: ignore[method-assign]
    omegaconf.base.parse = _parsed_interpolation  # type: ignore[attr-defined]
    ConfigLoaderImpl._parse_overrides_and_create_caching_repo = parse  # type: ignore[method-assign]
    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(apply)  # type: ignore[method-assign, assignment]


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Override:
    """Hydra parses each override several times, and in a grid for every run."""
    return _parse_rule_as_hydra(override_parser(), text, "override")


@functools.cache
def override_parser() -> OverridesParser:
    """Hydra's parser of overrides, which inspects the signatures of its functions when created."""
    return OverridesParser.create()


def _check_choice(override: Override, repository: IConfigRepository) -> None:
    value = override.value()
    if override.is_sweep_override() or isinstance(value, dict | list) or override.is_delete():
        return
    options = repository.get_group_options(override.key_or_group)
    if value is None or (value == "none" and "none" not in options):
        override.type, override._value = OverrideType.DEL, None
    elif not isinstance(value, str):
        raise InputError(no_such_choice(override.key_or_group, str(value), options))


def no_such_choice(group: str, choice: str, options: Sequence[str]) -> str:
    """Error message for `GROUP=CHOICE` with an unknown choice."""
    near = difflib.get_close_matches(choice, options, n=5)
    # Prefer those that differ in the last character: resnet20 for resnet21.
    near.sort(key=lambda option: choice[:-1] not in option)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={choice} does not exist; {hint}choose from {', '.join(options)}"


def apply(overrides: list[Override], config: DictConfig) -> None:
    """Apply overrides to a composed configuration.

    Raises:
        InputError: a key does not exist, or already exists and was to be added.
    """
    for override in overrides:
        key, value = override.key_or_group, override.value()
        there = _exists(config, key)
        if override.type in (OverrideType.CHANGE, OverrideType.DEL) and not there:
            if override.is_delete() or not _is_optional(key):
                raise InputError(no_such_key(config, key))
            OmegaConf.update(config, key, value, force_add=True)
        elif override.is_add() and there and not isinstance(value, dict | list):
            raise InputError(f"{key} already exists: omit the + in {override.input_line}")
        elif override.type == OverrideType.CHANGE and isinstance(value, dict):
            with open_dict(config):
                merge(config, key.split("."), value)
        elif override.type == OverrideType.CHANGE and _is_node(config, key):
            _change_node(config, override)
        else:
            _apply_as_hydra([override], config)
    _expand_home(config)


def merge(node: Any, path: list[str], value: dict[Any, Any]) -> None:
    """Merge a dictionary into the one at a path; a node with another `_target_` replaces it."""
    *parents, last = path
    for part in parents:
        node = node[part]
    old = node.get(last)
    target = value.get("_target_")
    if last in REPLACED or not isinstance(old, DictConfig) or target not in (
        None, old.get("_target_"),
    ):  # fmt: skip
        node[last] = value
        return
    for key, part in value.items():
        if isinstance(part, dict):
            merge(old, [key], part)
        else:
            old[key] = part


def _change_node(config: DictConfig, override: Override) -> None:
    """Replace a `_target_` node by null; reject other scalars, such as the name of a choice."""
    key, value = override.key_or_group, override.value()
    if value is not None and value != "none":
        group = key.rsplit(".", 1)[-1]
        raise InputError(
            f"{key} must be a node with a _target_, not {value!r}; "
            f"to select a file of the group {group}: {group}@{key}={value}"
            if group in config and group != key
            else f"{key} must be a node with a _target_, not {value!r}"
        )
    OmegaConf.update(config, key, None)


def _expand_home(config: DictConfig) -> None:
    # Before they are interpolated into run folders; `config.plain` expands the others.
    for key in ("output_dir", "hydra.run.dir", "hydra.sweep.dir"):
        parent, last = _parent(config, key)
        node = parent._get_node(last) if isinstance(parent, DictConfig) else None
        path = node._value() if isinstance(node, ValueNode) else None  # not resolved yet
        if isinstance(path, str) and home(path) != path:
            OmegaConf.update(config, key, home(path))


def _exists(config: DictConfig, key: str) -> bool:
    parent, last = _parent(config, key)
    if isinstance(parent, ListConfig):
        return last.isdecimal() and int(last) < len(parent)
    return isinstance(parent, DictConfig) and last in parent._content  # type: ignore[operator]


def _parent(config: Any, key: str) -> tuple[Any, str]:
    *parents, last = key.replace("[", ".").replace("]", "").split(".")
    for part in parents:
        if not isinstance(config, DictConfig) or part not in config:
            return None, last
        config = config._get_node(part)
    return config, last


def _is_node(config: DictConfig, key: str) -> bool:
    parent, last = _parent(config, key)
    node = parent._get_node(last) if isinstance(parent, DictConfig) else None
    return isinstance(node, DictConfig) and not node._is_none() and "_target_" in node


def _is_optional(key: str) -> bool:
    section, _, name = key.rpartition(".")
    return name in OPTIONAL.get(section, ())


def no_such_key(config: DictConfig, key: str) -> str:
    """Error message for a key missing in the configuration, with a suggestion."""
    node: Any = config
    walked: list[str] = []
    for part in key.split("."):
        if not isinstance(node, DictConfig) or node._is_none() or part not in node:
            break
        node = node._get_node(part)
        walked.append(part)
    if not isinstance(node, DictConfig) or node._is_none():
        return f"there is no key '{key}': {'.'.join(walked)} is a single value"
    wrong, *rest = key.split(".")[len(walked) :]
    taken, open_ended = _arguments(node, walked)
    present = {str(name) for name in node if name != "hydra"}
    prefix = "".join(f"{part}." for part in walked)
    if wrong in taken:
        return f"{key} is not set in the configuration: add it with +{key}=VALUE"
    names = sorted(name for name in taken | present if not name.startswith("_"))
    near = (
        difflib.get_close_matches(wrong, sorted(present), n=1)  # preferred over keys to add
        or difflib.get_close_matches(wrong, names, n=1)
        or [name for name in names if wrong in name]
    )
    if near:
        found = ".".join([prefix + near[0], *rest])
        if not _exists(config, found):
            plus = "" if near[0] in present or _is_optional(prefix + near[0]) else "+"
            found = plus + prefix + near[0]
        return f"there is no key '{key}'; did you mean {found}?"
    if not walked and (elsewhere := find_key(config, key)):
        return f"there is no key '{key}'; did you mean {elsewhere}?"
    known = f"; known keys: {', '.join(names)}" if names else ""
    add = f"; add it with +{key}=VALUE" if open_ended else ""
    return f"there is no key '{key}'{known}{add}"


def _arguments(node: DictConfig, path: list[str]) -> tuple[set[str], bool]:
    """The keys that may be set at a node, and whether other keys are accepted too."""
    names = set(OPTIONAL.get(".".join(path), ()))
    target: Any = OmegaConf.to_container(node, resolve=False).get("_target_")  # type: ignore[union-attr]
    if path == ["teacher", "trainer"]:  # overrides of the run's trainer
        target = "lightning.pytorch.Trainer"
    if isinstance(target, str):
        from kd_lightning.config.nodes import find_target, signature

        try:
            parameters, _, open_ended = signature(find_target(target, ".".join(path)))
        except InputError:
            return names, True
        return names | set(parameters), open_ended
    return names, path in (["method", "terms"], ["teacher", "rename_keys"]) or path[:1] == ["hydra"]


def find_key(config: DictConfig, name: str) -> str | None:
    """The key, anywhere in the configuration, whose last part is closest to a name: ``lr`` gives
    ``optimizer.lr``.
    """
    plain = OmegaConf.to_container(config, resolve=False)
    name = name.replace("-", "_").rsplit(".", 1)[-1]
    ends: dict[str, str] = {}
    for key in sorted(_leaves(plain), key=lambda key: (key.count("."), key.startswith("teacher"))):
        ends.setdefault(key.rsplit(".", 1)[-1], key)
    near = [name] if name in ends else difflib.get_close_matches(name, ends, n=1, cutoff=0.7)
    return ends[near[0]] if near else None


def _leaves(node: Any, path: str = "") -> Iterator[str]:
    for key, value in node.items():
        if path or key != "hydra":
            yield f"{path}{key}"
            if isinstance(value, dict):
                yield from _leaves(value, f"{path}{key}.")
