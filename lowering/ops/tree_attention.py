"""Attention of the nodes of a token tree over a KV cache and their ancestors in the tree.

    out[t] = Σ_s softmax_s(c(scale · q_t · k_s)) v_s      over slots s visible to t;  c(x) = softcap · tanh(x / softcap)
    s is visible to t  ⇔  (s < n or s − first is an ancestor of t)
                          and  0 ≤ p_s ≤ p_t  and  (window = 0 or p_t − p_s < window)

The cache has two parts. Its first n slots are the *prefix*, whose length n differs between sequences; the slots from
`first` on hold the tree. p is the position of a token, -1 for empty slots and padding. Ancestors are bit masks, and a
node is an ancestor of itself (:mod:`effpass.lowering.ops.ancestors`). A query without a visible slot, such as a padding
node, outputs 0. If blocks of the prefix were chosen for each KV head (:mod:`effpass.lowering.ops.tree_blocks`), slots
of other blocks are neither visible nor read. Every slot must hold finite numbers (a new cache is zeros), because a
masked slot has weight 0 and 0 · NaN is NaN.

The operator belongs to the decode engine, whose cache no exported program has; it has no ONNX translation and no
gradients.

Shapes: B batch, T nodes, S slots, H query heads, G KV heads, K key size, V value size, W words, M chosen blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.ancestors import WORD
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "tree_attention"]

#: Maximum deviation of the kernel's output from the reference, relative to the largest value of the output. Both
#: compute scores and sums in float32; the kernel rounds softmax weights to the cache's dtype before the second product.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float64: 1e-6}


def _tree_attention(
    query: Tensor, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor, lengths: Tensor,
    ancestors: Tensor, first: int, scale: float, window: int, softcap: float, chosen: Tensor | None, block: int,
) -> Tensor:  # fmt: skip
    (batch, heads, tokens, key_size), (_, groups, slots, value_size) = query.shape, values.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).reshape(batch, groups, heads // groups * tokens, key_size)
    scores = (grouped @ keys.to(wide).transpose(-1, -2)).view(batch, heads, tokens, slots) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    slot = torch.arange(slots, device=query.device)
    node = (slot - first).clamp(min=0)
    word = (node // WORD).clamp(max=ancestors.shape[2] - 1)
    is_ancestor = (ancestors[:, :, word] >> (node % WORD)) & 1 == 1
    is_ancestor &= (slot >= first) & (slot < first + WORD * ancestors.shape[2])
    of_keys, of_queries = key_positions[:, None, :], query_positions[:, :, None]
    visible = is_ancestor | (slot < lengths[:, None])[:, None]
    visible &= (of_keys >= 0) & (of_keys <= of_queries)
    if window:
        visible &= of_queries - of_keys < window
    visible = visible[:, None]
    if chosen is not None:
        kept = (slot // block == chosen[..., None]).any(2) | (slot >= first)
        visible = visible & kept.repeat_interleave(heads // groups, 1)[:, :, None]
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    weights = weights.masked_fill(~visible.any(-1, keepdim=True), 0)
    out = weights.view(batch, groups, heads // groups * tokens, slots) @ values.to(wide)
    return out.view(batch, heads, tokens, value_size).transpose(1, 2).to(query.dtype).contiguous()


@torch.library.custom_op(
    "effpass::tree_attention",
    mutates_args=(),
    schema="(Tensor query, Tensor keys, Tensor values, Tensor key_positions, Tensor query_positions, Tensor lengths, "
    "Tensor ancestors, int first, float scale, int window, float softcap, Tensor? chosen=None, int block=0) -> Tensor",
)
def tree_attention(
    query: Tensor, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor, lengths: Tensor,
    ancestors: Tensor, first: int, scale: float, window: int, softcap: float, chosen: Tensor | None = None,
    block: int = 0,
) -> Tensor:  # fmt: skip
    """Attention of T nodes. Query heads share the keys of their KV head without copying them.

    Args:
        query: [B, H, T, K], any strides.
        keys: [B, G, S, K], any strides with the last dimension contiguous.
        values: [B, G, S, V], any strides with the last dimension contiguous.
        key_positions: int32 [B, S]; -1 in empty slots and padding.
        query_positions: int32 [B, T]; -1 for padding.
        lengths: int32 [B], number of slots n in each sequence's prefix, all before `first`.
        ancestors: int64 [B, T, W], ancestor bits of the nodes.
        first: first slot of the tree.
        scale: factor applied to the scores.
        window: number of positions that a query sees, including its own; 0 for no limit.
        softcap: bound on the scores; 0 for none.
        chosen: int32 [B, G, M], blocks of the prefix to read, ascending, followed by -1; None for all.
        block: slots per block of `chosen`.

    Returns:
        [B, T, H, V], contiguous.

    Raises:
        EffpassError: if H is not a multiple of G, or sizes don't match.
    """
    _check(query, keys, values, key_positions, query_positions, lengths, ancestors, first, chosen, block)
    # Leave out the slots between the longest prefix and the tree, which may be most of the cache.
    end, tree = min(int(lengths.max()), first), slice(first, first + WORD * ancestors.shape[2])
    read_keys, read_values = (torch.cat((x[:, :, :end], x[:, :, tree]), 2) for x in (keys, values))
    positions = torch.cat((key_positions[:, :end], key_positions[:, tree]), 1)
    return _tree_attention(
        query, read_keys, read_values, positions, query_positions, lengths, ancestors, end, scale, window, softcap,
        chosen, block,
    )  # fmt: skip


@tree_attention.register_kernel("cuda")
def _(query, keys, values, key_positions, query_positions, lengths, ancestors, first, scale, window, softcap,  # type: ignore[no-untyped-def]
      chosen=None, block=0):  # fmt: skip
    _check(query, keys, values, key_positions, query_positions, lengths, ancestors, first, chosen, block)
    arguments = (
        query, keys, values, key_positions, query_positions, lengths, ancestors, first, scale, window, softcap, chosen,
        block,
    )  # fmt: skip
    kernels = triton_kernels("tree_attention")
    if kernels and kernels.supported(query, keys, values, block):
        return kernels.tree_attention(*arguments)
    return _tree_attention(*arguments)  # over all slots, because reading `lengths` would wait for the device


def _check(
    query: Tensor, keys: Tensor, values: Tensor, key_positions: Tensor, query_positions: Tensor, lengths: Tensor,
    ancestors: Tensor, first: int, chosen: Tensor | None, block: int,
) -> None:  # fmt: skip
    (batch, heads, tokens, key_size), (_, groups, slots, size) = query.shape, keys.shape
    if heads % groups or key_size != size or values.shape[:3] != keys.shape[:3] or keys.shape[0] != batch:
        raise EffpassError(
            f"effpass::tree_attention: queries {tuple(query.shape)} can't attend to keys {tuple(keys.shape)} and values"
            f" {tuple(values.shape)}",
            hint="queries are [B, H, T, K], keys [B, G, S, K] and values [B, G, S, V], where G divides H",
        )
    shapes = (tuple(key_positions.shape), tuple(query_positions.shape), tuple(lengths.shape))
    if shapes != ((batch, slots), (batch, tokens), (batch,)) or ancestors.shape[:2] != (batch, tokens):
        raise EffpassError(
            f"effpass::tree_attention: {tokens} nodes and keys {tuple(keys.shape)} have key_positions, query_positions"
            f" and lengths {shapes}, and ancestors {tuple(ancestors.shape)}",
            hint="they are [B, S], [B, T], [B] and [B, T, W]",
        )
    if not 0 <= first <= slots:
        raise EffpassError(f"effpass::tree_attention: the tree begins at slot {first} of {slots}")
    if chosen is not None and (chosen.shape[:2] != (batch, groups) or block < 1):
        raise EffpassError(
            f"effpass::tree_attention: chosen {tuple(chosen.shape)} of blocks of {block} slots, expected [B, G, M]"
        )


@tree_attention.register_fake
def _(query, keys, values, key_positions, query_positions, lengths, ancestors, first, scale, window, softcap,  # type: ignore[no-untyped-def]
      chosen=None, block=0):  # fmt: skip
    _check(query, keys, values, key_positions, query_positions, lengths, ancestors, first, chosen, block)
    batch, heads, tokens, _ = query.shape
    return query.new_empty((batch, tokens, heads, values.shape[-1]))


@register_flop_formula(torch.ops.effpass.tree_attention)
def _(query: Any, keys: Any, values: Any, *args: Any, out_val: Any = None, **kwargs: Any) -> Any:
    batch, heads, tokens, key_size = query
    return 2 * batch * heads * tokens * keys[2] * (key_size + values[3])
