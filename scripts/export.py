"""Export the student of a finished run for other programs.

    python scripts/export.py outputs/runs/SETTING/RUN --to onnx
    python scripts/export.py outputs/runs/SETTING/RUN --to onnx --int8
    python scripts/export.py outputs/runs/SETTING/RUN --to pt2 --out student.pt2

The file takes 8-bit RGB pixels (batch, height, width, 3) and returns logits. It is compared with
the student on all test images before it is written.
"""

import argparse

from kd_lightning.files import find_own_packages, home
from kd_lightning.startup import importing, run_script

MEGABYTE = 10**6


def main() -> None:
    """Read the command line, export, print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=home, help="folder of the run")
    parser.add_argument("--to", choices=("onnx", "pt2", "safetensors"), default="onnx")
    parser.add_argument(
        "--int8", action="store_true", help="quantize weights and activations; only --to onnx"
    )
    parser.add_argument("--out", type=home, metavar="FILE", help="by default in RUN/exported")
    parser.add_argument("--data-root", type=home, help="location of the images, if they have moved")
    parser.add_argument(
        "--max-loss", type=float, default=1.0, metavar="POINTS",
        help="with --int8: allowed loss of test accuracy, in percentage points (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--trust", nargs="+", default=[], metavar="PACKAGE",
        help="your own packages that contain the run's model or data",
    )  # fmt: skip
    arguments = parser.parse_args()
    if arguments.trust:
        find_own_packages()

    with importing():
        from kd_lightning import api
        from kd_lightning.reports.summary import percent

    result = api.export(
        arguments.run,
        arguments.to,
        int8=arguments.int8,
        out=arguments.out,
        data_root=arguments.data_root,
        trust=arguments.trust,
        max_loss=arguments.max_loss / 100,
    )
    images = "random images" if result.random else "test images"
    print(
        f"compared with the student on {result.images:,} {images}: largest difference of a logit "
        f"{result.difference:.2g}, same class {percent(result.agreement)}"
    )
    if result.accuracy is None or result.student_accuracy is None:
        print("the accuracy is not known, because the test images are not available")
    else:
        print(
            f"test accuracy {percent(result.accuracy)} (student: "
            f"{percent(result.student_accuracy)})"
        )
    print(f"{result.path}: {result.path.stat().st_size / MEGABYTE:.3f} MB")


if __name__ == "__main__":
    run_script(main)
