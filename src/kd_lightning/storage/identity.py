"""Content hashes of a run's inputs besides its configuration: images, teacher weights, user code.

A configuration refers to files and code by name only. A finished run is valid only as long as their
contents are unchanged, and runs with different contents never share a cell of a table.

There are two checks. `stamps` is a cheap digest of sizes and times of the files that a
configuration refers to, as in git's index, and needs neither torch nor the images. `Contents` is
the exact check, once the images are loaded.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import os
import site
import sys
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from kd_lightning.config.nodes import Node, find_target

# Packages identified by name, not by content: a new release of them, or a moved file of ours, must
# not invalidate all existing runs.
KNOWN = frozenset(
    {"kd_lightning", "torch", "torchvision", "timm", "transformers", "lightning", "hydra",
     "omegaconf", "torchmetrics", "builtins"}
)  # fmt: skip
LIBRARIES = {
    "kd_lightning.models.timm_model": "timm",
    "kd_lightning.models.torchvision_model": "torchvision",
}
"""Builders of models by name to the package whose version identifies the models' code."""

PLACES = ("output_dir", "data_dir", "cache_dir", "name", "setting", "logger", "_target_")

_loaded: dict[str, tuple[ModuleType, ModuleSpec | None, str, list[str]]] = {}
"""Results of `_code` for loaded modules."""


class Contents(NamedTuple):
    """SHA-256, in hex, of a run's inputs; None where there is no such input.

    Attributes:
        images: all pixels and labels, and the split between training and test images.
        teacher: a user-provided checkpoint, and user code of the teacher.
        code: user code of student, method, data, optimizer, scheduler and callbacks, and files that
            are passed to them.
    """

    images: str
    teacher: str | None
    code: str | None

    def as_metrics(self) -> dict[str, str | None]:
        """The keys and values in `metrics.json`."""
        return {f"{name}_sha256": value for name, value in self._asdict().items()}

    def changes(self, metrics: Mapping[str, Any]) -> list[str]:
        """Names of the inputs that differ from those of an earlier run; empty if none.

        Args:
            metrics: metrics of the earlier run; older versions did not record hashes.
        """
        words = {"images": "the images", "teacher": "the teacher", "code": "your own code"}
        now = self.as_metrics()
        return [
            text
            for name, text in words.items()
            if f"{name}_sha256" in metrics and metrics[f"{name}_sha256"] != now[f"{name}_sha256"]
        ]


def stamps(config: Node, memo: dict[Path, str] | None = None) -> str:
    """Digest of names, sizes and times of all files and folders in a configuration.

    Empty if it refers to user code, whose files are known only after import.

    Args:
        config: complete, as plain dictionaries.
        memo: cache for repeated calls during which the files do not change.
    """
    memo = {} if memo is None else memo
    nodes = {key: value for key, value in config.items() if key not in PLACES}
    if any(_package(target) not in KNOWN for target in target_paths(nodes)):
        return ""
    paths = set(_inputs(nodes))
    if "cache_dir" not in config.get("data", {}):  # a download, whose archive has a checksum
        paths.discard(Path(str(config["data_dir"])).expanduser())
    written = (config.get("output_dir"), config.get("data", {}).get("cache_dir"))
    own = {Path(folder).expanduser().resolve() for folder in written if folder}
    for path in paths - memo.keys():
        memo[path] = _stamp(path, own)
    return _digest([*(memo[path] for path in sorted(paths)), *_library_versions(nodes)])


def source_sha256(*nodes: Any, more: Iterable[str] = ()) -> str | None:
    """SHA-256, in hex, of user code and files that configuration nodes refer to.

    Covers every user module that a `_target_` refers to, directly or by import, ignoring comments,
    docstrings and formatting. Third-party packages (`KNOWN`, and installed packages that are not
    named by a `_target_`) are identified by name only, models by name (`LIBRARIES`) by the version
    of their package.

    Args:
        nodes: any parts of a configuration.
        more: other hashes; empty ones are left out.

    Returns:
        None if there are neither code nor files.

    Raises:
        InputError: a `_target_` cannot be imported.
    """
    found: dict[str, str] = {}
    own = {name for name in map(_package, target_paths(nodes)) if name not in KNOWN}
    for target in target_paths(nodes):
        if _package(target) in own:
            thing = find_target(target, "the configuration")
            for name in {getattr(thing, "__module__", None), target.rpartition(".")[0]}:
                _collect(name, own, found)
    for path in dict.fromkeys(_inputs(*nodes)):
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            place = "" if file == path else str(file.relative_to(path))
            name = f"file {path.name}/{place}"
            found[name] = found.get(name, "") + file_sha256(file)  # several may have this name
    found |= {f"package {name}": "" for name in _library_versions(nodes)}
    found |= {f"hash {value}": "" for value in more if value}
    return _digest(sorted(found.items())) if found else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hex; cached while size and times are unchanged."""
    status = path.stat()
    return _file_sha256(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@functools.lru_cache(maxsize=1024)
def _file_sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp(path: Path, own: Collection[Path]) -> str:
    """Digest of the files in a folder, except those in our `own` folders, or of a file."""

    def walk(folder: str) -> Iterator[tuple[Any, ...]]:
        with contextlib.suppress(OSError), os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if not entry.is_dir(follow_symlinks=False):  # links may be circular
                    yield _status(entry)
                elif Path(entry.path).resolve() not in own:
                    yield from walk(entry.path)

    # The JSON text of the list of all files, one by one: there may be millions.
    digest, separator = hashlib.sha256(b"["), ""
    for status in walk(str(path)) if path.is_dir() else [_status(path)]:
        digest.update(f"{separator}{json.dumps(status)}".encode())
        separator = ", "
    digest.update(b"]")
    return digest.hexdigest()


def _status(file: os.DirEntry[str] | Path) -> tuple[Any, ...]:
    try:
        status = file.stat()
    except OSError:  # a broken link, reported where it is used
        status = os.lstat(file)
    # The ctime cannot be set, so that a copy with preserved mtime still differs.
    times = status.st_mtime_ns, status.st_ctime_ns
    return (os.fspath(file), status.st_ino, status.st_size, *times)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _inputs(*nodes: Any) -> Iterator[Path]:
    """Existing files and folders that a training reads.

    A folder in the section ``callbacks`` is where a callback writes.
    """
    for node in nodes:
        callbacks = node.get("callbacks") if isinstance(node, dict) else None
        yield from (path for path in _paths(callbacks) if path.is_file())
        yield from _paths(node)


def _paths(node: Any, key: str = "") -> Iterator[Path]:
    """Existing files and folders that occur in a node, outside the section ``callbacks``."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name not in (*PLACES, "callbacks"):
                yield from _paths(value, name)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _paths(value, key)
    elif isinstance(node, str) and (
        key in ("root", "checkpoint", "outputs") or os.sep in node or Path(node).suffix
    ):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # not a path
            if (path := Path(node).expanduser()).exists():
                yield path


def target_paths(node: Any) -> Iterator[str]:
    """All `_target_` values in a node, including its own, in order."""
    if isinstance(node, dict):
        if "_target_" in node:
            target = str(node["_target_"])
            # Hydra's way to refer to a class or function without calling it.
            yield str(node.get("path")) if target.startswith("hydra.utils.get_") else target
        for value in node.values():
            yield from target_paths(value)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from target_paths(value)


def _library_versions(node: Any) -> list[str]:
    """Packages of the models by name in a node, with their versions, sorted."""
    names = {LIBRARIES[target] for target in target_paths(node) if target in LIBRARIES}
    found = []
    for name in sorted(names):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # reported elsewhere
            found.append(f"{name} {importlib.metadata.version(name)}")
    return found


def _package(name: str) -> str:
    return name.partition(".")[0]


def _collect(name: str | None, own: Iterable[str], found: dict[str, str]) -> None:
    """Add the code of a module, and of the user modules that it imports, to `found`."""
    if name is None or name in found or _is_known(name):
        return
    # Modules imported inside functions may not be loaded yet.
    module = sys.modules.get(name) or _unloaded(name)
    file = getattr(module, "__file__", None)
    if module is None or file is None or not _is_users(name, file, own):
        return
    found[name], imports = _code(module, Path(file))
    for imported in imports:
        _collect(imported, own, found)


def _unloaded(name: str) -> ModuleType | None:
    """An empty module object for a module that could be loaded, found without running code."""
    parent = name.rpartition(".")[0]
    if parent and parent not in sys.modules:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # not a package, or a synthetic module
        return None
    if spec is None or not spec.has_location or spec.origin is None:
        return None
    module = ModuleType(name)
    module.__file__, module.__package__ = spec.origin, spec.parent
    return module


def _code(module: ModuleType, path: Path) -> tuple[str, list[str]]:
    """SHA-256 of a module's code, in hex, and its imports, including its parent packages.

    Cached per loaded module: if the file is edited while a grid runs, the imported version stays in
    use. A reloaded module is a different object, or has a different spec.
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
    # Importing a module runs its parent packages.
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
    """Removes string statements, which have no effect."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        constant = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if constant else node


def unchanged(
    metrics: Mapping[str, Any], config: Node, memo: dict[Path, str] | None = None
) -> bool:
    """Whether the input files of a finished run are certainly unchanged.

    Runs of older versions did not record stamps and are assumed to be unchanged.

    Args:
        metrics: metrics of the run.
        config: configuration of the run.
        memo: see `stamps`.
    """
    recorded = metrics.get("stamps")
    return recorded is None or (recorded != "" and recorded == stamps(config, memo))
