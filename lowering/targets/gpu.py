"""GPU queries of the export targets: the GPU that a file was made for, the current GPU, and its free memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effpass.core.errors import ExportError
from effpass.lowering.targets.device import CPU

__all__ = ["NAME", "available_gpu_memory", "check_gpu", "describe_gpu", "device_here", "require_current"]

NAME, _CAPABILITY = "gpu", "compute capability"


def device_here(kind: str, what: str) -> torch.device:
    """Return the device of this machine that a file for `kind` runs on: the CPU, or PyTorch's current GPU.

    Args:
        kind: device type, ``"cpu"`` or ``"cuda"``.
        what: name of the file, for messages.

    Raises:
        ExportError: if `kind` is a GPU and this machine has none.
    """
    if kind == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise ExportError(
            f"{what} was exported on a GPU and runs on one; PyTorch finds none here",
            hint="take it to a machine with a GPU, or export it again with the model on the CPU (--device cpu)",
        )
    return torch.device("cuda", torch.cuda.current_device())


def require_current(device: torch.device) -> None:
    """Raise an :class:`ExportError` if `device` is a GPU but not the current one, on which exported files run."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ExportError(
            f"the model is on {device}, and PyTorch's current GPU is cuda:{torch.cuda.current_device()}",
            hint=f"call torch.cuda.set_device({device.index}) first, or run with CUDA_VISIBLE_DEVICES={device.index}",
        )


def describe_gpu(device: torch.device) -> dict[str, str]:
    """Return name and compute capability of a GPU as text; machine code runs on the capability it was made for."""
    major, minor = torch.cuda.get_device_capability(device)
    return {NAME: torch.cuda.get_device_name(device), _CAPABILITY: f"{major}.{minor}"}


def check_gpu(made: Mapping[str, str], device: torch.device, what: str) -> None:
    """Raise an :class:`ExportError` if the compute capability of `device` differs from that of a file.

    Args:
        made: result of :func:`describe_gpu` on the machine that wrote the file.
        device: a GPU of this machine.
        what: name of the file, for messages.
    """
    here = describe_gpu(device)
    if made.get(_CAPABILITY) != here[_CAPABILITY]:
        raise ExportError(
            f"{what} was made for GPUs of compute capability {made.get(_CAPABILITY, 'unknown')} "
            f"({made.get(NAME, 'unknown')}); this one has {here[_CAPABILITY]} ({here[NAME]})",
            hint="export it again on this machine",
        )


def available_gpu_memory(device: torch.device) -> int:
    """Return the bytes that this process can still allocate on a GPU, including what its allocator holds unused."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
