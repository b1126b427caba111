"""Host memory: what an export takes is known before it starts."""

from __future__ import annotations

from pathlib import Path

import torch

from effpass.core.errors import ExportError
from effpass.lowering.targets.target import Target

__all__ = ["available_memory", "check_memory"]

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def check_memory(target: Target, weights: int, dtype: torch.dtype) -> None:
    """Raise an :class:`ExportError` when the export of a loaded model would run out of host memory.

    Args:
        target: says how many times the weights an export holds, the model's own included.
        weights: bytes of the model's weights, which are in memory already.
        dtype: of the model.
    """
    times = target.memory(dtype)
    needed = int((times - 1) * weights)
    available = available_memory()
    if available is not None and available < needed:
        raise ExportError(
            f"exporting to {target.name} takes {times:g} times the weights' memory: {needed / 1e9:.1f} GB "
            f"more, and {available / 1e9:.1f} GB are available",
            hint="inductor needs least, and onnx where the model is in float32",
        )


def available_memory() -> int | None:
    """Bytes that this process can still take without swapping; None where the system does not say."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    try:  # a container's own limit
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            used = int((_CGROUP / "memory.current").read_text())
            cached = [int(line.split()[1]) for line in (_CGROUP / "memory.stat").read_text().splitlines()
                      if line.startswith("inactive_file ")]  # fmt: skip
            found.append(int(limit) - used + sum(cached))
    except OSError:
        pass
    return min(found, default=None)
