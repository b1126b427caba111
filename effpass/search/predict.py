"""Prediction for a recipe: time of a decode step on the engine, and bytes of weights and KV cache, from the cost model.

    seconds = Σ over kernels that read no cache of t(kernel) + L (launches · latency + B S R / bandwidth)
    bytes   = weights + L B S H

with L layers of full attention, B sequences and S cached positions of each. A decode step is traced once for each
combination of weights passes; t, latency and bandwidth are those of :mod:`effpass.core.roofline`. The attention
kernels of the trace are replaced by those of the decode engine, which reads R bytes of keys and values per position
once, whereas the traced model repeats them for the query heads that share a KV head. Runtime passes change R, the
number of kernel launches, and H, the bytes held on the device per position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from effpass.core.inspection import decode_parts
from effpass.core.pass_ import Pass
from effpass.core.roofline import Ceilings, ceilings, device_and_dtype
from effpass.lowering.ops.two_level_attention_index import STATISTICS, Selection
from effpass.passes.runtime.kv_offload import KVOffload
from effpass.passes.runtime.mla_absorption import latent_layers
from effpass.passes.runtime.prefix_kv import PrefixKV
from effpass.passes.runtime.sparse_attention import SparseAttention
from effpass.runtime.cache import full_layers
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.plan import token_bytes
from effpass.runtime.prefix_kv.quantized import layer_class
from effpass.runtime.sparse_cost import step_bytes
from effpass.search.workload import Goal, Workload

__all__ = ["Estimate", "Traced", "trace"]


@dataclass(frozen=True)
class Estimate:
    """Prediction for one recipe.

    Attributes:
        seconds: time of a decode step.
        bytes: bytes of weights and KV cache on the device.
    """

    seconds: float
    bytes: float

    def of(self, goal: Goal) -> float:
        """The quantity that `goal` minimizes."""
        return self.bytes if goal == "memory" else self.seconds


@dataclass(frozen=True)
class Traced:
    """A traced decode step of a model with one combination of weights passes, without attention.

    Attributes:
        seconds: predicted time of all kernels that read no cache.
        weight_bytes: bytes of the model's weights.
        config: config of the model.
        element: bytes per element of the model's dtype.
        layers: number of layers with full attention.
        is_latent: whether the layers have latent attention (MLA), where values are a part of the keys.
        batch: number of sequences.
        length: mean number of cached positions of a sequence.
        at: measured ceilings of the device.
    """

    seconds: float
    weight_bytes: int
    config: Any
    element: int
    layers: int
    is_latent: bool
    batch: int
    length: int
    at: Ceilings

    def with_passes(self, passes: Sequence[Pass]) -> Estimate:
        """The prediction with the runtime passes `passes` applied, in the order of the recipe."""
        step = _Cache(self, self.length)
        for pass_ in passes:
            step = step.after(pass_)
        launches = self.layers * step.launches * self.at.latency["attention"]
        moved = self.layers * self.batch
        return Estimate(
            self.seconds + launches + moved * step.read / self.at.bandwidth, self.weight_bytes + moved * step.held
        )


@dataclass(frozen=True)
class _Cache:
    """The cache of one sequence in one layer, as the passes applied so far have changed it; sizes are in bytes."""

    of: Traced
    length: float
    bytes_of: Any = layer_class("auto").bytes_of
    index: float = 0.0  # bytes of the index of sparse attention
    chosen: float | None = None  # bytes that a step of sparse attention reads; None: the whole cache
    on_device: float | None = None  # bytes of the device pool of an offloaded cache; None: the whole cache
    launches: int = 1
    selection: Selection | None = None

    @property
    def dense(self) -> float:
        return self.length * token_bytes(self.of.config, self.of.element, self.bytes_of)

    @property
    def read(self) -> float:
        return self.dense if self.chosen is None else self.chosen

    @property
    def held(self) -> float:
        return (self.dense if self.on_device is None else self.on_device) + self.index

    def after(self, pass_: Pass) -> _Cache:
        if isinstance(pass_, PrefixKV):
            row = token_bytes(self.of.config, self.of.element, self.bytes_of)
            mean = Budget.parse(pass_.options.budget).mean(self.of.length, self.of.batch, row * self.of.layers)
            kept = min(self.length, max(mean, pass_.options.sink + pass_.options.recent))
            return replace(self, length=kept, bytes_of=layer_class(pass_.options.kv_cache_dtype).bytes_of)
        if isinstance(pass_, SparseAttention):
            return self._sparse(pass_)
        if isinstance(pass_, KVOffload):
            return self._offloaded(pass_)
        return self

    def _sparse(self, pass_: SparseAttention) -> _Cache:
        how, length = pass_.options.selection, round(self.length)
        groups, key_size, value_size = self._sizes
        channels = key_size if pass_.artifact is None else pass_.artifact.options["channels"]
        of_blocks = STATISTICS[how.statistic] * key_size * self.of.element + 4
        index = groups * (-(-length // how.block) * of_blocks + length * (channels // 2 + 4))
        if length <= how.tokens or length < (pass_.options.dense_below or 0):
            return replace(self, index=index, selection=how)
        sizes = (groups, key_size, value_size, channels, self.of.element, self.of.is_latent)
        _, read = step_bytes(how, length, *sizes)
        return replace(self, index=index, chosen=read, selection=how, launches=2 if how.levels == "blocks" else 3)

    def _offloaded(self, pass_: KVOffload) -> _Cache:
        assert self.selection is not None  # the manager has checked that sparse attention precedes
        positions = pass_.options.pages(self.selection) * self.selection.block
        row = token_bytes(self.of.config, self.of.element, self.bytes_of)
        return replace(self, on_device=min(self.dense, positions * row))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Number of KV heads, key size and value size of the cache."""
        text = self.of.config.get_text_config(decoder=True)
        if self.of.is_latent:
            return 1, text.kv_lora_rank + text.qk_rope_head_dim, text.kv_lora_rank
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, size, size


def trace(model: Any, workload: Workload) -> Traced:
    """Trace a decode step of `model`, to which only weights passes were applied.

    Raises:
        EffpassError: the decode step can't be traced and counted.
    """
    at = ceilings(*device_and_dtype(model))
    length = workload.prompt + workload.new_tokens // 2
    parts = decode_parts(model, at, workload.batch, length)
    kernels = [part for part in parts if part.kind != "attention" and not part.cache_bytes]
    weights = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return Traced(
        sum(part.seconds for part in kernels), sum(weights.values()), model.config, model.dtype.itemsize,
        len(full_layers(model.config)[0]), bool(latent_layers(model)), workload.batch, length, at,
    )  # fmt: skip
