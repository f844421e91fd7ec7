"""How long a command takes to its first training step, and to its end.

    python scripts/benchmark_start.py
    python scripts/benchmark_start.py --repetitions 9 method=logit student=small
    python scripts/benchmark_start.py --restart

By default `method=none data=digits trainer.max_epochs=1`. Compares `python train.py` with the same
without `kd_lightning.startup`, in turn, and prints medians.

With `--restart`, how long a finished grid takes that is started again, compared with the same
composed by Hydra (without `kd_lightning.config.sweeps`). By default a grid of 72 tiny runs, which
are trained first (seven minutes).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from lightning.pytorch import Callback

from kd_lightning.terminal import positive

ROOT = Path(__file__).resolve().parents[1]
JOB = ["method=none", "data=digits", "trainer.max_epochs=1"]
GRID = [
    "method=none,logit,attention,combined", "student=small,medium,large", "seed=0,1,2",
    "teacher=resnet9,resnet8", "teacher.layers=null", "data=digits", "trainer.max_epochs=1",
    "teacher.trainer.max_epochs=1", "+trainer.limit_train_batches=1",
]  # fmt: skip
TRAIN = "from kd_lightning.cli import command; command()"
WITHOUT = (
    "import contextlib; from kd_lightning import startup; "
    "startup.importing = contextlib.nullcontext; startup.run_process = lambda main: main(); "
)
AS_HYDRA = "from kd_lightning.config import sweeps; sweeps.install = lambda: None; "


class FirstStep(Callback):
    """Writes the time of the first training step to a file."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def on_train_batch_end(self, *_: object) -> None:
        """Write the time, once."""
        if not self._path.exists():
            self._path.write_text(repr(time.time()))


def measure(code: str, overrides: list[str]) -> tuple[float, float]:
    """Seconds to the first step, and to the end of the process."""
    with tempfile.TemporaryDirectory() as folder:
        callback = f"{{_target_: benchmark_start.FirstStep, path: {folder}/first}}"
        start = time.time()
        execute(code, [*overrides, f"+callbacks.first={callback}"], folder)
        end = time.time()
        return float(Path(folder, "first").read_text()) - start, end - start


def execute(code: str, arguments: list[str], folder: str) -> None:
    """Run `code` with the arguments of a command, with its outputs in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, f"output_dir={folder}/outputs", "pictures=false"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}/scripts"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stderr)


def compare(name: str, ours: list[float], without: list[float]) -> None:
    """Print the medians of two commands and their ratio."""
    first, second = statistics.median(ours), statistics.median(without)
    print(f"{name}: {first:.1f} s, without {second:.1f} s, ratio {first / second:.2f}")


def start(repetitions: int, overrides: list[str]) -> None:
    """Measure one run."""
    seconds: dict[str, list[tuple[float, float]]] = {TRAIN: [], WITHOUT + TRAIN: []}
    for _ in range(repetitions):
        for code, measured in seconds.items():
            measured.append(measure(code, overrides))
    ours, without = seconds.values()
    for number, name in enumerate(("first step", "end")):
        compare(name, [pair[number] for pair in ours], [pair[number] for pair in without])


def restart(repetitions: int, overrides: list[str]) -> None:
    """Train a grid, then measure how long it takes again."""
    seconds: dict[str, list[float]] = {TRAIN: [], AS_HYDRA + TRAIN: []}
    with tempfile.TemporaryDirectory() as folder:
        execute(TRAIN, ["-m", *overrides], folder)
        for _ in range(repetitions):
            for code, measured in seconds.items():
                began = time.time()
                execute(code, ["-m", *overrides], folder)
                measured.append(time.time() - began)
    compare("restart of a finished grid", *seconds.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=positive, default=5)
    parser.add_argument("--restart", action="store_true", help="of a finished grid")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.restart:
        restart(arguments.repetitions, arguments.overrides or GRID)
    else:
        start(arguments.repetitions, arguments.overrides or JOB)


if __name__ == "__main__":
    main()
