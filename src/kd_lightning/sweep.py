"""What a grid does beside its runs: after each of them, the results so far."""

import logging
import os
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


FOLDERS = "KD_GRID_FOLDERS"
"""Environment variable: the file in which the runs of a grid, in whichever process they are made,
leave the folders that they lie in. With several teachers there is one for each."""


class Results(Callback):
    """Keeps `results.csv`, `results.md` and pictures in the grid's folder up to date.

    A Hydra callback: Hydra calls it in whichever process a run was made.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Know afterwards which runs are of now, and where they lie."""
        self._began = time.time()
        own = Path(config.hydra.sweep.dir).absolute()
        os.environ[FOLDERS] = str(own / f".folders-{os.getpid()}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """A run has ended, well or badly."""
        if config.hydra.mode == RunMode.MULTIRUN:
            folder = Path(config.hydra.sweep.dir)
            update(folder)
            with Path(os.environ[FOLDERS]).open("a", encoding="utf-8") as file:
                file.write(f"{folder}\n")

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Say where to look, and whether all went well, in whichever process it was."""
        names = Path(os.environ.pop(FOLDERS))
        written = names.read_text(encoding="utf-8").splitlines() if names.exists() else []
        names.unlink(missing_ok=True)
        for folder in sorted({Path(name) for name in written}):
            update(folder)
            for metrics in folder.glob("*/metrics.json"):
                recent = metrics.stat().st_mtime >= self._began
                if recent and read_json(metrics).get("status") == "failed":
                    exit_codes.append(1)
            results = folder / "results.md"
            if results.exists():
                print(results.read_text(encoding="utf-8").split("Every cell.")[0].rstrip())
                print(f"\nall of it in {results}\n")


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
