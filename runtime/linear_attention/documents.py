"""Rows that hold several documents, as transformers' `DataCollatorWithFlattening` makes them.

Where documents begin is known from `cu_seq_lens_q`, or from `position_ids` that restart. transformers' own attention
separates documents by the positions, without a mask and a cache, and reads `cu_seq_lens_q` only in FlashAttention. A
hybrid therefore always has both.

Shapes: B rows, T tokens, N documents of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effpass.core.cache_name import cache_name
from effpass.core.errors import ModelError
from effpass.runtime.document_starts import document_starts
from effpass.runtime.linear_attention.padding import can_be_read

__all__ = ["CU_SEQLENS", "documents", "places"]

#: Name of the argument that gives the ends of documents to a model and its layers.
CU_SEQLENS = "cu_seq_lens_q"


def documents(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that keep the documents of a call apart, to be added to those of the call.

    Args:
        given: arguments of the call of a model by name.

    Returns:
        `cu_seq_lens_q`, offsets int32 [N + 1] among the B T tokens or None, and `position_ids` [B, T]. Empty for one
        document in each row, for a call with a mask or a cache, and where positions can't be read, as in a compiled
        model.

    Raises:
        ModelError: if `cu_seq_lens_q` has another form, or comes with an attention mask.
    """
    ends = given.get(CU_SEQLENS)
    if ends is None:
        ends = _by_positions(given)
        return {} if ends is None else {CU_SEQLENS: ends}
    if not isinstance(ends, Tensor) or ends.dim() != 1 or len(ends) < 2:
        what = tuple(ends.shape) if isinstance(ends, Tensor) else type(ends).__name__
        raise ModelError(f"{CU_SEQLENS} is {what}", hint="offsets int32 [N + 1] of N documents, from 0 to all tokens")
    batch, tokens = _inputs(given).shape[:2]
    if batch == 1 and len(ends) == 2:
        return {CU_SEQLENS: None}  # one document
    if given.get("attention_mask") is not None:
        raise ModelError(
            f"{CU_SEQLENS} comes with an attention mask, with which attention does not separate documents",
            hint="leave out the mask",
        )
    positions = given.get("position_ids")
    if positions is None:
        positions = places(ends.to(_inputs(given).device), batch * tokens).view(batch, tokens)
    return {CU_SEQLENS: ends, "position_ids": positions}


def _inputs(given: Mapping[str, Any]) -> Tensor:
    return next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)


def _by_positions(given: Mapping[str, Any]) -> Tensor | None:
    """Return the offsets of documents whose positions restart, padded to a power of two by empty ones.

    So few numbers of documents leave layers that are compiled for each number with few graphs.
    """
    positions = given.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[1] < 2 or not can_be_read(positions):
        return None
    if any(given.get(name) is not None for name in ("attention_mask", "effpass_cache", cache_name())):
        return None
    begins = document_starts(positions)
    if not bool(begins[:, 1:].any()):
        return None
    begins = begins.expand(_inputs(given).shape[0], -1).flatten()
    starts = begins.nonzero().flatten()
    count = 1 << (len(starts) - 1).bit_length()
    return F.pad(starts, (0, count + 1 - len(starts)), value=len(begins)).to(torch.int32)


def places(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the place of each token in its document, [tokens], from the offsets of the documents [N + 1]."""
    index = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
