"""Predict the classes of image files with the student of a run or an exported file.

    python scripts/predict.py outputs/runs/SETTING/RUN photos/ more/a.jpg > table.csv
    python scripts/predict.py student.onnx photos/ --top 3 --out table.json

Folders are searched recursively. The table has a row for each image: file, class, probability; with
--top also class_2, probability_2 and so on. Files that are not readable are named on standard error
and skipped; the exit code is then 3.
"""

import argparse
import csv
import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from kd_lightning.errors import InputError
from kd_lightning.files import (
    find_own_packages,
    home,
    readable,
    replacing,
    without_controls,
)
from kd_lightning.startup import importing, run_script

SKIPPED = 3


def main() -> None:
    """Read the command line, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "student", type=home, help="folder of a run, or an exported .onnx, .pt2 or .safetensors"
    )
    parser.add_argument("images", nargs="+", type=home, help="image files, and folders of them")
    parser.add_argument(
        "--out", type=home, metavar="FILE", help=".csv or .json; by default CSV to standard output"
    )
    parser.add_argument("--top", type=int, default=1, metavar="K", help="classes per image")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--trust", nargs="+", default=[], metavar="PACKAGE",
        help="your own packages that contain the run's model, or the .pt2 file itself",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.trust:
        find_own_packages()
    if run(arguments):
        sys.exit(SKIPPED)


def run(arguments: argparse.Namespace) -> int:
    """Predict; return the number of files that could not be read."""
    out = Path(arguments.out) if arguments.out is not None else None
    if out is not None and out.suffix not in (".csv", ".json"):
        raise InputError(f"--out must be a .csv or .json file, not {out.name}")
    with importing():
        from kd_lightning import api

    warnings.filterwarnings("ignore", module="PIL")  # about unused metadata
    files = api.find_images(arguments.images)
    student = api.load_student(arguments.student, arguments.trust)
    skipped = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal skipped
        for prediction in api.predict_files(student, files, arguments.top, arguments.batch_size):
            if prediction.error is not None:
                print(f"skipped: {prediction.error}", file=sys.stderr)
                skipped += 1
                continue
            row: dict[str, Any] = {"file": readable(prediction.file)}
            best = zip(prediction.classes, prediction.probabilities, strict=True)
            for rank, (name, probability) in enumerate(best, start=1):
                suffix = "" if rank == 1 else f"_{rank}"
                row |= {
                    f"class{suffix}": without_controls(name),
                    f"probability{suffix}": round(probability, 6),
                }
            yield row

    with _opened(out) as stream:
        if out is not None and out.suffix == ".json":
            json.dump(list(rows()), stream, indent=1)
            stream.write("\n")
        else:
            write_csv(rows(), stream)
    return skipped


def write_csv(rows: Iterator[dict[str, Any]], stream: TextIO) -> None:
    """Write rows as they come; the columns are those of the first, or of the best class only."""
    first = next(rows, None)
    columns = list(first or ("file", "class", "probability"))
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    if first is not None:
        writer.writerow(first)
        writer.writerows(rows)


@contextmanager
def _opened(out: Path | None) -> Iterator[TextIO]:
    """Standard output, or a file that is written atomically."""
    if out is None:
        yield sys.stdout
        return
    with replacing(out) as partial, partial.open("w", encoding="utf-8", newline="") as stream:
        yield stream


if __name__ == "__main__":
    run_script(main)
