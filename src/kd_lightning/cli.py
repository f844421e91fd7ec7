"""The command line: the only place that knows Hydra's decorator. Compose, validate, run, print."""

import contextlib
import errno
import logging
import os
import sys
import threading
import warnings
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from kd_lightning import __version__, naming, overrides
from kd_lightning import config as configuration
from kd_lightning.commandline import composition_error, prepare
from kd_lightning.errors import InputError, RunError, Stopped
from kd_lightning.streams import robust_streams
from kd_lightning.sweep import exit_codes
from kd_lightning.terminal import say

log = logging.getLogger(__name__)
naming.register()
overrides.install()

stamped: dict[Path, str] = {}
"""What the files of a grid look like: a restart looks once, not again for every finished cell."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Run what the command line says; exit with 0, 1 (failed while running), 2 (wrong input),
    or 128 and the number of the signal that stopped it.
    """
    with robust_streams():
        _main()


def _main() -> None:
    # Hydra prints tracebacks and exits by itself unless it is asked not to.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        if "--version" in sys.argv[1:]:
            print(f"kd_lightning {__version__}")
            return
        sys.argv[1:] = prepare(sys.argv[1:])
        _app()
    except KeyboardInterrupt:
        _stop("stopped by Ctrl-C; run the same command again to resume", 130)
    except Stopped as stop:
        _stop(str(stop), stop.exit_code)
    except InputError as error:
        _fail(str(error), 2)
    except (HydraException, OmegaConfBaseException) as error:
        _fail(composition_error(error), 2)
    except OSError as error:
        _fail(f"output_dir cannot be written: {error.strerror}: {error.filename}", 2)
    except (ValueError, TypeError) as error:  # the rest of what Hydra's parser lets through
        _fail(f"the command line cannot be read: {error}", 2)
    if exit_codes:
        sys.exit(max(exit_codes))


@hydra.main(version_base="1.3", config_path=configuration.tree(), config_name="train")
def _app(composed: DictConfig) -> float | None:
    run_dir = Path(HydraConfig.get().runtime.output_dir)
    in_a_grid = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        config = configuration.plain(composed)
        configuration.check_sections(config)
        from kd_lightning.summary import print_summary

        metrics = naming.finished(run_dir, config)
        if metrics and not naming.unchanged(metrics, config, stamped if in_a_grid else None):
            metrics = None
        if metrics and in_a_grid:
            say(f"{metrics['name']} was finished before")
        elif metrics:
            print_summary(metrics, run_dir)
            say("(finished before; to train it again, remove that folder)")
        else:
            # Torch and Lightning take seconds to import: not before there is something to run.
            from kd_lightning.training import run

            quiet_lightning()
            metrics = run(config, run_dir, wait=not in_a_grid)
            print_summary(metrics, run_dir)
        return float(metrics["val_accuracy"])
    except InputError as error:
        _report(str(error), 2)
        if in_a_grid:
            _record_failure(composed, run_dir, error)
        else:
            _remove_unused(run_dir)
    except RunError as error:
        _report(f"{error} (run: {run_dir})", 1)
    except OSError as error:
        hint = "; free some space, the same command goes on" if error.errno in DISK_FULL else ""
        _report(f"{error.strerror or error}: {error.filename or run_dir}{hint}", 1)
    except Exception as error:
        log.info("failed", exc_info=error)  # to the log file only
        reason = (str(error).splitlines() or [""])[0]
        where = f"traceback in {run_dir}/train.log"
        _report(f"{type(error).__name__}: {reason} ({where})", 1)
    return None


def _record_failure(composed: DictConfig, run_dir: Path, error: InputError) -> None:
    """Let the grid's table show a cell that could not begin."""
    from kd_lightning.training import record_failure

    with contextlib.suppress(InputError, OSError, KeyError, TypeError):
        record_failure(configuration.plain(composed), run_dir, error)


def _remove_unused(run_dir: Path) -> None:
    """Remove what Hydra made for a run that never started: empty folders, and their log."""
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler) and (
            Path(handler.baseFilename).parent == run_dir.absolute()
        ):  # it would open its file with the next record
            root.removeHandler(handler)
            handler.close()
    with contextlib.suppress(OSError):
        if [path.name for path in run_dir.iterdir()] == ["train.log"]:
            (run_dir / "train.log").unlink()
        for folder in (run_dir, *run_dir.parents[:2]):
            folder.rmdir()  # refuses one that holds anything


def _report(message: str, code: int) -> None:
    say(f"error: {message}", error=True)
    exit_codes.append(code)


def _stop(message: str, code: int) -> NoReturn:
    say(message, error=True)
    sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    _report(message, code)
    sys.exit(code)


def quiet_lightning() -> None:
    """Leave out what Lightning says about every training whatever its outcome."""
    # TensorBoard writes in a thread. What that fails of, its next caller hears too.
    threading.excepthook = lambda failed: log.info(
        "failed in %s", failed.thread, exc_info=failed.exc_value
    )
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    # Workers would only pass indices on: pixels are made where the model is.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning's own use of a torch function, of no concern to whoever runs this.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    # Short epochs log every step of theirs that there is.
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # What goes on after an interruption finds its own checkpoints.
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    # Epochs without a validation leave the best one unknown; `fitting.fit` validates at the end.
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")
