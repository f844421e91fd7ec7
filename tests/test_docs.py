"""Tests and files mentioned in the documents exist."""

import re

import pytest
from conftest import REPOSITORY

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_mentioned_tests_exist(document):
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?(\.\.\.)?", document.read_text())
    for file, test, more in named:
        source = (REPOSITORY / "tests" / file).read_text()
        assert not test or f"def {test}" + ("" if more else "(") in source, (file, test)
    if document.name == "reliability.md":
        assert len(named) > 50


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_mentioned_modules_exist(document):
    files = {
        "/".join(path.parts[-n:])
        for folder in ("src", "scripts", "tests")
        for path in (REPOSITORY / folder).rglob("*.py")
        for n in range(1, 5)
    } | {"train.py"}
    named = re.findall(r"`(?:[a-z]+ )?([\w/]+\.py)\b", document.read_text())
    assert [name for name in named if name not in files] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_linked_files_exist(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
