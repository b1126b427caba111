"""Memory checks that run before an export starts and, where possible, before its model is loaded."""

from __future__ import annotations

import torch

from effpass.core.available_memory import available_memory
from effpass.core.errors import ExportError
from effpass.lowering.targets.device import CPU
from effpass.lowering.targets.gpu import available_gpu_memory
from effpass.lowering.targets.target import Target

__all__ = ["available_memory", "check_memory"]

# GPU memory of an export as a multiple of the weights: those of the model and of the file, and the activations of the
# check. What libraries take for themselves does not grow with the weights.
_ON_GPU, _ROOM = 2.2, 200_000_000


def check_memory(
    target: Target, weights: int, dtype: torch.dtype, device: torch.device = CPU, *, loaded: bool = True
) -> None:
    """Raise an :class:`ExportError` if an export would run out of memory.

    Args:
        target: target of the export; :meth:`Target.memory` gives its peak host memory.
        weights: size of the model's weights in bytes.
        dtype: dtype of the model.
        device: device that the model is on, or will be loaded to. For a GPU both the memory of the GPU, which holds the
            weights of model and file during the check, and the host memory, which holds the copy to write, are checked.
        loaded: whether the model is in memory already.
    """
    times = target.memory(dtype)
    held = loaded and device.type == "cpu"
    _check(target, times, int((times - held) * weights), available_memory(), "host memory",
           "inductor needs least, and onnx where the model is in float32")  # fmt: skip
    if device.type != "cpu":
        _check(target, _ON_GPU, int((_ON_GPU - loaded) * weights) + _ROOM, available_gpu_memory(device),
               f"memory of {device}", "free memory there, or load the model in a smaller dtype")  # fmt: skip


def _check(target: Target, times: float, needed: int, available: int | None, where: str, hint: str) -> None:
    if available is not None and available < needed:
        raise ExportError(
            f"exporting to {target.name} takes {times:g} times the weights in {where}: {needed / 1e9:.1f} GB more than "
            f"now, and {available / 1e9:.1f} GB are available",
            hint=hint,
        )
