"""Fuzzing of our own files: they are read, or rejected with a message, and never crash."""

import contextlib
import copy
import json

import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kd_lightning.data.folder import FolderDataModule
from kd_lightning.errors import InputError
from kd_lightning.models import ConvNet
from kd_lightning.reports import documents, plots
from kd_lightning.reports.documents import markdown, write_report
from kd_lightning.reports.runs import read_histories, read_runs
from kd_lightning.reports.statistics import summarise
from kd_lightning.results import COLUMNS
from kd_lightning.storage import teacher_cache as memory
from kd_lightning.storage.run_directory import Checkpoint, RunDirectory
from kd_lightning.storage.teacher_store import TeacherStore
from kd_lightning.storage.weights import load_weights
from kd_lightning.workflows.grid import update

fuzz = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from(["finished", "failed", "none", "../../x", 10**400, "0", -1]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
NESTED = b"[" * 20_000
garbage = st.binary(max_size=200) | st.sampled_from([b"", b"\xff\xfe", b"null", b"{}", NESTED])


@st.composite
def damaged(draw, content):
    """A file's bytes, truncated or modified."""
    if draw(st.booleans()):
        return content[: draw(st.integers(0, len(content)))]
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@st.composite
def changed(draw, tree):
    """A tree of dictionaries with some values replaced or removed."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            key = draw(st.sampled_from(sorted(node)))
            if not (isinstance(node[key], dict) and node[key] and draw(st.booleans())):
                break
            node = node[key]
        if draw(st.booleans()):
            node[key] = draw(values)
        else:
            del node[key]
        if not tree:
            break
    return tree


def metrics(method="logit", seed=0):
    return {
        "status": "finished", "name": f"{method}-small-s{seed}", "setting": "cifar10-convnet-2e",
        "method": method, "student": "small", "teacher": "convnet", "data": "cifar10",
        "seed": seed, "parameters": 530_090, "teacher_parameters": 33_930_890,
        "compression_ratio": 64.0, "val_accuracy": 0.7, "test_accuracy": 0.69,
        "best_val_accuracy": 0.71, "best_epoch": 1, "test_accuracy_at_best": 0.68, "epochs": 2,
        "agreement": None, "teacher_val_accuracy": None, "teacher_test_accuracy": 0.9,
        "train_seconds": 3.0, "images_per_second": 1000.0, "precision": "32-true",
        "device": "cpu", "torch": "2.9.1", "python": "3.11",
    }  # fmt: skip


CONFIG = {
    "student": {
        "name": "small",
        "model": {
            "_target_": "kd_lightning.models.ConvNet", "channels": [4, 8], "hidden": 8,
            "num_classes": 3, "image_size": 16,
        },
    },
    "data": {"_target_": "kd_lightning.data.FolderDataModule", "num_classes": 3, "image_size": 16},
    "optimizer": {"_target_": "torch.optim.SGD"},
    "trainer": {"accelerator": "cpu", "precision": "32-true", "memory_format": "auto"},
}  # fmt: skip


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def tables(sources):
    """The full reporting pipeline, up to `results.md`."""
    runs = read_runs(sources)
    for setting, part in runs[runs["status"] != "unreadable"].groupby("setting"):
        markdown(setting, part, summarise(part), {})
    read_histories(runs)
    return runs


@settings(fuzz, max_examples=10)
@given(st.tuples(*[changed(metrics()) | values | garbage] * 4))
def test_metrics(tmp_path, contents):
    """Of several runs at once: most of the time is spent on a table, whatever its length."""
    for number, method in enumerate(("none", "logit")):
        write(tmp_path / str(number) / "metrics.json", metrics(method))
    for number, content in enumerate(contents, start=2):
        write(tmp_path / str(number) / "metrics.json", content)
        assert isinstance(RunDirectory(tmp_path / str(number)).read_metrics(), dict)
    runs = tables([tmp_path])
    assert len(runs) == 2 + len(contents)
    assert (runs["status"] == "finished").sum() >= 2


@pytest.fixture
def results(tmp_path):
    """The `results.csv` of two runs."""
    for number, method in enumerate(("none", "logit")):
        write(tmp_path / "runs" / str(number) / "metrics.json", metrics(method))
    path = tmp_path / "results.csv"
    read_runs([tmp_path / "runs"]).to_csv(path, index=False)
    return path


def test_results_csv_contains_all_of_the_runs(results):
    again, runs = tables([results]), tables([results.with_name("runs")])
    again, runs = (table.astype(object).where(table.notna(), None) for table in (again, runs))
    pd.testing.assert_frame_equal(again, runs)


@settings(fuzz, max_examples=30)
@given(st.sampled_from(COLUMNS), st.integers(0, 1), values, st.data())
def test_results_csv(results, column, row, value, data):
    table = pd.read_csv(results).astype(object)
    table.loc[row, column] = str(value) if isinstance(value, list | dict) else value
    path = results.with_name("changed.csv")
    table.to_csv(path, index=False)
    for content in (path.read_bytes(), data.draw(damaged(path.read_bytes()) | garbage)):
        path.write_bytes(content)
        with contextlib.suppress(InputError):
            tables([path])


@settings(fuzz, max_examples=10)
@given(
    garbage | damaged(b"epoch,train_accuracy,val_accuracy,images_per_second\n1,0.5,0.4,99\n"),
    garbage | damaged(b"cat,dog\n5,1\n2,4\n"),
)
@example(b"a,b\n1,2\n", b"a,b\n1,2\n")
@example(b"epoch,val_accuracy\nlate,good\n", b"cat,dog\nmany,few\n3,4\n")
def test_other_files_of_a_run(tmp_path, history, confusion):
    """The report is written without the figure. Other figures do not read these files."""
    run = tmp_path / "runs" / "run"
    write(run / "metrics.json", metrics())
    write(run / "history.csv", history)
    write(run / "confusion.csv", confusion)
    (tmp_path / "results.md").unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "accuracy_by_size", lambda *_: None)
        patch.setattr(plots, "gain_by_method", lambda *_: None)
        patch.setattr(documents, "accuracy_by_cost", lambda *_: None)
        write_report([tmp_path / "runs"], tmp_path)
    assert "| logit |" in (tmp_path / "results.md").read_text()


@fuzz
@given(
    changed(CONFIG).map(lambda tree: yaml.safe_dump(tree).encode())
    | garbage.map(lambda content: content[:3000])
    | st.text().map(str.encode)
)
def test_config(tmp_path, content):
    run = RunDirectory(tmp_path)
    write(tmp_path / "config.yaml", content)
    save_file(
        ConvNet(channels=[4, 8], hidden=8, num_classes=3, image_size=16).state_dict(),
        tmp_path / "student.safetensors",
    )
    try:
        student, config = run.load_student()
    except InputError:
        return
    assert isinstance(student, torch.nn.Module)
    assert config["student"]["model"]["_target_"]


@pytest.mark.timeout(20)
def test_aliases_do_not_multiply(tmp_path):
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    write(tmp_path / "config.yaml", "\n".join(lines).encode())
    with pytest.raises(InputError, match="aliases"):
        RunDirectory(tmp_path).read_config()


@fuzz
@given(st.data())
def test_weights(tmp_path, data):
    model = ConvNet(channels=[4], hidden=4, num_classes=3, image_size=8)
    path = tmp_path / "student.safetensors"
    save_file(model.state_dict(), path)
    path.write_bytes(data.draw(damaged(path.read_bytes()) | garbage))
    with contextlib.suppress(InputError):
        load_weights(model, path)


@fuzz
@given(st.data())
def test_checkpoint(tmp_path, data):
    path = tmp_path / "checkpoints" / "last.ckpt"
    path.parent.mkdir(exist_ok=True)
    progress = {"ready": 2, "started": 2, "processed": 1, "completed": 1}
    loops = {
        "epoch_progress": {"current": progress, "total": progress},
        "epoch_loop.batch_progress": {"current": {**progress, "processed": 4}},
    }
    tree = {"global_step": 9, "loops": {"fit_loop": loops}}
    torch.save(tree, path)
    run = RunDirectory(tmp_path)
    assert run.checkpoint() == Checkpoint(path, 1, 9, 4)
    torch.save(data.draw(changed(tree)), path)
    assert run.checkpoint() is None or isinstance(run.checkpoint(), Checkpoint)
    path.write_bytes(data.draw(damaged(path.read_bytes()) | garbage))
    assert run.checkpoint() is None or isinstance(run.checkpoint(), Checkpoint)


@fuzz
@given(st.data())
def test_damaged_stored_teacher(tmp_path_factory, data):
    store = TeacherStore(tmp_path_factory.mktemp("store"))
    trained = []

    def train(folder):
        trained.append(folder)
        save_file({"w": torch.ones(3)}, folder / "teacher.safetensors")
        return {"val_accuracy": 0.5, "test_accuracy": 0.4}

    stored = store.obtain("t", "k" * 64, train)
    manifest = stored.path / "teacher.json"
    whole = json.loads(manifest.read_text())
    write(manifest, data.draw(changed(whole) | values | garbage))
    again = store.obtain("t", "k" * 64, train)
    for fact in ("val_accuracy", "test_accuracy"):
        assert isinstance(again.facts[fact], float)
    assert len(trained) in (1, 2)
    assert (again.path / "teacher.safetensors").exists()
    if len(trained) == 2:  # the existing one is kept
        assert list(store.root.glob("*.damaged-1/teacher.safetensors"))


@fuzz
@given(st.data())
def test_modified_rows_are_invalid(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("rows")
    rows = memory.Rows(root / "t", {"a": 1}, images=5, shape=(3,), dtype=torch.float16)
    index, view = torch.arange(5), torch.zeros(5, dtype=torch.int64)
    rows.reserve(0)
    rows.write(index, view, torch.arange(15.0).view(5, 3).half())
    before = rows.path(0).read_bytes()
    content = data.draw(damaged(before) | garbage)
    rows.path(0).write_bytes(content)
    again = memory.Rows(root / "t", {"a": 1}, images=5, shape=(3,), dtype=torch.float16)
    numbers, known = again.read(index, view)
    width = len(before) // 5
    for row in range(5):
        same = content[row * width : (row + 1) * width] == before[row * width : (row + 1) * width]
        whole = len(content) >= len(before)  # otherwise the file counts as missing
        assert bool(known[row]) == (same and whole)
        if known[row]:
            assert numbers[row].tolist() == [3 * row, 3 * row + 1, 3 * row + 2]
    write(root / "t" / "key.json", data.draw(values | garbage))
    assert isinstance(memory.stored(root)[0].key, dict)


@fuzz
@given(st.data())
def test_damaged_decoded_images(tmp_path_factory, data):
    from conftest import write_folder

    root = tmp_path_factory.mktemp("images")
    folder = write_folder(root / "images", classes=2, per_class=3, size=4)

    def load():
        module = FolderDataModule(
            name="x", root=str(folder), cache_dir=str(root / "cache"), image_size=4, padding=1
        )
        return module.load().pixels

    pixels = load()
    (stored,) = (root / "cache").glob("*.safetensors")
    others = st.sampled_from([torch.float32, torch.uint8, torch.int64])
    if data.draw(st.booleans()):
        shape = data.draw(st.sampled_from([pixels.shape, (1, 4, 4, 3), (8,)]))
        dtype = data.draw(others)
        if (shape, dtype) != (pixels.shape, torch.uint8):
            save_file({"pixels": torch.zeros(shape, dtype=dtype)}, stored)
    else:
        stored.write_bytes(data.draw(garbage))
    assert torch.equal(load(), pixels)


STATE = {"runs": {"run/metrics.json": [1, 2]}, "drawn": 1e9, "complete": True}


@fuzz
@given(changed(STATE) | values | garbage)
def test_state_file_of_a_grid(tmp_path, content):
    write(tmp_path / "run" / "metrics.json", {**metrics(), "status": "failed", "error": "why"})
    write(tmp_path / ".results.json", content)
    (tmp_path / "results.csv").unlink(missing_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            documents, "write_report", lambda _, out, **__: write(out / "results.csv", b"")
        )
        update(tmp_path)
    assert (tmp_path / "results.csv").exists()


def test_untrusted_setting_name_stays_in_the_report_folder(tmp_path, monkeypatch):
    """The setting's name is part of the figures' file names."""
    monkeypatch.setattr(plots, "png", lambda figure: b"")
    for number, setting in enumerate(("../../elsewhere", "/tmp/x", "<script>alert(1)</script>")):
        write(tmp_path / "runs" / str(number) / "metrics.json", {**metrics(), "setting": setting})
    out = tmp_path / "a" / "b" / "out"
    write_report([tmp_path / "runs"], out, page=True)
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "a"}
    assert len(list(out.glob("*-accuracy.png"))) == 3
    assert "<script>" not in (out / "report.html").read_text()
