"""What is recorded of the machine and the program: versions, the commit, the device."""

import subprocess
from pathlib import Path

import pytest
import torch

from kd_lightning.storage import provenance
from kd_lightning.storage.provenance import device_name, versions


def test_versions_name_the_commit(monkeypatch):
    found = versions()
    assert found["torch"] == torch.__version__
    assert found["lightning"][0].isdigit()
    assert found["python"].startswith("3.")
    root = Path(provenance.__file__).resolve().parents[3]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        commit, _, dirty = found["git_commit"].partition("-")
        assert len(commit) == 12
        assert head.startswith(commit)
        assert dirty in ("", "dirty")


@pytest.mark.parametrize("error", [OSError("no git"), subprocess.TimeoutExpired("git", 10)])
def test_without_git_there_is_no_commit(monkeypatch, error, tmp_path):
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a" / "b" / "c" / "x.py"))

    def fails(*_, timeout, **__):
        assert 1 <= timeout <= 60  # with a timeout
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", fails)
        assert versions()["git_commit"] == ""
    assert versions()["git_commit"] == ""  # looks like a repository, but is not
    (tmp_path / ".git").rmdir()
    assert versions()["git_commit"] == ""


def test_modified_checkout_is_dirty(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@x"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True)

    (tmp_path / "file").write_text("1")
    git("init", "--quiet")
    git("add", "file")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "a" / "b" / "c" / "x.py"))
    clean = versions()["git_commit"]
    assert len(clean) == 12
    (tmp_path / "file").write_text("2")
    assert versions()["git_commit"] == f"{clean}-dirty"


def test_device_has_a_human_readable_name(monkeypatch):
    name = device_name(torch.device("cpu"))
    assert f", {torch.get_num_threads()} thread" in name
    info = Path("/proc/cpuinfo")
    if info.exists() and "model name" in info.read_text():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        assert name.rpartition(",")[0] == models[0].split(":")[1].strip()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"a GPU at {device}")
    assert device_name(torch.device("cuda:1")) == "a GPU at cuda:1"
    assert device_name(torch.device("mps")) == "mps"


def test_device_name_without_proc(monkeypatch):
    def absent(self, *_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "open", absent)
    for processor, machine, expected in (("chip", "arch", "chip"), ("", "arch", "arch")):
        monkeypatch.setattr(provenance.platform, "processor", lambda p=processor: p)
        monkeypatch.setattr(provenance.platform, "machine", lambda m=machine: m)
        assert device_name(torch.device("cpu")).startswith(f"{expected}, ")
