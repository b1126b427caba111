"""Area `kv_offload`: decode steps of models of real sizes, whose caches are filled with random numbers.

What a random model chooses says nothing about hits: every step runs the same token at the same position, so that
choices stay, and before every step a share of the pages is taken away, outside the time that is measured. The share is
what `hits` measured; all keys of such a block come through the bus, where in text few of them were chosen.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import effpass
from benchmarks.backend import _dtype, _free, _weight_bytes
from benchmarks.rows import Row, bandwidth, row
from benchmarks.shapes import random_model
from effpass import backend
from effpass.backend import DECODE_PASSES, DecodeBackend
from effpass.core.available_memory import available_memory
from effpass.core.errors import EffpassError
from effpass.lowering.ops.block_pool import COUNTED
from effpass.runtime.attention import reading_cache
from effpass.runtime.kv_offload import Offload, OffloadedCache
from effpass.runtime.session import Session
from effpass.runtime.sparse_cost import step_bytes

__all__ = ["SPARSE", "glm_48k", "glm_96k", "qwen3_48k", "qwen3_96k", "small_operators", "step", "throughput"]

AREA = "kv_offload"
RESULTS = Path(__file__).parent / "results" / "kv_offload.jsonl"
SPARE = 5_000_000_000  # bytes of the device that no cache takes: activations, graphs, workspaces
PROMPT = 32
TINY = {"tokens": 32, "blocks": 4, "block": 16, "recent": 1}


@cache
def _misses(times: float) -> float:
    """The share of blocks that is not in a pool of `times` what a step chooses: the worst of the committed rows."""
    found = [0.01]
    if RESULTS.exists():
        rows = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
        wanted = f"blocks found in a pool of {times:g} times a step's"
        found += [1 - r["ours"] / 100 for r in rows if r["metric"] == wanted]
    return max(found)


# -- sessions ---------------------------------------------------------------------------------------------------------


def _model(shape: str, device: str, options: dict[str, Any], **overrides: Any) -> Any:
    """Prepared: sparse, over keys in host memory."""
    model = random_model(shape, device, _dtype(device), max_position_embeddings=1 << 18, **overrides)
    passes = [{"sparse_attention": {"dense_below": 1, **options}}, "kv_offload"]
    return effpass.prepare(model, {"version": 1, "passes": passes})


@contextmanager
def _only(model: Any, *kept: str) -> Iterator[None]:
    """Inside, sessions of `model` are made without what the passes put beside it, but for `kept`."""
    taken = {n: getattr(model, n) for n in ("effpass_reader", "effpass_offload") if n not in kept and hasattr(model, n)}
    for name in taken:
        delattr(model, name)
    try:
        yield
    finally:
        for name, value in taken.items():
            setattr(model, name, value)


def _filled(model: Any, rows: int, length: int, device: str) -> Session:
    """A session that holds `length` tokens of `rows` sequences, and runs one token at one position again and again."""
    backend = model.effpass_engine.backend if device == "cuda" else None
    session = Session(model, rows, length + 256, backend)
    session.begin(rows)
    session.prefill(torch.randint(5, model.config.vocab_size, (rows, PROMPT), device=device), None, 1 << 15)
    noise: Tensor | None = None
    for index in range(len(session.cache)):
        layer = session.cache.buffers(index)
        slab = getattr(layer, "slab", None)
        if slab is None:
            for stored in (layer.keys, layer.values):
                stored.normal_()
            continue
        host = slab.tensor.flatten(2, 3)
        if noise is None or noise.shape != host.shape[2:]:
            noise = torch.randn(host.shape[2:], dtype=host.dtype, device=device)
        for row_of in host.unbind(0):
            for head in row_of.unbind(0):
                head.copy_(noise, non_blocking=True)
        layer.pool.forget()
    slots = session.cache.slots
    slots.positions[:, :length] = torch.arange(length, device=device)
    slots.filled.fill_(length)
    slots.length = slots.seen = session.length = length
    session.cache.changed()
    session._position.fill_(length - 1)
    session._index.fill_(length - 1)
    session._moves.zero_()
    session.tokens.fill_(5)
    session.step()  # compiles and records
    return session


def _take_away(cache: OffloadedCache, share: float) -> None:
    """A share of the pages, of every layer and head."""
    for pool in cache.pools():
        gone = (torch.rand(pool.owner.shape, device=pool.owner.device) < share) & (pool.owner >= 0)
        blocks = pool.block_table.shape[2]
        marked = torch.zeros((*gone.shape[:2], blocks + 1), dtype=torch.bool, device=gone.device)
        marked.scatter_(2, torch.where(gone, pool.owner, blocks).long(), True)
        pool.block_table.masked_fill_(marked[..., :blocks], -1)
        pool.owner.masked_fill_(gone, -1)
        pool.age.masked_fill_(gone, -1)


def _seconds(session: Session, share: float, steps: int, device: str) -> tuple[float, str]:
    """Median of a step, and what its pool did."""
    cache = session.cache
    offloaded = isinstance(cache, OffloadedCache)
    times = []
    for at in range(steps + 12):
        if at == 12 and isinstance(cache, OffloadedCache):  # the pool is full
            for pool in cache.pools():
                pool.counts.zero_()
            cache.times.zero_()
        if isinstance(cache, OffloadedCache) and at >= 10:
            _take_away(cache, share)
        if device == "cuda":
            torch.cuda._sleep(4_000_000)  # the host is ahead when the step begins
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            session.step()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            started = time.perf_counter()
            session.step()
            times.append(time.perf_counter() - started)
    if not offloaded:
        return median(times[12:]), ""
    assert isinstance(cache, OffloadedCache)
    counts = torch.stack([pool.counts.sum((0, 1)) for pool in cache.pools()]).sum(0).tolist()
    found = dict(zip(COUNTED, counts, strict=True))
    of_block = cache.pools()[0].pages[:1].nbytes
    block = cache.pools()[0].host.shape[3]
    note = (
        f"{found['missing_blocks'] / max(1, found['blocks']):.2%} of the blocks missing;"
        f" {found['missing_tokens'] * of_block / block / steps / 1e6:.1f} MB a step read through the bus and"
        f" {found['copied'] * of_block / steps / 1e6:.1f} MB copied; {int(cache.times[2]) / steps / 1e3:.0f} us waited"
    )
    return median(times[12:]), note


# -- cases ------------------------------------------------------------------------------------------------------------


def step(device: str, smoke: bool) -> Iterator[Row]:
    """A step over keys in host memory against all on the device, at measured miss rates; some of the layers."""
    small = smoke or device == "cpu"
    shapes = [("tiny-qwen3", 512, {})] if small else [("qwen3-8b", 98304, {"num_hidden_layers": 9})]
    for shape, length, overrides in shapes:
        model = _model(shape, device, TINY if small else {}, **overrides)
        offload: Offload = model.effpass_offload
        for rows in (1,) if small else (1, 4):
            case = f"{shape}, {model.config.num_hidden_layers} layers, {length} tokens x {rows}"
            with torch.no_grad(), reading_cache(model):
                with _only(model, "effpass_reader"):
                    session = _filled(model, rows, length, device)
                resident, _ = _seconds(session, 0, 4 if small else 24, device)
                del session
                _free(device)
                for times in (1.5, 2.0, 3.0, 4.0):
                    offload.pages, share = int(times * offload.most), _misses(times)
                    session = _filled(model, rows, length, device)
                    ours, note = _seconds(session, share, 4 if small else 24, device)
                    del session
                    _free(device)
                    yield row(
                        AREA, case, f"decode step, a pool of {times:g} times what it chooses", ours * 1e3, "ms",
                        device=device, peer=resident * 1e3, peer_name="all keys on the device, sparse", runs=24,
                        note=f"{share:.2%} of the pages taken away before each step; {note}",
                    )  # fmt: skip
        del model
        _free(device)


@dataclass(frozen=True)
class _Kind:
    """One way to decode: what rows call it, what the session keeps of the passes, and batches that are tried."""

    name: str
    kept: tuple[str, ...]
    batches: str

    @property
    def is_sparse(self) -> bool:
        return bool(self.kept)

    @property
    def is_offloaded(self) -> bool:
        return len(self.kept) == 2


FULL = _Kind("full attention, all on the device", (), "1,4,largest")
SPARSE = _Kind("sparse, all on the device", ("effpass_reader",), "1,4")
HOST = _Kind("sparse, keys and values in host memory", ("effpass_reader", "effpass_offload"), "1,4,largest")


def _widths(config: Any) -> tuple[int, int, int, int]:
    """Key-value heads as cached, key size, value size, and numbers of a token and head."""
    latent = getattr(config, "kv_lora_rank", None)
    if latent:
        return 1, latent + config.qk_rope_head_dim, latent, latent + config.qk_rope_head_dim
    return config.num_key_value_heads, config.head_dim, config.head_dim, 2 * config.head_dim


def _host_memory() -> tuple[int | None, str]:
    """Bytes of host memory that keys and values may take, and their name: EFFPASS_HOST_MEMORY (GB), or most of it."""
    if given := os.environ.get("EFFPASS_HOST_MEMORY"):
        return int(float(given) * 1e9), f"{given} GB of host memory"
    found = available_memory()
    return None if found is None else int(0.85 * found), "host memory"


def _device_memory() -> tuple[int, str]:
    """Bytes of the device that are left for caches, and what bounds them: EFFPASS_DEVICE_MEMORY (GB), or all of it."""
    free = torch.cuda.mem_get_info()[0] - SPARE
    if given := os.environ.get("EFFPASS_DEVICE_MEMORY"):
        return min(free, int(float(given) * 1e9) - torch.cuda.memory_reserved() - SPARE), f"{given} GB of the device"
    return free, "device memory"


def _largest(model: Any, length: int, kind: _Kind) -> tuple[int, str]:
    """The largest batch that fits, and what bounds it."""
    groups, key_size, _, width = _widths(model.config)
    offload: Offload = model.effpass_offload
    heads = model.config.num_hidden_layers * groups
    (free, name), of_all = _device_memory(), heads * width * 2 * (length + 256)
    # Two statistics of a block, a label of all channels at four bits with its range, and scores of the block.
    index = heads * (key_size * 2 * 2 / offload.block + key_size / 2 + 4 + 12 / offload.block) * length
    if not kind.is_offloaded:
        return int(free // (of_all + index * kind.is_sparse)), name
    by_device = int(free // (heads * width * 2 * offload.block * offload.pages + index))
    host, name_of_host = _host_memory()
    by_host = by_device if host is None else host // of_all
    return min(by_host, by_device), name_of_host if by_host < by_device else name


def _bound(model: Any, rows: int, length: int, kind: _Kind, device: str) -> float:
    """Seconds in which all that a step must read is read; of experts those that so many tokens need, in the mean."""
    config = model.config
    weights = _weight_bytes(model)
    experts = getattr(config, "n_routed_experts", None)
    if experts:
        of_experts = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if ".mlp.experts." in n)
        weights -= int(of_experts * (1 - config.num_experts_per_tok / experts) ** rows)
    groups, key_size, value_size, _ = _widths(config)
    read = step_bytes(
        model.effpass_reader.selection, length, groups, key_size, value_size, key_size, _dtype(device).itemsize,
        groups == 1,
    )  # fmt: skip
    return (weights + rows * config.num_hidden_layers * read[kind.is_sparse]) / bandwidth(device)


@dataclass(frozen=True)
class _Run:
    """A batch that was decoded: tokens a second, what the bound allows, and what is to be told."""

    rate: float
    bound: float
    note: str
    bounded: str


def _runs(model: Any, kind: _Kind, length: int, share: float, device: str, small: bool) -> Iterator[tuple[int, _Run]]:
    """Each batch, as soon as it is measured."""
    largest, bounded = (2, "smoke") if small else _largest(model, length, kind)
    given = os.environ.get("EFFPASS_BATCHES", kind.batches).split(",")
    batches = {largest if b == "largest" else int(b) for b in given}
    for rows in sorted(b for b in batches if 0 < b <= largest):
        bound = rows / _bound(model, rows, length, kind, device)
        with torch.no_grad(), reading_cache(model), _only(model, *kind.kept):
            session: Session | None = None
            try:
                session = _filled(model, rows, length, device)
                seconds, note = _seconds(session, share, 4 if small else 16, device)
            except (torch.OutOfMemoryError, EffpassError) as error:
                print(f"{kind.name}, batch {rows}: {str(error).splitlines()[0]}")
                continue
            finally:
                session = None
                _free(device)
        told = f"a step {seconds * 1e3:.2f} ms, {rows / seconds / bound:.0%} of the bound"
        if kind.is_offloaded:
            told += f"; {share:.2%} of the pages taken away before each step; {note}"
        yield rows, _Run(rows / seconds, bound, told, bounded if rows == largest else "")


def throughput(area: str, shape: str, length: int, kinds: Sequence[_Kind], device: str, smoke: bool) -> Iterator[Row]:
    """Tokens a second of all sequences in each of `kinds`, against full attention at the same and the largest batch."""
    small = smoke or device == "cpu"
    if small:
        shape, length = f"tiny-{shape.partition('-')[0]}", 512
    model = _model(shape, device, TINY if small else {})
    full: dict[int, _Run] = {}
    for kind in (FULL, *kinds):
        for rows, run in _runs(model, kind, length, _misses(3.0), device, small):
            if kind is FULL:
                full[rows] = run
            case = f"{shape}, {length} tokens x {rows}" + (f" (the most: {run.bounded})" if run.bounded else "")
            against = {"": rows} if kind is not FULL and rows in full else {}
            if kind is not FULL and run.bounded and full:
                against[", the most against the most"] = max(full)
            for what, batch in (against or {"": None}).items():
                peer = None if batch is None else full[batch]
                gain = "" if peer is None else f"; the bounds allow {run.bound / peer.bound:.2f} times full attention"
                yield row(
                    area, case, f"{kind.name}{what}", run.rate, "tokens/s", device=device, peer=peer and peer.rate,
                    peer_name="" if peer is None else f"full attention, batch {batch}", lower_is_better=False,
                    bound=run.bound, runs=16, note=run.note + gain,
                )  # fmt: skip


# What the decode engine does with the small operators of a step: its inner backend, and whether routers are fused.
SMALL_OPERATORS = {
    "as they are": ("eager", False),
    "routers fused": ("eager", True),
    "compiled": ("effpass_regions", False),
    "routers fused, the others compiled": ("effpass_regions", True),
}


def small_operators(device: str, smoke: bool) -> Iterator[Row]:
    """Steps of seven layers of GLM-4.7-Flash's shape, full and sparse, by what is done with their small operators."""
    small = smoke or device == "cpu"
    shape = "tiny-glm" if small else "glm-4.7-flash"
    model = _model(shape, device, TINY if small else {}, **({} if small else {"num_hidden_layers": 7}))
    usual: DecodeBackend = model.effpass_engine.backend
    for rows, length in ((1, 512),) if small else ((1, 49152), (4, 98304)):
        for kind in (FULL, SPARSE):
            before: float | None = None
            for name, (inner, fused) in SMALL_OPERATORS.items():
                passes = tuple(p for p in DECODE_PASSES if fused or p != "fuse_routing")
                model.effpass_engine.backend = replace(usual, inner=inner)
                with (
                    patch.object(backend, "DECODE_PASSES", passes), torch.no_grad(), reading_cache(model),
                    _only(model, *kind.kept),
                ):  # fmt: skip
                    session = _filled(model, rows, length, device)
                    seconds, _ = _seconds(session, 0, 4 if small else 24, device)
                    del session
                    _free(device)
                yield row(
                    "sparse_attention", f"{shape}, {model.config.num_hidden_layers} layers, {length} tokens x {rows}",
                    f"{kind.name}, small operators {name}", seconds * 1e6, "us", device=device, peer=before,
                    peer_name="" if before is None else "as they are", runs=24,
                )  # fmt: skip
                before = before or seconds * 1e6
                torch._dynamo.reset()


def qwen3_48k(device: str, smoke: bool) -> Iterator[Row]:
    """Qwen3-8B's shape at 48k."""
    yield from throughput(AREA, "qwen3-8b", 49152, [HOST], device, smoke)


def qwen3_96k(device: str, smoke: bool) -> Iterator[Row]:
    """Qwen3-8B's shape at 96k."""
    yield from throughput(AREA, "qwen3-8b", 98304, [HOST], device, smoke)


def glm_48k(device: str, smoke: bool) -> Iterator[Row]:
    """GLM-4.7-Flash's shape at 48k."""
    yield from throughput(AREA, "glm-4.7-flash", 49152, [HOST], device, smoke)


def glm_96k(device: str, smoke: bool) -> Iterator[Row]:
    """GLM-4.7-Flash's shape at 96k."""
    yield from throughput(AREA, "glm-4.7-flash", 98304, [HOST], device, smoke)
