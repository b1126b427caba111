"""Determines how much of the host's memory is available, within the limits of a container."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_memory"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Bytes that this process can still allocate without swapping; None where the system does not report it."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    try:  # the memory limit of the container, if there is one
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            cached = [int(line.split()[1]) for line in (_CGROUP / "memory.stat").read_text().splitlines()
                      if line.startswith("inactive_file ")]  # fmt: skip
            found.append(int(limit) - used + sum(cached))
    except OSError:
        pass
    return min(found, default=None)
