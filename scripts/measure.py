"""Measure latency and memory of the students and teachers of finished runs, on a quiet machine.

python scripts/measure.py outputs/runs/cifar10-convnet-15e-3ff7b752/combined-small-s0

The figures are added to the metrics.json of each run; write the report again to see them there.
"""

import argparse
from pathlib import Path

from kd_lightning.errors import InputError
from kd_lightning.files import find_own_packages, home
from kd_lightning.startup import importing, run_script


def main() -> None:
    """Read the command line, measure, and print a table for each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("runs", type=home, nargs="+", metavar="RUN", help="folders of the runs")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads; by default those that torch uses")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="for each batch size and number of threads"
    )
    parser.add_argument(
        "--trust",
        nargs="+",
        default=[],
        metavar="PACKAGE",
        help="your own packages that contain the models of a run",
    )
    arguments = parser.parse_args()
    if arguments.trust:
        find_own_packages()
    # A glob of a setting's folder also matches its tables and pictures.
    runs = [run for run in arguments.runs if not Path(run).is_file()] or arguments.runs
    if arguments.seconds <= 0 or (arguments.threads is not None and arguments.threads < 1):
        raise InputError("--seconds and --threads must be positive")

    with importing():
        from kd_lightning.reports.tables import cost_table
        from kd_lightning.terminal import say, table_of
        from kd_lightning.workflows.measure import measure

    given = (arguments.device, arguments.threads, arguments.seconds, arguments.trust)
    for folder, figures in measure(runs, *given):
        say(f"{folder} on {figures['measured_on']}")
        say(table_of(cost_table(figures)))


if __name__ == "__main__":
    run_script(main)
