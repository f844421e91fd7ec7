"""The summary printed at the end of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from kd_lightning.results import FIGURE
from kd_lightning.terminal import printable, say


def print_summary(metrics: dict[str, Any], run_dir: str | Path) -> None:
    """Print the summary table of a finished run.

    Args:
        metrics: as in `metrics.json`.
        run_dir: folder of the run.
    """
    title = (
        f"{metrics['method']}: {metrics['student']} student on {metrics['data']}, "
        f"seed {metrics['seed']}"
    )
    table = Table(title=Text(printable(title), style="table.title"), title_justify="left")
    table.add_column()
    for column in ("parameters", "validation", "test"):
        table.add_column(column, justify="right")
    if metrics["teacher_test_accuracy"] is not None:
        table.add_row(
            Text(printable(f"teacher {metrics['teacher']}")),
            f"{metrics['teacher_parameters']:,}",
            # A teacher that follows the student is not validated before the training.
            "-"
            if metrics["teacher_val_accuracy"] is None
            else percent(metrics["teacher_val_accuracy"]),
            percent(metrics["teacher_test_accuracy"]),
        )
    table.add_row(
        Text(printable(f"student {metrics['student']}"), style="bold"),
        f"{metrics['parameters']:,}",
        percent(metrics["val_accuracy"]),
        Text(percent(metrics["test_accuracy"]), style="bold"),
    )
    table.add_row(
        f"  at its best epoch, {metrics['best_epoch']} of {metrics['epochs']}",
        "",
        percent(metrics["best_val_accuracy"]),
        percent(metrics["test_accuracy_at_best"]),
    )
    say(table)
    if metrics["agreement"] is not None:
        ratio = metrics["compression_ratio"]
        say(
            f"compression {ratio:.{1 if ratio >= 1 else 3}f}x of {metrics['teacher']}, agreement "
            f"with the teacher {percent(metrics['agreement'])}"
        )
    for line in _quality(metrics):
        say(line)
    plural = "s" if metrics["epochs"] > 1 else ""
    say(
        f"trained {metrics['epochs']} epoch{plural} in {duration(metrics['train_seconds'])}, "
        f"{metrics['images_per_second']:,.0f} images/s, {metrics['precision']} on "
        f"{metrics['device']}"
    )
    say(f"results in {run_dir}")


def _quality(metrics: Mapping[str, Any]) -> Iterator[str]:
    """Calibration and cost, as far as they are known: runs of older versions lack them."""

    def shown(name: str) -> str:
        return FIGURE[name].show(metrics.get(name))

    if metrics.get("test_ece") is not None:
        yield (
            f"negative log-likelihood {shown('test_nll')}, calibration error "
            f"{shown('test_ece')} %; with temperature {shown('temperature')}: "
            f"{shown('test_nll_calibrated')}, {shown('test_ece_calibrated')} %"
        )
    if metrics.get("macs") is not None:
        taught = metrics.get("teacher_macs") is not None
        beside = {
            name: f" ({shown(f'teacher_{name}')})" if taught else "" for name in ("macs", "bytes")
        }
        yield (
            f"{shown('macs')} multiply-accumulates per image{beside['macs']}, "
            f"{shown('file_bytes')} of weights{beside['bytes']}"
            + ("; the teacher's in parentheses" if taught else "")
        )


def percent(fraction: float) -> str:
    """Format 0.7584 as '75.84 %'."""
    return f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """Format seconds as '41 s' or '12 min 5 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def about(seconds: float) -> str:
    """Format seconds as an estimate: '40 s', '12 min', '3 h 20 min' or '2 d 5 h'."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"
