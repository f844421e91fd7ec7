"""Architecture: imports point downwards only, without cycles; no file is too long to read."""

import ast
from functools import cache
from graphlib import TopologicalSorter

from conftest import REPOSITORY

SOURCE = REPOSITORY / "src" / "kd_lightning"

# From lowest to highest. Packages in one line must not import each other.
LAYERS = (
    {"errors", "results", "schedules", "streams", "transfer"},
    {"files", "startup", "terminal"},
    {"models"},
    {"data", "losses"},
    {"config"},
    {"storage"},
    {"reports", "inference"},
    {"distill"},
    {"engine"},
    {"workflows"},
    {"api"},
    {"cli"},
    {"__main__"},
)
RANK = {name: number for number, layer in enumerate(LAYERS) for name in layer}


@cache
def modules():
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return found


def imports(path, only_at_the_top=False):
    """Modules of this package that a file imports, relative to the package."""
    tree = ast.parse(path.read_text())
    known = dict(modules())
    for node in tree.body if only_at_the_top else ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kd_lightning"):
            base = node.module.removeprefix("kd_lightning").lstrip(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".lstrip(".")
                yield name if name in known else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("kd_lightning"):
                    yield alias.name.removeprefix("kd_lightning").lstrip(".")


def test_every_module_has_a_layer():
    assert {name.partition(".")[0] for name, _ in modules() if name} == RANK.keys()


def test_imports_point_downwards():
    upwards = []
    for name, path in modules():
        package = name.partition(".")[0]
        for imported in imports(path) if package else ():
            other = imported.partition(".")[0]
            if other and other != package and RANK[other] >= RANK[package]:
                upwards.append(f"{name} imports {imported}")
    assert not upwards


def test_no_import_cycles():
    graph = {name: set(imports(path, only_at_the_top=True)) - {name} for name, path in modules()}
    list(TopologicalSorter(graph).static_order())  # raises an error that names the cycle


def test_only_resolve_reads_the_whole_configuration():
    """Only the modules that resolve or identify the configuration may use it as a whole."""
    allowed = {"config", "storage.identity", "storage.run_directory", "cli", "api", "workflows"}
    for name, path in modules():
        if any(name == place or name.startswith(f"{place}.") for place in allowed):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                arguments = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
                assert "config" not in arguments, f"{name}.{node.name}"


def test_no_file_is_longer_than_400_lines():
    files = [REPOSITORY / "train.py"]
    for folder in ("configs", "scripts", "src", "tests"):
        found = list((REPOSITORY / folder).rglob("*.py"))
        assert found, folder
        files += found
    long = {str(path): n for path in files if (n := len(path.read_text().splitlines())) > 400}
    assert not long
