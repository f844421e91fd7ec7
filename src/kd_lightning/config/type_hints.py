"""Validation of YAML values against type hints."""

import collections.abc
import enum
import inspect
import os
import types
import typing
from collections.abc import Collection, Iterator
from typing import Any, Literal

from kd_lightning.errors import InputError

LITERAL: Any = Literal  # mypy does not compare types with it otherwise
SCALARS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


def check_value(value: Any, hint: Any, path: str, strict: bool = False) -> None:
    """Check a YAML value against a type hint; unknown kinds of hints accept any value.

    Args:
        value: the value.
        hint: the type hint.
        path: the value's path in the configuration, for messages.
        strict: whether the hint is exact, elements of lists included. Otherwise it may be narrower
            than what is accepted: lists and dictionaries match any.

    Raises:
        InputError: the value does not match the type.
    """
    parts = list(union_parts(hint))
    scalars = [part for part in parts if part in SCALARS]
    for part in parts:
        # In a union with scalars, ignore classes such as Tensor, which YAML cannot express.
        opaque = inspect.isclass(_origin(part)) and not (_describe(part) or _choices(part))
        ignored = opaque and scalars and isinstance(value, str | int | float)
        if not ignored and _fits(value, part, strict):
            if strict and isinstance(value, list):
                _check_elements(value, part, path)
            return
    origins = [_origin(part) for part in parts]
    if isinstance(value, str) and collections.abc.Callable in origins:
        raise InputError(
            f"{path} must be a callable, not a string: write {{_target_: {value}, _partial_: true}}"
        )
    if isinstance(value, str) and type in origins:
        raise InputError(
            f"{path} must be a class, not its name: "
            f"write {{_target_: hydra.utils.get_class, path: {value}}}"
        )
    choices = [str(choice) for part in parts for choice in _choices(part)]
    allowed = sorted({_describe(part) for part in parts} - {""})
    if choices:
        allowed.append(f"one of {', '.join(dict.fromkeys(choices))}")
    words = " or ".join(allowed) or "a node with a _target_"
    raise InputError(f"{path} must be {words}, not {value!r}")


def _check_elements(values: list[Any], hint: Any, path: str) -> None:
    kinds = typing.get_args(hint)
    if _origin(hint) is not tuple or kinds[-1:] in ((), (...,)):
        kinds = kinds[:1] * len(values)
    elif len(kinds) != len(values):
        raise InputError(f"{path} must be a list of {len(kinds)} values, not {values!r}")
    for index, (value, kind) in enumerate(zip(values, kinds, strict=False)):  # none without kinds
        check_value(value, kind, f"{path}[{index}]", strict=True)


def union_parts(hint: Any) -> Iterator[Any]:
    """The members of a union; the underlying type of an annotated type or alias."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from union_parts(part)
    elif origin is typing.Annotated:
        yield from union_parts(typing.get_args(hint)[0])
    elif alias := getattr(hint, "__supertype__", None) or getattr(hint, "__value__", None):
        yield from union_parts(alias)
    else:
        yield hint


def _origin(hint: Any) -> Any:
    return typing.get_origin(hint) or hint


def is_enum(hint: Any) -> bool:
    """Whether a type hint is an enum."""
    return inspect.isclass(hint) and issubclass(hint, enum.Enum)


def _choices(hint: Any) -> Collection[Any]:
    if _origin(hint) is LITERAL:
        return typing.get_args(hint)
    return list(hint.__members__) if is_enum(hint) else ()


def _fits(value: Any, hint: Any, strict: bool) -> bool:
    if isinstance(value, dict) and "_target_" in value:
        return True
    origin = _origin(hint)
    if origin is LITERAL:
        return value in typing.get_args(hint)
    if is_enum(hint):
        named = isinstance(value, str) and value.rsplit(".", 1)[-1] in hint.__members__
        return named or value in [member.value for member in hint]
    if origin in (int, float, bool, str, type(None)):
        return _fits_scalar(value, origin, strict)
    if not inspect.isclass(origin):
        return True  # Any, a type variable, an unresolved name
    if value is None:
        return origin is object
    if origin in (collections.abc.Callable, type):
        return not isinstance(value, str | int | float | list)
    if issubclass(origin, os.PathLike):
        return isinstance(value, str)
    if strict and isinstance(value, list | dict) and _is_container(origin):
        return isinstance(value, dict) == issubclass(origin, collections.abc.Mapping)
    return not (isinstance(value, str | int | float) and _is_container(origin))


def _fits_scalar(value: Any, kind: type, strict: bool) -> bool:
    if isinstance(value, list | dict):
        return not strict
    if isinstance(value, bool) or kind is not float:
        return type(value) is kind
    return isinstance(value, int | float)


def _is_container(kind: Any) -> bool:
    abstract = kind.__module__ == "collections.abc" and issubclass(kind, collections.abc.Iterable)
    return abstract or issubclass(kind, list | tuple | set | frozenset | dict)


def _describe(hint: Any) -> str:
    origin = _origin(hint)
    if origin in SCALARS:
        return SCALARS[origin]
    if origin is type(None):
        return "null"
    if inspect.isclass(origin) and _is_container(origin):
        return "a dictionary" if issubclass(origin, collections.abc.Mapping) else "a list"
    if inspect.isclass(origin) and issubclass(origin, os.PathLike):
        return "a path"
    return ""  # an object that YAML cannot express
