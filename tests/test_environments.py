"""The command under other interpreters, in other folders, and without a place for its output."""

import subprocess
import sys

import pytest
from conftest import REPOSITORY, in_a_new_process

JOB = (
    "method=none", "data=digits", "trainer.max_epochs=1", "+trainer.limit_train_batches=2",
    "trainer.accelerator=cpu", "student.model.channels=[4,8]", "student.model.hidden=8",
    "data.image_size=16", "pictures=false",
)  # fmt: skip


def test_python_m_is_equivalent_to_train_py(tmp_path):
    job = (*JOB, f"output_dir={tmp_path}")
    done = in_a_new_process("train.py", *job)
    assert done.code == 0, done.err
    (metrics,) = tmp_path.glob("runs/*/*/metrics.json")
    assert metrics.parent.name.startswith("none-small-s0")
    for command in (("-m", "kd_lightning"), (str(REPOSITORY / "train.py"),)):
        safe = {"PYTHONSAFEPATH": "1", "LC_ALL": "C"} if len(command) == 1 else {}
        again = in_a_new_process(*command, *job, cwd=tmp_path, fresh=True, **safe)
        assert again.code == 0, again.err
        assert "already finished" in again.out


@pytest.mark.slow  # Python recompiles every package
def test_run_with_python_oo(tmp_path):
    done = in_a_new_process("-OO", "train.py", *JOB, f"output_dir={tmp_path}")
    assert done.code == 0, done.err


@pytest.mark.parametrize("redirected", [">&-", "<&- 2>&-", ">/dev/full", "| true"])
def test_no_traceback_if_output_is_closed(redirected):
    command = f"{sys.executable} train.py --help {redirected}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr
    assert done.returncode == (1 if "full" in redirected else 0)


def test_output_to_a_terminal_without_unicode(tmp_path):
    done = in_a_new_process(
        "train.py", "data.root=/é=", f"output_dir={tmp_path}", fresh=True,
        PYTHONIOENCODING="ascii:strict",
    )  # fmt: skip
    assert done.code == 2
    assert "Traceback" not in done.err


def test_packages_are_found_in_the_current_folder(train, tmp_path, monkeypatch):
    (tmp_path / "own_networks.py").write_text(
        "from kd_lightning.models import ConvNet\nclass Own(ConvNet): pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    done = train("method=none", "student.model._target_=own_networks.Own")
    assert done.code == 0, done.err
