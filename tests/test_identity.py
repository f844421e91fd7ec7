"""Content hashes: changed inputs invalidate everything computed from them."""

import json
import os
import shutil

import pytest
import torch
from conftest import FOLDER, TINY
from user_modules import write_module

from kd_lightning import api
from kd_lightning.config import naming
from kd_lightning.config.nodes import build
from kd_lightning.data.views import PLAIN
from kd_lightning.distill.caching import open_caches
from kd_lightning.models import ConvNet
from kd_lightning.storage.identity import stamps
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.workflows import student as training
from kd_lightning.workflows.evaluate import evaluate
from kd_lightning.workflows.jobs import prepare
from kd_lightning.workflows.teacher import find_teachers

SETTING = ("setting=here", "trainer.precision=32-true", "trainer.max_epochs=1")
TEACHER = ("teacher.model.channels=[4,8]", "teacher.model.hidden=8")


def metrics_of(tmp_path, name):
    return json.loads((tmp_path / "outputs" / "runs" / "here" / name / "metrics.json").read_text())


def superseded(tmp_path):
    return sorted(path.name for path in tmp_path.glob("outputs/superseded/here/*"))


def write_checkpoint(path, seed):
    torch.manual_seed(seed)
    torch.save(ConvNet([4, 8], 8, num_classes=3, image_size=16).state_dict(), path)


@pytest.fixture
def opened(tmp_path, folder):
    """The module of a run with its caches, as before the training of the student."""

    def module(*arguments, device="cpu"):
        config = api.compose(
            *FOLDER, f"data.root={folder}", *TINY, f"output_dir={tmp_path / 'outputs'}",
            f"data_dir={tmp_path / 'data'}", *arguments,
        )  # fmt: skip
        job = prepare(config)
        job = job.with_teachers(find_teachers(job.plan, job.data, job.teachers))
        open_caches(job.module, job.plan, job.data, torch.device(device))
        return job.module

    return module


def cached_in(module):
    """The folder of the cached targets of the only term that needs the teacher."""
    (rows,) = module.cache.rows.values()
    return rows.folder


NET = """
    from kd_lightning.models import ConvNet
    class Net(ConvNet):
        def forward(self, images):
            return {} super().forward(images)
"""

# --- runs --------------------------------------------------------------------------------------


def test_replaced_checkpoint_invalidates_runs(train, tmp_path):
    checkpoint = tmp_path / "teacher.pt"
    command = ("method=logit", f"teacher.checkpoint={checkpoint}", *TEACHER, *SETTING)
    write_checkpoint(checkpoint, seed=0)
    first = train(*command, "seed=0").metrics
    write_checkpoint(checkpoint, seed=1)
    again = train(*command, "seed=0")
    assert again.code == 0, again.err
    other = train(*command, "seed=1").metrics
    name = next(path.name for path in tmp_path.glob("outputs/runs/here/*-s0*"))
    now = metrics_of(tmp_path, name)
    assert now["teacher_sha256"] == other["teacher_sha256"] != first["teacher_sha256"]
    assert now["images_sha256"] == first["images_sha256"]
    assert now["teacher_test_accuracy"] == other["teacher_test_accuracy"]
    assert superseded(tmp_path) == [f"{name}-1"]
    kept = tmp_path / "outputs" / "superseded" / "here" / f"{name}-1"
    assert json.loads((kept / "metrics.json").read_text()) == first
    assert (kept / "student.safetensors").exists()


def test_relabelled_images_invalidate_runs(train, tmp_path, folder):
    first = train("method=none", *SETTING).metrics
    for number in (0, 2):
        (folder / "train" / "class0" / f"{number}.jpg").rename(
            folder / "train" / "class1" / f"moved{number}.jpg"
        )
    done = train("method=none", *SETTING)
    assert done.code == 0, done.err
    name = next(path.name for path in tmp_path.glob("outputs/runs/here/none*"))
    assert metrics_of(tmp_path, name)["images_sha256"] != first["images_sha256"]
    assert superseded(tmp_path) == [f"{name}-1"]


def test_relabelled_images_in_data_dir_invalidate_runs(train, tmp_path, folder):
    command = ("method=none", f"data_dir={folder}", *SETTING)
    first = train(*command).metrics
    assert "already finished" in train(*command).out
    (folder / "train" / "class0" / "0.jpg").rename(folder / "train" / "class1" / "moved.jpg")
    done = train(*command)
    assert "already finished" not in done.out
    name = next(path.name for path in tmp_path.glob("outputs/runs/here/none*"))
    assert metrics_of(tmp_path, name)["images_sha256"] != first["images_sha256"]


def test_own_folders_below_the_images_do_not_invalidate_stamps(tmp_path, folder):
    config = api.compose(
        *FOLDER, "method=none", f"data.root={folder}", f"data_dir={folder}",
        f"output_dir={folder}/outputs",
    )  # fmt: skip
    before = stamps(config)
    for place in (folder / "decoded", folder / "outputs" / "runs"):
        place.mkdir(parents=True)
        (place / "new").touch()
    assert stamps(config) == before
    (folder / "train" / "new").touch()
    assert stamps(config) != before


def test_interrupted_run_is_not_resumed_on_other_images(train, tmp_path, folder):
    (run,) = train("method=none", *SETTING).runs
    metrics = json.loads((run / "metrics.json").read_text())
    (run / "metrics.json").write_text(json.dumps({**metrics, "status": "running"}))
    shutil.rmtree(folder / "train" / "class2")
    shutil.copytree(folder / "train" / "class1", folder / "train" / "class2")
    weights = (run / "student.safetensors").read_bytes()
    assert train("method=none", *SETTING).code == 0
    assert (run / "student.safetensors").read_bytes() != weights
    kept = tmp_path / "outputs" / "superseded" / "here" / f"{run.name}-1"
    assert (kept / "student.safetensors").read_bytes() == weights


def test_newer_mtime_alone_has_no_effect(train, tmp_path, folder, monkeypatch):
    checkpoint = tmp_path / "teacher.pt"
    write_checkpoint(checkpoint, seed=0)
    command = ("method=logit", f"teacher.checkpoint={checkpoint}", *TEACHER, *SETTING)
    (run,) = train(*command).runs
    before = (run / "student.safetensors").stat().st_mtime_ns
    for path in [checkpoint, *folder.rglob("*.png")]:
        os.utime(path, (1e9, 1e9))
    assert "already finished" in train(*command).out + train(*command).out
    assert (run / "student.safetensors").stat().st_mtime_ns == before
    assert not superseded(tmp_path)
    # The stamps are updated, so that nothing is loaded again.
    monkeypatch.setattr(training, "prepare", lambda *_: pytest.fail("loaded the images"))
    assert "already finished" in train(*command).out


def test_changed_teacher_code_invalidates_cached_outputs(train, tmp_path, own):
    checkpoint = tmp_path / "teacher.pt"
    write_checkpoint(checkpoint, seed=0)
    command = (
        "method=logit", f"teacher.checkpoint={checkpoint}", "teacher.model._target_=mine.Net",
        *TEACHER, *SETTING,
    )  # fmt: skip
    write_module(own / "mine.py", NET.format(""))
    right = train(*command, "seed=0").metrics
    write_module(own / "mine.py", NET.format("-"))
    wrong = train(*command, "seed=1").metrics
    assert wrong["teacher_sha256"] != right["teacher_sha256"]
    fresh = train(*command, "seed=1", f"output_dir={tmp_path / 'outputs' / 'fresh'}")
    (run,) = fresh.runs
    expected = json.loads((run / "metrics.json").read_text())
    assert wrong["teacher_test_accuracy"] == expected["teacher_test_accuracy"]
    assert wrong["val_accuracy"] == expected["val_accuracy"]
    weights = [
        next(path.glob("**/logit*s1*/student.safetensors")).read_bytes()
        for path in (tmp_path / "outputs" / "runs", tmp_path / "outputs" / "fresh")
    ]
    assert weights[0] == weights[1]


def test_changed_student_code_invalidates_runs(train, tmp_path, own):
    command = ("method=none", "student.model._target_=mine.Net", "student.name=mine", *SETTING)
    write_module(own / "mine.py", NET.format(""))
    first = train(*command).metrics
    write_module(own / "mine.py", NET.format("2 *"))
    assert train(*command).code == 0
    name = next(path.name for path in tmp_path.glob("outputs/runs/here/none*"))
    assert metrics_of(tmp_path, name)["code_sha256"] != first["code_sha256"]
    assert superseded(tmp_path) == [f"{name}-1"]


TERM = """
    from kd_lightning.losses import Logit
    class Mine(Logit):
        def remember(self, teacher):
            return {} teacher.logits.float()
"""


def test_changed_term_code_invalidates_cached_targets(opened, own):
    folders = []
    for sign in ("", "-", ""):
        write_module(own / "mine.py", TERM.format(sign))
        folders.append(cached_in(opened("method=logit", "method.terms.logit._target_=mine.Mine")))
    assert folders[0] == folders[2] != folders[1]


def test_terms_with_equal_targets_share_cached_logits(train, opened, own):
    write_module(
        own / "mine.py",
        """
        from kd_lightning.losses import Logit, LogitTerm
        class Derived(Logit):
            def forward(self, student, remembered, batch):
                return (student.logits - remembered).square().mean()
        class Independent(LogitTerm):
            def forward(self, student, remembered, batch):
                return (student.logits - remembered).abs().mean()
        class Clamped(Independent):
            def remember(self, teacher):
                return teacher.logits.float().clamp(-20, 20)
        """,
    )

    def arguments(kind):
        term = f"+method.terms.{kind.lower()}={{_target_: mine.{kind}, weight: 1.0}}"
        return "method=logit", "~method.terms.logit", term

    shared = cached_in(opened("method=logit"))
    for kind in ("Derived", "Independent"):
        assert cached_in(opened(*arguments(kind))) == shared
    assert cached_in(opened(*arguments("Clamped"))) != shared

    # The rows that one term has written are those that another reads.
    train("method=logit", *SETTING)
    before = {path: path.stat().st_mtime_ns for path in shared.glob("*.rows")}
    done = train(*arguments("Independent"), *SETTING)
    assert done.code == 0, done.err
    assert {path: path.stat().st_mtime_ns for path in shared.glob("*.rows")} == before != {}


def test_run_of_an_older_version_is_valid(train, tmp_path):
    (run,) = train("method=none", *SETTING).runs
    metrics = json.loads((run / "metrics.json").read_text())
    new = ("images_sha256", "teacher_sha256", "code_sha256", "stamps")
    old = {key: value for key, value in metrics.items() if key not in new}
    (run / "metrics.json").write_text(json.dumps(old))
    assert "already finished" in train("method=none", *SETTING).out
    assert json.loads((run / "metrics.json").read_text()) == old


def test_evaluation_on_other_images_warns(train, folder, capsys):
    (run,) = train("method=none").runs
    evaluate(run)
    assert capsys.readouterr().err == ""
    (folder / "test" / "class0" / "0.jpg").rename(folder / "test" / "class1" / "moved.jpg")
    evaluate(run)
    assert "the images differ" in capsys.readouterr().err


def test_baseline_on_other_images_is_not_reused(train, folder):
    train("method=none", "setting=one")
    (folder / "train" / "class0" / "0.jpg").rename(folder / "train" / "class1" / "moved.jpg")
    other = ("setting=two", "teacher.model.hidden=24")
    assert train("method=none", *other).runs  # no run is shown instead


# --- where it is stored ------------------------------------------------------------------------


def test_new_keys_do_not_rename_runs():
    from test_naming import composed

    config = composed()
    assert config["setting"] == "cifar10-convnet-15e-3ff7b752"
    assert naming.config_key(config).startswith("e3117eef9cd4f113")
    new = {**config, "update_bn": False, "callbacks": {}, "pictures": False}
    new["teacher"] = {**config["teacher"], "ignore_keys": []}
    assert naming.config_key(new) == naming.config_key(config)
    assert naming.config_key({**new, "update_bn": True}) != naming.config_key(config)


def test_cached_outputs_are_specific_to_the_device_type(opened):
    keys = []
    for kind in ("cpu", "cuda"):
        module = opened("method=logit", device=kind)
        for cache in (module.evaluation_cache, module.cache):
            keys += [rows.key.get("device") for rows in cache.rows.values()]
    assert keys == [None, None, "cuda", "cuda"]


@pytest.mark.parametrize("layer", ["torch.nn.BatchNorm2d(3, track_running_stats=False)", "Noise()"])
def test_outputs_that_depend_on_the_batch_are_not_cached(train, tmp_path, own, layer):
    write_module(
        own / "mine.py",
        f"""
        import torch
        from kd_lightning.models import ConvNet
        class Noise(torch.nn.Module):
            def forward(self, x):
                return torch.nn.functional.dropout(x)
        class Net(ConvNet):
            def __init__(self, *args, **settings):
                super().__init__(*args, **settings)
                self.first = {layer}
            def forward(self, images):
                return super().forward(self.first(images))
        """,
    )
    done = train("method=combined", "teacher.model._target_=mine.Net", *SETTING)
    assert done.code == 0, done.err
    assert "not cached" in done.err
    assert not list((tmp_path / "outputs" / "teachers").glob("remembered/*"))


def test_recorded_device_is_the_training_device(train, monkeypatch):
    """Lightning moves a module back to the CPU after testing."""
    named = []
    monkeypatch.setattr(training, "device_name", lambda device: named.append(device) or "it")
    original = training.build_trainer

    def build(*args, **kwargs):
        trainer = original(*args, **kwargs)
        trainer.strategy._root_device = torch.device("cpu", 0)
        return trainer

    monkeypatch.setattr(training, "build_trainer", build)
    assert train("method=none").metrics["device"] == "it"
    assert named == [torch.device("cpu", 0)]


AUGMENTATION = """
    import torch
    from kd_lightning.data.views import PLAIN
    class Darker:
        def __init__(self, by=2):
            self.by = by
        def render(self, images, index, view):
            pixels = images[index].permute(0, 3, 1, 2)
            changed = (view != PLAIN).view(-1, 1, 1, 1)
            return torch.where(changed, pixels // self.by {}, pixels)
"""


def test_user_defined_augmentation_is_used_and_cached_under_its_own_key(train, opened, own):
    def command(by):
        return "method=logit", f"+data.augmentation={{_target_: mine.Darker, by: {by}}}"

    write_module(own / "mine.py", AUGMENTATION.format(""))
    done = train(*command(2), *SETTING)
    assert done.code == 0, done.err
    views = Views(done.runs[0])
    pixels = views.render(torch.tensor([3]), torch.tensor([5]))
    plain = views.render(torch.tensor([3]), torch.tensor([PLAIN]))
    assert torch.equal(pixels, plain // 2)
    used = cached_in(opened(*command(2)))
    assert list(used.glob("*.rows"))
    # Its settings and its code are part of the key.
    folders = [used, cached_in(opened("method=logit")), cached_in(opened(*command(3)))]
    write_module(own / "mine.py", AUGMENTATION.format("+ 1"))
    folders.append(cached_in(opened(*command(2))))
    assert len(set(folders)) == 4


class Views:
    """The data module of a run."""

    def __init__(self, run):
        self.data = build(RunDirectory(run).read_config()["data"], "data")
        self.data.setup()

    def render(self, index, view):
        return self.data._cut(index, view)["images"]
