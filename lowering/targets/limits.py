"""The sizes that an exported file accepts, and a wrapper that refuses inputs outside of them.

Ahead-of-time compiled code checks nothing: called with sizes, dtypes, strides or devices that it was not compiled for,
it returns wrong numbers. :func:`limited` therefore wraps every loaded file. Sizes are named as in
:mod:`effpass.lowering.targets.decode_graph`: B sequences, T new tokens and P past positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import ExportError
from effpass.lowering.targets.cache_layers import CacheLayer
from effpass.lowering.targets.decode_graph import Step
from effpass.lowering.targets.device import CPU

__all__ = ["LARGEST_INDEX", "Elements", "Limits", "check_indices", "check_limits", "limited", "model_length"]

# Number of elements of a tensor as a polynomial in B, T and P. Each term is (coefficient, exponent of B, exponent of T,
# exponent of P), and the number is the sum of the terms.
Elements = tuple[tuple[int, int, int, int], ...]

LARGEST_INDEX = 2**31 - 1


@dataclass(frozen=True)
class Limits:
    """Upper limits of the sizes that a file accepts. The lower limits are 1 for B and T, and 0 for P.

    Attributes:
        batch: largest batch size B; None for no limit.
        length: largest P + T, past and new tokens together; None for no limit.
        indices: sizes of the tensors that compiled kernels index with 32 bits, none of which may have more than
            :data:`LARGEST_INDEX` elements; see :func:`check_indices`.
    """

    batch: int | None = None
    length: int | None = None
    indices: tuple[Elements, ...] = ()


def model_length(model: Any) -> int | None:
    """Return the ``max_position_embeddings`` of the model's config; None if the config has none."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_limits(model: Any, max_batch: int | None, max_length: int | None) -> None:
    """Raise an :class:`ExportError` if the requested limits are too small, or too large for `model`."""
    for name, value, least in (("max_batch", max_batch, 1), ("max_length", max_length, 2)):
        if value is not None and value < least:
            raise ExportError(f"{name} is {value}, at least {least} is needed")
    holds = model_length(model)
    if max_length is not None and holds is not None and max_length > holds:
        raise ExportError(
            f"max_length is {max_length}, but {type(model).__name__} holds {holds} positions "
            "(max_position_embeddings of its config)",
            hint=f"ask for at most {holds}",
        )


def check_indices(indices: Sequence[Elements], batch: int, tokens: int, past: int, what: str) -> None:
    """Raise an :class:`ExportError` if a tensor has more elements than a kernel can index with 32 bits.

    Args:
        indices: sizes of the tensors, from :attr:`Limits.indices`.
        batch: batch size B of a call.
        tokens: number of new tokens T of the call.
        past: number of past positions P of the call.
        what: name of the file, for messages.
    """
    for elements in indices:
        count = sum(factor * batch**b * tokens**t * past**p for factor, b, t, p in elements)
        if count > LARGEST_INDEX:
            raise ExportError(
                f"{what}: {batch} x {tokens} tokens on a past of {past} make a tensor of {count:,} elements, "
                "and its kernels count to 2³¹ - 1",
                hint="feed a long prompt in parts, each on the past of those before, or fewer sequences",
            )


def limited(
    step: Step,
    layers: Sequence[CacheLayer],
    dtype: torch.dtype,
    limits: Limits,
    what: str,
    device: torch.device = CPU,
) -> Step:
    """Wrap `step` so that it is called only with contiguous tensors of supported shapes, dtypes and device.

    Args:
        step: an exported file as a function.
        layers: cache shapes of the file, one entry per layer.
        dtype: dtype of the cache.
        limits: the sizes that the file accepts.
        what: name of the file, for messages.
        device: device that `step` runs on.

    Returns:
        A function of the same arguments that raises an :class:`ExportError` for unsupported inputs.
    """
    count = 3 + 2 * len(layers)
    grows = next((3 + 2 * i for i, layer in enumerate(layers) if layer.grows), None)  # an input with dimension P

    def checked(*inputs: Tensor) -> Sequence[Tensor]:
        if len(inputs) != count:
            raise ExportError(f"{what} takes {count} tensors, {len(inputs)} were given")
        ids = inputs[0]
        if ids.dim() != 2 or not ids.numel() or (grows is not None and inputs[grows].dim() != 4):
            past = "" if grows is None else f", the past {list(inputs[grows].shape)}"
            raise ExportError(
                f"{what} takes input_ids [B, T] and a past [B, G, P, K] with B and T of at least 1; "
                f"input_ids is {list(ids.shape)}{past}"
            )
        batch, tokens = ids.shape
        if inputs[1].dim() != 2 or inputs[1].shape[1] < tokens:
            raise ExportError(
                f"{what}: attention_mask is {list(inputs[1].shape)}; it covers the past and the {tokens} input_ids"
            )
        length = inputs[1].shape[-1] - tokens if grows is None else inputs[grows].shape[2]
        expected: list[tuple[torch.dtype, tuple[int, ...]]]
        expected = [(torch.int64, (batch, n)) for n in (tokens, length + tokens, tokens)]
        for layer in layers:
            expected += zip(layer.dtypes(dtype), layer.shapes(batch, length), strict=True)
        for index, (tensor, (kind, shape)) in enumerate(zip(inputs, expected, strict=True)):
            if tensor.dtype != kind or tuple(tensor.shape) != shape:
                raise ExportError(
                    f"{what}: {_name(index, layers)} is {_shown(tensor.dtype)}{list(tensor.shape)}; "
                    f"with these input_ids and this past it must be {_shown(kind)}{list(shape)}"
                )
            if tensor.device != device:
                raise ExportError(
                    f"{what} runs on {device}, and {_name(index, layers)} is on {tensor.device}",
                    hint=f"make all of its tensors with device={str(device)!r}",
                )
        for name, value, most in (("batch", batch, limits.batch), ("length", length + tokens, limits.length)):
            if most is not None and value > most:
                raise ExportError(
                    f"{what}: a {name} of {value} is outside its range, 1 to {most}",
                    hint=f"export it again with max_{name} (--max-{name}) of {value}",
                )
        check_indices(limits.indices, batch, tokens, length, what)
        return step(*(t.contiguous() for t in inputs))

    return checked


def _name(index: int, layers: Sequence[CacheLayer]) -> str:
    fixed = ("input_ids", "attention_mask", "position_ids")
    if index < len(fixed):
        return fixed[index]
    layer, part = divmod(index - len(fixed), 2)
    return f"past_key_values.{layer}.{layers[layer].parts[part]}"


def _shown(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
