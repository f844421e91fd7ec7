"""What a grid does beside its runs: after each of them, the results so far."""

import logging
import time
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from kd_lightning.files import read_json, write_json

log = logging.getLogger(__name__)

exit_codes: list[int] = []
"""Of the runs that failed: a grid goes on after a failure and reports it at the end."""


class Results(Callback):
    """Keeps `results.csv`, `results.md` and pictures in the grid's folder up to date.

    A Hydra callback: Hydra calls it in whichever process a run was made.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Know afterwards which runs are of now."""
        self._began = time.time()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """A run has ended, well or badly."""
        if config.hydra.mode == RunMode.MULTIRUN:
            update(Path(config.hydra.sweep.dir))

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Say where to look, and whether all went well, in whichever process it was."""
        own = Path(config.hydra.sweep.dir)
        update(own)
        # Of several teachers each has a folder: those that something has happened in.
        written = sorted(own.parent.glob("*/.results.json"))
        for folder in [p.parent for p in written if self._is_recent(p)] or [own]:
            for metrics in folder.glob("*/metrics.json"):
                if self._is_recent(metrics) and read_json(metrics).get("status") == "failed":
                    exit_codes.append(1)
            results = folder / "results.md"
            if results.exists():
                print(results.read_text(encoding="utf-8").split("Every cell.")[0].rstrip())
                print(f"\nall of it in {results}\n")

    def _is_recent(self, path: Path) -> bool:
        return path.stat().st_mtime >= self._began


def update(folder: Path) -> None:
    """Write the results of a folder of runs, if any run has changed since they were written."""
    try:
        with FileLock(folder / ".results.lock"):
            # What the runs were like when the results were written; no clock is asked, since a run
            # may end while another process writes.
            state = {
                str(run.relative_to(folder)): [run.stat().st_mtime_ns, run.stat().st_size]
                for run in sorted(folder.glob("*/metrics.json"))
            }
            if state == read_json(folder / ".results.json"):
                return
            from kd_lightning.documents import write_report  # seconds: pandas, pictures

            write_report([folder], folder)
            write_json(folder / ".results.json", state)
    except Exception as error:  # a picture that cannot be drawn must not cost a night of training
        log.warning("the results in %s could not be brought up to date: %s", folder, error)
