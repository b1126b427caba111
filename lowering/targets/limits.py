"""The sizes that an exported file takes, and a wrapper that refuses all others.

Compiled code checks nothing: called with other sizes, dtypes, strides or devices than it was made for it returns wrong
numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import ExportError
from effpass.lowering.targets.decode_graph import CPU, CacheLayer, Step

__all__ = ["LARGEST_INDEX", "Elements", "Limits", "check_indices", "check_limits", "limited", "model_length"]

# How many elements of a tensor B, T and P make: the sum over (coefficient, exponents of B, T and P).
Elements = tuple[tuple[int, int, int, int], ...]

LARGEST_INDEX = 2**31 - 1


@dataclass(frozen=True)
class Limits:
    """Upper limits; None where there is none. Batch and tokens start at 1, the past at 0.

    Attributes:
        batch: largest B.
        length: largest P + T, past and new tokens together.
        indices: tensors that the code counts through with 32 bits, and that must not outgrow them; see
            :func:`check_indices`.
    """

    batch: int | None = None
    length: int | None = None
    indices: tuple[Elements, ...] = ()


def model_length(model: Any) -> int | None:
    """How many positions `model` was made for: its config's ``max_position_embeddings``."""
    config = model.config.get_text_config()
    length = getattr(config, "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def check_limits(model: Any, max_batch: int | None, max_length: int | None) -> None:
    """Raise an :class:`ExportError` when `model` can't hold what was asked for."""
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
    """Raise an :class:`ExportError` when a tensor has more elements than its kernel can count.

    Args:
        indices: the tensors.
        batch: B of a call.
        tokens: its T.
        past: its P.
        what: the file's name, for messages.
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
    """`step`, called with contiguous tensors of the right sizes and dtypes, on the right device, only.

    Args:
        step: an exported file as a function.
        layers: shapes of its cache.
        dtype: of its cache.
        limits: the sizes that it takes.
        what: the file's name, for messages.
        device: that it runs on.
    """
    count = 3 + 2 * len(layers)
    grows = next((3 + 2 * i for i, layer in enumerate(layers) if layer.grows), None)  # a tensor that tells P

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
