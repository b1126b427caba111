"""Estimate of the device memory that a fine-tuning run needs; checked before the run starts."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any

import torch
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from effpass.lowering.targets.host_memory import available_memory
from effpass.trainers.afa_lora.lora import LoraSettings, add_lora
from effpass.trainers.finetune.settings import Method, Sparse
from effpass.trainers.lm.model import make_model, set_experts
from effpass.trainers.lm.optimizers import STATE_BYTES
from effpass.trainers.memory import SHAPES, Estimate, available, kept_bytes, use_causal_attention

__all__ = ["estimate", "host_line"]

_FLOAT = 4
_INDEX = 4


def estimate(
    model_config: Any,
    method: Method,
    lora: LoraSettings,
    optimizer: str,
    *,
    rows: int,
    length: int,
    bfloat16: bool,
    device: torch.device,
    sparse: Sparse | None = None,
    sharing: int = 1,
) -> Estimate:
    """Estimate the memory on one device.

    Args:
        model_config: transformers config of the model.
        method: what is trained: all weights or an adapter.
        lora: settings of the adapter.
        optimizer: name of the optimizer.
        rows, length: number of sequences per micro-batch, and of tokens per sequence.
        bfloat16: whether computation is in bfloat16, and frozen weights too.
        device: device of the run.
        sparse: settings of sparse attention, which saves lists of blocks instead of masks; None for the model's own.
        sharing: number of devices that share a micro-batch.
    """
    activations = None
    with torch.device("meta"), no_init_weights():
        model = make_model(copy.deepcopy(model_config), None, 0)
        model.tie_weights()  # type: ignore[operator]
        total = sum(p.numel() for p in model.parameters())
        if method != "full":
            if bfloat16:
                model.to(torch.bfloat16)
            add_lora(model, lora)
    with FakeTensorMode(), SHAPES:
        _pretend(model)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        use_causal_attention(model)
        set_experts(model)
        shape = (rows, length) if sharing == 1 else (1, -(-rows * length // sharing))
        ids = torch.zeros(shape, dtype=torch.long)

        def forward(_: Any) -> tuple[Tensor, Tensor]:
            return model(input_ids=ids, use_cache=False).logits, ids

        # Casts are disabled as in the run (Trained.under_autocast). Operators with data-dependent shapes raise errors.
        with disable_input_dtype_casting(model, bfloat16), suppress(RuntimeError, NotImplementedError):
            # Masks of packed rows: a boolean one, and one in the dtype of computation that the attention of each layer
            # makes of it and saves.
            text = model_config.get_text_config(decoder=True)
            masks = rows * length * length * (1 + text.num_hidden_layers * (2 if bfloat16 else _FLOAT))
            if sparse is not None:
                groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
                blocks = -(-min(sparse.most, rows * length) // sparse.block)
                masks = text.num_hidden_layers * groups // sharing * rows * length * blocks * _INDEX
            activations = kept_bytes(model, forward, bfloat16=bfloat16) + masks
    state = trained * (2 * _FLOAT + STATE_BYTES[optimizer]) + (total if method != "full" else 0) * (
        2 if bfloat16 else _FLOAT
    )
    if bfloat16:
        state += 2 * trained  # copy of the weights that autocast makes
    return Estimate(total if method == "full" else total + trained, state, activations, "", available(device))


def host_line(found: Estimate, device: torch.device) -> str:
    """Return a message about the host memory that reading the checkpoint needs."""
    if device.type == "cpu":
        return "the device is the host"
    free = available_memory()
    return f"host: {found.parameters * _FLOAT / 1e9:.2f} GB while the checkpoint is read; available: " + (
        "unknown" if free is None else f"{free / 1e9:.2f} GB"
    )


def _pretend(model: nn.Module) -> None:
    """Replace meta tensors by fake tensors, which pretend to be on a device.

    PEFT can't create adapters on fake tensors, so that the model is made of meta tensors first.
    """
    known: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    if id(tensor) not in known:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=SHAPES)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        known[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake
                    held[name] = known[id(tensor)]
