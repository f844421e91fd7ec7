"""How long a command takes to its first training step, and to its end.

    python scripts/benchmark_start.py
    python scripts/benchmark_start.py --repetitions 9 method=logit student=small

By default `method=none data=digits trainer.max_epochs=1`. Compares `python train.py` with the same
without `kd_lightning.startup`, in turn, and prints medians.
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
TRAIN = "from kd_lightning.cli import command; command()"
WITHOUT = (
    "import contextlib; from kd_lightning import startup; "
    "startup.importing = contextlib.nullcontext; startup.run_process = lambda main: main(); "
)


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
        done = subprocess.run(
            [sys.executable, "-c", code, *overrides, f"+callbacks.first={callback}",
             f"output_dir={folder}/outputs", "pictures=false"],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}/src:{ROOT}/scripts"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        end = time.time()
        if done.returncode:
            sys.exit(done.stderr)
        return float(Path(folder, "first").read_text()) - start, end - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repetitions", type=positive, default=5)
    parser.add_argument("overrides", nargs="*", default=JOB)
    arguments = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {TRAIN: [], WITHOUT + TRAIN: []}
    for _ in range(arguments.repetitions):
        for code, measured in seconds.items():
            measured.append(measure(code, arguments.overrides))
    for number, name in enumerate(("first step", "end")):
        ours, without = (
            statistics.median(pair[number] for pair in measured) for measured in seconds.values()
        )
        print(f"{name}: {ours:.1f} s, without {without:.1f} s, ratio {ours / without:.2f}")


if __name__ == "__main__":
    main()
