"""Fill, list, check, pack, unpack and remove teacher-output caches.

    python scripts/cache.py fill method=combined data.views=25 trainer.max_epochs=100  # as train.py
    python scripts/cache.py list --output-dir outputs
    python scripts/cache.py check outputs/runs/SETTING/RUN 1000      # recompute 1,000 rows each
    python scripts/cache.py pack outputs/runs/SETTING/RUN teacher.zip     # for teacher=packed
    python scripts/cache.py pack resnet9-logit-0123456789abcdef logit.zip
    python scripts/cache.py unpack logit.zip                         # verified before it is used
    python scripts/cache.py remove resnet9-logit-0123456789abcdef    # or: remove all

`fill` computes the outputs that such a training uses, without training a student. Of many trainings
that are then started at once, none computes them again.

A training that uses a removed cache continues and computes the outputs. `list` and `remove` also
know the copies of packed teachers, which `remove all` leaves.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kd_lightning.errors import InputError, RunError
from kd_lightning.files import find_own_packages, home
from kd_lightning.startup import importing, run_script

if TYPE_CHECKING:
    from kd_lightning.storage.teacher_cache import Stored

MEGABYTE = 10**6


def main() -> None:
    """Read the command line and run the subcommand."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument(
        "--output-dir", type=home, default="outputs", help="output_dir of the trainings"
    )
    trusting = argparse.ArgumentParser(add_help=False)
    trusting.add_argument(
        "--trust", nargs="+", default=[], metavar="PACKAGE",
        help="your own packages that contain the run's models, data or losses",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("fill", help="compute the outputs that a training uses")
    command.add_argument("overrides", nargs="*", help="as for train.py")
    commands.add_parser("list", help="list all caches", parents=[place])
    command = commands.add_parser(
        "check", help="recompute rows of the caches of a run", parents=[trusting]
    )
    command.add_argument("run", type=home, help="folder of the run")
    command.add_argument("rows", type=int, nargs="?", default=256, help="rows of each cache")
    command = commands.add_parser("pack", help="write to one file", parents=[place, trusting])
    command.add_argument(
        "names", nargs="+", metavar="NAME", type=home,
        help="name of a cache; or folders of runs: all outputs of their teacher",
    )  # fmt: skip
    command.add_argument("file", type=home)
    command = commands.add_parser("unpack", help="add a packed cache", parents=[place])
    command.add_argument("file", type=home)
    command = commands.add_parser("remove", help="remove caches", parents=[place])
    command.add_argument("names", nargs="+", metavar="NAME", help="or: all")
    arguments = parser.parse_args()
    if arguments.command == "fill" or getattr(arguments, "trust", ()):
        find_own_packages()
    root = Path(getattr(arguments, "output_dir", "outputs")) / "teachers" / "remembered"
    run(arguments, root)


def run(arguments: argparse.Namespace, root: Path) -> None:
    """Run a subcommand."""
    if arguments.command == "fill":
        fill(arguments.overrides)
        return
    if arguments.command == "check":
        check(arguments.run, arguments.rows, arguments.trust)
        return
    with importing():
        from kd_lightning.storage.packing import unpack
        from kd_lightning.storage.teacher_cache import remove, stored
    if arguments.command == "list":
        show(stored(root), "stored", root)
        if copies := unpacked(root):
            show(copies, "unpacked", root.with_name("packed"))
    elif arguments.command == "pack":
        pack_all(root, arguments.names, Path(arguments.file), arguments.trust)
    elif arguments.command == "unpack":
        if not Path(arguments.file).is_file():
            raise InputError(f"{arguments.file} does not exist")
        for found in unpack(Path(arguments.file), root, restore=True):
            restored = f", {found.rows} missing rows restored" if found.rows else ""
            print(f"{found.views} new views{restored}: {found.folder}")
    elif arguments.command == "remove":
        entries = find(root, arguments.names)
        for entry in entries:
            remove(entry.folder)
        show(entries, "removed", root)


def fill(overrides: Sequence[str]) -> None:
    """Fill the caches of a training; exit with 1 if outputs are missing."""
    with importing():
        from kd_lightning import api
        from kd_lightning.engine.quiet import quiet_lightning
        from kd_lightning.workflows.fill_cache import fill_cache

    quiet_lightning()
    found = fill_cache(api.compose(*overrides, train_earlier=True))
    for part in found:
        print(f"{part.name}: {part.views} of {part.wanted} views")
    if any(part.views < part.wanted for part in found):
        raise RunError("some outputs could not be stored, see the warnings above")


def pack_all(root: Path, names: Sequence[str], file: Path, trust: Sequence[str]) -> None:
    """Pack the outputs of the teacher of runs, or a single cache, and print what was packed."""
    from kd_lightning.storage.packing import pack

    runs = [Path(name) for name in names if Path(name, "config.yaml").is_file()]
    if not runs:
        if len(names) > 1:
            raise InputError(f"{names[0]} is no folder of a run; caches are packed one by one")
        entries = find(root, names)
        if len(entries) != 1:
            raise InputError(f"{root} has {len(entries)} caches, which are packed one by one")
        (entry,) = entries
        print(f"{pack(entry.folder, file)} views: {file}")
        return
    if len(runs) < len(names):
        raise InputError("pack either the folders of runs, or one cache")
    from kd_lightning.workflows.packing import pack_runs

    for cache, views in pack_runs(runs, file, trust).items():
        print(f"{cache}: {views} {'view' if views == 1 else 'views'}")
    print(f"{file}: {file.stat().st_size / MEGABYTE:.3f} MB")


def find(root: Path, names: Sequence[str]) -> "list[Stored]":
    """The caches with these names.

    Raises:
        InputError: there is no such cache.
    """
    from kd_lightning.storage.teacher_cache import stored

    entries = {entry.folder.name: entry for entry in stored(root)}
    if names == ["all"]:
        return list(entries.values())
    entries |= {copy.folder.name: copy for copy in unpacked(root)}
    if unknown := [name for name in names if name not in entries]:
        raise InputError(f"there is no cache {unknown[0]} in {root}")
    return [entries[name] for name in names]


def unpacked(root: Path) -> "list[Stored]":
    """The copies of packed teachers that trainings have unpacked."""
    from kd_lightning.storage.teacher_cache import Stored, stored

    copies = []
    for folder in sorted(root.with_name("packed").glob("[!.]*")):
        if folder.is_dir():
            parts = stored(folder)
            size, views = sum(part.bytes for part in parts), sum(part.views for part in parts)
            copies.append(Stored(folder, size, views, parts[0].key if parts else {}, {}))
    return copies


def show(entries: "Sequence[Stored]", what: str, root: Path) -> None:
    """Print caches, and their total size."""
    width = max([len(entry.folder.name) for entry in entries], default=0)
    for entry in entries:
        print(
            f"{entry.folder.name:{width}}  {entry.views:5} views  "
            f"{entry.bytes / MEGABYTE:10.3f} MB  {entry.key.get('dtype', '?')}"
        )
    total = sum(entry.bytes for entry in entries) / MEGABYTE
    print(f"{what} in {root}: {total:.3f} MB")


def check(run: str, rows: int, trust: Sequence[str]) -> None:
    """Recompute rows, print the differences; exit with 1 if one is too large or a row damaged."""
    if rows < 1:
        raise InputError(f"the number of rows must be at least 1, not {rows}")
    with importing():
        from kd_lightning.workflows.check_cache import check_cache

    found = check_cache(run, rows, trust=trust)
    for cache in found:
        good = cache.difference <= cache.tolerance
        print(
            f"{cache.name}: {cache.rows} rows, largest difference {cache.difference:.2g} of the "
            f"largest value, {'as expected' if good else 'WRONG'} (at most {cache.tolerance:g})"
        )
        if cache.damaged:
            print(f"{cache.name}: damaged and computed again when used: {cache.damaged} rows")
    if any(cache.damaged or cache.difference > cache.tolerance for cache in found):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
