"""Report on any runs: results.csv, results.md, figures and a self-contained report.html.

python scripts/report.py outputs/runs --out outputs/report

A results.csv can be used instead of its runs, but without curves and confusion matrix.
"""

import argparse
from pathlib import Path

from kd_lightning.errors import InputError
from kd_lightning.files import home
from kd_lightning.startup import importing, run_script


def main() -> None:
    """Read the command line, write the report, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("sources", type=home, nargs="+", help="folders of runs, or a results.csv")
    parser.add_argument("--out", type=home, help="output folder; by default the first source")
    parser.add_argument(
        "--baseline",
        type=home,
        metavar="FOLDER",
        help="runs without a teacher that all gains refer to, instead of those of each setting",
    )
    arguments = parser.parse_args()
    if arguments.baseline is not None and not Path(arguments.baseline).is_dir():
        raise InputError(
            f"--baseline must be a folder of runs of the method none, not {arguments.baseline}"
        )
    for source in arguments.sources:
        if not Path(source).exists():
            raise InputError(f"{source} does not exist")
    if arguments.out is None and not Path(arguments.sources[0]).is_dir():
        raise InputError("an output folder is required: --out OUT")

    with importing():
        from kd_lightning.reports.documents import write_report

    out = Path(arguments.out or arguments.sources[0])
    runs = write_report(arguments.sources, out, page=True, baseline=arguments.baseline)
    if runs.empty:
        raise InputError(f"there is no run in {', '.join(arguments.sources)}")
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    print(f"{count}: {out / 'results.md'}, {out / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
