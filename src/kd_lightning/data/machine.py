"""Memory and processor cores that a process may use."""

import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def processes_here() -> int:
    """Number of processes of this training on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def available_cores() -> int:
    """Number of processor cores for this process, if those of the machine are shared evenly."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, cores // processes_here())


def memory_limit() -> int:
    """Memory of the machine, or of the container, in bytes.

    Not what is free at the moment: the same in all processes and in the next run.
    """
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limit = min(limit, int((CGROUP / name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return limit
