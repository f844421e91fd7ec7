"""Where the configuration tree is, what a valid configuration is, and one clear sentence for each
way to get it wrong.

Hydra composes values without looking at them; this looks, before data or teacher cost anything.
Two rules do most of the work. A `_target_` node must fit the signature of what it names, by name
and by type. And no number anywhere is NaN or infinite.
"""

import contextlib
import difflib
import functools
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kd_lightning.errors import InputError

Node = dict[str, Any]

# Keys that are not arguments of a `_target_`. A configuration has these and no others.
KEYS: dict[str, set[str]] = {
    "": {
        "seed", "output_dir", "data_dir", "setting", "name",
        "method", "student", "teacher", "data", "trainer", "optimizer", "scheduler", "remember",
        "callbacks", "update_bn",
    },
    "method": {"name", "terms"},
    "student": {"name", "model", "layers"},
    "teacher": {
        "name", "model", "layers", "checkpoint", "rename_keys", "mean", "std",
        "cutout", "seed", "trainer", "optimizer", "scheduler",
    },
    "remember": {"disk_gb", "dtype"},
}  # fmt: skip
OPTIONAL = {"callbacks", "update_bn"}
"""Keys that a configuration may lack: those of older runs do."""
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
ROUNDINGS = ("float16", "bfloat16", "float32")
STRATEGIES = ("auto", "ddp")
MEMORY_FORMATS = ("auto", "channels_last", "contiguous")


def tree() -> str:
    """Hydra's address of the configuration tree: the checkout's folder, else the wheel's copy."""
    checkout = Path(__file__).resolve().parents[2] / "configs"
    return str(checkout) if checkout.is_dir() else "pkg://kd_lightning.configs"


def plain(config: DictConfig) -> Node:
    """The configuration as plain dictionaries, interpolations resolved.

    Raises:
        InputError: a value is missing (``???``) or refers to one that does not exist.
    """
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = error.full_key or "the configuration"
        reason = str(error).splitlines()[0]
        if "Missing mandatory value" in reason:
            raise InputError(f"{key} must be given: add {key}=VALUE to the command") from error
        raise InputError(f"{key}: {reason}") from error
    return typing.cast(Node, resolved)


def check(config: Node) -> None:
    """Check everything that can be checked without data, teacher or weights.

    The data node is not looked at: it was checked and built before, to know the classes.

    Raises:
        InputError: naming the key, what is wrong with it, and what it may be.
    """
    check_sections(config)
    for path, number in _numbers(config):
        if not math.isfinite(number):
            raise InputError(f"{path} must be a finite number, not {number}")
    for path in ("seed", "teacher.seed"):
        seed = select(config, path)
        if not _is_integer(seed) or not 0 <= seed < 2**32:
            raise InputError(f"{path} must be a whole number from 0 to 2^32 - 1, not {seed}")
    cutout = config["teacher"]["cutout"]
    if not _is_integer(cutout) or cutout < 0:
        raise InputError(f"teacher.cutout must be 0 or more pixels, not {cutout}")
    remember = config["remember"]
    if not _is_number(remember["disk_gb"]) or remember["disk_gb"] < 0:
        raise InputError(
            f"remember.disk_gb must be a number of at least 0, not {remember['disk_gb']}"
        )
    if remember["dtype"] not in ROUNDINGS:
        raise InputError(
            f"remember.dtype must be one of {', '.join(ROUNDINGS)}, not {remember['dtype']}"
        )
    for path in ("output_dir", "data_dir"):
        if not isinstance(config[path], str) or not config[path]:
            raise InputError(f"{path} must be the path of a folder, not {config[path]!r}")
    if not config["method"]["terms"]:
        raise InputError("method.terms must name at least one term")
    for name, term in config["method"]["terms"].items():
        weight: Any = term.get("weight") if isinstance(term, dict) else None
        if not _is_number(weight) or weight < 0:
            raise InputError(
                f"method.terms.{name}.weight must be a number of at least 0, not {weight}"
            )
        check_node(without(term, "weight"), f"method.terms.{name}")
    for path in ("student.model", "teacher.model"):
        check_node(select(config, path), path)
    if not isinstance(config.get("update_bn", False), bool):
        raise InputError(f"update_bn must be true or false, not {config['update_bn']}")
    callbacks = config.get("callbacks") or {}
    if not isinstance(callbacks, dict):
        raise InputError(f"callbacks must be names with a _target_ node each, not {callbacks!r}")
    for name, callback in callbacks.items():
        check_node(callback, f"callbacks.{name}")
    for prefix in ("", "teacher."):
        trainer = trainer_node(config, teacher=bool(prefix))
        check_trainer(trainer, f"{prefix}trainer")
        if prefix and trainer["devices"] != 1:
            raise InputError("teacher.trainer.devices must be 1: one process trains a teacher")
        check_node(select(config, f"{prefix}optimizer"), f"{prefix}optimizer", {"params"})
        scheduler = select(config, f"{prefix}scheduler")
        if scheduler is not None:
            check_node(scheduler, f"{prefix}scheduler", {"optimizer", "total_steps"})


def check_sections(config: Node) -> None:
    """Check the keys that belong to no `_target_`; needs no import of anything heavy.

    Raises:
        InputError: a key is unknown, or a group was left out.
    """
    config.setdefault("scheduler", None)  # `scheduler=null`: a constant learning rate
    for section, known in KEYS.items():
        node = config[section] if section else config
        for key in node:
            if key not in known:
                raise InputError(unknown_key(f"{section}.{key}".lstrip("."), known, section))
        for key in sorted(known - node.keys() - OPTIONAL):
            raise InputError(f"{section}.{key} must be given".lstrip("."))


def check_trainer(trainer: Node, path: str) -> None:
    """Check the arguments of Lightning's Trainer, and the two that are ours."""
    for key, choices in (("precision", PRECISIONS), ("memory_format", MEMORY_FORMATS)):
        if trainer[key] not in choices:
            raise InputError(
                f"{path}.{key} must be one of {', '.join(choices)}, not {trainer[key]}"
            )
    for key in ("max_epochs", "log_every_n_steps"):
        if not _is_integer(trainer[key]) or trainer[key] < 1:
            raise InputError(
                f"{path}.{key} must be a whole number of at least 1, not {trainer[key]}"
            )
    devices = trainer["devices"]
    if devices != "auto" and (not _is_integer(devices) or devices < 1):
        raise InputError(
            f"{path}.devices must be a whole number of at least 1, or auto, not {devices}"
        )
    if trainer.get("strategy", "auto") not in STRATEGIES:
        raise InputError(
            f"{path}.strategy must be one of {', '.join(STRATEGIES)}, not {trainer['strategy']}"
        )
    if trainer.get("num_nodes", 1) != 1:
        raise InputError(f"{path}.num_nodes must be 1: a run does not go beyond one machine")
    check_node(without(trainer, "memory_format"), path)


def trainer_node(config: Node, teacher: bool = False) -> Node:
    """The trainer's settings; the teacher's are the run's own, changed by its recipe.

    A teacher is trained by one process, so that it is the same however many distil it.
    """
    if not teacher:
        return dict(config["trainer"])
    own = without(config["trainer"], "strategy")
    return {**own, "devices": 1, **config["teacher"]["trainer"]}


def check_node(node: Any, path: str, given: set[str] | None = None) -> None:
    """Check that a `_target_` node fits the signature of what it names.

    Args:
        node: the node.
        path: its place in the configuration, for messages.
        given: parameters that the caller will supply.

    Raises:
        InputError: the target cannot be imported, or does not take these arguments.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise InputError(f"{path} must be a node with a _target_, not {node!r}")
    target = find_target(node["_target_"], path)
    parameters, hints, open_ended = _signature(target)
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    for key, value in arguments.items():
        if key not in parameters and not open_ended:
            raise InputError(unknown_key(f"{path}.{key}", set(parameters), path))
        if isinstance(value, dict) and "_target_" in value:
            check_node(value, f"{path}.{key}", given)
        elif key in hints and not _fits(value, hints[key]):
            raise InputError(f"{path}.{key} must be {_describe(hints[key])}, not {value!r}")
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty
        if required and name not in arguments and name not in (given or ()):
            raise InputError(f"{path}.{name} must be given: {node['_target_']} needs it")


def takes(node: Node, parameter: str, path: str) -> bool:
    """Whether what a `_target_` node names has a parameter of this name.

    Raises:
        InputError: the target cannot be imported.
    """
    return parameter in _signature(find_target(node["_target_"], path))[0]


def find_target(target: str, path: str) -> Any:
    """The class or function that a `_target_` names.

    Raises:
        InputError: it cannot be imported.
    """
    try:
        return pkgutil.resolve_name(target)
    except Exception as error:  # whatever importing a module may raise
        raise InputError(
            f"{path}._target_={target} cannot be imported: {_reason(error)}"
        ) from error


def build(node: Node, path: str) -> Any:
    """Instantiate a `_target_` node.

    Raises:
        InputError: naming `path` and what the constructor objected to.
    """
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        raise _refused(path, error.__cause__ or error) from error


def build_partial(node: Node, path: str) -> Callable[..., Any]:
    """A callable that instantiates the node with further arguments; errors as in `build`."""
    partial = instantiate({**node, "_partial_": True}, _convert_="all")

    @functools.wraps(partial.func)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return partial(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise _refused(path, error) from error

    return call


def select(config: Node, path: str) -> Any:
    """The value at a dotted path."""
    return functools.reduce(lambda node, key: node[key], path.split("."), config)


def without(node: Node, *keys: str) -> Node:
    """The node less some keys."""
    return {key: value for key, value in node.items() if key not in keys}


def unknown_key(path: str, known: set[str], section: str) -> str:
    """The sentence for a key that does not exist, with the nearest that does."""
    key = path.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1)
    prefix = f"{section}." if section else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known are: {', '.join(sorted(known))}"
    return f"there is no key '{path}'; {hint}"


def _refused(path: str, error: BaseException) -> InputError:
    return error if isinstance(error, InputError) else InputError(f"{path}: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """The first line of an exception's innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


def _numbers(node: Any, path: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _numbers(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _numbers(value, f"{path}[{index}]")
    elif isinstance(node, float):
        yield path, node


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _signature(target: Any) -> tuple[dict[str, inspect.Parameter], dict[str, Any], bool]:
    """Named parameters, their type hints, and whether any other keyword is taken as well.

    A class whose constructor passes ``**settings`` on takes the parameters of its base class too.
    """
    is_class = inspect.isclass(target)
    parameters: dict[str, inspect.Parameter] = {}
    hints: dict[str, Any] = {}
    for function in (base.__init__ for base in target.__mro__) if is_class else (target,):
        try:
            own = list(inspect.signature(function).parameters.values())[is_class:]
        except (TypeError, ValueError):
            return parameters, hints, True  # built in, without a signature
        with contextlib.suppress(Exception):  # annotations that only their own module understands
            hints = {**typing.get_type_hints(function), **hints}
        named = (p for p in own if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        parameters = {**{p.name: p for p in named}, **parameters}
        if not any(p.kind is p.VAR_KEYWORD for p in own):
            return parameters, hints, False
    return parameters, hints, True


def _scalars(hint: Any) -> set[type] | None:
    """The scalar types a hint admits; None if it admits other values that YAML can write."""
    if hint in (int, float, bool, str, type(None)):
        return {hint}
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return None
    allowed: set[type] = set()
    for part in typing.get_args(hint):
        scalars = _scalars(part)
        if scalars is not None:
            allowed |= scalars
        elif not inspect.isclass(part):  # a class, such as Tensor, YAML cannot write
            return None
    return allowed


def _fits(value: Any, hint: Any) -> bool:
    allowed = _scalars(hint)
    if allowed is None or isinstance(value, list | dict):
        return True
    if isinstance(value, bool):
        return bool in allowed
    if isinstance(value, int):
        return bool({int, float} & allowed)
    return type(value) in allowed


def _describe(hint: Any) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    allowed = _scalars(hint) or set()
    if float in allowed:
        allowed = allowed - {int}
    return " or ".join(names.get(scalar, "null") for scalar in sorted(allowed, key=str))
