"""Atomic writes and file locks for files shared by several processes."""

import json
import logging
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kd_lightning.errors import RunError

log = logging.getLogger(__name__)


def home(path: str) -> str:
    """Expand a leading ``~``, which shells do not do in ``--option=~/x`` or ``KEY=~/x``."""
    return str(Path(path).expanduser()) if path == "~" or path.startswith("~/") else path


def find_own_packages() -> None:
    """Let Python find the user's packages in the current folder, after all others."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Atomic write: yield a temporary path that replaces `path` when the block succeeds.

    If the block raises, the temporary file is removed and `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes of several machines may share the folder, and have equal numbers.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        # Some writers create files readable by their owner only, but teacher stores are shared.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    except OSError as error:
        if str(error.filename) in ("None", str(partial)):  # None: of a failed write
            error.filename = str(path)
        raise
    finally:
        partial.unlink(missing_ok=True)


def hold(path: Path, busy: str, wait: bool = True) -> AbstractContextManager[Any]:
    """Hold a file lock for the duration of a `with` block.

    The operating system releases the lock if the process dies.

    Args:
        path: the lock file; its parent folder is created.
        busy: message when another process holds the lock.
        wait: block until the lock is free.

    Raises:
        RunError: another process holds the lock and `wait` is False.
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
    """Read the object in a JSON file; empty if the file is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # the last: too deeply nested
        return {}
    return value if isinstance(value, dict) else {}


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an indented JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def readable(path: str | os.PathLike[str]) -> str:
    """Make a path or file name printable and encodable in UTF-8.

    Control characters, and bytes that are not UTF-8 (lone surrogates in Python's text), are written
    as backslash escapes.
    """
    text = os.fspath(path)
    try:
        text = os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # not a valid name on this file system
        text = text.encode("utf-8", "backslashreplace").decode()
    return without_controls(text)


def without_controls(text: str) -> str:
    """Replace control characters, which a terminal would obey, by backslash escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)


def tidy(text: str) -> str:
    """Replace characters that are special to a file system, a shell or Hydra's grammar."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", re.sub(r"[\[\]{}'\"]", "", text))
