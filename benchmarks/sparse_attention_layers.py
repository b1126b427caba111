"""Layers' full caches, and steps of attention over them, for the area `sparse_attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rows import measure
from effpass.lowering.ops import cached_attention  # noqa: F401  (registers the operator)
from effpass.lowering.ops.two_level_attention import attend
from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection
from effpass.runtime.sparse_cost import step_bytes

__all__ = ["GQA", "MLA", "TINY", "Layers", "Shape"]


@dataclass(frozen=True)
class Shape:
    """Attention of one layer: H query heads, G key-value heads, K key size, V value size, C channels of a label."""

    name: str
    heads: int
    groups: int
    key_size: int
    value_size: int
    channels: int

    @property
    def is_latent(self) -> bool:
        return self.value_size < self.key_size

    def bytes(self, how: Selection, length: int, element: int) -> tuple[int, int]:
        """Read in a step of one sequence, dense and sparse."""
        return step_bytes(
            how, length, self.groups, self.key_size, self.value_size, self.channels, element, self.is_latent
        )


GQA = Shape("GQA 32/8 x 128", 32, 8, 128, 128, 32)
MLA = Shape("MLA 20 x 512 + 64", 20, 1, 576, 512, 128)
TINY = {GQA: Shape("GQA 4/2 x 32", 4, 2, 32, 32, 32), MLA: Shape("MLA 4 x 32 + 16", 4, 1, 48, 32, 32)}


class Layers:
    """Full caches of some layers, together larger than what the device keeps of them."""

    def __init__(self, shape: Shape, batch: int, length: int, device: str) -> None:
        self.shape, self.batch, self.length, self.device = shape, batch, length, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        dense, sparse = shape.bytes(Selection(), length, 2)
        count = (
            1
            if device == "cpu"
            else max(2, min(16, 200_000_000 // (sparse * batch), 20_000_000_000 // (dense * batch)))
        )
        self.caches, self.queries = [], []
        for _ in range(count):
            keys = self._some(batch, shape.groups, length, shape.key_size)
            values = keys[..., : shape.value_size] if shape.is_latent else self._some(*keys.shape[:3], shape.value_size)
            self.caches.append((keys, values))
            self.queries.append(self._some(batch, shape.heads, 1, shape.key_size))
        self.positions = torch.arange(length, dtype=torch.int32, device=device).expand(batch, -1).contiguous()
        self.now = self.positions[:, -1:].contiguous()
        self.filled = torch.tensor([length], dtype=torch.int32, device=device)
        self.scale = shape.key_size**-0.5

    def _some(self, *sizes: int) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype)

    def indices(self, how: Selection) -> list[KeyIndex]:
        groups, size = self.shape.groups, self.shape.key_size
        channels = torch.stack([torch.randperm(size)[: self.shape.channels] for _ in range(groups)])
        channels = channels.to(self.device, torch.int32)
        found = []
        for keys, _ in self.caches:
            index = KeyIndex.empty(how, channels, self.batch, self.length, size, self.dtype)
            index.add(keys, self.positions, torch.zeros_like(self.filled), self.filled, self.length)
            found.append(index)
        return found

    def sparse(self, how: Selection) -> Callable[[], None]:
        indices = self.indices(how)

        def step() -> None:
            for index, query, (keys, values) in zip(indices, self.queries, self.caches, strict=True):
                attend(index, query, keys, values, self.positions, self.now, self.filled, self.scale)

        return step

    def dense(self) -> dict[str, Callable[[], None]]:
        """What attends to everything, by name."""

        def ours() -> None:
            for query, (keys, values) in zip(self.queries, self.caches, strict=True):
                torch.ops.effpass.cached_attention(
                    query, keys, values, self.positions, self.now, self.filled, self.scale, 0, 0.0
                )

        def sdpa(backend: SDPBackend) -> Callable[[], None]:
            def step() -> None:
                with sdpa_kernel([backend]):
                    for query, (keys, values) in zip(self.queries, self.caches, strict=True):
                        torch.nn.functional.scaled_dot_product_attention(
                            query, keys, values, scale=self.scale, enable_gqa=True
                        )

            return step

        if self.shape.is_latent:
            return {"absorbed dense, effpass": ours}
        found = {"effpass dense": ours}
        if self.device == "cuda":
            found["SDPA cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION)
            found["SDPA FlashAttention"] = sdpa(SDPBackend.FLASH_ATTENTION)
        return found

    def seconds(self, step: Callable[[], None], smoke: bool) -> float:
        """Of one layer."""
        if self.device == "cpu":
            return measure(step, "cpu", warmup=1, runs=1 if smoke else 5).median / len(self.caches)
        with torch.inference_mode():
            for _ in range(2):
                step()
            torch.cuda.synchronize()
            graph, repeats = torch.cuda.CUDAGraph(), 4
            with torch.cuda.graph(graph):
                for _ in range(repeats):
                    step()
        return measure(graph.replay, "cuda", warmup=2, runs=9).median / (repeats * len(self.caches))
