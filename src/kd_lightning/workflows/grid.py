"""Results and remaining time of a grid while it runs."""

import contextlib
import json
import logging
import os
import secrets
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from kd_lightning.files import read_json, write_json

log = logging.getLogger(__name__)

exit_codes: list[int] = []
"""Exit codes of failed runs: a grid continues after a failure and reports it at the end."""


FOLDERS = "KD_GRID_FOLDERS"
"""Environment variable with the path of a file to which every run of a grid, in any process,
appends a `CompletedRun`. With several teachers the runs are in several folders."""


MINUTE = 60.0  # seconds


class CompletedRun(NamedTuple):
    """A completed run of a grid.

    Attributes:
        folder: folder of the setting.
        number: index of the run in the grid, from 0.
        seconds: duration; 0 if it had already been finished, or failed.
        exit_code: 0 unless it failed.
    """

    folder: str
    number: int
    seconds: float
    exit_code: int = 0


class Results(Callback):
    """Hydra callback that updates `results.csv`, `results.md` and figures in the grid's folder, and
    prints the progress of the grid and the estimated remaining time.

    Hydra calls it in the process of each run, which may differ from the main process.
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._started = 0.0
        self._finished_before = False
        self._failures = 0
        self._cells: list[str] = []

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Record the start of the grid and create the file of its jobs."""
        self._began = time.time()
        self._cells = cells_of(config)
        own = Path(config.hydra.sweep.dir).absolute()
        # Not the PID: processes of other machines, and of containers, may have the same.
        os.environ[FOLDERS] = str(own / f".folders-{secrets.token_hex(4)}")

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Record the start of a run, and whether it is already finished."""
        self._started = time.time()
        self._failures = len(exit_codes)
        metrics = read_json(Path(config.hydra.runtime.output_dir) / "metrics.json")
        self._finished_before = metrics.get("status") == "finished"

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Update the results and print the remaining time."""
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.sweep.dir)
        update(folder, last=False)
        done = job_return.status == JobStatus.COMPLETED and job_return.return_value is not None
        worked = done and not self._finished_before
        seconds = time.time() - self._started if worked else 0.0
        exit_code = max(exit_codes[self._failures :], default=0)
        job = CompletedRun(str(folder), int(config.hydra.job.num), seconds, exit_code)
        with Path(os.environ[FOLDERS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(job) + "\n")
        jobs = read_jobs(Path(os.environ[FOLDERS]))
        if worked and len(jobs) < len(self._cells):
            from kd_lightning.reports.summary import about
            from kd_lightning.terminal import say

            left = time_left(self._cells, jobs, time.time() - self._began)
            say(f"{len(jobs)} of {len(self._cells)} runs, about {about(left)} left", error=True)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        """Print the results and collect failures from all processes."""
        names = Path(os.environ.pop(FOLDERS))
        jobs = read_jobs(names)
        names.unlink(missing_ok=True)
        exit_codes.extend(job.exit_code for job in jobs if job.exit_code)  # in any process
        lost = set(range(len(self._cells))) - {job.number for job in jobs}
        if lost:
            from kd_lightning.terminal import say

            say(f"error: {len(lost)} of {len(self._cells)} runs left no record of their end", True)
            exit_codes.append(1)
        folders = sorted({Path(job.folder) for job in jobs})
        for folder in folders:
            update(folder)
        if written := [folder for folder in folders if (folder / "results.md").exists()]:
            show(written)


def cells_of(config: DictConfig) -> list[str]:
    """The overrides of each run of a grid, in order, without the seed.

    Empty if the runs are not known in advance, as in a search.

    Args:
        config: configuration of the grid, as passed to a Hydra callback.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper = config.hydra.sweeper
    if not sweeper.get("_target_", "").endswith("BasicSweeper"):
        return []
    try:
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        axes = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
        overrides = parser.parse_overrides([*axes, *config.hydra.overrides.task])
        (runs,) = BasicSweeper.split_arguments(overrides, None)
    except Exception as error:  # Hydra reports errors in the command itself
        log.info("the number of runs is not known: %s", error)
        return []
    return [" ".join(part for part in run if not part.startswith("seed=")) for run in runs]


def read_jobs(path: Path) -> list[CompletedRun]:
    """Read the completed jobs of a grid."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    jobs = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):  # of several machines at once, over NFS
            jobs.append(CompletedRun(*json.loads(line)))
    return jobs


def time_left(cells: Sequence[str], jobs: Sequence[CompletedRun], elapsed: float) -> float:
    """Estimate the remaining seconds of a grid, from the mean of each cell, else the median.

    Args:
        cells: from `cells_of`.
        jobs: completed jobs, at least one of them with nonzero duration.
        elapsed: seconds since the start of the grid; less than the sum of durations if runs are
            parallel.
    """
    took: dict[str, list[float]] = defaultdict(list)
    for job in jobs:
        if job.seconds:
            took[cells[job.number]].append(job.seconds)
    typical = statistics.median(seconds for cell in took.values() for seconds in cell)
    done = {job.number for job in jobs}
    rest = sum(
        statistics.mean(took.get(cell, [typical]))
        for number, cell in enumerate(cells)
        if number not in done
    )
    return rest / max(1.0, sum(job.seconds for job in jobs) / max(elapsed, 1e-9))


def show(folders: Sequence[Path]) -> None:
    """Print the results of folders of runs: one table per setting, methods by students."""
    from kd_lightning.reports.documents import details, overview
    from kd_lightning.reports.runs import read_runs
    from kd_lightning.reports.statistics import groups, summarise
    from kd_lightning.terminal import fits, say, table_of, watched

    say("\ntest accuracy in per cent, mean ± standard deviation (runs)")
    for group in groups(read_runs(folders)):
        cells = summarise(group.runs)
        table = table_of(overview(cells, group.runs))
        if watched() and not fits(table):  # many students: one row per cell
            table = table_of(details(cells)[["method", "student", "runs", "test", "gain"]])
        say(f"\n{group.title}")
        say(table)
    for folder in folders:
        say(f"gains, confidence intervals and figures: {folder / 'results.md'}")


def update(folder: Path, last: bool = True) -> None:
    """Write the results of a folder of runs, if any run has changed since the last update.

    Args:
        folder: folder of a setting.
        last: whether no further run is expected. Until then figures, which take seconds, are drawn
            at most once a minute.
    """
    if not folder.is_dir():
        return  # all its runs are those of another setting
    try:
        with FileLock(folder / ".results.lock"):
            # Compare the state of the runs, not times: a run may end while another process writes.
            state = {
                str(run.relative_to(folder)): [run.stat().st_mtime_ns, run.stat().st_size]
                for run in sorted(folder.glob("*/metrics.json"))
            }
            written = read_json(folder / ".results.json")
            drawn, now = written.get("drawn"), time.time()
            recently = isinstance(drawn, float) and 0 <= now - drawn < MINUTE
            due = last or not recently
            if state == written.get("runs") and (written.get("complete") or not due):
                return
            from kd_lightning.reports.documents import write_report

            write_report([folder], folder, draw_figures=due)
            drawn = time.time() if due else written.get("drawn", 0)
            write_json(folder / ".results.json", {"runs": state, "drawn": drawn, "complete": due})
    except Exception as error:  # a failed report must not end the grid
        log.warning("the results in %s could not be updated: %s", folder, error)
