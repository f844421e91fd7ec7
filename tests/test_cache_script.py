"""The teacher-output cache as a component: the script, packed files, and other training loops."""

import errno
import json
import os
import re
import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import FOLDER, REPOSITORY, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_lightning.distill.module import DistillationModule
from kd_lightning.errors import InputError
from kd_lightning.storage import packing
from kd_lightning.storage.packing import pack, unpack
from kd_lightning.storage.rows import Rows
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_cache import TeacherCache, folder_name, stored

CPU = torch.device("cpu")
INDEX = torch.arange(20)
SAMPLE = 1  # passes that determine the shapes of the outputs


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        place = (
            [] if arguments[0] in ("check", "fill") else ["--output-dir", str(tmp_path / "outputs")]
        )
        command = ["cache.py", arguments[0], *place, *map(str, arguments[1:])]
        monkeypatch.setattr(sys, "argv", command)
        code = 0
        try:
            runpy.run_path(str(REPOSITORY / "scripts" / "cache.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def names(tmp_path):
    return {entry.folder.name for entry in stored(tmp_path / "outputs" / "teachers" / "remembered")}


def test_list_and_remove(train, tmp_path, script):
    assert train("method=combined").code == 0
    before = names(tmp_path)
    assert all(name in script("list")[1] for name in before)
    code, _, said = script("remove", "nothing")
    assert code == 2
    assert "there is no cache nothing" in said
    assert names(tmp_path) == before
    script("remove", min(before))
    assert names(tmp_path) == before - {min(before)}
    script("remove", "all")
    assert not names(tmp_path)


def test_check_recomputes_rows(train, tmp_path, script):
    (run,) = train("method=combined", "data.mixing={_target_: kd_lightning.data.Mixup}").runs
    code, said, _ = script("check", run, 50)
    assert code == 0, said
    assert said.count("as expected") == 3  # logits, attention maps, evaluation
    moved = run.parents[2].rename(tmp_path / "moved")
    run = moved / run.relative_to(tmp_path / "outputs")
    assert script("check", run, 50) == (0, said, "")
    # A valid row with other numbers: the outputs of another teacher.
    (entry,) = [e for e in stored(run.parents[2] / "teachers" / "remembered") if "-logit-" in
                e.folder.name]  # fmt: skip
    spoilt(entry)
    code, said, _ = script("check", run, 1000)
    assert code == 1
    assert "WRONG" in next(line for line in said.splitlines() if "-logit-" in line)
    assert script("check", run, 0)[0] == 2
    (none,) = train("method=none").runs
    code, _, said = script("check", none)
    assert code == 2
    assert "no teacher" in said


@pytest.mark.parametrize(
    "section",
    [
        "student.model", "teacher.model", "teacher.optimizer", "method.terms.logit", "optimizer",
        "scheduler", "data", "data.augmentation", "callbacks.mine", "trainer", "logger.mine",
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["check", "pack"])
def test_untrusted_run_cannot_execute_code(
    distilled, tmp_path, script, monkeypatch, section, command
):
    run = shutil.copytree(distilled, tmp_path / "run")
    (tmp_path / "untrusted.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "untrusted", raising=False)
    config = RunDirectory(run).read_config()
    config["callbacks"] = {"rates": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}}
    node = config
    for key in section.split("."):
        node[key] = node.get(key) or {}
        node = node[key]
    node["_target_"] = "untrusted.anything"
    RunDirectory(run).write_config(config)
    arguments = [tmp_path / "packed.zip"] if command == "pack" else []
    code, _, said = script(command, run, *arguments)
    assert not Path("executed").exists()
    if section.startswith("logger"):  # not built
        assert code == 0
        return
    assert code == 2
    assert "--trust PACKAGE" in said
    script(command, run, *arguments, "--trust", "untrusted")
    assert Path("executed").exists()


def test_fill_computes_once_what_a_training_uses(folder, train, tmp_path, script, monkeypatch):
    job = ("method=combined", "data.views=2", "trainer.max_epochs=3", "setting=a")
    fixed = (f"output_dir={tmp_path / 'outputs'}", f"data.root={folder}", *FOLDER, *TINY)
    batches = []
    ask = DistillationModule.ask_teacher
    monkeypatch.setattr(
        DistillationModule, "ask_teacher", lambda *given: batches.append(1) or ask(*given)
    )
    for computed in (2, 0):  # batches: all images of each view
        batches.clear()
        code, said, _ = script("fill", *fixed, *job)
        assert code == 0
        assert said.count(": 2 of 2 views\n") == 2
        assert len(batches) == SAMPLE + computed
    assert not list(tmp_path.glob("outputs/runs/*"))
    filled = {path: path.read_bytes() for path in tmp_path.rglob("view-*.rows")}
    assert len(filled) == 5  # of two terms, and of the images that are not augmented
    batches.clear()
    (run,) = train(*job).runs
    assert len(batches) == SAMPLE
    assert filled == {path: path.read_bytes() for path in tmp_path.rglob("view-*.rows")}
    assert script("check", run, 1000)[0] == 0
    # Only the view with a damaged output is computed again.
    damaged = next(path for path in filled if path.stem == "view-00001")
    damaged.write_bytes(filled[damaged][:-100].ljust(len(filled[damaged]), b"\0"))
    batches.clear()
    assert script("fill", *fixed, *job)[0] == 0
    assert len(batches) == SAMPLE + 1
    assert damaged.read_bytes() == filled[damaged]


def test_what_cannot_be_filled(folder, tmp_path, script):
    fixed = (f"output_dir={tmp_path / 'outputs'}", f"data.root={folder}", *FOLDER)
    for change, reason in (
        (("method=none", *TINY), "has no teacher"),
        (("teacher=mean",), "follows the student"),
        (("remember.disk_gb=0", *TINY), "disables the cache"),
        (("method=nothing",), "nothing"),
    ):
        code, _, said = script("fill", *fixed, *change)
        assert code == 2
        assert reason in said
        assert not list(tmp_path.glob("outputs/teachers/*"))
    code, said, _ = script("fill", *fixed, *TINY, "method=combined", "remember.disk_gb=5e-6")
    assert code == 1
    assert sorted(line.partition(": ")[2] for line in said.splitlines()) == [
        "0 of 2 views", "2 of 2 views",
    ]  # fmt: skip


def test_check_reports_damaged_rows(distilled, tmp_path, script):
    run = copied(distilled, tmp_path)
    (path,) = tmp_path.rglob("*-logit-*/view-00000.rows")
    content = path.read_bytes()
    images = json.loads(path.with_name("rows.json").read_text())["images"]
    size = len(content) // images
    written = sum(any(content[size * number : size * (number + 1)]) for number in range(images))
    for damaged, count in (
        (bytes([content[0] ^ 1]) + content[1:], 1),
        (content[-size:] + content[:-size], written),  # moved
        (content[: -3 * size + 1], 3),
        (bytes(len(content)), 0),  # not written yet
    ):
        path.write_bytes(damaged)
        code, said, _ = script("check", run, 1000)
        assert code == bool(count)
        found = re.findall(r": damaged and computed again when used: (\d+) rows\n", said)
        assert found == ([str(count)] if count else [])
    for other in path.parent.glob("view-*.rows"):
        other.write_bytes(b"\1" * len(content))
    code, said, _ = script("check", run, 1000)
    assert code == 1
    assert "-logit-" in said


def copied(run, tmp_path):
    """A copy of a run and its caches."""
    root = shutil.copytree(run.parents[2], tmp_path / "outputs")
    copy = root / run.relative_to(run.parents[2])
    config = RunDirectory(copy).read_config()
    RunDirectory(copy).write_config({**config, "output_dir": str(root)})
    return copy


def spoilt(entry):
    from kd_lightning.storage.rows import DTYPES, Rows

    shape, dtype = tuple(entry.geometry["shape"]), DTYPES[entry.geometry["dtype"]]
    rows = Rows(entry.folder, entry.key, entry.geometry["images"], shape, dtype)
    index, view = torch.arange(10), torch.zeros(10, dtype=torch.long)
    rows.write(index, view, rows.read(index, view)[0] + 1)


def test_packed_cache_is_used_elsewhere(train, tmp_path, script):
    assert train("method=logit").code == 0
    (name,) = [name for name in names(tmp_path) if "-logit-" in name]
    code, said, _ = script("pack", name, tmp_path / "packed.zip")
    assert (code, said) == (0, f"2 views: {tmp_path / 'packed.zip'}\n")
    place = tmp_path / "outputs" / "teachers" / "remembered" / name
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    script("remove", name)
    assert script("unpack", tmp_path / "packed.zip")[0] == 0
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    assert "0 new views" in script("unpack", tmp_path / "packed.zip")[1]
    assert not [path for path in place.parent.iterdir() if path.name.startswith(".")]


def test_outputs_of_equal_keys_are_shared_and_of_others_are_not(tmp_path):
    """Each argument that changes the rows belongs to the key, and so to the folder."""
    base = {"key": {"teacher": "a"}, "images": 20, "shapes": {"logits": (3,), "maps": (2, 2)}}

    def folders(**changes):
        cache = TeacherCache.of(tmp_path, **{**base, **changes})
        return {name: rows.folder for name, rows in cache.rows.items()}

    assert folders() == folders()
    assert len(set(folders().values())) == 2
    for change in (
        {"key": {"teacher": "b"}}, {"key": {"teacher": "a", "images": "v2"}},
        {"images": 21}, {"dtype": "bfloat16"},
        {"shapes": {"logits": (4,), "maps": (4,)}},
    ):  # fmt: skip
        assert not set(folders(**change).values()) & set(folders().values())
    cache = TeacherCache.of(str(tmp_path), **base, limit=1.0)
    assert (cache.root, cache.limit) == (tmp_path, 1.0)
    for rows in cache.rows.values():
        assert (rows.images, rows.dtype) == (20, torch.float16)
        assert rows.folder.parent == tmp_path
    assert cache.rows["maps"].shape == (2, 2)
    assert TeacherCache.of(tmp_path, **base).limit == 5e9


@pytest.fixture
def packed(tmp_path):
    cache = TeacherCache.of(tmp_path / "one", {"for": "a test"}, 20, {"logits": (3,)})
    for view in (0, 1):
        cache.fetch(INDEX, INDEX * 0 + view, CPU, lambda: {"logits": torch.randn(20, 3)})
    (entry,) = stored(tmp_path / "one")
    pack(entry.folder, tmp_path / "packed.zip")
    return tmp_path / "packed.zip"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_file_adds_nothing(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("packed")
    cache = TeacherCache.of(root / "one", {"for": "a test"}, 20, {"logits": (3,)})
    cache.fetch(INDEX, INDEX * 0, CPU, lambda: {"logits": torch.arange(60.0).view(20, 3)})
    (entry,) = stored(root / "one")
    pack(entry.folder, root / "packed.zip")
    content = bytearray((root / "packed.zip").read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    content = content[: data.draw(st.integers(len(content) // 2, len(content)))]
    (root / "packed.zip").write_bytes(content)
    try:
        unpack(root / "packed.zip", root / "two")
    except InputError:
        assert not stored(root / "two")
        return
    rows = next((root / "two").rglob("view-00000.rows"))
    assert rows.read_bytes() == (entry.folder / "view-00000.rows").read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../x-logits-0123456789abcdef"},
        {"name": "other-logits-0123456789abcdef"},
        {"key": {"for": "another teacher"}},
        {"files": {"../view-00000.rows": "0" * 64}},
        {"files": {"view-00000.rows": "0" * 64}},
        {"files": {"key.json": "0" * 64}},
        {"rows": {"images": 19, "shape": [3], "dtype": "float16"}},
        {"rows": {"images": 20, "shape": [3], "dtype": "int8"}},
        {"rows": {"images": 0, "shape": [3], "dtype": "float16"}, "files": {}},
        {"rows": {"images": 20, "shape": [0], "dtype": "float16"}, "files": {}},
        {"rows": {"images": 10**9, "shape": [3], "dtype": "float16"}, "files": {}},
        {"format": 2},
        {"files": None},
    ],
)
def test_forged_manifest_is_rejected(tmp_path, packed, change):
    with zipfile.ZipFile(packed) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    manifest = {**json.loads(parts.pop("manifest.json")), **change}
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
        archive.writestr("manifest.json", json.dumps(manifest))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="damaged, or not a packed cache"):
        unpack(packed, tmp_path / "two" / "deep")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_two_processes_may_unpack_the_same_cache(tmp_path, packed, monkeypatch):
    extract = packing._extract

    def interrupted(*arguments):
        monkeypatch.setattr(packing, "_extract", extract)
        unpack(packed, tmp_path / "two")  # another process, in the meantime
        extract(*arguments)

    monkeypatch.setattr(packing, "_extract", interrupted)
    unpack(packed, tmp_path / "two")
    (entry,) = stored(tmp_path / "two")
    assert entry.views == 2
    assert sorted(entry.folder.parent.iterdir()) == [entry.folder]


def test_name_of_a_teacher_may_contain_hyphens(tmp_path):
    key = {"for": "a test"}
    folder = tmp_path / "one" / folder_name("wrn-40-2", "logits", key)
    Rows(folder, key, 20, (3,), torch.float16).reserve(0)
    assert pack(folder, tmp_path / "packed.zip") == 1
    place = tmp_path / "two" / folder.name
    assert unpack(tmp_path / "packed.zip", tmp_path / "two") == [(place, 1)]
    assert unpack(tmp_path / "packed.zip", tmp_path / "two") == [(place, 0)]


@pytest.mark.parametrize("missing", ["rows.json", "key.json", ""])
def test_incomplete_cache_is_not_packed(tmp_path, missing):
    rows = Rows(tmp_path / "one" / "teacher-logits-0", {"for": "a test"}, 2, (3,), torch.float16)
    rows.reserve(0)
    folder = rows.folder if missing else tmp_path / "one" / "other"
    (rows.folder / (missing or "key.json")).unlink()
    with pytest.raises(InputError, match=f"{folder} cannot be packed"):
        pack(folder, tmp_path / "packed.zip")
    assert not (tmp_path / "packed.zip").exists()


def test_full_disk_is_reported_as_such(tmp_path, packed, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        unpack(packed, tmp_path / "two")


def test_example_of_the_document_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs/cache.md").read_text(), re.S
    )
    asked = []
    counted = example.replace("teacher(images)}", "asked.append(len(images)) or teacher(images)}")
    assert counted != example
    for expected in (3 * 512, 0):
        torch.manual_seed(0)
        asked.clear()
        exec(compile(counted, "docs/cache.md", "exec"), {"asked": asked})
        assert sum(asked) == expected
