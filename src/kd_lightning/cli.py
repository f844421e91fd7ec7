"""Command-line entry point: compose the configuration with Hydra, validate, run, print."""

import contextlib
import errno
import logging
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kd_lightning import __version__
from kd_lightning.config import naming, overrides, sweeps
from kd_lightning.config.checks import check_sections
from kd_lightning.config.commandline import composition_error, prepare
from kd_lightning.config.complete import plain
from kd_lightning.config.finished import finished, finished_elsewhere
from kd_lightning.config.launcher import find_launcher, launched_together, trainer_of
from kd_lightning.config.tree import tree
from kd_lightning.errors import InputError, RunError, Stopped
from kd_lightning.files import find_own_packages
from kd_lightning.startup import importing, run_process
from kd_lightning.storage.identity import unchanged
from kd_lightning.terminal import say
from kd_lightning.workflows.earlier import train_earlier_runs
from kd_lightning.workflows.grid import exit_codes

log = logging.getLogger(__name__)
naming.register()
overrides.install()
sweeps.install()

stamped: dict[Path, str] = {}
"""File digests by path, cached so that restarting a grid does not rehash for every finished run."""

LOST_WORKERS = ("TerminatedWorkerError", "BrokenProcessPool", "UncompletedJobError")
"""Errors of joblib and submitit."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def command() -> None:
    """Run `main` as the entry point of a process."""
    run_process(main)


def main() -> None:
    """Run the command line. Exit code: 0, 1 (failed while running), 2 (invalid input), or
    128 + signal number.
    """
    find_own_packages()
    logging.raiseExceptions = False  # of a log file on a full disk
    try:
        _main()
    except SystemExit as stop:
        _end_others(stop.code if isinstance(stop.code, int) else 1)
        raise
    except BaseException:
        _end_others(1)
        raise
    _end_others(0)


def _end_others(code: int) -> None:
    """End the other processes of torchrun or srun, if this one leads them."""
    if "kd_lightning.engine.group" in sys.modules:
        from kd_lightning.engine import group

        group.end(code)


def _main() -> None:
    # By default Hydra prints tracebacks and exits on its own.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if "--version" in sys.argv[1:]:
            print(f"kd_lightning {__version__}")
            return
        sys.argv[1:] = prepare(sys.argv[1:])
        if find_launcher() is not None:
            _join_others()
        _app()
    except KeyboardInterrupt:
        _stop("stopped by Ctrl-C; run the same command again to resume", 130)
    except Stopped as stop:
        _stop(str(stop), stop.exit_code)
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        _fail(composition_error(error), 2)
    except OSError as error:
        _fail(f"output_dir cannot be written: {error.strerror}: {error.filename}", 2)
    except RuntimeError as error:
        if type(error).__name__ not in LOST_WORKERS:
            raise
        _fail("a process of the grid was killed; run the same command again to resume", 1)
    except (ValueError, TypeError) as error:  # other errors raised by Hydra's parser
        _fail(f"the command line cannot be read: {error}", 2)
    if exit_codes:
        sys.exit(max(exit_codes))


def _join_others() -> None:
    """Under torchrun or srun, lead or follow the other processes; a follower exits here.

    Raises:
        InputError, RunError: see `launched_together` and `group.join`.
    """
    try:
        launcher = launched_together(trainer_of(sys.argv[1:]))
    except (InputError, HydraException, OmegaConfBaseException, yaml.YAMLError):
        if (found := find_launcher()) is not None and found.rank:
            sys.exit(2)  # rank 0 reports it
        raise
    if launcher is None:
        return
    with importing():
        from kd_lightning.engine import group
    process = group.join(launcher)
    if isinstance(process, group.Follower):
        sys.exit(process.serve())


@hydra.main(version_base="1.3", config_path=tree(), config_name="train")
def _app(composed: DictConfig) -> float | None:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    in_a_grid = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        overrides = list(HydraConfig.get().overrides.task)
        train_earlier_runs(composed, overrides)
        config = plain(composed, overrides)
        check_sections(config)
        metrics = finished(run_dir, config) or finished_elsewhere(run_dir, config)
        if metrics and not unchanged(metrics, config, stamped if in_a_grid else None):
            metrics = None
        if metrics:
            _show_finished(metrics, run_dir, in_a_grid)
        else:
            # Torch and Lightning take seconds to import; delay until there is something to run.
            with importing():
                from kd_lightning.engine.quiet import quiet_lightning
                from kd_lightning.reports.summary import print_summary
                from kd_lightning.workflows.cards import card_in_turn
                from kd_lightning.workflows.student import run

            quiet_lightning()
            if in_a_grid:
                # One folder of locks for all settings: they share the GPUs.
                with card_in_turn(Path(config["output_dir"]) / "gpus", config["trainer"]):
                    metrics = run(config, run_dir, wait=False)
            else:
                metrics = run(config, run_dir)
            if "folder" in metrics:
                _show_finished(metrics, run_dir, in_a_grid)
            elif metrics:  # in rank 0
                print_summary(metrics, run_dir)
        return float(metrics["val_accuracy"]) if metrics else None
    except Exception as error:
        _report(*_explained(error, run_dir))
        if in_a_grid:
            _record_failure(composed, run_dir, error)
        elif isinstance(error, InputError):
            _remove_unused(run_dir)
    return None


def _explained(error: Exception, run_dir: Path) -> tuple[str, int]:
    """The error message of a failed run, and the exit code."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, RunError):
        return f"{error} (run: {run_dir})", 1
    if isinstance(error, OSError):
        full = error.errno in DISK_FULL
        hint = "; free disk space and rerun the same command to resume" if full else ""
        return f"{error.strerror or error}: {error.filename or run_dir}{hint}", 1
    log.info("failed", exc_info=error)  # to the log file only
    reason = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {reason} (traceback in {run_dir}/train.log)", 1


def _show_finished(metrics: dict[str, Any], run_dir: Path, in_a_grid: bool) -> None:
    """Report that the run is already finished, and where its results are."""
    from kd_lightning.reports.summary import print_summary

    folder = metrics.get("folder", run_dir)
    if in_a_grid:
        where = f", in {folder}" if "folder" in metrics else ""
        say(f"{metrics['name']} is already finished{where}")
    else:
        print_summary(metrics, folder)
        say("(already finished; remove that folder to train it again)")
    if "folder" in metrics:
        _remove_unused(run_dir)


def _record_failure(composed: DictConfig, run_dir: Path, error: Exception) -> None:
    """Record a failed run, as far as possible, so that the grid's table shows it."""
    config: Any = composed
    with contextlib.suppress(Exception):  # it may be what is wrong
        config = plain(composed, HydraConfig.get().overrides.task)
    try:
        from kd_lightning.workflows.record import record_failure

        record_failure(config, run_dir, error)
    except Exception as reason:  # reported is the error, not this one
        log.info("the failure could not be recorded: %s", reason)


def _remove_unused(run_dir: Path) -> None:
    """Remove the empty folders and log file that Hydra created for a run that never started."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler) and (
            Path(handler.baseFilename).parent == run_dir.absolute()
        ):  # it would recreate its file with the next record
            root.removeHandler(handler)
            handler.close()
    with contextlib.suppress(OSError):
        if [path.name for path in run_dir.iterdir()] == ["train.log"]:
            (run_dir / "train.log").unlink()
        for folder in (run_dir, *run_dir.parents[:2]):
            folder.rmdir()  # fails if not empty


def _report(message: str, code: int) -> None:
    say(f"error: {message}", error=True)
    exit_codes.append(code)


def _stop(message: str, code: int) -> NoReturn:
    say(message, error=True)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    _report(message, code)
    sys.exit(code)
