"""What a grid does beside its runs: after each of them, the results so far."""

import logging
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

log = logging.getLogger(__name__)


class Results(Callback):
    """Keeps `results.csv`, `results.md` and pictures in the grid's folder up to date.

    A Hydra callback: Hydra calls it in whichever process a run was made.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """A run has ended, well or badly."""
        if config.hydra.mode == RunMode.MULTIRUN:
            update(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Say where to look."""
        results = Path(config.hydra.sweep.dir) / "results.md"
        if results.exists():
            print(results.read_text(encoding="utf-8").split("Every cell.")[0].rstrip())
            print(f"\nall of it in {results}")


def update(folder: Path) -> None:
    """Write the results of a folder of runs, if any run has changed since they were written."""
    try:
        with FileLock(folder / ".results.lock"):
            results = folder / "results.md"
            written = results.stat().st_mtime_ns if results.exists() else 0
            if all(run.stat().st_mtime_ns < written for run in folder.glob("*/metrics.json")):
                return
            from kd_lightning.documents import write_report  # seconds: pandas, pictures

            write_report([folder], folder)
    except Exception as error:  # a picture that cannot be drawn must not cost a night of training
        log.warning("the results in %s could not be brought up to date: %s", folder, error)
