"""One table of any runs: results.csv, results.md, pictures and a single report.html.

python scripts/report.py outputs/runs --out outputs/report
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Read the command line, write the report, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", help="run directories, or folders that have some")
    parser.add_argument("--out", help="where to write; by default the first folder")
    arguments = parser.parse_args()
    missing = [folder for folder in arguments.folders if not Path(folder).is_dir()]
    if missing:
        print(f"error: {missing[0]} is not a folder", file=sys.stderr)
        sys.exit(2)

    from kd_lightning.documents import write_report

    out = Path(arguments.out or arguments.folders[0])
    try:
        runs = write_report(arguments.folders, out, page=True)
    except OSError as error:
        print(f"error: {out} cannot be written: {error.strerror}", file=sys.stderr)
        sys.exit(1)
    if runs.empty:
        print(f"error: there is no run in {', '.join(arguments.folders)}", file=sys.stderr)
        sys.exit(2)
    print(f"{len(runs)} runs: {out / 'results.md'}, {out / 'report.html'}")


if __name__ == "__main__":
    main()
