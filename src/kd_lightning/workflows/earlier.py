"""Training of the runs whose students are the teachers of another run."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from kd_lightning.config.checks import check_sections
from kd_lightning.config.complete import plain
from kd_lightning.config.earlier_run import earlier_runs
from kd_lightning.config.finished import finished, finished_elsewhere
from kd_lightning.config.nodes import Node
from kd_lightning.errors import InputError, RunError
from kd_lightning.storage.identity import unchanged
from kd_lightning.terminal import say


def check_earlier_runs(config: DictConfig, overrides: Sequence[str]) -> None:
    """Check that the runs that `teacher.run` names by their overrides are finished.

    Args:
        config: composed, with interpolations.
        overrides: of the command.

    Raises:
        InputError: one is not finished, or an override is invalid.
    """
    for _, folder, metrics in _earlier_runs(config, overrides):
        if metrics is None:
            raise InputError(f"teacher.run: the run in {folder} is not finished; train it first")


def train_earlier_runs(config: DictConfig, overrides: Sequence[str]) -> None:
    """Train the runs that `teacher.run` names by their overrides, unless they are finished.

    Args:
        config: composed, with interpolations.
        overrides: of the command.

    Raises:
        InputError, RunError: as `workflows.student.run`.
    """
    for node, folder, metrics in _earlier_runs(config, overrides):
        if metrics and unchanged(metrics, node):
            continue
        # Needs torch, which takes seconds to import.
        from kd_lightning.engine.quiet import quiet_lightning
        from kd_lightning.workflows.student import run

        quiet_lightning()
        say(f"the teacher is trained first: {folder}")
        try:
            run(node, folder)
        except InputError as error:
            raise InputError(f"teacher.run: {error}") from error
        except RunError as error:
            raise RunError(f"teacher.run: {error}, in {folder}") from error


def _earlier_runs(
    config: DictConfig, overrides: Sequence[str]
) -> Iterator[tuple[Node, Path, dict[str, Any] | None]]:
    """Configuration and folder of each, in the order of their training; metrics if finished."""
    for earlier in earlier_runs(config, overrides):
        node = plain(earlier.config, earlier.overrides)
        check_sections(node)
        yield (
            node,
            earlier.folder,
            (finished(earlier.folder, node) or finished_elsewhere(earlier.folder, node)),
        )
