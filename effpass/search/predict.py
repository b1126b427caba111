"""What the cost model makes of a recipe: time of a decode step on the engine, and bytes that stay.

    seconds = Σ over kernels that read no cache of t(kernel) + L (launches latency + B S R / bandwidth)
    bytes   = weights + L B S H

of a decode step that is traced once for each choice of weights, B sequences over S positions. Attention is the
engine's: it reads R bytes of a position's keys and values, once, where the traced model's repeats them for the heads
that share them. Runtime passes change R, the launches and H, the bytes that are held.
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
    """
    Attributes:
        seconds: of a decode step.
        bytes: of weights and cache.
    """

    seconds: float
    bytes: float

    def of(self, goal: Goal) -> float:
        """What the goal makes smaller."""
        return self.bytes if goal == "memory" else self.seconds


@dataclass(frozen=True)
class Traced:
    """A decode step of one choice of weights, without attention.

    Attributes:
        seconds: of its kernels.
        weight_bytes: of the model.
        config: of the model.
        element: bytes of a number.
        layers: with full attention.
        is_latent: values are part of the keys.
        batch, length: sequences, and positions of each in the mean.
        at: ceilings of the device.
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
        """With runtime passes, in the order of the recipe."""
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
    """One layer's cache of one sequence."""

    of: Traced
    length: float
    bytes_of: Any = layer_class("auto").bytes_of
    index: float = 0.0  # bytes of an index
    chosen: float | None = None  # bytes that a sparse step reads
    on_device: float | None = None  # bytes of a pool, where the rest is elsewhere
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
        assert self.selection is not None  # the manager has seen sparse attention in front of it
        positions = pass_.options.pages(self.selection) * self.selection.block
        row = token_bytes(self.of.config, self.of.element, self.bytes_of)
        return replace(self, on_device=min(self.dense, positions * row))

    @property
    def _sizes(self) -> tuple[int, int, int]:
        """Key-value heads, key size and value size as they are cached."""
        text = self.of.config.get_text_config(decoder=True)
        if self.of.is_latent:
            return 1, text.kv_lora_rank + text.qk_rope_head_dim, text.kv_lora_rank
        size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return getattr(text, "num_key_value_heads", None) or text.num_attention_heads, size, size


def trace(model: Any, workload: Workload) -> Traced:
    """Trace a decode step of `model`, prepared by passes on weights alone.

    Raises:
        EffpassError: it can't be counted.
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
