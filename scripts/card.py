"""Model card of a finished run, and its publication on the Hugging Face Hub.

python scripts/card.py outputs/runs/cifar10-convnet-15e-3ff7b752/combined-small-s0 --license mit
"""

import argparse
from pathlib import Path

from kd_lightning.files import home
from kd_lightning.startup import importing, run_script


def main() -> None:
    """Read the command line, write the card, and publish it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=home, help="folder of the run")
    parser.add_argument("--out", type=home, help="file of the card; by default RUN/README.md")
    parser.add_argument("--license", help="licence of the weights: mit, apache-2.0, other, ...")
    parser.add_argument("--dataset", metavar="OWNER/NAME", help="the data set on the Hub")
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        help="upload weights, configuration, metrics and card to this repository of the Hub",
    )
    parser.add_argument("--private", action="store_true", help="if it is created, it is private")
    parser.add_argument(
        "--file", type=home, nargs="+", default=[], help="exported files to upload as well"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a file that was edited, or is no card"
    )
    arguments = parser.parse_args()
    if not arguments.push and (arguments.file or arguments.private):
        parser.error("--file and --private need --push")

    with importing():
        from kd_lightning.reports.card import CardOptions, model_card
        from kd_lightning.reports.card_file import check_card, write_card
        from kd_lightning.workflows.publish import publish

    out = Path(arguments.out or Path(arguments.run) / "README.md")
    files = tuple(Path(file).name for file in arguments.file)
    options = CardOptions(arguments.license, arguments.dataset, arguments.push, files)
    card = model_card(arguments.run, options)
    if not arguments.push:
        write_card(out, card, arguments.overwrite)
        print(out)
        return
    check_card(out, arguments.overwrite)
    where = arguments.push, options, arguments.file, arguments.private
    print(publish(arguments.run, *where))
    write_card(out, card, arguments.overwrite)  # it says where the student is published
    print(out)


if __name__ == "__main__":
    run_script(main)
