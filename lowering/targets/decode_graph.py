"""Capture of a causal LM as one graph for prefill and decode, with its KV cache as plain inputs and outputs.

:func:`export_decode_graph` captures a transformers model with ``torch.export``; all export targets write the resulting
:class:`DecodeGraph`. Inputs and outputs are, for layer i::

    input_ids                    [B, T]           logits                [B, T, vocab]
    attention_mask               [B, P + T]       present.{i}.key       [B, G, P + T, K]
    position_ids                 [B, T]           present.{i}.value     [B, G, P + T, V]
    past_key_values.{i}.key      [B, G, P, K]
    past_key_values.{i}.value    [B, G, P, V]

B is the batch size, T the number of new tokens, P the number of past positions, G the number of KV heads, K the key
size and V the value size. B, T and P are dynamic; P may be 0 and T may be 1. Names and layout are those of Optimum's
ONNX decoders, so that Optimum's runners can load an exported file. `attention_mask` is 1 for tokens to attend to and 0
for padding (on the left, or in the past). Sliding-window layers also keep all P positions, and the mask applies the
window. Models with multi-head latent attention (MLA) cache latents: G is 1, K is the size of the latent and V that of
the rotary part. Layers of effpass's linear attention cache convolution inputs and a state (:class:`CacheLayer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from effpass.core.errors import ExportError
from effpass.lowering.targets.cache_layers import CacheLayer, cache_layers
from effpass.lowering.targets.device import model_device
from effpass.lowering.targets.flat_forward import flat_forward
from effpass.lowering.targets.plain_tensors import plain_tensors
from effpass.lowering.targets.tracing import trace

__all__ = ["DecodeGraph", "Step", "check_exportable", "export_decode_graph"]

# (input_ids, attention_mask, position_ids, *past) → (logits, *present)
Step = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class DecodeGraph:
    """A captured decode graph.

    Attributes:
        program: the graph, not decomposed, so that passes find `aten.linear` and `aten.scaled_dot_product_attention`.
            Weights have the names that they have in the model.
        layers: cache shapes, one entry per layer.
        dtype: dtype of logits and cache.
        device: device of weights, inputs and outputs.
    """

    program: ExportedProgram
    layers: tuple[CacheLayer, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "position_ids", *self._cache_names("past_key_values")]

    @property
    def output_names(self) -> list[str]:
        return ["logits", *self._cache_names("present")]

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """Dynamic dimensions of each input with the names that Optimum gives them."""
        batch, tokens, past = "batch_size", "sequence_length", "past_sequence_length"
        fixed = {
            "input_ids": {0: batch, 1: tokens},
            "attention_mask": {0: batch, 1: f"{past} + {tokens}"},
            "position_ids": {0: batch, 1: tokens},
        }
        for index, layer in enumerate(self.layers):
            axes = {0: batch, 2: past} if layer.grows else {0: batch}
            fixed |= {f"past_key_values.{index}.{part}": axes for part in layer.parts}
        return fixed

    def module(self) -> Step:
        """Return the graph in its current form, rewritten or not, as a callable on plain tensors."""
        # The guards that torch.export leaves reject sizes of 1 for views whose strides were derived at other sizes. A
        # view that is valid at other sizes is valid at size 1 too, and every export is checked at size 1.
        return self.program.module(check_guards=False)

    def _cache_names(self, prefix: str) -> list[str]:
        return [f"{prefix}.{i}.{part}" for i, layer in enumerate(self.layers) for part in layer.parts]


def check_exportable(model: Any) -> None:
    """Raise an :class:`ExportError` if `model` is in training mode, or not on a single CPU or GPU."""
    if model.training:
        raise ExportError(f"{type(model).__name__} is in training mode", hint="call model.eval() first")
    model_device(model)


def export_decode_graph(model: Any) -> DecodeGraph:
    """Capture `model` as a decode graph.

    Args:
        model: a transformers causal LM or PeftModel in `eval()` mode, on the CPU or one GPU. It is not changed.

    Raises:
        ExportError: if the model is in training mode, on several devices, or can't be captured as one graph; the
            message then names the error and the line of the model's code.
    """
    check_exportable(model)
    name = type(model).__name__
    layers = cache_layers(model)
    dtype, device = model.dtype, model_device(model)
    with plain_tensors(model), flat_forward(model, layers) as names:
        try:
            program = trace(model, names, layers, dtype, device)
        except Exception as error:  # torch.export passes on any exception of the model's code
            raise _capture_error(error, name) from error
    return DecodeGraph(program, layers, dtype, device)


def _capture_error(error: Exception, name: str) -> ExportError:
    if isinstance(error, ExportError):
        return error
    where, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "modeling_" in file or "transformers_modules" in file:
            where = f" at {file.rsplit('/', 1)[-1]}:{trace.tb_lineno}"
        trace = trace.tb_next
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return ExportError(
        f"{name} can't be captured as one graph{where}: {type(error).__name__}: {first}",
        hint="a branch on a tensor's value or a call outside PyTorch stops the capture; "
        "torch.compile(backend='effpass') works on such models in parts",
    )
