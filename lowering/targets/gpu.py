"""GPUs: which one a file was made for, whether there is one here, and how much of its memory is free."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from effpass.core.errors import ExportError
from effpass.lowering.targets.decode_graph import CPU

__all__ = ["NAME", "available_gpu_memory", "check_gpu", "describe_gpu", "device_here", "require_current"]

NAME, _CAPABILITY = "gpu", "compute capability"


def device_here(kind: str, what: str) -> torch.device:
    """The device of this machine that a file for `kind` runs on: the CPU, or PyTorch's current GPU.

    Args:
        kind: ``"cpu"`` or ``"cuda"``.
        what: the file's name, for messages.

    Raises:
        ExportError: there is no GPU here.
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
    """Raise an :class:`ExportError` when `device` is a GPU and not the current one: files know no other."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        raise ExportError(
            f"the model is on {device}, and PyTorch's current GPU is cuda:{torch.cuda.current_device()}",
            hint=f"call torch.cuda.set_device({device.index}) first, or run with CUDA_VISIBLE_DEVICES={device.index}",
        )


def describe_gpu(device: torch.device) -> dict[str, str]:
    """Name and compute capability, as text: machine code for one capability is for no other."""
    major, minor = torch.cuda.get_device_capability(device)
    return {NAME: torch.cuda.get_device_name(device), _CAPABILITY: f"{major}.{minor}"}


def check_gpu(made: Mapping[str, str], device: torch.device, what: str) -> None:
    """Raise an :class:`ExportError` when `device` has another compute capability than the GPU of a file.

    Args:
        made: what :func:`describe_gpu` said where the file was made.
        device: a GPU of this machine.
        what: the file's name, for messages.
    """
    here = describe_gpu(device)
    if made.get(_CAPABILITY) != here[_CAPABILITY]:
        raise ExportError(
            f"{what} was made for GPUs of compute capability {made.get(_CAPABILITY, 'unknown')} "
            f"({made.get(NAME, 'unknown')}); this one has {here[_CAPABILITY]} ({here[NAME]})",
            hint="export it again on this machine",
        )


def available_gpu_memory(device: torch.device) -> int:
    """Bytes that this process can still take on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
