"""What a run is made of besides its configuration: images, the teacher's weights, the user's code.

A configuration names files and code; their contents decide. A finished run is only believed while
they are what they were, and runs of different contents never share a cell of a table.

Two questions, because one of them is cheap. `stamps` looks at sizes and times of the files that a
configuration names and needs neither torch nor the images: while it is unchanged, so are the
contents (git's index works this way). `Contents` is the exact answer, once the images are loaded.
"""

import ast
import contextlib
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from kd_lightning.config.naming import config_key
from kd_lightning.config.nodes import Node, find_target
from kd_lightning.errors import InputError
from kd_lightning.files import read_json

# Packages whose code is named by the configuration, not by its contents: a release of them, or a
# file of ours that moves, must not invalidate every run there is.
KNOWN = frozenset(
    {"kd_lightning", "torch", "torchvision", "timm", "transformers", "lightning", "hydra",
     "omegaconf", "torchmetrics", "builtins"}
)  # fmt: skip
PLACES = ("output_dir", "data_dir", "cache_dir", "name", "setting", "_target_")

_loaded: dict[str, tuple[ModuleType, ModuleSpec | None, str, list[str]]] = {}
"""What `_code` found of the modules that are loaded."""


class Contents(NamedTuple):
    """SHA-256, in hex, of what a run was computed from; None where there is no such thing.

    Attributes:
        images: every pixel and label, and the split between training and test images.
        teacher: weights of the user's own checkpoint, and the user's code of the teacher.
        code: the user's own code of student, method, data, optimizer, scheduler and callbacks, and
            files that these are given.
    """

    images: str
    teacher: str | None
    code: str | None

    def as_metrics(self) -> dict[str, str | None]:
        """As `metrics.json` holds them."""
        return {f"{name}_sha256": value for name, value in self._asdict().items()}

    def changes(self, metrics: Mapping[str, Any]) -> list[str]:
        """In words, what differs from that of an earlier run; empty if nothing is known to.

        Args:
            metrics: of the earlier run; those of older versions do not say.
        """
        words = {"images": "the images", "teacher": "the teacher", "code": "your own code"}
        now = self.as_metrics()
        return [
            text
            for name, text in words.items()
            if f"{name}_sha256" in metrics and metrics[f"{name}_sha256"] != now[f"{name}_sha256"]
        ]


def stamps(config: Node, memo: dict[Path, str] | None = None) -> str:
    """A digest of names, sizes and times of all files and folders that a configuration names.

    Empty if it names code of the user's own, whose files only an import would tell.

    Args:
        config: complete and plain.
        memo: of a caller that asks again and again and for whom files do not change meanwhile.
    """
    memo = {} if memo is None else memo
    nodes = {key: value for key, value in config.items() if key not in PLACES}
    if any(_package(target) not in KNOWN for target in targets(nodes)):
        return ""
    shared = Path(str(config["data_dir"])).expanduser()
    paths = {path for path in _paths(nodes) if path != shared}
    for path in paths - memo.keys():
        memo[path] = _stamp(path)
    return _digest([memo[path] for path in sorted(paths)])


def source_sha256(*nodes: Any) -> str | None:
    """SHA-256, in hex, of the user's own code and files that configuration nodes name.

    Code is every module of the user's that a `_target_` leads to, directly or by import, without
    its comments, docstrings and layout. Packages of others count by name alone (`KNOWN`, and
    whatever is installed but not named by a `_target_`).

    Args:
        nodes: any parts of a configuration.

    Returns:
        None if there is neither code nor file.

    Raises:
        InputError: a `_target_` cannot be imported.
    """
    found: dict[str, str] = {}
    own = {name for name in map(_package, targets(nodes)) if name not in KNOWN}
    for target in targets(nodes):
        if _package(target) in own:
            thing = find_target(target, "the configuration")
            for name in {getattr(thing, "__module__", None), target.rpartition(".")[0]}:
                _collect(name, own, found)
    for path in _paths(nodes):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            place = "" if file == path else str(file.relative_to(path))
            found[f"file {path.name}/{place}"] = file_sha256(file)
    return _digest(sorted(found.items())) if found else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex; remembered while the file is what it was."""
    status = path.stat()
    return _file_sha256(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _file_sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path) -> str:
    def walk(folder: str) -> Iterator[tuple[Any, ...]]:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):  # links may go round in circles
                    yield from walk(entry.path)
                else:
                    yield _status(entry)

    return _digest(list(walk(str(path)) if path.is_dir() else [_status(path)]))


def _status(file: os.DirEntry[str] | Path) -> tuple[Any, ...]:
    try:
        status = file.stat()
    except OSError:  # a link that leads nowhere, for those to complain of who need it
        status = os.lstat(file)
    # The time of the last change to the inode cannot be set: a copy that preserves times differs.
    times = status.st_mtime_ns, status.st_ctime_ns
    return (os.fspath(file), status.st_ino, status.st_size, *times)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _paths(node: Any, key: str = "") -> Iterator[Path]:
    """Files and folders that exist and are named somewhere in a node."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name not in PLACES:
                yield from _paths(value, name)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _paths(value, key)
    elif isinstance(node, str) and (
        key in ("root", "checkpoint") or os.sep in node or Path(node).suffix
    ):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # no path at all
            if (path := Path(node).expanduser()).exists():
                yield path


def targets(node: Any) -> Iterator[str]:
    """What the `_target_` nodes in a node name, in order, itself included."""
    if isinstance(node, dict):
        if "_target_" in node:
            target = str(node["_target_"])
            # Hydra's own way of naming a class or function without calling it.
            yield str(node.get("path")) if target.startswith("hydra.utils.get_") else target
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from targets(value)


def _package(name: str) -> str:
    return name.partition(".")[0]


def _collect(name: str | None, own: Iterable[str], found: dict[str, str]) -> None:
    """Add a module's code, and that of the user's modules which it imports, to `found`."""
    if name is None or name in found or _is_known(name):
        return
    # What a function imports when it is called may not have been loaded yet.
    module = sys.modules.get(name) or _unloaded(name)
    file = getattr(module, "__file__", None)
    if module is None or file is None or not _is_users(name, file, own):
        return
    found[name], imports = _code(module, Path(file))
    for imported in imports:
        _collect(imported, own, found)


def _unloaded(name: str) -> ModuleType | None:
    """A module, empty, that could be loaded from a file; nothing is run to find it."""
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # no package, or a module of its own making
        return None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    module = ModuleType(name)
    module.__file__, module.__package__ = spec.origin, spec.parent
    return module


def _code(module: ModuleType, path: Path) -> tuple[str, list[str]]:
    """SHA-256 of a module's code, in hex, and what it imports, its parent packages included.

    As they were when first asked for: if the file is edited while a grid runs, what has been
    imported goes on to be used. A module that is loaded again is another object, or has another
    specification.
    """
    known = _loaded.get(module.__name__)
    if known is not None and known[0] is module and known[1] is module.__spec__:
        return known[2:]
    if path.suffix != ".py":  # compiled
        digest, imports = file_sha256(path), []
    else:
        tree = ast.parse(path.read_bytes())
        text = ast.unparse(_WithoutDocstrings().visit(tree))
        digest, imports = hashlib.sha256(text.encode()).hexdigest(), list(_imports(tree, module))
    # Importing a module runs the packages that it is in.
    imports += itertools.accumulate(module.__name__.split(".")[:-1], "{}.{}".format)
    if sys.modules.get(module.__name__) is module:
        _loaded[module.__name__] = (module, module.__spec__, digest, imports)
    return digest, imports


def _imports(tree: ast.AST, module: ModuleType) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            try:
                base = importlib.util.resolve_name(relative, module.__package__)
            except (ImportError, ValueError):
                continue
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _is_known(name: str) -> bool:
    return _package(name) in KNOWN or _package(name) in sys.stdlib_module_names


def _is_users(name: str, file: str, own: Iterable[str]) -> bool:
    place = Path(file).resolve()
    return _package(name) in own or not any(place.is_relative_to(folder) for folder in _installed())


@functools.cache
def _installed() -> tuple[Path, ...]:
    """Folders of the standard library and of installed packages."""
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    folders = [sysconfig.get_path(kind) for kind in kinds]
    return tuple(Path(f).resolve() for f in (*folders, *site.getsitepackages()) if f)


class _WithoutDocstrings(ast.NodeTransformer):
    """Leaves out strings that stand as statements: they compute nothing."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        constant = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if constant else node


def finished(run_dir: Path, config: Node) -> dict[str, Any] | None:
    """The metrics of this very run if it was finished before.

    Its files may have changed since: see `kd_lightning.contents`.

    Raises:
        InputError: the folder holds a finished run of another configuration.
    """
    metrics = read_json(run_dir / "metrics.json")
    if metrics.get("status") != "finished":
        return None
    if metrics.get("config_key") != config_key(config):
        raise InputError(
            f"{run_dir} holds a finished run of another configuration; choose another name=... "
            "or hydra.run.dir=..."
        )
    return metrics


def unchanged(
    metrics: Mapping[str, Any], config: Node, memo: dict[Path, str] | None = None
) -> bool:
    """Whether the files that a finished run was computed from are certainly what they were.

    Runs of older versions do not say, and are believed.

    Args:
        metrics: of the run.
        config: that it was made by.
        memo: see `contents.stamps`.
    """
    recorded = metrics.get("stamps")
    return recorded is None or (recorded != "" and recorded == stamps(config, memo))


def finished_elsewhere(run_dir: Path, config: Node) -> dict[str, Any] | None:
    """The metrics of another setting's finished run that differs in nothing but a teacher which
    neither of the two has.

    Its files may have changed since, as in `finished`. A run that was begun in `run_dir` is not
    looked for elsewhere.

    Args:
        run_dir: the folder of the run that is wanted.
        config: complete and plain.

    Returns:
        With one key more: ``folder``, that of the other run.
    """
    if (run_dir / "metrics.json").exists():
        return None
    runs = Path(config["output_dir"]) / "runs"
    key = ""
    for path in sorted(runs.glob(f"*/{glob.escape(config['name'])}/metrics.json")):
        metrics = read_json(path)
        if metrics.get("status") == "finished" and "key_without_teacher" in metrics:
            key = key or config_key(config, "teacher")
            if metrics["key_without_teacher"] == key:
                return {**metrics, "folder": str(path.parent)}
    return None
