"""What a person sees at the end of a run."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def print_summary(metrics: dict[str, Any], run_dir: str | Path) -> None:
    """Print the short table of a finished run.

    Args:
        metrics: as in `metrics.json`.
        run_dir: the run's folder.
    """
    table = Table(
        title=f"{metrics['method']}: {metrics['student']} student on {metrics['data']}, "
        f"seed {metrics['seed']}",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column()
    for column in ("parameters", "validation", "test"):
        table.add_column(column, justify="right")
    if metrics["teacher_val_accuracy"] is not None:
        table.add_row(
            f"teacher {metrics['teacher']}",
            f"{metrics['teacher_parameters']:,}",
            percent(metrics["teacher_val_accuracy"]),
            percent(metrics["teacher_test_accuracy"]),
        )
    table.add_row(
        f"[bold]student {metrics['student']}[/bold]",
        f"{metrics['parameters']:,}",
        percent(metrics["val_accuracy"]),
        f"[bold]{percent(metrics['test_accuracy'])}[/bold]",
    )
    table.add_row(
        f"  at its best epoch, {metrics['best_epoch']} of {metrics['epochs']}",
        "",
        percent(metrics["best_val_accuracy"]),
        percent(metrics["test_accuracy_at_best"]),
    )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(
        f"compression {metrics['compression_ratio']:.1f}x of {metrics['teacher']}"
        + (
            f", agreement with the teacher {percent(metrics['agreement'])}"
            if metrics["agreement"] is not None
            else ""
        )
    )
    console.print(
        f"trained {metrics['epochs']} epochs in {duration(metrics['train_seconds'])}, "
        f"{metrics['images_per_second']:,.0f} images/s, {metrics['precision']} on "
        f"{metrics['device']}"
    )
    console.print(f"results in {run_dir}")


def percent(fraction: float) -> str:
    """0.7584 as '75.84 %'."""
    return f"{100 * fraction:.2f} %"


def duration(seconds: float) -> str:
    """Seconds as '41 s' or '12 min 5 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
