"""Rows that hold several documents, as transformers' `DataCollatorWithFlattening` makes them.

Where documents begin is known from `cu_seq_lens_q`, or from `position_ids` that restart. transformers separates the
documents in its own attention for both, without a mask and a cache; this module follows the same rule.

Shapes: B rows, T tokens, N documents of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effpass.core.cache_name import cache_name

__all__ = ["CU_SEQLENS", "cu_seqlens_of", "places"]

#: Name of the argument that gives the ends of documents to a model and its layers.
CU_SEQLENS = "cu_seq_lens_q"


def cu_seqlens_of(given: Mapping[str, Any]) -> Tensor | None:
    """Return the offsets of the documents in a call of a model among its B T tokens, int32 [N + 1].

    Args:
        given: arguments of the call by name.

    Returns:
        The argument `cu_seq_lens_q`; without it, what follows from `position_ids` [B or 1, T]; None for one document
        in each row, or a call with a mask or a cache.
    """
    if given.get(CU_SEQLENS) is not None:
        return given[CU_SEQLENS]
    positions = given.get("position_ids")
    if positions is None or positions.dim() != 2 or positions.shape[1] < 2 or positions.is_meta:
        return None
    if any(given.get(name) is not None for name in ("attention_mask", "effpass_cache", cache_name())):
        return None
    begins = F.pad(positions.diff(dim=1) != 1, (1, 0), value=True)
    if not bool(begins[:, 1:].any()):
        return None
    tokens = next(given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None)
    begins = begins.expand(tokens.shape[0], -1).flatten()
    return F.pad(begins.nonzero().flatten(), (0, 1), value=len(begins)).to(torch.int32)


def places(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Return the place of each token in its document, [tokens], from the offsets of the documents [N + 1]."""
    index = torch.arange(tokens, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return index - cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
