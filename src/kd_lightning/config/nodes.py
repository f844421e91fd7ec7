"""`_target_` nodes: validation against the signature of the target, and instantiation."""

import collections.abc
import contextlib
import copy
import difflib
import enum
import functools
import inspect
import pkgutil
import types
import typing
from collections.abc import Callable
from typing import Any
from urllib.error import URLError

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from kd_lightning.config.type_hints import check_value, is_enum, union_parts
from kd_lightning.errors import InputError

Node = dict[str, Any]
Signature = tuple[dict[str, inspect.Parameter], dict[str, Any], bool]

# Keys of a node that Hydra interprets.
HYDRA_KEYS = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")


def check_node(node: Any, path: str, given: set[str] | None = None) -> None:
    """Check a `_target_` node and all nested nodes against the signatures of their targets.

    Args:
        node: the node.
        path: its path in the configuration, for messages.
        given: parameters supplied by the caller.

    Raises:
        InputError: a target cannot be imported, or does not accept these arguments.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise InputError(f"{path} must be a node with a _target_, not {node!r}")
    for key, kind, words in (
        ("_target_", str, "a dotted name"),
        ("_args_", list, "a list"),
        ("_partial_", bool, "true or false"),
        ("_recursive_", bool, "true or false"),
    ):
        if key in node and not isinstance(node[key], kind):
            raise InputError(f"{path}.{key} must be {words}, not {node[key]!r}")
    target = find_target(node["_target_"], path)
    if not callable(target):
        raise InputError(f"{path}._target_={node['_target_']} is neither a class nor a function")
    parameters, hints, open_ended = signature(target)
    arguments = {key: value for key, value in node.items() if key not in HYDRA_KEYS}
    ours = str(getattr(target, "__module__", "")).startswith("kd_lightning.")
    for key, value in arguments.items():
        if key not in parameters and not open_ended:
            raise InputError(unknown_key(f"{path}.{key}", set(parameters), path))
        default = getattr(parameters.get(key), "default", None)
        # A value of the default's type is accepted, whatever the annotation says.
        if key in hints and (type(value) is not type(default) or isinstance(value, list | str)):
            check_value(value, hints[key], f"{path}.{key}", strict=ours)
    if node.get("_recursive_", True):
        _check_nested(list(arguments.items()), path, given)
        _check_nested([("_args_", node.get("_args_", []))], path, given)
    if node.get("_partial_"):
        return  # the remaining arguments are passed by the caller
    positional = len(node.get("_args_", []))
    for name, parameter in list(parameters.items())[positional:]:
        required = parameter.default is parameter.empty
        if required and name not in arguments and name not in (given or ()):
            raise InputError(f"{path}.{name} must be given: {node['_target_']} requires it")


def _check_nested(values: list[tuple[str, Any]], path: str, given: set[str] | None) -> None:
    for key, value in values:
        place = f"{path}.{key}"
        if isinstance(value, dict) and "_target_" in value:
            check_node(value, place, given)
        elif isinstance(value, dict):
            _check_nested(list(value.items()), place, given)
        elif isinstance(value, list):
            for index, part in enumerate(value):
                _check_nested([(f"{key}[{index}]", part)], path, given)


def takes(node: Node, parameter: str, path: str) -> bool:
    """Whether the target of a node has a parameter of this name.

    Raises:
        InputError: the target cannot be imported.
    """
    return parameter in signature(find_target(node["_target_"], path))[0]


def find_target(target: Any, path: str) -> Any:
    """Import the class or function that a `_target_` names.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        found = pkgutil.resolve_name(target)
        if isinstance(found, types.ModuleType):
            # `torchvision.models.alexnet` is both a submodule and a function of its package.
            package, _, name = target.rpartition(".")
            found = getattr(pkgutil.resolve_name(package), name) if package else found
        return found
    except Exception as error:  # importing a module may raise anything
        raise InputError(
            f"{path}._target_={target} cannot be imported: {_reason(error)}"
        ) from error


def build(node: Node, path: str) -> Any:
    """Instantiate a `_target_` node.

    Raises:
        InputError: the constructor raised; the message names `path` and the reason.
    """
    if node.get("_partial_"):
        raise InputError(f"{path}: omit _partial_, the object itself is needed")
    node = _with_enums(node)
    try:
        if _needs_hydra(node):
            return instantiate(_converted(node))
        target, arguments = _taken_apart(node)
    except InstantiationException as error:
        raise _refused(path, error.__cause__ or error) from error
    try:
        return target(**arguments)
    except Exception as error:  # a constructor may raise anything
        raise _refused(path, error) from error


def build_partial(node: Node, path: str) -> Callable[..., Any]:
    """A callable that instantiates the node with additional arguments; errors as in `build`."""
    node = _with_enums(node)
    if _needs_hydra(node):
        partial = instantiate({**_converted(node), "_partial_": True})
    else:
        target, arguments = _taken_apart(node)
        partial = functools.partial(target, **arguments)

    @functools.wraps(partial.func)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return partial(*args, **kwargs)
        except Exception as error:  # a constructor may raise anything
            raise _refused(path, error) from error

    return call


def _converted(node: Node) -> Node:
    """The node to instantiate; as a keyword, `_convert_` would make Hydra copy the node again."""
    return {**node, "_convert_": "all"}


def _needs_hydra(node: Node) -> bool:
    """Whether Hydra has to resolve an argument, or to instantiate it.

    It makes several copies of a node, which takes longer than building most objects.
    """
    if any(key in node for key in HYDRA_KEYS if key != "_target_"):
        return True
    return not all(_is_data(value) for key, value in node.items() if key != "_target_")


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return all(
            isinstance(key, str) and key not in HYDRA_KEYS and _is_data(part)
            for key, part in value.items()
        )
    if isinstance(value, list):
        return all(map(_is_data, value))
    if isinstance(value, str):
        return "${" not in value and value != "???"
    return value is None or isinstance(value, bool | int | float | enum.Enum)


def _taken_apart(node: Node) -> tuple[Callable[..., Any], Node]:
    """The target, if Hydra allows it, and a copy of the arguments."""
    arguments = {key: value for key, value in node.items() if key != "_target_"}
    name, copied = node["_target_"], copy.deepcopy(arguments)
    try:
        found = find_target(name, "")
    except InputError:  # Hydra says why
        found = None
    if isinstance(found, collections.abc.Hashable):
        return _allowed(name, found), copied
    return _allowed.__wrapped__(name, found), copied


@functools.lru_cache(maxsize=256)
def _allowed(name: str, _: Any) -> Callable[..., Any]:
    """The target as Hydra calls it; not the earlier one if the name now means another object."""
    target: Callable[..., Any] = instantiate({"_target_": name, "_partial_": True})
    return target


def _with_enums(node: Any) -> Any:
    """Replace names of enum members by the members, where the signature expects an enum."""
    if isinstance(node, list):
        return [_with_enums(value) for value in node]
    if not isinstance(node, dict):
        return node
    hints: dict[str, Any] = {}
    if any(isinstance(value, str) for key, value in node.items() if key not in HYDRA_KEYS):
        with contextlib.suppress(InputError):
            hints = signature(find_target(node.get("_target_"), ""))[1]
    return {
        key: _member(value, hints[key]) if key in hints else _with_enums(value)
        for key, value in node.items()
    }


def _member(value: Any, hint: Any) -> Any:
    if isinstance(value, str) and str not in union_parts(hint):
        for part in union_parts(hint):
            if is_enum(part):
                name = value.rsplit(".", 1)[-1]
                return part[name] if name in part.__members__ else part(value)
    return _with_enums(value)


def unknown_key(path: str, known: set[str], section: str) -> str:
    """Error message for an unknown key, with the closest known one."""
    key = path.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1)
    prefix = f"{section}." if section else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(sorted(known))}"
    return f"there is no key '{path}'; {hint}"


def _refused(path: str, error: BaseException) -> InputError:
    if isinstance(error, InputError):
        return error
    if isinstance(error, URLError | ConnectionError | TimeoutError):
        return InputError(
            f"{path}: a required file could not be downloaded ({_reason(error)}); "
            "pretrained weights are searched in TORCH_HOME first"
        )
    return InputError(f"{path}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """The first line of an exception's innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


def signature(target: Any) -> Signature:
    """Named parameters, their type hints, and whether other keywords are accepted.

    If a constructor takes ``**kwargs``, the parameters of the base class are included.
    """
    return (_known if isinstance(target, collections.abc.Hashable) else _signature)(target)


def _signature(target: Any) -> Signature:
    is_class = inspect.isclass(target)
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for function in (base.__init__ for base in target.__mro__) if is_class else (target,):
        try:
            own = list(inspect.signature(function).parameters.values())[is_class:]
        except (TypeError, ValueError):
            return parameters, hints, True  # a built-in without a signature
        with contextlib.suppress(Exception):  # annotations that cannot be resolved
            hints = {**typing.get_type_hints(inspect.unwrap(function)), **hints}
        named = (p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        parameters = {**{p.name: p for p in named}, **parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            return parameters, hints, False
    return parameters, hints, True


_known = functools.lru_cache(maxsize=256)(_signature)


def select(config: Node, path: str) -> Any:
    """The value at a dotted path."""
    return functools.reduce(lambda node, key: node[key], path.split("."), config)


def without(node: Node, *keys: str) -> Node:
    """A copy of the node without some keys."""
    return {key: value for key, value in node.items() if key not in keys}
