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
def test_linked_files_exist(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target
