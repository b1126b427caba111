"""A session of the decode engine whose layers keep their shares of a cache budget.

A prompt is *staged* (:mod:`effpass.runtime.prefix_kv.staging`): each layer holds all of its tokens until those to keep
are selected and copied to buffers of the layer's own size. With a profile, a layer's share is known beforehand. Its
staged keys are then freed as soon as it has attended, so that besides kept tokens only one layer at a time is in
memory, and a batch runs a few sequences at a time. Without a profile, all layers of all sequences stay staged until the
last layer has attended. Decode steps append tokens, and every :attr:`Settings.every` steps each layer evicts the tokens
beyond its share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.runtime.cache import DecodeCache, Slots, cannot_crop, new_layers
from effpass.runtime.prefix_kv.layer import EvictingLayer
from effpass.runtime.prefix_kv.plan import Growth, Limits, Settings, token_bytes
from effpass.runtime.prefix_kv.quantized import layer_class
from effpass.runtime.prefix_kv.select import cumulative_mass, kept_slots, priority
from effpass.runtime.prefix_kv.staging import Staging
from effpass.runtime.session import Backend, Session, Tail

__all__ = ["BudgetSession"]


class BudgetSession(Session):
    """A :class:`Session` with a cache of :class:`EvictingLayer` and a budget.

    Args:
        model: a transformers causal LM.
        batch: number of sequences that the buffers hold.
        capacity: number of tokens of prompt and answer together; layers have slots for their shares of them.
        backend: `torch.compile` backend for the decode step; None runs the model's own operators.
        settings: policy, budget and protected tokens.

    Attributes:
        growth: for each layer with full attention, the number of tokens that it keeps; created by the first prompt.
        keyed: indices of the layers that cache keys and values.
        full: indices of those with full attention, which share the budget.
        token_bytes: bytes of one token in all of `full`.
    """

    growth: list[Growth]
    gives_up = True

    def __init__(self, model: Any, batch: int, capacity: int, backend: Backend | None, settings: Settings) -> None:
        self.settings = settings
        super().__init__(model, batch, capacity, backend)
        self.keyed = [i for i in range(len(self.cache)) if self.cache.buffers(i).keeps_keys]
        self.full = [i for i in self.keyed if not self._kept(i).is_sliding]
        layer = layer_class(settings.kv_cache_dtype)
        self.token_bytes = len(self.full) * token_bytes(model.config, model.dtype.itemsize, layer.bytes_of)
        self._lengths: list[int] = []  # number of tokens of each sequence, without padding, at the last eviction
        self._pinned = 0
        self._settled_at = 0

    def _new_cache(self, batch: int, capacity: int) -> DecodeCache:
        if (offload := getattr(self.model, "effpass_offload", None)) is not None:
            if self.settings.kv_cache_dtype != "auto":
                raise EffpassError(
                    f"kv_cache_dtype: {self.settings.kv_cache_dtype} in prefix_kv, and kv_offload holds keys and values"
                    " as they are",
                    hint="leave it out, or kv_offload",
                )
            return offload.evicting(self.model, batch, capacity)
        layer, device, config = layer_class(self.settings.kv_cache_dtype), self.model.device, self.model.config
        layers = new_layers(config, Slots(batch, 0, device), lambda window: layer(batch, window, device))
        return DecodeCache(config, batch, capacity, device, layers)

    def _kept(self, index: int) -> EvictingLayer:
        layer = self.cache.layers[index]
        assert isinstance(layer, EvictingLayer)
        return layer

    def begin(self, rows: int) -> None:
        super().begin(rows)
        self._lengths, self._pinned, self._settled_at = [0] * rows, 0, 0

    # -- prompts ------------------------------------------------------------------------------------------------------

    def prefill(
        self, input_ids: Tensor, is_token: Tensor | None, chunk: int, keep: Tensor | None = None, **inputs: Any
    ) -> None:
        """Run the next prompt tokens, and keep those that the budget allows.

        Args:
            input_ids, is_token, chunk, inputs: as for :meth:`Session.prefill`.
            keep: bool `[rows, T]`, tokens that no layer may evict; None for no such tokens.

        Raises:
            EffpassError: if the budget is smaller than the number of protected tokens.
        """
        rows, tokens = input_ids.shape
        before, steps = self.length, self.length - self._settled_at
        known = [n + steps for n in self._lengths]
        if is_token is None:
            lengths = [n + tokens for n in known]
        else:
            lengths = [n + more for n, more in zip(known, is_token.sum(1).tolist(), strict=True)]
        pinned = self._pinned + (0 if keep is None else int(keep.sum(1).max()))
        high = [min(self._kept(i).slots.length + tokens, max(lengths)) for i in self.full]
        limits = Limits.of(self.settings, max(lengths), rows, high, pinned, self.token_bytes)
        ratio = limits.total / (len(self.full) * limits.length)
        shares = [1.0] * len(high) if limits.total >= sum(high) else self.settings.policy.shares(ratio, len(high))

        positions = self._begin_prompt(input_ids, is_token)
        if shares is None:
            self._online(input_ids, positions, is_token, chunk, keep, limits, lengths, inputs)
        else:
            counts = limits.counts(self.settings, shares)
            at_once = rows if before or inputs else max(1, chunk * rows // tokens)
            for first in range(0, rows, at_once):
                group = slice(first, first + at_once)
                self.length = before
                self._stage(
                    input_ids[group], positions[group], None if is_token is None else is_token[group],
                    max(1, chunk * rows // at_once), None if keep is None else keep[group], inputs, first,
                    lengths[group], counts, limits,
                )  # fmt: skip
        self._end_prompt(positions)
        self._lengths, self._pinned = lengths, pinned
        self._settled_at = self.length
        for index in self.keyed:
            slots = self._kept(index).slots
            slots.seen = self.length
            slots.is_dense = is_token is None and slots.length == self.length == min(lengths)
            slots.positions[rows:] = -1
        for index in range(len(self.cache)):
            if not self.cache.buffers(index).keeps_keys:
                self.cache.buffers(index).slots = self._kept(self.keyed[0]).slots  # new if that layer was reallocated

    def _online(
        self,
        input_ids: Tensor,
        positions: Tensor,
        is_token: Tensor | None,
        chunk: int,
        keep: Tensor | None,
        limits: Limits,
        lengths: Sequence[int],
        inputs: dict[str, Any],
    ) -> None:
        """Stage all layers, search for their shares, and then select the tokens of each layer."""
        staging = self._stage(input_ids, positions, is_token, chunk, keep, inputs, 0, lengths, None, limits)
        counts = limits.counts(self.settings, self._searched(staging, limits, lengths))
        self._grow(counts, limits)
        for index in self.keyed:
            self._settle(staging, index, 0, lengths, counts, limits)

    def mass(self, staging: Staging, mean: int) -> tuple[Tensor, Tensor]:
        """Return the cumulative importance of staged tokens, `[B, L, S]`, and their number, int64 `[B, L]`.

        Args:
            staging: the staged prompt, which all layers have attended to.
            mean: mean number of tokens that a layer will keep, for :meth:`Policy.recent`.
        """
        masses, there, settings = [], [], self.settings
        for index in self.full:
            layer = staging.staged(index)
            table = layer.slots.positions
            rank = settings.policy.rank(layer.from_all, layer.from_last, table, settings.sink)
            recent = settings.policy.recent(mean, settings.recent)
            order = priority(rank, table, layer.pinned, settings.sink, recent)
            masses.append(cumulative_mass(rank, table, order, settings.sink))
            there.append((table >= 0).sum(1))
        widest = max(mass.shape[1] for mass in masses)
        padded = [torch.nn.functional.pad(m, (0, widest - m.shape[1]), value=1.0) for m in masses]
        return torch.stack(padded, 1), torch.stack(there, 1)

    def _searched(self, staging: Staging, limits: Limits, lengths: Sequence[int]) -> list[float]:
        """Return the number of tokens that the policy assigns to each layer, from the mean of the sequences' shares."""
        mass, high = self.mass(staging, limits.total // len(self.full))
        totals = [round(limits.total * n / limits.length) for n in lengths]
        low = [min(limits.low, most) for most in limits.high]
        least = [sum(min(lo, n) for lo in low) for n in lengths]
        totals = [max(total, floor) for total, floor in zip(totals, least, strict=True)]
        found = self.settings.policy.counts(mass, totals, low, high)
        shares = [[count / n for count in row] for row, n in zip(found, lengths, strict=True)]
        return [sum(column) / len(shares) * limits.length for column in zip(*shares, strict=True)]

    def stage(self, input_ids: Tensor, chunk: int, inputs: dict[str, Any]) -> Staging:
        """Run a first prompt `[rows, T]` without padding, and return the staged layers before tokens are selected."""
        rows, tokens = input_ids.shape
        positions, lengths = self._begin_prompt(input_ids, None), [tokens] * rows
        limits = Limits(tokens, tokens * len(self.full), 0, [tokens] * len(self.full))
        return self._stage(input_ids, positions, None, chunk, None, inputs, 0, lengths, None, limits)

    def _stage(
        self,
        input_ids: Tensor,
        positions: Tensor,
        is_token: Tensor | None,
        chunk: int,
        keep: Tensor | None,
        inputs: dict[str, Any],
        row: int,
        lengths: Sequence[int],
        counts: Sequence[int] | None,
        limits: Limits,
    ) -> Staging:
        """Run a prompt; given `counts`, tokens of each layer are selected as soon as it has attended to the prompt."""
        rows, tokens = input_ids.shape
        kept, policy = self.cache, self.settings.policy
        importance = "none" if self.settings.budget.is_everything else policy.importance
        if counts is not None and row == 0:
            self._grow(counts, limits)

        def settle(index: int) -> None:
            assert counts is not None
            staged, self.cache = self.cache, kept
            assert isinstance(staged, Staging)
            self._settle(staged, index, row, lengths, counts, limits)
            self.cache = staged

        staging = Staging(
            kept, self.model.config, row, rows, tokens, self.length > 0, importance, policy.window,
            None if counts is None else settle,
        )  # fmt: skip
        if keep is not None:
            for index in self.keyed:
                staging.staged(index).pinned[:, -tokens:] = keep
        if is_token is not None:
            for slots in staging.distinct_slots():
                slots.is_dense = False
        chunk = tokens if inputs else chunk
        self.cache = staging
        try:
            for first in range(0, tokens, chunk):
                part = positions[:, first : first + chunk].contiguous()
                self._enter(part)
                logits = self._call(self.model, input_ids[:, first : first + chunk], part.clamp(min=0), **inputs)
        finally:
            self.cache = kept
        self._keep_logits(logits, row)
        return staging

    def _grow(self, counts: Sequence[int], limits: Limits) -> None:
        self.growth = Growth.of(self.settings, counts, limits, self.rows, self.token_bytes)

    def _settle(
        self,
        staging: Staging,
        index: int,
        row: int,
        lengths: Sequence[int],
        counts: Sequence[int],
        limits: Limits,
    ) -> None:
        """Select the tokens of a layer, copy them to its own buffers, and free the staged ones."""
        staged, kept, settings = staging.staged(index), self._kept(index), self.settings
        assert staged.keys is not None
        assert staged.values is not None
        table, recent = staged.slots.positions, settings.recent
        capacity = self.capacity
        if kept.is_sliding:
            count, row_counts = limits.length, list(lengths)
        else:
            place = self.full.index(index)
            count, growth = counts[place], self.growth[place]
            row_counts = limits.row_counts(count, lengths)
            recent = settings.policy.recent(count, settings.recent)
            capacity = min(capacity, growth.at(capacity) + settings.every)
        rank = settings.policy.rank(staged.from_all, staged.from_last, table, settings.sink)
        order = priority(rank, table, staged.pinned, settings.sink, recent)
        of_rows = _column(row_counts, table.device)
        slots, positions = kept_slots(order, table, count, of_rows)

        def chosen(x: Tensor) -> Tensor:
            return x.gather(2, slots[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))

        keys, values = chosen(staged.keys), chosen(staged.values)
        if row == 0 and kept.fit(max(capacity, count), keys, values):
            self._graph = self._model = None
        kept.put(row, keys, values, positions, [table.gather(1, slots) for table in staged.tables()])
        if settings.policy.slides:
            kept.anchor.zero_()
        else:
            last = (of_rows - settings.recent).clamp(min=0, max=count - 1)
            kept.anchor[row : row + len(positions)] = positions.gather(1, last)
        staged.free()

    # -- decoding -----------------------------------------------------------------------------------------------------

    def step(self, tail: Tail | None = None) -> None:
        if self.length - self._settled_at >= self.settings.every:
            self._give_up()
        super().step(tail)

    def _give_up(self) -> None:
        """Evict the tokens of each layer beyond its share."""
        steps, self._settled_at = self.length - self._settled_at, self.length
        self._lengths = [n + steps for n in self._lengths]
        longest = max(self._lengths)
        for index, growth in zip(self.full, self.growth, strict=True):
            layer = self._kept(index)
            before, count = layer.slots.length, growth.at(longest)
            if count >= before:
                continue
            rows = [min(count, max(-(-count * n // longest), min(n, self.settings.protected))) for n in self._lengths]
            rows += [count] * (self.batch - len(rows))
            target, most = _column(rows, layer.anchor.device), before - min(rows)
            layer.give_up(target, count, most, self._position, self.settings.sink, self.settings.recent)
        self.cache.changed()

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens of every sequence; tokens that were evicted meanwhile are not restored."""
        removed = self.length - length
        if removed <= 0:
            return
        if not self.cache.is_croppable:
            raise cannot_crop(removed)
        last = self._position - self._moves * removed
        for slots in self.cache.distinct_slots():
            slots.positions.masked_fill_(slots.positions > last, -1)
            slots.seen -= removed
        steps = length - self._settled_at
        if steps < 0:
            self._lengths = [n + steps for n in self._lengths]
            self._settled_at = length
        self.length = length
        self._position.copy_(last)
        torch.clamp(self._position, min=0, out=self._index)


def _column(values: Sequence[int], device: torch.device) -> Tensor:
    """Copy `values` to the device as int64 `[B, 1]`, without synchronization."""
    if len(set(values)) == 1:
        return torch.full((len(values), 1), values[0], device=device)
    column = torch.tensor(values)[:, None]
    return column.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else column
