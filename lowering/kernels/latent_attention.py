"""Dense attention of one token over the latents of MLA, whose values are the first channels of its keys.

A kernel of `cached_attention`: latents are read once, for scores and for sums, and by the query heads together. What
the programs leave is merged in a second launch, since all heads share one key and there are many parts.
"""

from __future__ import annotations

from torch import Tensor

from effpass.lowering.kernels.chosen_attention import DENSE, attend_chosen, fits, is_latent

__all__ = ["cached_attention", "supported"]


def supported(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether there is a kernel for `query` [B, H, 1, K] over latents."""
    return (
        query.shape[2] == 1
        and query.numel() > 0
        and keys.shape[2] > 0
        and is_latent(keys, values)
        and fits(query, keys, values, keys.shape[1])
    )


def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    filled: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """`effpass::cached_attention` where :func:`supported`, without a window."""
    assert not window
    query = query if query.stride(-1) == 1 else query.contiguous()
    return attend_chosen(
        query, keys, values, None, None, key_positions, query_positions, filled, None, None, None, None, None, None,
        scale, softcap, 64, 0, 1, False, DENSE, key_positions.shape[1], 1,
    )  # fmt: skip
