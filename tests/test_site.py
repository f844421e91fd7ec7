"""The site has every document, its links lead to pages, and the README stays short."""

import importlib.util
import json
import re

import pytest
import yaml
from conftest import REPOSITORY

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def site_pages():
    """The hook of MkDocs, which is not part of a package."""
    spec = importlib.util.spec_from_file_location(
        "site_pages", REPOSITORY / "scripts" / "site_pages.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def leaves(nav):
    for entry in nav:
        (target,) = entry.values()
        yield from leaves(target) if isinstance(target, list) else [target]


def test_navigation_has_every_page_once(site_pages):
    nav = list(leaves(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    pages = {path.name for path in [*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")]}
    assert sorted(nav) == sorted(pages | set(site_pages.PAGES.values()))


@pytest.mark.parametrize(
    ("text", "folder", "expected"),
    [
        ("[a](docs/grid.md#parallel-runs)", "", "[a](grid.md#parallel-runs)"),
        ("![b](docs/results/x.png) [c](RESULTS.md)", "", "![b](results/x.png) [c](results.md)"),
        ("[d](../README.md#quick-start)", "docs", "[d](index.md#quick-start)"),
        ("[e](grid.md), [f](../docs/data.md)", "docs", "[e](grid.md), [f](data.md)"),
        ("see [g](../configs/train.yaml)", "docs", "see g"),
        ("[h](https://semver.org/x) [i](#here)", "", "[h](https://semver.org/x) [i](#here)"),
    ],
)
def test_links_lead_to_pages(site_pages, text, folder, expected):
    assert site_pages.site_links(text, folder) == expected


def test_readme_is_short():
    text = (REPOSITORY / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert text.count("![") == 1
    for document in DOCS.glob("*.md"):
        assert f"docs/{document.name}" in text, document.name


def test_api_reference_names_what_exists():
    for name in re.findall(r"^::: (\S+)", (DOCS / "api.md").read_text(), re.MULTILINE):
        path = REPOSITORY / "src" / name.replace(".", "/")
        if not path.with_suffix(".py").exists():
            source = path.parent.with_suffix(".py").read_text()
            assert re.search(rf"^class {path.name}\b", source, re.MULTILINE), name


def test_constraints_pin_every_dependency():
    """The locked installation is complete: indirect dependencies too, on this platform."""
    from importlib import metadata

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    pins = dict(line.split(" ")[0].split("==") for line in lines if "==" in line)
    if any(metadata.version(name) != pins[name] for name in ("lightning", "timm")):
        pytest.skip("another environment than the locked one")
    pinned = {canonicalize_name(name) for name in pins}
    own = "kd-lightning"
    unseen, seen = [Requirement(f"{own}[dev]")], set()
    while unseen:
        wanted = unseen.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen:
            continue
        seen.add(key)
        try:
            requires = metadata.distribution(wanted.name).requires or []
        except metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, requires):
            marker = requirement.marker
            extras = ["", *wanted.extras]
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                unseen.append(requirement)
    assert {name for name, _ in seen} - pinned == {own}


def test_notebook_is_stored_with_its_outputs():
    cells = json.loads((DOCS / "notebook.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    kinds = {output["output_type"] for output in outputs}
    assert kinds <= {"execute_result", "display_data", "stream"}
    assert all(output.get("name") != "stderr" for output in outputs)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert str(REPOSITORY.parent) not in json.dumps(outputs)
