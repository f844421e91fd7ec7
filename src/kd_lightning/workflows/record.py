"""The record of a run: `metrics.json` and `config.yaml`, from its beginning."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_lightning.config.nodes import Node
from kd_lightning.config.plan import Plan
from kd_lightning.storage.run_directory import RunDirectory
from kd_lightning.storage.teacher_store import StoredTeacher
from kd_lightning.workflows.jobs import Job

log = logging.getLogger(__name__)

TEACHERS = "trained_teachers_sha256"
"""Key of the hashes of the weights of trained teachers, which a configuration does not determine on
every machine.
"""


def begin_record(job: Job, directory: RunDirectory, stamped: str) -> tuple[dict[str, Any], bool]:
    """Write the initial metrics and the configuration of a run.

    Returns:
        The metrics, and whether to resume an interrupted training.
    """
    plan = job.plan
    earlier = directory.read_metrics()
    if changes := job.contents.changes(earlier):
        place = plan.output_dir / "superseded" / directory.path.parent.name
        aside = directory.set_aside(place)
        log.warning(
            "changed since %s was run: %s; retraining it, the earlier run is kept in %s",
            directory.path.name, ", ".join(changes), aside,
        )  # fmt: skip
        earlier = {}
    resumes = earlier.get("config_key") == plan.key
    # Otherwise this one, interrupted before its first checkpoint, would resume from it.
    if not resumes and directory.drop_checkpoint():
        log.warning(
            "the interrupted training in %s was of another configuration; starting a new one",
            directory.path,
        )
    record = {
        **_identity(plan),
        "config_key": plan.key,
        "baseline_key": plan.baseline_key,
        **job.contents.as_metrics(),
        "stamps": stamped,
        "class_names": [str(name) for name in job.data.classes],
    }
    if not plan.teachers:
        record["key_without_teacher"] = plan.key_without_teacher
    if resumes and TEACHERS in earlier:
        record[TEACHERS] = earlier[TEACHERS]
    directory.write_metrics(record)
    directory.write_config(plan.config)
    return record, resumes


def record_teachers(
    record: dict[str, Any], stored: Sequence[StoredTeacher | None], directory: RunDirectory
) -> bool:
    """Record the weights of teachers that were trained, and drop a checkpoint of other ones.

    Args:
        record: from `begin_record`; extended.
        stored: the teachers.
        directory: folder of the run.

    Returns:
        False if the interrupted training had teachers with other weights: they were lost and have
        been trained again, on another machine.
    """
    found = [teacher.sha256 for teacher in stored if teacher is not None]
    same = record.get(TEACHERS, found) == found
    if not same and directory.drop_checkpoint():
        log.warning(
            "the interrupted training in %s had a teacher with other weights; starting a new one",
            directory.path,
        )
    record[TEACHERS] = found
    directory.write_metrics(record)
    return same


def _identity(plan: Plan) -> dict[str, Any]:
    return {
        "status": "running",
        "name": plan.name,
        "setting": plan.setting,
        "method": plan.method,
        "student": plan.student.name,
        "teacher": plan.teacher_name,
        "data": plan.data.name,
        "seed": plan.student.seed,
    }


def record_failure(config: Node, run_dir: str | Path, error: Exception) -> None:
    """Record a run of a grid as failed, even if it could not start, for the grid's table.

    Raises:
        RunError: another process is working on the run.
    """
    directory = RunDirectory(run_dir)
    with directory.lock(wait=False):
        earlier = directory.read_metrics()
        if earlier.get("status") == "finished":
            return
        directory.write_metrics(
            {
                **earlier,  # an interrupted training can still be resumed
                "status": "failed",
                **{part: config[part] for part in ("name", "setting")},
                **{part: config[part]["name"] for part in ("method", "student", "teacher", "data")},
                "seed": config["seed"],
                "error": str(error),
            }
        )
