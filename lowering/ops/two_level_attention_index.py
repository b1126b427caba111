"""Index of a cache's keys for two-level sparse attention, with which a step selects keys without reading them.

    statistics[n] = min and max (or mean; or mean and standard deviation) of the keys in block n, per channel
    labels[s, c]  = round((k_sc - low_s) / step_s)
                    low_s = min_c k_sc,  step_s = (max_c k_sc - low_s) / 15,  c over the channels of the KV head's label

A block is a run of `block` consecutive slots. Slots that are empty, padding, or not below `filled` are excluded from a
block's statistics, and `seen` counts the others. Blocks are those of Quest (https://arxiv.org/abs/2406.10774), labels
those of Double Sparsity (https://arxiv.org/abs/2408.07092). :mod:`effpass.lowering.ops.two_level_attention` reads and
extends the index.

Keys are [B, G, S, K], or with a `block_table` int32 [B, G, N] pages [pages, block, K], where block n of a sequence and
KV head is in page block_table[b, g, n]. A block without a page (-1) is read from `host` [B, G, N, block, W], if given,
which holds all keys and values side by side (W = K + V), or latents (W = K).

Shapes: B batch, G KV heads, S slots, N = ceil(S / block) blocks, K key size, C channels of a label, P vectors of
statistics per block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["STATISTICS", "KeyIndex", "Selection", "gather_slots", "index_blocks", "index_keys", "parted"]

#: Kinds of block statistics, and the number of vectors of each.
STATISTICS = {"min_max": 2, "mean": 1, "mean_std": 2}
_LARGEST = 65504.0  # largest float16


@dataclass(frozen=True)
class Selection:
    """Rule by which a decode step selects the keys that it attends to.

    Attributes:
        tokens: number of keys that a step attends to, per KV head.
        blocks: number of blocks that the first level keeps, whose keys the second level considers.
        block: slots per block.
        sink: number of blocks at the start of the sequence that are always kept.
        recent: number of blocks up to the last token that are always kept.
        statistic: ``"min_max"`` gives an upper bound of the scores of a block's keys; ``"mean"`` and ``"mean_std"``
            give estimates.
        aggregation: reduction of the scores over the query heads of a KV head: ``"sum"`` or ``"max"``.
        levels: ``"both"``; ``"blocks"`` to attend to whole blocks (Quest); ``"tokens"`` to consider the labels of all
            keys (Double Sparsity).
        is_pipelined: whether to choose tokens in blocks selected by the previous step, so that these can be fetched in
            between.
    """

    tokens: int = 2048
    blocks: int = 128
    block: int = 64
    sink: int = 1
    recent: int = 2
    statistic: Literal["min_max", "mean", "mean_std"] = "min_max"
    aggregation: Literal["sum", "max"] = "sum"
    levels: Literal["both", "blocks", "tokens"] = "both"
    is_pipelined: bool = False

    def __post_init__(self) -> None:
        known = {"statistic": tuple(STATISTICS), "aggregation": ("sum", "max"), "levels": ("both", "blocks", "tokens")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise EffpassError(f"selection: {name} is {getattr(self, name)!r}", hint=f"one of {', '.join(values)}")
        if self.block not in (16, 32, 64, 128):
            raise EffpassError(f"selection: block is {self.block}", hint="16, 32, 64 or 128 slots")
        if self.tokens < 1 or self.sink < 0 or self.recent < 1:
            raise EffpassError(
                f"selection: tokens is {self.tokens}, sink {self.sink}, recent {self.recent}",
                hint="attend to at least one token, and keep at least the last block",
            )
        if self.kept_blocks < self.sink + self.recent and self.levels != "tokens":
            raise EffpassError(
                f"selection: {self.kept_blocks} blocks are kept, of which {self.sink} + {self.recent} always",
                hint="raise blocks (levels 'both') or tokens (levels 'blocks')",
            )
        if self.levels == "both" and self.blocks * self.block < self.tokens:
            raise EffpassError(
                f"selection: {self.blocks} blocks of {self.block} have fewer than {self.tokens} tokens",
                hint="raise blocks",
            )

    @property
    def kept_blocks(self) -> int:
        return self.tokens // self.block if self.levels == "blocks" else self.blocks


@dataclass(frozen=True)
class KeyIndex:
    """Index of one layer's keys, in tensors whose addresses do not change.

    Attributes:
        selection: rule by which keys are selected.
        channels: int32 `[G, C]`, channels of a label; C is even.
        statistics: `[B, G, N, P, K]`, in the keys' dtype.
        seen: int32 `[B, G, N]`, number of tokens in each block.
        labels: uint8 `[B, G, S, C/2]`; byte j has channel j in its low half and channel j + C/2 in its high half.
        ranges: float16 `[B, G, S, 2]`, step and low of each label.
        scores: float32 `[B, G, 2, N]`, block scores of the last two steps; those of a step that ends with F slots
            filled are in scores[:, :, F % 2].
        chosen_blocks: int32 `[B, G, kept]`, blocks of the last step, ascending, followed by -1; empty without the first
            level.
        chosen_tokens: int32 `[B, G, tokens]`, slots of the last step, ascending, followed by -1; empty if attention is
            over whole blocks.
    """

    selection: Selection
    channels: Tensor
    statistics: Tensor
    seen: Tensor
    labels: Tensor
    ranges: Tensor
    scores: Tensor
    chosen_blocks: Tensor
    chosen_tokens: Tensor

    @classmethod
    def empty(
        cls, selection: Selection, channels: Tensor, batch: int, slots: int, key_size: int, dtype: torch.dtype
    ) -> KeyIndex:
        """Create the index of an empty cache.

        Args:
            selection: rule by which keys are selected.
            channels: int32 `[G, C]` on the cache's device, channels of the labels.
            batch: batch size B.
            slots: number of slots S.
            key_size: key size K.
            dtype: dtype of the keys.
        """
        groups, of_label = channels.shape
        if of_label % 2 or not of_label:
            raise EffpassError(f"a label has {of_label} channels", hint="an even number, two to a byte")
        has_blocks, has_labels = selection.levels != "tokens", selection.levels != "blocks"
        blocks = -(-slots // selection.block) if has_blocks else 0
        of_slots = slots if has_labels else 0

        def full(*shape: int, dtype: torch.dtype, value: float = 0) -> Tensor:
            return torch.full((batch, groups, *shape), value, dtype=dtype, device=channels.device)

        return cls(
            selection,
            channels,
            full(blocks, STATISTICS[selection.statistic], key_size, dtype=dtype),
            full(blocks, dtype=torch.int32),
            full(of_slots, of_label // 2, dtype=torch.uint8),
            full(of_slots, 2, dtype=torch.float16),
            full(2, blocks, dtype=torch.float32, value=float("-inf")),
            full(selection.kept_blocks if has_blocks else 0, dtype=torch.int32, value=-1),
            full(selection.tokens if has_labels else 0, dtype=torch.int32, value=-1),
        )

    def rows(self, count: int) -> KeyIndex:
        """Return the index of the first `count` sequences, as views."""
        if count == self.seen.shape[0]:
            return self
        names = ("statistics", "seen", "labels", "ranges", "scores", "chosen_blocks", "chosen_tokens")
        return replace(self, **{name: getattr(self, name)[:count] for name in names})

    @property
    def bytes_per_token(self) -> float:
        """Memory of the index in bytes per slot, for all KV heads."""
        slots = max(self.labels.shape[2], self.seen.shape[2] * self.selection.block)
        parts = (self.statistics, self.seen, self.labels, self.ranges, self.scores)
        return sum(t.numel() * t.element_size() for t in parts) / (slots * self.seen.shape[0])

    def add(
        self, keys: Tensor, key_positions: Tensor, start: Tensor, filled: Tensor, tokens: int,
        block_table: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add `tokens` keys, which are in the cache from slot `start` on; see :func:`index_keys`."""
        rows = self.rows(key_positions.shape[0])
        torch.ops.effpass.index_keys(
            keys, block_table, key_positions, start, filled, tokens, rows.channels, rows.statistics, rows.seen,
            rows.labels, rows.ranges, self.selection.block, self.selection.statistic,
        )  # fmt: skip


def parted(rows: Tensor, key_size: int, value_size: int) -> tuple[Tensor, Tensor]:
    """Split entries [..., W] into keys and values, as views; the value of a latent is the first part of its key."""
    first = 0 if rows.shape[-1] == key_size else key_size
    return rows[..., :key_size], rows[..., first : first + value_size]


def gather_slots(
    cached: Tensor, block_table: Tensor | None, slots: Tensor, block: int, host: Tensor | None = None
) -> Tensor:
    """Gather keys or values [B, G, L, K] of `slots` [B, G, L]; for negative slots the result is arbitrary.

    Args:
        cached: [B, G, S, K], or pages [pages, block, K].
        block_table: int32 [B, G, N], page of each block; or None.
        slots: [B, G, L].
        block: slots per block.
        host: [B, G, N, block, K], read for blocks without a page; or None.
    """
    slots = slots.clamp(min=0).long()
    if block_table is None:
        return cached.gather(2, slots[..., None].expand(*slots.shape, cached.shape[-1]))
    pages = block_table.long().gather(2, slots // block)
    found = cached[pages.clamp(min=0), slots % block]
    if host is None:
        return found
    return torch.where((pages >= 0)[..., None], found, gather_slots(host.flatten(2, 3), None, slots, block))


# -- reference --------------------------------------------------------------------------------------------------------


def index_blocks(
    keys: Tensor,
    block_table: Tensor | None,
    key_positions: Tensor,
    filled: int,
    first: int,
    last: int,
    channels: Tensor,
    statistics: Tensor,
    seen: Tensor,
    labels: Tensor,
    ranges: Tensor,
    block: int,
    statistic: str,
    host: Tensor | None = None,
) -> None:
    """Recompute statistics and labels of blocks `first` to `last`, inclusive, from the keys in the cache."""
    (batch, slots), groups = key_positions.shape, channels.shape[0]
    begin, end = first * block, min((last + 1) * block, slots)
    here = torch.arange(begin, begin + (last + 1 - first) * block, device=keys.device)
    inside = here.clamp(max=slots - 1)
    of_slots = inside.expand(batch, groups, -1)
    k = gather_slots(keys, block_table, of_slots, block, host)
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    visible = (key_positions[:, inside] >= 0) & (here < min(filled, slots))
    if seen.shape[2]:
        k_blocks = k.view(batch, groups, -1, block, k.shape[-1])
        there = visible.view(batch, 1, -1, block, 1)
        count = there.sum(3)
        seen[:, :, first : last + 1] = count[..., 0].to(torch.int32)
        found = torch.stack(list(_statistics(k_blocks, there, count, statistic)), 3)
        statistics[:, :, first : last + 1] = torch.where(count[..., None] > 0, found, 0).to(statistics.dtype)
    if labels.shape[2]:
        kept = k[:, :, : end - begin]
        of_label = channels.long()[None, :, None].expand(batch, -1, end - begin, -1)
        codes, of_range = _labels(kept.gather(3, of_label))
        half = channels.shape[1] // 2
        labels[:, :, begin:end] = codes[..., :half] | (codes[..., half:] << 4)
        ranges[:, :, begin:end] = of_range


def _statistics(k: Tensor, there: Tensor, count: Tensor, statistic: str) -> Iterator[Tensor]:
    """Yield statistics `[B, G, blocks, K]` of the keys `[B, G, blocks, block, K]` that `there` selects."""
    if statistic == "min_max":
        yield k.masked_fill(~there, float("inf")).amin(3)
        yield k.masked_fill(~there, float("-inf")).amax(3)
        return
    mean = k.masked_fill(~there, 0).sum(3) / count.clamp(min=1)
    yield mean
    if statistic == "mean_std":
        away = (k - mean[:, :, :, None]).masked_fill(~there, 0)
        yield (away.square().sum(3) / count.clamp(min=1)).sqrt()


def _labels(k: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 `[..., C]` of keys `[..., C]`, and their step and low, float16 `[..., 2]`."""
    low, high = k.amin(-1, keepdim=True), k.amax(-1, keepdim=True)
    of_range = torch.cat(((high - low) / 15, low), -1).clamp(-_LARGEST, _LARGEST).to(torch.float16)
    step, low = of_range.to(k.dtype).split(1, -1)
    codes = torch.floor((k - low) / step.masked_fill(step == 0, 1) + 0.5).clamp(0, 15)
    return codes.to(torch.uint8), of_range


# -- index_keys -------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "effpass::index_keys",
    mutates_args=("statistics", "seen", "labels", "ranges"),
    schema="(Tensor keys, Tensor? block_table, Tensor key_positions, Tensor start, Tensor filled, int tokens, "
    "Tensor channels, Tensor(a!) statistics, Tensor(b!) seen, Tensor(c!) labels, Tensor(d!) ranges, int block, "
    "str statistic) -> ()",
)
def index_keys(
    keys: Tensor,
    block_table: Tensor | None,
    key_positions: Tensor,
    start: Tensor,
    filled: Tensor,
    tokens: int,
    channels: Tensor,
    statistics: Tensor,
    seen: Tensor,
    labels: Tensor,
    ranges: Tensor,
    block: int,
    statistic: str,
) -> None:
    """Add keys that the cache already holds to its index; the blocks that contain them are recomputed.

    Args:
        keys: [B, G, S, K], or pages [pages, block, K] with a table.
        block_table: int32 [B, G, N], page of each block; or None.
        key_positions: int32 [B, S]; -1 in empty slots and padding.
        start: int32 [1], slot of the first new key.
        filled: int32 [1], number of slots in use.
        tokens: number of new keys.
        channels: int32 [G, C], channels of a label; see :class:`KeyIndex`, also for the following tensors.
        statistics: written.
        seen: written.
        labels: written.
        ranges: written.
        block: slots per block.
        statistic: kind of the statistics.
    """
    blocks = -(-key_positions.shape[1] // block)
    if keys.is_cuda:
        kernels = triton_kernels("key_index")
        if kernels and kernels.indexable(keys, channels, labels):
            kernels.index_keys(
                keys, block_table, key_positions, start, filled, tokens, channels, statistics, seen, labels, ranges,
                block, statistic,
            )  # fmt: skip
            return
        first, last = 0, blocks - 1  # all blocks, because reading `start` would wait for the device
        end = key_positions.shape[1]
        key_positions = torch.where(torch.arange(end, device=keys.device) < filled, key_positions, -1)
    else:
        end = int(filled)
        first, last = int(start) // block, min((int(start) + tokens - 1) // block, blocks - 1)
    index_blocks(
        keys, block_table, key_positions, end, first, last, channels, statistics, seen, labels, ranges, block,
        statistic,
    )  # fmt: skip


@index_keys.register_fake
def _(*args: Any) -> None:
    return None


@register_flop_formula(torch.ops.effpass.index_keys)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
