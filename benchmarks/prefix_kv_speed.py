"""Area `prefix_kv`, speed and memory: a decode step over caches of real sizes, filled with random keys.

Nothing of that depends on what the keys are. The shares of the layers have the shape that the paper learned for a 7B
model. The bound reads all weights and all kept keys and values once.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.backend import _dtype, _free, _weight_bytes
from benchmarks.decode import _cache_bytes, _cudnn
from benchmarks.rows import Row, bandwidth, measure, measure_pair, row
from benchmarks.shapes import random_model
from effpass.backend import DecodeBackend
from effpass.runtime.attention import reading_cache
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.peers.uniform import Uniform
from effpass.runtime.prefix_kv.plan import Growth, Limits, Settings
from effpass.runtime.prefix_kv.policy import Policy
from effpass.runtime.prefix_kv.prefix import PrefixKV
from effpass.runtime.prefix_kv.session import BudgetSession
from effpass.runtime.session import Session

__all__ = ["KEPT", "decode", "operator", "prefill"]

AREA = "prefix_kv"
KEPT = 0.2


class _Shape(Policy):
    """Shares of the paper's shape: most in the first layers, least in the later ones, more in the last."""

    def shares(self, ratio: float, layers: int) -> Sequence[float]:
        middle = [0.25 - 0.23 * i / max(1, layers - 4) for i in range(layers - 3)]
        return [0.72, 0.57, *middle, 0.47][-layers:]


def _filled(model: Any, rows: int, length: int, new: int, budget: float, device: str) -> Session:
    """A session that holds `length` tokens of `rows` sequences, of random keys."""
    settings = Settings(_Shape() if budget < 1 else Uniform(), Budget(ratio=budget))
    backend = DecodeBackend() if device == "cuda" else None
    session = BudgetSession(model, rows, length + new, backend, settings)
    session.begin(rows)
    layers = len(session.full)
    limits = Limits.of(settings, length, rows, [length] * layers, 0, session.token_bytes)
    counts = limits.counts(settings, settings.policy.shares(budget, layers) or [])
    session.growth = Growth.of(settings, counts, limits, rows, session.token_bytes)
    config = model.config
    heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for index, count, growth in zip(session.full, counts, session.growth, strict=True):
        layer = session._kept(index)
        capacity = min(session.capacity, growth.at(session.capacity) + settings.every)
        one = torch.randn(1, heads, 1, size, device=device, dtype=model.dtype)
        layer.fit(max(capacity, count), one, one)
        for stored in layer.storage():
            stored.normal_()
        layer.slots.positions[:, :count] = torch.linspace(0, length - 1, count, device=device).int()
        layer.slots.filled.fill_(count)
        layer.slots.length, layer.slots.seen, layer.slots.is_dense = count, length, budget == 1
    session.length = session._settled_at = length
    session._lengths = [length] * rows
    session._position.fill_(length - 1)
    session._index.fill_(length - 1)
    session.tokens.fill_(5)
    session.logits = torch.zeros(rows, config.vocab_size, device=device, dtype=model.dtype)
    return session


def _used(device: str) -> tuple[float, float]:
    """GB in use: by the allocator, and as nvidia-smi says."""
    if device != "cuda":
        return math.nan, math.nan
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", "0"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    told = float(done.stdout) * 2**20 / 1e9 if done.returncode == 0 else math.nan
    return torch.cuda.memory_allocated() / 1e9, told


def decode(device: str, smoke: bool) -> Iterator[Row]:
    """A decode step over long caches: the whole, and 20 % kept."""
    on_gpu = device == "cuda" and not smoke
    shape, cases = ("llama-3.1-8b", ((131072, 1), (8192, 32), (4096, 16))) if on_gpu else ("tiny", ((512, 2),))
    model = random_model(shape, device, _dtype(device), max_position_embeddings=1 << 18)
    steps = 192 if on_gpu else 8
    for length, rows in cases:
        found = []
        for budget in (1.0, KEPT):
            before = _used(device)
            with torch.no_grad(), reading_cache(model):
                session = _filled(model, rows, length, 4 * steps + 64, budget, device)
                after = _used(device)
                session.step()
                timing = measure(lambda s=session: [s.step() for _ in range(steps)], device, warmup=1, runs=2)
                kept = sum(g.count for g in session.growth) / len(session.growth)
            found.append((timing.median / steps, kept, after[0] - before[0], after[1] - before[1]))
            del session
            _free(device)
        (whole, _, whole_bytes, whole_told), (ours, kept, our_bytes, our_told) = found
        read = [_weight_bytes(model) + rows * _cache_bytes(model, int(n)) for n in (length + steps, kept)]
        allowed = read[0] / read[1]
        case = f"{shape}, {_dtype(device)}, {length} tokens x {rows}".replace("torch.", "")
        yield row(
            AREA, case, f"decode step, {KEPT:.0%} kept", ours * 1e3, "ms", device=device, peer=whole * 1e3,
            peer_name="the whole cache, same engine", bound=read[1] / bandwidth(device) * 1e3, runs=2,
            note=f"speed-up {whole / ours:.2f}, the bound allows {allowed:.2f}: {whole / ours / allowed:.0%} of it;"
            " rounds of giving up slots included",
        )  # fmt: skip
        if on_gpu:
            for name, mine, theirs in (("allocator", our_bytes, whole_bytes), ("nvidia-smi", our_told, whole_told)):
                if math.isnan(theirs):
                    continue
                yield row(
                    AREA, case, f"resident keys and values, {KEPT:.0%} kept ({name})", mine, "GB", device=device,
                    peer=theirs, peer_name="the whole cache", bound=KEPT * theirs,
                    note=f"{mine / theirs:.1%} of the whole; room for {4 * steps + 64} more tokens in both",
                )  # fmt: skip


def prefill(device: str, smoke: bool) -> Iterator[Row]:
    """Time and peak memory of a prompt: the whole cache, a profile (layer by layer), and searched (all layers)."""
    on_gpu = device == "cuda" and not smoke
    shape, length = ("llama-3.1-8b", 32768) if on_gpu else ("tiny", 256)
    model = random_model(shape, device, _dtype(device), max_position_embeddings=1 << 16)
    ids = torch.randint(5, model.config.vocab_size, (1, length), device=device)
    kinds: dict[str, tuple[Policy | None, float]] = {
        "the whole cache": (None, 1.0),
        "profile": (_Shape(), KEPT),
        "searched": (PrefixKV(), KEPT),
        "profile, last 256 asked": (_asking_last(), KEPT),
    }
    peers: tuple[float, float] | None = None
    for name, (policy, budget) in kinds.items():
        with torch.no_grad(), reading_cache(model):
            before = _used(device)[0]

            def run(policy: Policy | None = policy, budget: float = budget) -> Session:
                session = (
                    Session(model, 1, length + 64, None)
                    if policy is None
                    else BudgetSession(model, 1, length + 64, None, Settings(policy, Budget(ratio=budget)))
                )
                session.begin(1)
                session.prefill(ids, None, length)
                return session

            run()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            timing = measure(run, device, warmup=0, runs=2)
            peak = torch.cuda.max_memory_allocated() / 1e9 - before if device == "cuda" else math.nan
        case = f"{shape}, prompt of {length}, {name}"
        yield row(AREA, case, "prompt", timing.median * 1e3, "ms", device=device, runs=2,
                  peer=peers and peers[0] * 1e3, peer_name="the whole cache")  # fmt: skip
        if device == "cuda":
            yield row(
                AREA, case, "peak beside the weights", peak, "GB", device=device, peer=peers and peers[1],
                peer_name="the whole cache",
                note=f"keys and values of the whole prompt are {_cache_bytes(model, length) / 1e9:.2f} GB",
            )  # fmt: skip
        peers = peers or (timing.median, peak)
        _free(device)


def _asking_last() -> Policy:
    policy = _Shape()
    policy.importance = "window"
    return policy


def operator(device: str, smoke: bool) -> Iterator[Row]:
    """The sums of attention that rank a prompt's tokens, beside the prompt's own attention."""
    for length in (8192, 32768) if device == "cuda" and not smoke else (128,):
        q, k = (torch.randn(1, n, length, 128, device=device, dtype=_dtype(device)) for n in (32, 8))
        positions = torch.arange(length, dtype=torch.int32, device=device)[None]
        filled = torch.full((1,), length, dtype=torch.int32, device=device)
        for name, last in (("all tokens asked", length), ("last 256 asked", min(256, length))):
            of_queries = positions[:, -last:].contiguous()

            def ours(
                q: Tensor = q[:, :, -last:], k: Tensor = k, p: Tensor = positions, of: Tensor = of_queries
            ) -> Tensor:
                return torch.ops.effpass.received_attention(q, k, p, of, 0.088, 0.0)

            def peer(q: Tensor = q, k: Tensor = k, p: Tensor = positions, filled: Tensor = filled) -> Tensor:
                if q.is_cuda:
                    return _cudnn(q, k, k)
                return torch.ops.effpass.cached_attention(q, k, k, p, p, filled, 0.088, 0, 0.0)

            a, b = measure_pair(ours, peer, device, warmup=2, runs=5)
            flops = 2 * 2 * 32 * 128 * last * (length - last / 2)
            yield row(
                AREA, f"32 / 8 heads of 128, {_dtype(device)}, {length} tokens".replace("torch.", ""),
                f"received_attention, {name}", a.median * 1e3, "ms", device=device, peer=b.median * 1e3,
                peer_name="SDPA cuDNN, causal" if device == "cuda" else "cached_attention", runs=5,
                note=f"{flops / a.median / 1e12:.0f} TFLOP/s of the scores that are seen, computed twice",
            )  # fmt: skip
