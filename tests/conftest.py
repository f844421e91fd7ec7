"""Shared fixtures: a small image folder, and the command line as a user runs it."""

import gc
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import composition
import numpy as np
import processes
import pytest
from hydra._internal.hydra import Hydra
from hypothesis import Phase, settings
from PIL import Image

from kd_lightning import cli

# torch and Lightning are imported where they are needed: pytest-xdist imports this file in a
# process that runs no test.
if TYPE_CHECKING:
    from kd_lightning.config.plan import TrainerPlan
    from kd_lightning.storage.run_directory import RunDirectory
    from kd_lightning.workflows.export import Exported

if "PYTEST_XDIST_WORKER" in os.environ:
    import kd_lightning.engine.preload  # noqa: F401  # as a run does, without unused parts of SciPy

    gc.disable()  # while the tests are imported

# For mutation testing: a failing example is enough, no need to shrink it.
settings.register_profile("first-failure", phases=(Phase.explicit, Phase.generate))

REPOSITORY = Path(__file__).resolve().parents[1]

# Runs in seconds, but covers every part of a run.
TINY = (
    "student.model.channels=[4,8]",
    "student.model.hidden=8",
    "teacher.model.channels=[8,16]",
    "teacher.model.hidden=16",
    "teacher.layers=[stage1,stage2]",
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "teacher.trainer.max_epochs=1",
    "optimizer.lr=0.01",
    "teacher.optimizer.lr=0.01",
    "pictures=false",
)

# Of the images of `write_folder`.
FOLDER = ("data=folder", "data.image_size=16", "data.padding=2", "data.batch_size=16")


class Finished(NamedTuple):
    """Result of a command: exit code, output, and run directories."""

    code: int
    out: str
    err: str
    runs: list[Path]

    @property
    def metrics(self) -> dict[str, Any]:
        """`metrics.json` of the only run."""
        (run,) = self.runs
        return json.loads((run / "metrics.json").read_text())


def write_folder(root: Path, classes: int = 3, per_class: int = 12, size: int = 16) -> Path:
    """Class sub-folders of images whose colour determines the class."""
    generator = np.random.default_rng(0)
    for part, count in (("train", per_class), ("test", per_class // 3)):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 100, (size, size, 3), dtype=np.uint8)
                pixels[:, :, label % 3] += 120
                suffix = "png" if number % 2 else "jpg"
                Image.fromarray(pixels).save(folder / f"{number}.{suffix}")
    return root


def pytest_configure(config: pytest.Config) -> None:
    """Start the server of commands that all processes of pytest-xdist share."""
    if config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        processes.share()


@pytest.fixture(scope="session", autouse=True)
def composed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder that all processes of the session share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "composed"
    folder.mkdir(exist_ok=True)
    os.environ[composition.STORE] = str(folder)
    if "PYTEST_XDIST_WORKER" in os.environ:
        processes.serve()
        gc.freeze()  # a full collection would visit everything that is imported
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Leave the memory of a process of pytest-xdist to the operating system: freeing every object
    takes ten seconds, and lets some libraries report leaks.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(0)


@pytest.fixture(scope="module", autouse=True)
def fast_composition(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compose configurations, and find the commit, as in tests/composition.py, except in the tests
    of that; skip waits.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_sweeps":
            composition.install(patch)
        composition.skip_waits(patch)
        if request.module.__name__ != "test_provenance":
            composition.read_commit_once(patch)
        yield


@pytest.fixture(scope="session")
def original_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `folder` copies; encoding takes longer than copying."""
    return write_folder(tmp_path_factory.mktemp("original") / "images")


@pytest.fixture
def folder(tmp_path: Path, original_folder: Path) -> Path:
    """A folder of 36 training and 12 test images in three classes."""
    return shutil.copytree(original_folder, tmp_path / "images", copy_function=shutil.copyfile)


@pytest.fixture
def run(tmp_path: Path) -> "RunDirectory":
    """A run directory that does not exist yet."""
    from kd_lightning.storage.run_directory import RunDirectory

    return RunDirectory(tmp_path / "setting" / "run")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for user modules, on Python's path."""
    folder = tmp_path / "own"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("mine", "helpers"):
        sys.modules.pop(name, None)


@pytest.fixture
def unrendered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but not rendered."""
    monkeypatch.setattr("kd_lightning.reports.documents.plots.png", lambda figure: b"\x89PNG")


@pytest.fixture(scope="session")
def shipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for photographs, and for a student that is distilled from a checkpoint."""
    return tmp_path_factory.mktemp("shipping")


@pytest.fixture(scope="session")
def photographs(shipping: Path) -> Path:
    """Images of three classes, in files of many kinds."""
    from photograph_folder import write_photographs

    return write_photographs(shipping / "photographs")


@pytest.fixture(scope="session")
def distilled(shipping: Path, photographs: Path) -> Path:
    """The folder of a student distilled from the checkpoint."""
    from photograph_folder import teacher_checkpoint

    from kd_lightning import api

    with pytest.MonkeyPatch.context() as patch:  # this may come before `fast_composition`
        composition.install(patch)
        composition.skip_waits(patch)
        metrics = api.run(
            *TINY, "method=logit", "data=folder", f"data.root={photographs}", "data.image_size=16",
            "data.padding=2", "data.batch_size=16", "trainer.max_epochs=10", "optimizer.lr=0.02",
            "student.model.channels=[8,16]", "student.model.hidden=16",
            f"teacher.checkpoint={teacher_checkpoint(photographs, shipping / 'teacher.pt')}",
            f"output_dir={shipping / 'outputs'}", f"data_dir={shipping / 'data'}",
        )  # fmt: skip
    assert metrics["teacher_test_accuracy"] > 0.95
    assert metrics["test_accuracy"] > 0.95
    return Path(metrics["folder"])


@pytest.fixture(scope="session")
def exported(distilled: Path) -> "Exported":
    """The student of the run as ONNX."""
    from kd_lightning import api

    return api.export(distilled, "onnx")


@pytest.fixture(scope="session")
def exported_pt2(distilled: Path) -> "Exported":
    """The student of the run as a program of torch."""
    from kd_lightning import api

    return api.export(distilled, "pt2")


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[Any, str, str]]:
    """Run one of the scripts in this process; return its exit code and its output."""

    def call(name: str, *arguments: Any) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code: Any = 0
        try:
            runpy.run_path(str(REPOSITORY / "scripts" / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def train(
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Finished]:
    """Run `train.py` in this process on the small folder, with a tiny student and teacher.

    Figures are only drawn with `pictures=true`, also those of a grid.
    """

    calls: list[tuple[str, ...]] = []

    def run(*arguments: str, tiny: bool = True, data: bool = True) -> Finished:
        given = [f"output_dir={tmp_path / 'outputs'}", f"data_dir={tmp_path / 'data'}"]
        if data:
            given += [*FOLDER, f"data.root={folder}"]
        given += TINY if tiny else ("pictures=false",)
        if not any(argument.startswith(("setting=", "-m")) for argument in arguments):
            # A separate folder per command, so that it does not find earlier runs.
            given.append(f"setting=call-{len(calls)}")
        calls.append(arguments)
        before = set(run_directories(tmp_path))
        flags = [argument for argument in arguments if argument.startswith("-")]
        overrides = [argument for argument in arguments if not argument.startswith("-")]
        cli.exit_codes.clear()
        code = 0
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["train.py", *flags, *given, *overrides])
            if "pictures=true" not in overrides:
                patch.setattr("kd_lightning.reports.documents.draw", lambda *_: {})
            if not composition.may_choose_mode(overrides):
                patch.setattr(Hydra, "get_mode", lambda *_, **__: None)
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        captured = capsys.readouterr()
        new = sorted(set(run_directories(tmp_path)) - before)
        return Finished(code, captured.out, captured.err, new)

    return run


def run_directories(root: Path) -> list[Path]:
    """Folders below `root` that contain a `metrics.json`."""
    return [path.parent for path in root.glob("outputs/*/**/metrics.json")]


def trainer_plan(settings: dict[str, Any], precision: str = "32-true") -> "TrainerPlan":
    """The plan of a single-process CPU trainer."""
    from kd_lightning.config.plan import TrainerPlan

    return TrainerPlan(settings, precision, channels_last=True, processes=1)


def in_a_new_process(
    *command: str,
    cwd: Path = REPOSITORY,
    fresh: bool = False,
    prepare: Callable[[], None] | None = None,
    **env: str,
) -> Finished:
    """Run a Python command line in another process, as a user does.

    Args:
        command: a script and its arguments, or any of Python's own.
        cwd: the folder that it is run in.
        fresh: whether a new interpreter is needed; options of Python's need one at any rate.
        prepare: called in the process first; only without a new interpreter.
        env: further environment variables.
    """
    if fresh or not command[0].endswith(".py"):
        assert prepare is None
        done = processes.run_fresh(*command, cwd=cwd, **env)
        return Finished(done.returncode, done.stdout, done.stderr, [])
    process = processes.start(*command, cwd=cwd, prepare=prepare, **env)
    out, err = process.communicate()
    return Finished(process.wait(), out, err, [])
