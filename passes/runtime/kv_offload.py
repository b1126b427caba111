"""`kv_offload`: keep keys and values in host memory, and the blocks that sparse attention reads on the device.

The pass requires `sparse_attention` before it in the recipe. That pass attends to a few thousand keys per decode step
and chooses them with an index that remains on the device. Blocks that a step has read are copied to a pool on the
device while the step continues; a key whose block is not in the pool is read over the bus by the attention kernel
(:mod:`effpass.lowering.ops.block_pool`). AsyncTLS (https://arxiv.org/abs/2604.07815) also keeps a pool of blocks, but
chooses tokens only in the blocks of the previous step, so that no block is ever missing. Since missing keys can be read
over the bus, this restriction is unnecessary here, and results are bitwise equal to those of `sparse_attention` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from effpass.core.errors import ModelError, PassRefusedError
from effpass.core.model import inner_model
from effpass.core.pass_ import Pass, RuntimePass
from effpass.core.report import Refusal
from effpass.lowering.ops.two_level_attention_index import Selection
from effpass.passes.runtime.sparse_attention import SparseAttention
from effpass.runtime.attach import engine_of
from effpass.runtime.cache import full_layers
from effpass.runtime.host_memory import HostMemory
from effpass.runtime.kv_offload import Offload, OffloadCounters
from effpass.runtime.prefix_kv.budget import parse_bytes
from effpass.runtime.sparse_attention import SparseSettings

__all__ = ["KVOffload", "KVOffloadOptions", "counters"]

_POOL = 3  # default size of the pool, as a multiple of the blocks that a step chooses


@dataclass(frozen=True)
class KVOffloadOptions:
    """Options of `kv_offload`.

    Attributes:
        host_memory: size limit of all caches in host memory, such as `"64 GiB"`; None for nine tenths of the available
            memory.
        pool: number of blocks of each KV head on the device; None for three times the number that a step chooses.
        prefetch: maximum number of blocks of a KV head that a step copies for later steps; 0 to copy none.
    """

    host_memory: str | None = None
    pool: int | None = None
    prefetch: int = 16

    def __post_init__(self) -> None:
        if self.host_memory is not None:
            parse_bytes("host_memory", self.host_memory)
        if self.pool is not None and self.pool < 2:
            raise ValueError(f"pool: got {self.pool}, expected blocks, 2 or more")
        if self.prefetch < 0:
            raise ValueError(f"prefetch: got {self.prefetch}, expected blocks, 0 or more")

    def pages(self, how: Selection) -> int:
        """Return the number of blocks of each KV head on the device."""
        return _POOL * how.kept_blocks if self.pool is None else self.pool


class KVOffload(RuntimePass):
    """Keeps keys and values in host memory, beside sparse attention."""

    name = "kv_offload"
    exact = True
    Options = KVOffloadOptions
    options: KVOffloadOptions

    def check_beside(self, before: Sequence[Pass], behind: Sequence[Pass]) -> None:
        sparse = next((pass_ for pass_ in before if isinstance(pass_, SparseAttention)), None)
        if sparse is None:
            raise PassRefusedError(
                "kv_offload needs sparse_attention before it in the recipe: dense attention reads every key at every"
                " step, and would wait for the bus each time",
                hint="passes: [{sparse_attention: {tokens: 2048}}, kv_offload]",
            )
        how = sparse.options.selection
        if how.levels == "tokens":
            raise PassRefusedError(
                "kv_offload moves blocks, and sparse_attention with levels: tokens chooses none",
                hint="leave levels at both, or take blocks",
            )
        wanted, pages = how.kept_blocks + 1, self.options.pages(how)
        if pages < wanted:
            raise PassRefusedError(
                f"pool: {pages} blocks, and a step wants {wanted}: the {how.kept_blocks} that sparse_attention chooses,"
                " and the next token's",
                hint=f"pool: {wanted} is the least, {_POOL * how.kept_blocks} the default; or choose fewer blocks",
            )

    def check_model(self, model: torch.nn.Module) -> None:
        if getattr(inner_model(model), "device", None) is None:
            raise ModelError(f"{type(inner_model(model)).__name__} is no transformers model that generates")

    def prepare(self, model: torch.nn.Module) -> tuple[int, list[Refusal]]:
        """Allocate the model's caches in host memory; hits are layers."""
        runs: Any = inner_model(model)
        full, others = full_layers(runs.config)
        on_device = [Refusal(f"layer {i}", f"{what}, and stays on the device") for i, what in others.items()]
        if not full:
            return 0, on_device
        settings, options = runs.effpass_reader, self.options
        assert isinstance(settings, SparseSettings)
        how, limit = settings.selection, options.host_memory
        memory = HostMemory(None if limit is None else parse_bytes("host_memory", limit))
        runs.effpass_offload = Offload(memory, how.block, how.kept_blocks, options.pages(how), options.prefetch)
        engine_of(runs).release()
        return len(full), on_device


def counters(model: Any) -> OffloadCounters:
    """Return how much the decode steps of the model have read and copied.

    Caches that the engine reuses for the next call accumulate their counts over calls.

    Raises:
        ModelError: the model was prepared without kv_offload.
    """
    offload = getattr(inner_model(model), "effpass_offload", None)
    if not isinstance(offload, Offload):
        raise ModelError("no cache is in host memory", hint="prepare the model with sparse_attention and kv_offload")
    return offload.counters()
