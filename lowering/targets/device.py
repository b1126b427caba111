"""Devices that files are exported for."""

from __future__ import annotations

from typing import Any

import torch

from effpass.core.errors import ExportError

__all__ = ["CPU", "DEVICES", "model_device"]

# Types of the devices.
DEVICES = ("cpu", "cuda")
CPU = torch.device("cpu")


def model_device(model: Any) -> torch.device:
    """Return the device that all weights and buffers of `model` are on.

    Raises:
        ExportError: if they are on several devices, or on one that no file can be exported for.
    """
    name = type(model).__name__
    places = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if len(places) > 1:
        raise ExportError(
            f"{name} is spread over {', '.join(places)}, and an exported file runs on one device",
            hint="load it without device_map, or move it: model.to('cpu')",
        )
    device = torch.device(*places)
    if device.type not in DEVICES:
        raise ExportError(f"{name} has weights on {device}", hint="move it: model.to('cpu')")
    return device
