"""Packed teachers: the same students from recorded outputs, without the teacher."""

import contextlib
import hashlib
import json
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import FOLDER, TINY, write_folder
from test_cache_script import script  # noqa: F401

from kd_lightning import api
from kd_lightning.errors import InputError
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import student
from kd_lightning.workflows.packing import pack_runs

NETWORK = (
    "teacher.model.channels", "teacher.model.hidden", "teacher.layers", "teacher.trainer",
    "teacher.optimizer",
)  # fmt: skip
STUDENT = tuple(setting for setting in TINY if not setting.startswith(NETWORK))
TRUST = ("--trust", "own_teacher")
SAME = (
    "teacher", "teacher_parameters", "compression_ratio", "teacher_val_accuracy",
    "teacher_test_accuracy", "agreement", "val_accuracy", "test_accuracy", "parameters",
)  # fmt: skip


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A packed teacher of `write_folder`'s images, and the runs of two methods that it is of.

    The code of the teacher is in the folder ``code`` beside the file: see `own_code`.
    """
    root = tmp_path_factory.mktemp("published")
    (root / "code").mkdir()
    (root / "code" / "own_teacher.py").write_text(
        "from kd_lightning.models import ConvNet\n\nclass Net(ConvNet):\n    pass\n"
    )
    given = (*FOLDER, *TINY, f"data.root={write_folder(root / 'images')}",
             f"output_dir={root / 'outputs'}", "trainer.precision=32-true",
             "teacher.model._target_=own_teacher.Net")  # fmt: skip
    with own_code_in(root / "code"):
        # fitnet selects the teacher's layers by role
        found = {name: api.run(*given, f"method={name}") for name in ("combined", "fitnet")}
        runs = [run["folder"] for run in found.values()]
        views = pack_runs(runs, root / "teacher.zip", ["own_teacher"])
    kinds = {name.split("-")[1]: count for name, count in views.items()}
    assert kinds == {"logit": 2, "attention": 2, "mapterm": 2, "evaluation": 1}
    return root / "teacher.zip", found


@contextlib.contextmanager
def own_code_in(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield
    sys.modules.pop("own_teacher", None)


@pytest.fixture
def own_runs(published, tmp_path):
    """Copies of the runs and caches of `published` in `tmp_path`; the teacher can be imported."""
    root = published[0].parent
    shutil.copytree(root / "outputs", tmp_path / "outputs")
    runs = {}
    for name, metrics in published[1].items():
        runs[name] = tmp_path / Path(metrics["folder"]).relative_to(root)
        config = runs[name] / "config.yaml"
        config.write_text(
            config.read_text().replace(f"{root / 'outputs'}", f"{tmp_path / 'outputs'}")
        )
    with own_code_in(root / "code"):
        yield runs


@pytest.fixture
def from_packed(train, published):
    """Train from a packed teacher, on the images of the `train` fixture, which are the same."""

    def run(*arguments, file=published[0]):
        given = ("teacher=packed", f"teacher.outputs={file}", "trainer.precision=32-true")
        return train(*STUDENT, *given, *arguments, tiny=False)

    return run


@pytest.fixture
def prepare(folder, published, tmp_path):
    """Prepare a training from a packed teacher, as the command line does."""

    def prepared(*arguments, file=published[0]):
        given = ("teacher=packed", f"teacher.outputs={file}", "trainer.precision=32-true")
        place = (f"data.root={folder}", f"output_dir={tmp_path / 'outputs'}")
        student.prepare(api.compose(*FOLDER, *STUDENT, *place, *given, *arguments))

    return prepared


@pytest.fixture
def refused(prepare, tmp_path):
    """Prepare a training that must be rejected, with nothing unpacked."""

    def run(words, *arguments, **file):
        with pytest.raises(InputError) as error:
            prepare(*arguments, **file)
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("outputs/**/*.rows"))

    return run


def student_of(folder):
    return (Path(folder) / "student.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["combined", "fitnet"])
def test_student_and_results_are_those_of_the_teacher(from_packed, published, tmp_path, method):
    """Through the command line, elsewhere, without the teacher's weights and code."""
    file, originals = published
    done = from_packed(f"method={method}")
    assert done.code == 0, done.err
    assert student_of(done.runs[0]) == student_of(originals[method]["folder"])
    assert {key: done.metrics[key] for key in SAME} == {key: originals[method][key] for key in SAME}
    assert done.metrics["teacher_key"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "own_teacher" not in sys.modules
    assert not list(tmp_path.glob("outputs/teachers/*/*.safetensors"))


def test_missing_row_ends_the_training_which_then_resumes(
    from_packed,
    prepare,
    published,
    tmp_path,
    script,  # noqa: F811
):
    """Without the teacher it cannot be recomputed, and no other number may be used."""
    file, originals = published
    command = ("method=combined", "setting=same", "trainer.max_epochs=2")
    prepare("method=logit", "seed=1", "trainer.max_epochs=1")
    (damaged,) = tmp_path.glob("outputs/teachers/packed/*/*-logit-*/view-00001.rows")
    content = bytearray(damaged.read_bytes())
    for place in range(8, len(content), 16):
        content[place] ^= 1
    damaged.write_bytes(content)
    done = from_packed(*command)
    assert done.code == 1
    assert str(file) in done.err
    folder = damaged.parents[1]
    assert f"remove {folder} and run the same command again" in done.err
    assert "Traceback" not in done.err
    assert torch.load(done.runs[0] / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 0
    assert f"{folder.name} " in script("list")[1]
    assert script("remove", "all")[0] == 0
    assert folder.exists()
    assert f"{folder.name} " in script("remove", folder.name)[1]
    assert not folder.exists()
    again = from_packed(*command)
    assert again.code == 0, again.err
    assert "resum" in (done.runs[0] / "train.log").read_text()
    assert student_of(done.runs[0]) == student_of(originals["combined"]["folder"])


MISFITS = [
    (["data.padding=1"], "data.padding is 2 in the file and 1 here"),
    (["data.view_seed=4"], "data.view_seed is 0 in the file and 4 here"),
    (["data.val_fraction=0.2"], "data.val_fraction is 0.1 in the file and 0.2 here"),
    (["data.mean=[0.4,0.5,0.5]"], "data.mean is"),
    (["trainer.precision=bf16-mixed"], "precision is 32-true in the file and bf16-mixed here"),
    (["remember.dtype=float32"], "remember.dtype is float16 in the file and float32 here"),
    (["remember.top_k=1"], "remember.top_k is None in the file and 1 here"),
    (["data.mixing={_target_: kd_lightning.data.Mixup}"], "data.mixing is None in the file and"),
    (["augmentation=strong"], "data.augmentation is {"),
    (["teacher.layers=[stage1]", "method=attention"], "term.maps is"),
    (["trainer.max_epochs=3"], "2 views of each image for logit, but this run needs 3: use data"),
    (["trainer.max_epochs=5", "data.views=4"], "use data.views=2"),
    (["remember.disk_gb=0"], "remember.disk_gb must be above 0"),
    (["teacher.outputs=null"], "needs teacher.outputs=FILE"),
    (["teacher.outputs=nowhere.zip"], "teacher.outputs=nowhere.zip does not exist"),
    (["teacher.checkpoint=one.safetensors"], "cannot be used with teacher.outputs"),
    (["teacher.members=[{seed: 0},{seed: 1}]"], "a packed teacher cannot be in an ensemble"),
    (["teacher=convnet"], "add teacher=packed"),
    (["data.image_size=8"], "the images or labels differ"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "words"), MISFITS, ids=lambda value: str(value[0])[:40])
def test_what_differs_is_named_before_training(refused, overrides, words):
    refused(words, "method=logit", *overrides)


def test_what_differs_is_one_line_of_the_command(from_packed, tmp_path):
    done = from_packed("method=logit", "data.view_seed=4")
    assert done.code == 2, done.err
    assert "data.view_seed is 0 in the file and 4 here" in done.err
    assert len(done.err.splitlines()) == 1, done.err
    assert not done.runs
    assert not list(tmp_path.glob("outputs/**/*.rows"))


def rewritten(source, target, change=lambda manifest: None, parts=lambda parts: None):
    """A copy of a packed file with changes of its manifest and of its parts' bytes."""
    with zipfile.ZipFile(source) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    parts(content)
    manifest = json.loads(content.pop("manifest.json"))
    change(manifest)
    with zipfile.ZipFile(target, "w") as archive:
        for name, part in content.items():
            archive.writestr(name, part)
        archive.writestr("manifest.json", json.dumps(manifest))
    return target


def without(kind):
    def change(manifest):
        manifest["caches"] = [c for c in manifest["caches"] if f"-{kind}-" not in c["name"]]

    return change


def test_outputs_that_a_method_needs_must_be_there(refused, published, tmp_path):
    file = rewritten(published[0], tmp_path / "less.zip", without("attention"))
    refused("no outputs for the term attention, only those of ", "method=combined", file=file)
    file = rewritten(published[0], tmp_path / "untested.zip", without("evaluation"))
    refused("no outputs on the test images", "method=logit", file=file)


def changed(*path, to):
    def change(manifest):
        *parents, last = path
        node = manifest
        for part in parents:
            node = node[part]
        node[last] = to

    return change


FORGED = [
    changed("teacher", "name", to="../../elsewhere"),
    changed("teacher", "name", to="${oc.env:HOME}"),
    changed("teacher", "layers", to=["${output_dir}"]),
    changed("teacher", "layers", to="stage1"),
    changed("teacher", "parameters", to=2**70),
    changed("teacher", "val_accuracy", to="good"),
    changed("teacher", "shapes", "shapes", "stage1", to=[8, -1, 8]),
    changed("teacher", "shapes", "layouts", "stage1", to=["channels_first", 8]),
    changed("teacher", "shapes", "layouts", "stage2", to=["tokens", 8, 8, 3]),
    changed("teacher", "shapes", "shapes", "stage2", to=[2**39, 2, 2]),
    changed("teacher", "shapes", to={}),
    changed("teacher", "shapes", "shapes", "", to=[4]),
    changed("caches", 0, "name", to="../../elsewhere"),
    changed("caches", 0, "key", to=[]),
    changed("caches", 0, "rows", "shape", to=[4]),
    changed("caches", 0, "rows", "dtype", to=[]),
    changed("caches", 0, "files", to={"../view-00000.rows": "0" * 64}),
    changed("caches", 1, "key", "normalization", to=None),  # of the evaluation
    changed("caches", 0, "key", "term", to=7),
    changed("caches", 0, "key", "split", to=7),
    changed("caches", to=7),
    changed("format", to=3),
]


@pytest.mark.parametrize("change", FORGED, ids=range(len(FORGED)))
def test_forged_description_is_rejected(refused, published, tmp_path, change):
    file = rewritten(published[0], tmp_path / "forged.zip", change)
    refused("", "method=combined", file=file)
    assert not list(tmp_path.rglob("elsewhere*"))


def test_damaged_file_is_rejected_before_training(refused, published, tmp_path):
    def spoil(content):
        name = next(name for name in content if "-logit-" in name)
        content[name] = content[name][:-1] + bytes([content[name][-1] ^ 1])

    file = rewritten(published[0], tmp_path / "spoilt.zip", parts=spoil)
    refused("is damaged", "method=logit", file=file)
    content = published[0].read_bytes()
    (tmp_path / "half.zip").write_bytes(content[: len(content) // 2])
    refused("is damaged", "method=logit", file=tmp_path / "half.zip")


def test_single_cache_is_no_teacher(refused, own_runs, tmp_path, script):  # noqa: F811
    (name,) = [path.name for path in tmp_path.glob("outputs/teachers/remembered/*-logit-*")]
    assert script("pack", name, tmp_path / "one.zip")[0] == 0
    shutil.rmtree(tmp_path / "outputs")
    words = "pack it again with scripts/cache.py pack RUN FILE"
    refused(words, "method=logit", file=tmp_path / "one.zip")


def test_other_content_is_another_teacher(from_packed, published, tmp_path):
    file = tmp_path / "teacher.zip"
    shutil.copy(published[0], file)
    command = ("method=logit", "setting=same", "trainer.max_epochs=1")
    first = from_packed(*command, file=file)
    assert first.code == 0, first.err
    assert "already finished" in from_packed(*command, file=file).out
    rewritten(published[0], file, changed("teacher", "val_accuracy", to=0.25))
    second = from_packed(*command, file=file)
    assert second.code == 0, second.err
    assert "the teacher" in second.err
    metrics = json.loads((first.runs[0] / "metrics.json").read_text())
    assert metrics["teacher_val_accuracy"] == 0.25
    (earlier,) = tmp_path.glob("outputs/superseded/same/*/metrics.json")
    for key in ("teacher_key", "teacher_sha256"):
        assert json.loads(earlier.read_text())[key] != metrics[key]


def test_grid_and_report(from_packed, published, tmp_path):
    done = from_packed("-m", "method=none,attention", "data.views=1")
    assert done.code == 0, done.err
    assert len(done.runs) == 2
    for run in done.runs:
        metrics = json.loads((run / "metrics.json").read_text())
        assert metrics["teacher"] == "convnet"
        assert metrics["teacher_parameters"] == published[1]["fitnet"]["teacher_parameters"]
    table = next(tmp_path.glob("outputs/runs/*/results.md")).read_text()
    assert "attention" in table
    assert "convnet" in table


def test_several_processes(from_packed, train):
    command = ("method=logit", "trainer=ddp", "trainer.devices=2", "trainer.max_epochs=1")
    done = from_packed(*command)
    assert done.code == 0, done.err
    assert done.metrics["processes"] == 2


def test_runs_that_cannot_be_packed(train, tmp_path, script, own_runs, from_packed):  # noqa: F811
    file, run = tmp_path / "teacher.zip", own_runs["combined"]

    def said(*runs):
        code, _, err = script("pack", *runs, file, *TRUST)
        assert code == 2
        assert not file.exists()
        return err

    other = train("method=logit", "trainer.max_epochs=1", "trainer.precision=32-true")
    assert "another teacher" in said(run, other.runs[0])
    again = from_packed("method=logit", "trainer.max_epochs=1")
    assert again.code == 0, again.err
    assert "without weights" in said(again.runs[0])
    none = train("method=none", "trainer.max_epochs=1")
    assert "no teacher" in said(none.runs[0])
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "teacher": "my net"}))
    assert "teacher.name: 'my net' cannot be packed" in said(run)
    (run / "metrics.json").write_text(json.dumps(metrics))
    config = RunDirectory(run).read_config()
    RunDirectory(run).write_config({**config, "remember": {**config["remember"], "disk_gb": 0}})
    assert "not cached" in said(run)
    (run / "metrics.json").write_text(json.dumps({**metrics, "status": "running"}))
    assert "no finished run" in said(run)


def test_same_runs_make_the_same_file(own_runs, published, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 2e9)
    pack_runs([own_runs["fitnet"], own_runs["combined"]], tmp_path / "again.zip", ["own_teacher"])
    assert (tmp_path / "again.zip").read_bytes() == published[0].read_bytes()


def test_fewer_views_than_configured_are_reported(own_runs, tmp_path, caplog):
    directory = RunDirectory(own_runs["fitnet"])
    config = directory.read_config()
    trainer = {**config["trainer"], "max_epochs": 30}
    directory.write_config({**config, "data": {**config["data"], "views": 25}, "trainer": trainer})
    pack_runs([directory.path], tmp_path / "teacher.zip", ["own_teacher"])
    assert "2 of 25 views of convnet-mapterm-" in caplog.text
    assert len(caplog.records) == 1


def test_incomplete_views_are_not_packed(own_runs, tmp_path, script, caplog):  # noqa: F811
    run, file = own_runs["fitnet"], tmp_path / "teacher.zip"
    (view,) = tmp_path.glob("outputs/teachers/remembered/*-mapterm-*/view-00001.rows")
    for name, count in (("view-00001.rows", "2 views"), ("view-00000.rows", "1 view")):
        code, said, err = script("pack", run, file, *TRUST)
        assert code == 0, err
        assert f": {count}\n" in said.splitlines(keepends=True)[0]
        assert len(said.splitlines()) == 3  # a term, evaluation, the file
        assert ("1 of 2 views of" in caplog.text) == (count == "1 view")
        view.with_name(name).write_bytes(bytes(view.stat().st_size))
    code, _, err = script("pack", run, tmp_path / "none.zip", *TRUST)
    assert code == 2
    assert "no complete view" in err
    assert "scripts/cache.py fill" in err
