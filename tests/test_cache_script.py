"""The teacher-output cache as a component: the script, packed files, and other training loops."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import FOLDER, REPOSITORY, TINY

from kd_lightning.distill.module import DistillationModule
from kd_lightning.storage.rows import Rows
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_cache import TeacherCache, stored

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


def test_views_of_a_part_of_the_images_are_packed_once_filled(folder, train, tmp_path, script):
    job = ("method=logit", "trainer.max_epochs=1", "+trainer.limit_train_batches=1", "setting=a")
    (run,) = train(*job).runs
    code, _, said = script("pack", run, tmp_path / "packed.zip")
    assert code == 2
    assert "scripts/cache.py fill" in said
    fixed = (f"output_dir={tmp_path / 'outputs'}", f"data.root={folder}", *FOLDER, *TINY)
    assert script("fill", *fixed, *job)[0] == 0
    assert script("pack", run, tmp_path / "packed.zip")[0] == 0


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
    from kd_lightning.storage.rows import DTYPES

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
    assert "0 new views: " in script("unpack", tmp_path / "packed.zip")[1]
    (place / "view-00000.rows").write_bytes(bytes(len(before["view-00000.rows"])))
    said = script("unpack", tmp_path / "packed.zip")[1]
    assert re.match(r"0 new views, \d+ missing rows restored: ", said)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
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


def test_example_of_the_document_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(
        r"```python\n(.*?)```", (REPOSITORY / "docs/cache.md").read_text(), re.S
    )
    asked = []
    counted = example.replace("teacher(images)}", "asked.append(len(images)) or teacher(images)}")
    assert counted != example
    for expected in (3 * 512, 0):
        torch.seed()
        asked.clear()
        exec(compile(counted, "docs/cache.md", "exec"), {"asked": asked})
        assert sum(asked) == expected
