"""List and remove teacher-output caches.

    python scripts/remembered.py                            # list
    python scripts/remembered.py --remove convnet-logit-0123456789abcdef
    python scripts/remembered.py --remove all               # outputs will be recomputed

A training that uses a removed cache continues and computes the outputs.
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
        "--output-dir", type=home, default="outputs", help="output_dir of the trainings"
    )
    parser.add_argument("--remove", nargs="+", metavar="NAME", default=[], help="or: all")
    arguments = parser.parse_args()
    root = Path(arguments.output_dir) / "teachers" / "remembered"
    entries = {entry.folder.name: entry for entry in stored(root)}
    names = list(entries) if arguments.remove == ["all"] else arguments.remove
    if unknown := [name for name in names if name not in entries]:
        print(f"error: there is no cache {unknown[0]} in {root}", file=sys.stderr)
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
