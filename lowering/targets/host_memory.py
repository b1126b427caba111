"""Memory: what an export takes is known before it starts, and before a model is loaded for it."""

from __future__ import annotations

import torch

from effpass.core.available_memory import available_memory
from effpass.core.errors import ExportError
from effpass.lowering.targets.decode_graph import CPU
from effpass.lowering.targets.gpu import available_gpu_memory
from effpass.lowering.targets.target import Target

__all__ = ["available_memory", "check_memory"]

# Memory of a GPU, as a multiple of the weights: the model's and the file's, and what is computed while it is checked.
_ON_GPU = 2.2


def check_memory(
    target: Target, weights: int, dtype: torch.dtype, device: torch.device = CPU, *, loaded: bool = True
) -> None:
    """Raise an :class:`ExportError` when an export would run out of memory.

    Args:
        target: says how many times the weights an export holds, the model's own included.
        weights: bytes of the model's weights.
        dtype: of the model.
        device: that it is on, or will be. On a GPU the file's weights stand beside the model's when it is checked; in
            host memory, the copy that is written takes the place of the model.
        loaded: whether the model is in memory already.
    """
    times = target.memory(dtype)
    held = loaded and device.type == "cpu"
    _check(target, times, int((times - held) * weights), available_memory(), "host memory",
           "inductor needs least, and onnx where the model is in float32")  # fmt: skip
    if device.type != "cpu":
        _check(target, _ON_GPU, int((_ON_GPU - loaded) * weights), available_gpu_memory(device), f"memory of {device}",
               "free memory there, or load the model in a smaller dtype")  # fmt: skip


def _check(target: Target, times: float, needed: int, available: int | None, where: str, hint: str) -> None:
    if available is not None and available < needed:
        raise ExportError(
            f"exporting to {target.name} takes {times:g} times the weights in {where}: {needed / 1e9:.1f} GB more than "
            f"now, and {available / 1e9:.1f} GB are available",
            hint=hint,
        )
