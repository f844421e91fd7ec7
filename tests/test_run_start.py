"""The start of a run: nothing is left of a rejected one; a cluster's variables have no effect."""

import logging
import sys

import pytest
from lightning.fabric.utilities import rank_zero
from processes import start

from kd_lightning.models import count_parameters
from kd_lightning.storage.run_directory import RunDirectory


@pytest.mark.parametrize(
    "wrong", ["method.terms.logit.temperature=-3", "trainer.max_time=never", "data.batch_size=999"]
)
def test_rejected_run_leaves_no_folder(train, tmp_path, wrong):
    plus = "+" if "max_time" in wrong else ""
    done = train("method=logit", plus + wrong)
    assert done.code == 2
    assert not list(tmp_path.glob("outputs/*"))
    logging.getLogger("anything").warning("no log file is left that this would be written to")


def import_anew():
    """As in a new interpreter, in which importing Lightning sets the rank from the environment."""
    rank_zero.rank_zero_only.rank = rank_zero._get_rank()
    for name in [name for name in sys.modules if name.partition(".")[0] == "kd_lightning"]:
        del sys.modules[name]


def test_single_process_ignores_cluster_variables(folder, tmp_path):
    variables = {
        "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "grid", "RANK": "1",
        "LOCAL_RANK": "1", "WORLD_SIZE": "2", "NODE_RANK": "1", "MASTER_PORT": "1",
    }  # fmt: skip
    command = (
        "train.py", "method=none", "data=folder", f"data.root={folder}", "data.image_size=16",
        "data.batch_size=16", "student.model.channels=[4,8]", "trainer.max_epochs=1",
        "trainer.accelerator=cpu", f"output_dir={tmp_path / 'outputs'}", "pictures=false",
        f"data_dir={tmp_path / 'data'}",
    )  # fmt: skip
    trained = start(*command, prepare=import_anew, **variables)
    out, err = trained.communicate()
    assert trained.returncode == 0, err
    # The table, and a line of progress.
    assert len(err.splitlines()) == 1
    assert ": epoch 1/1, val " in err
    (run,) = (tmp_path / "outputs" / "runs").glob("*/*")
    left = {path.name.partition(".out")[0] for path in run.iterdir()}
    assert {"config.yaml", "metrics.json", "student.safetensors", "checkpoints", "events"} <= left
    metrics = RunDirectory(run).read_metrics()
    assert metrics["status"] == "finished"
    accuracy = f"{100 * metrics['test_accuracy']:.2f} %"
    assert accuracy in out
    evaluated = start("scripts/evaluate.py", str(run), prepare=import_anew, **variables)
    out, err = evaluated.communicate()
    assert evaluated.returncode == 0, err
    assert f"test accuracy {accuracy}" in out
    assert out.count(accuracy) == 2


def test_parameters_of_a_teacher_not_buildable_on_meta_device(train):
    from torchvision.models import regnet_y_400mf

    model = "teacher.model._target_=torchvision.models.regnet_y_400mf"
    less = [f"~teacher.model.{key}" for key in ("channels", "hidden", "image_size")]
    done = train(
        "method=none", model, *less, "student.model.channels=[4,8]", "trainer.max_epochs=1",
        "trainer.accelerator=cpu", tiny=False,
    )  # fmt: skip
    assert done.code == 0, done.err
    expected = regnet_y_400mf(num_classes=3)
    assert done.metrics["teacher_parameters"] == count_parameters(expected)
