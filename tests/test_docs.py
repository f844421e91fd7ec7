"""Tests and files mentioned in the documents exist."""

import re
import shlex

import pytest
from conftest import REPOSITORY

from kd_lightning import api

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


def test_method_files_have_the_measured_costs():
    text = (REPOSITORY / "docs" / "methods.md").read_text().partition("## Cost")[2]
    measured = re.findall(r"`(\w+)` \| ([\d.-]+) \| ([\d.]+)", text.partition("\n## ")[0])
    methods = {path.stem: path.read_text() for path in REPOSITORY.glob("configs/method/*.yaml")}
    assert sorted(name for name, *_ in measured) == sorted(methods.keys() - {"none"})
    for name, *costs in measured:
        given = re.findall(r"([\d.]+) times", methods[name])
        expected = [float(cost) for cost in costs if cost != "-"]
        assert [float(cost) for cost in given] == pytest.approx(expected, abs=0.051)


def test_commands_and_settings_of_methods_are_accepted():
    from kd_lightning.config.checks import check

    text = (REPOSITORY / "docs" / "methods.md").read_text()
    commands = [
        *re.findall(r"^    python train\.py (.+)$", text, re.MULTILINE),
        *(f"method={term} '{setting}'" for setting, term in
          re.findall(r"`(\+?method\.terms\.([a-z]+)\.\w+=[^`]+)`", text)),
    ]  # fmt: skip
    assert len(commands) >= 4
    for command in commands:
        check(api.compose("data=digits", *shlex.split(command)))
