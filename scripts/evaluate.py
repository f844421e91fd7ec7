"""Test the student of a finished run again, from its folder.

python scripts/evaluate.py outputs/runs/cifar10-convnet-15e-3ff7b752/combined-small-s0
"""

import argparse

from kd_lightning.files import find_own_packages, home
from kd_lightning.startup import importing, run_script


def main() -> None:
    """Read the command line and print the test accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=home, help="folder of the run")
    parser.add_argument("--data-root", type=home, help="location of the images, if they have moved")
    parser.add_argument(
        "--trust",
        nargs="+",
        default=[],
        metavar="PACKAGE",
        help="your own packages that contain the run's model or data",
    )
    arguments = parser.parse_args()
    if arguments.trust:
        find_own_packages()

    with importing():
        from kd_lightning import api
        from kd_lightning.reports.summary import percent

    result = api.evaluate(arguments.run, arguments.data_root, arguments.trust)
    print(f"test accuracy {percent(result['accuracy'])} (reported: {percent(result['recorded'])})")


if __name__ == "__main__":
    run_script(main)
