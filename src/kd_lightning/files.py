"""Files that several processes share: a reader sees the old one or the new one, never half of
either, and one at a time works where only one may.
"""

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kd_lightning.errors import RunError

log = logging.getLogger(__name__)


def home(path: str) -> str:
    """A path with ``~`` expanded, which shells do not do in ``--option=~/x`` or ``KEY=~/x``."""
    return str(Path(path).expanduser()) if path == "~" or path.startswith("~/") else path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it takes its place in one step.

    If the block raises, the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        # Some writers make files for their owner only; a teacher store is there to be shared.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def hold(path: Path, busy: str, wait: bool = True) -> AbstractContextManager[Any]:
    """Hold a lock until the end of the `with` block that this is used in.

    It is the system's: a process that dies leaves none behind.

    Args:
        path: the lock's file; its folder is made.
        busy: what to say when another process holds it.
        wait: for that process.

    Raises:
        RunError: another process holds it, and there was no waiting.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise RunError(busy) from error
        log.warning("%s; waiting for it", busy)
        return lock.acquire()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if there is none that can be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the last: brackets in brackets in brackets
        return {}
    return value if isinstance(value, dict) else {}


def write_text(path: Path, text: str) -> None:
    """Replace the file by this text."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace the file by this object as indented JSON."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def readable(path: str | os.PathLike[str]) -> str:
    """A path or file name as text that can be printed and stored anywhere.

    Control characters, and bytes that are not UTF-8 (lone surrogates in Python's text), are written
    as backslash escapes.
    """
    text = os.fspath(path)
    try:
        text = os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # not a name that this file system could have
        text = text.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)
