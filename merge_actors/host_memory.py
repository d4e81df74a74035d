"""How much memory of this host a process may still use."""

from __future__ import annotations

import os


def available_bytes() -> int:
    """Return the host memory that can be used without swapping: caches that can be dropped count."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free, _control_group_bytes())


def _control_group_bytes() -> int:
    """Return what the process's container may still allocate; caches that can be dropped count."""
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:
            most = int(file.read())
        with open("/sys/fs/cgroup/memory.stat", encoding="ascii") as file:
            used = dict(line.split() for line in file)
    except (OSError, ValueError):  # no container, or "max"
        return 1 << 62
    return max(0, most - int(used.get("anon", 0)) - int(used.get("shmem", 0)))
