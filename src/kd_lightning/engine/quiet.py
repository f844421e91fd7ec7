"""Suppression of messages of Lightning."""

import logging
import threading
import warnings

log = logging.getLogger(__name__)


def quiet_lightning() -> None:
    """Suppress messages of Lightning that are the same in every training."""
    threading.excepthook = _report_thread
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for module in ("fabric.utilities.seed", "fabric.utilities.distributed", "pytorch.accelerators"):
        logging.getLogger(f"lightning.{module}").setLevel(logging.WARNING)
    # `trainer=cpu` on a machine with a GPU.
    warnings.filterwarnings("ignore", message="GPU available but not used.*")
    # Data-loader workers are useless here: pixels are rendered on the model's device.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Caused by Lightning itself; the second one by DDP on a GPU.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated.*")
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match.*")
    # The last step of every epoch is logged, however short the epoch.
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # In 16-mixed the scaler skips the first steps, which the schedule counts; Lightning calls the
    # scheduler after the optimizer.
    warnings.filterwarnings(
        "ignore",
        message="Detected call of `lr_scheduler.step.*",
        module=r"lightning\.pytorch\.|torch\.optim\.lr_scheduler",
    )
    # A resumed training has existing checkpoints.
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    # Epochs without validation; `fitting.fit` validates at the end.
    warnings.filterwarnings("ignore", message=".*could not find the monitored key.*")


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread, and raises its errors in the next call too."""
    if type(failed.thread).__module__.startswith("tensorboard"):
        log.info("failed in %s", failed.thread, exc_info=failed.exc_value)
    else:
        threading.__excepthook__(failed)
