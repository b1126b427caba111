"""AFA-LoRA (arXiv 2512.22455): low-rank adapters with an activation between A and B that is annealed to the identity.

    y = W x + (alpha / r) · B h,    h = z + β (σ(z) − z),    z = A dropout(x)

W is the frozen weight, A `[r, in]` and B `[out, r]` are the matrices of the adapter, and σ is ReLU, SiLU or GELU.
During training β decreases from 1 to 0, so that an adapter that starts as a two-layer network ends as plain LoRA, which
can be merged into W. The adapter is a standard PEFT adapter throughout; the activation is attached to its layers as a
PEFT variant (:mod:`.variant`).

The paper's abstract specifies the activation and its position. The default schedule, β = 0 after 30 % of the steps,
follows a third party's reading of the paper; the formula above and the training after the anneal are choices of this
implementation.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effpass.trainers.afa_lora.adapter import AfaLora, attach
    from effpass.trainers.afa_lora.lora import LoraSettings, add_lora
    from effpass.trainers.afa_lora.schedule import AnnealSchedule

_HOME = {
    "AfaLora": "adapter",
    "AnnealSchedule": "schedule",
    "LoraSettings": "lora",
    "add_lora": "lora",
    "attach": "adapter",
}

__all__ = ["AfaLora", "AnnealSchedule", "LoraSettings", "add_lora", "attach"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
