"""Compare the student of a finished run with its teacher on test images.

python scripts/explain.py outputs/runs/cifar10-convnet-15e-3ff7b752/combined-small-s0

Writes the similarity of layers, the images that both classify differently, and attention maps to
the folder `explanation` of the run and to TensorBoard.
"""

import argparse

from kd_lightning.errors import InputError
from kd_lightning.files import find_own_packages, home
from kd_lightning.startup import importing, run_script


def main() -> None:
    """Read the command line, explain the run, and print where the pictures are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=home, help="folder of the run")
    parser.add_argument("--data-root", type=home, help="location of the images, if they have moved")
    parser.add_argument("--images", type=int, default=1000, help="number of test images")
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument(
        "--trust",
        nargs="+",
        default=[],
        metavar="PACKAGE",
        help="your own packages that contain the run's models or data",
    )
    arguments = parser.parse_args()
    if arguments.trust:
        find_own_packages()
    if arguments.images < 2:
        raise InputError("--images must be at least 2")

    with importing():
        from kd_lightning.workflows.explain import explain

    given = (arguments.data_root, arguments.images, arguments.device, arguments.trust)
    result = explain(arguments.run, *given)
    print(
        f"student and teacher classify {result['different']} of {result['images']} test images "
        f"differently; see {result['folder']}"
    )


if __name__ == "__main__":
    run_script(main)
