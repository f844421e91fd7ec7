"""Show what is stored of the teachers' answers, and remove it.

    python scripts/remembered.py                            # what is there
    python scripts/remembered.py --remove convnet-logit-0123456789abcdef
    python scripts/remembered.py --remove all               # nothing is lost but time

A training that is going on meanwhile lets its teacher compute instead.
"""

import argparse
import sys
from pathlib import Path

from kd_lightning.files import home
from kd_lightning.storage.teacher_cache import GIGABYTE, remove, stored


def main() -> None:
    """Read the command line, list or remove."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output-dir", type=home, default="outputs", help="as the trainings had it"
    )
    parser.add_argument("--remove", nargs="+", metavar="NAME", default=[], help="or: all")
    arguments = parser.parse_args()
    root = Path(arguments.output_dir) / "teachers" / "remembered"
    entries = {entry.folder.name: entry for entry in stored(root)}
    names = list(entries) if arguments.remove == ["all"] else arguments.remove
    if unknown := [name for name in names if name not in entries]:
        print(f"error: nothing is stored under {unknown[0]} in {root}", file=sys.stderr)
        sys.exit(2)
    for name in names:
        remove(entries[name].folder)
    shown = [entries[name] for name in (names or entries)]
    width = max([len(entry.folder.name) for entry in shown], default=0)
    for entry in shown:
        print(
            f"{entry.folder.name:{width}}  {entry.views:5} views  "
            f"{entry.bytes / GIGABYTE:8.3f} GB  {entry.key.get('dtype', '?')}"
        )
    total = sum(entry.bytes for entry in shown) / GIGABYTE
    print(f"{'removed' if names else 'stored'} in {root}: {total:.3f} GB")


if __name__ == "__main__":
    main()
