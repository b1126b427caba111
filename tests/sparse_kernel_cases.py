"""Kernels of sparse attention against brute force in float64: on a GPU, or, run as a program, without one.

`python sparse_kernel_cases.py interpret` computes float32 cases through Triton's interpreter; `python
sparse_kernel_cases.py compile` compiles kernels for a GPU that is not there. Both print JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from block_pool_cases import POOLS, TURNED, pool_errors, turned_errors
from kernel_cases import attention, error, rms_norm, rotate
from offline_kernels import compile_instead
from torch import Tensor
from triton_interpreter import set_up

from effpass.lowering.ops.block_pool import BlockPool
from effpass.lowering.ops.block_sparse_attention import BlockSelection, Spans, _selected
from effpass.lowering.ops.two_level_attention import TOLERANCE
from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection, gather_slots, parted

# -- brute force ------------------------------------------------------------------------------------------------------


def positions_of(lengths: list[int], slots: int, padding: int) -> Tensor:
    """Int32 [B, S]: rows of one physical length, of which each has its own number of tokens, padded on the left."""
    positions = torch.full((len(lengths), slots), -1, dtype=torch.int32)
    physical = max(lengths) + padding
    for row, length in enumerate(lengths):
        positions[row, physical - length : physical] = torch.arange(length)
    return positions


def in_pages(cached: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Keys or values [B, G, S, K] as pages [pages, block, K] in random order, and their table [B, G, N]."""
    batch, groups, slots, size = cached.shape
    blocks = -(-slots // block)
    whole = torch.nn.functional.pad(cached, (0, 0, 0, blocks * block - slots), value=float("nan"))
    generator = torch.Generator().manual_seed(slots)
    table = torch.randperm(batch * groups * blocks, generator=generator).view(batch, groups, blocks)
    pages = torch.empty(batch * groups * blocks, block, size, dtype=cached.dtype, device=cached.device)
    pages[table.flatten().to(cached.device)] = whole.reshape(-1, block, size)
    return pages, table.to(torch.int32).to(cached.device)


def some_in_pages(keys: Tensor, values: Tensor | None, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, G, S, K] (or latents) as host [B, G, N, block, W], pages of some blocks, and their table.

    Whatever must not be read is NaN: the host of a block with a page, and a page without a block.
    """
    rows = keys if values is None else torch.cat((keys, values), -1)
    pages, table = in_pages(rows, block)
    host = pages[table.long()]
    generator = torch.Generator().manual_seed(rows.shape[2])
    is_near = torch.rand(table.shape, generator=generator).to(table.device) < 0.5
    host[is_near] = float("nan")
    pages[table[~is_near].long()] = float("nan")
    return host, pages, torch.where(is_near, table, -1)


def valid_top(chosen: set[int], scores: dict[int, float], count: int, slack: float) -> int:
    """How many of `chosen` can't be among the `count` best, where scores may be wrong by `slack`; 0 is right."""
    wanted = min(count, len(scores))
    if len(chosen) != wanted or not chosen <= scores.keys():
        return max(1, abs(len(chosen) - wanted))
    if not wanted:
        return 0
    kth = sorted(scores.values(), reverse=True)[wanted - 1]
    below = sum(scores[i] < kth - slack for i in chosen)
    missed = sum(value > kth + slack for i, value in scores.items() if i not in chosen)
    return below + missed


def block_oracle(q: Tensor, k: Tensor, visible: Tensor, how: Selection) -> dict[int, float]:
    """Scores of the blocks of one row and head that hold a token, one by one, from the keys themselves."""
    scores, seen = {}, 0
    last = int(visible.nonzero()[-1]) // how.block if visible.any() else -1
    for n in range(last + 1):
        inside = torch.zeros_like(visible)
        inside[n * how.block : (n + 1) * how.block] = True
        inside &= visible
        if not inside.any():
            continue
        seen += 1
        members = k[inside].double()
        if how.statistic == "min_max":
            low, high = members.amin(0), members.amax(0)
            each = torch.maximum(q * low, q * high).sum(-1)
        else:
            each = q @ members.mean(0)
            if how.statistic == "mean_std":
                each = each + q.abs() @ members.std(0, correction=0)
        scores[n] = float(each.sum() if how.aggregation == "sum" else each.max())
        if seen <= how.sink or n > last - how.recent:
            scores[n] = float("inf")
    return scores


def token_oracle(q: Tensor, k: Tensor, slots: list[int], channels: Tensor, how: Selection) -> dict[int, float]:
    """Scores of tokens from their keys rounded to 16 levels, one by one."""
    scores = {}
    for slot in slots:
        key = k[slot, channels].double()
        step = float(((key.max() - key.min()).float() / 15).to(torch.float16))
        low = float(key.min().float().to(torch.float16))
        level = torch.floor((key - low) / (step or 1) + 0.5).clamp(0, 15)
        each = q[:, channels] @ (low + step * level)
        scores[slot] = float(each.sum() if how.aggregation == "sum" else each.max())
    return scores


# -- cases ------------------------------------------------------------------------------------------------------------


def step_errors(
    ops: Any, how: Selection, heads: int, groups: int, key_size: int, value_size: int, lengths: list[int], slots: int,
    channels: int, padding: int = 0, paged: bool = False, latent: bool = False, softcap: float = 0.0,
    hosted: bool = False, **of: Any,
) -> dict[str, float]:  # fmt: skip
    """Three steps after a prompt: output over the chosen tokens, and the chosen blocks and tokens by brute force."""
    torch.manual_seed(slots + key_size)
    device, batch, steps = of["device"], len(lengths), 3
    keys = torch.randn(batch, groups, slots, key_size, **of)
    keys += torch.randn(batch, groups, -(-slots // how.block), 1, key_size, **of).expand(
        -1, -1, -1, how.block, -1
    ).flatten(2, 3)[:, :, :slots]  # blocks differ  # fmt: skip
    values = keys[..., :value_size] if latent else torch.randn(batch, groups, slots, value_size, **of)
    positions = positions_of(lengths, slots, padding).to(device)
    filled = max(lengths) + padding
    keys[:, :, filled:], values[:, :, filled:] = float("nan"), float("nan")  # nobody may read them
    of_channels = torch.stack([torch.randperm(key_size)[:channels] for _ in range(groups)]).to(device, torch.int32)
    index = KeyIndex.empty(how, of_channels, batch, slots, key_size, of["dtype"])
    table, host, store_k, store_v = None, None, keys, values
    if hosted:
        host, pages, table = some_in_pages(keys, None if latent else values, how.block)
        store_k, store_v = parted(pages, key_size, value_size)
    elif paged:
        store_k, table = in_pages(keys, how.block)
        store_v = store_k[..., :value_size] if latent else in_pages(values, how.block)[0]

    def number(value: int) -> Tensor:
        return torch.tensor([value], dtype=torch.int32, device=device)

    # `ops` are the operators, or the kernels' modules.
    index_keys = ops.index_keys if hasattr(ops, "index_keys") else _kernels("key_index").index_keys
    # The prompt goes in as two calls, of which the second begins inside a block.
    before, first = filled - steps, (filled - steps) // 2 + 1
    for start, stop in ((0, first), (first, before)):
        there = torch.where(torch.arange(slots, device=device) < stop, positions, -1)
        index_keys(
            *((keys, None) if hosted else (store_k, table)), there, number(start), number(stop), stop - start,
            index.channels, index.statistics, index.seen, index.labels, index.ranges, how.block, how.statistic,
        )  # fmt: skip
    found = {"attention": 0.0, "blocks": 0.0, "tokens": 0.0, "order": 0.0}
    slack = 1e-3 if of["dtype"] == torch.float32 else 0.15
    last_scores: list[dict[int, float]] = []
    for end in range(before + 1, filled + 1):
        query = torch.randn(batch, 1, heads, key_size, **of).transpose(1, 2)
        there = torch.where(torch.arange(slots, device=device) < end, positions, -1)
        now = there[:, end - 1 : end].contiguous()
        out = ops.two_level_attention(
            query, store_k, store_v, table, host, there, now, number(end), index.channels, index.statistics,
            index.seen, index.labels, index.ranges, index.scores, index.chosen_blocks, index.chosen_tokens,
            key_size**-0.5, softcap, how.block, how.sink, how.recent, how.statistic, how.aggregation, how.is_pipelined,
        )  # fmt: skip
        q = query[:, :, 0].double().view(batch, groups, heads // groups, key_size)
        attended = torch.full((batch, groups, slots), -1, dtype=torch.int32, device=device)
        these = []
        for b in range(batch):
            visible = (there[b] >= 0) & (there[b] <= now[b])
            for g in range(groups):
                slots_of = visible.nonzero().flatten().tolist()
                if how.levels != "tokens":
                    scores = block_oracle(q[b, g], keys[b, g], visible, how)
                    these.append(scores)
                    got = [n for n in index.chosen_blocks[b, g].tolist() if n >= 0]
                    found["order"] += got != sorted(set(got))
                    if not how.is_pipelined:
                        found["blocks"] += valid_top(set(got), scores, how.kept_blocks, slack)
                    elif last_scores:
                        used = {**dict.fromkeys(scores, float("inf")), **last_scores[b * groups + g]}
                        forced = {n: value for n, value in scores.items() if value == float("inf")}
                        found["blocks"] += valid_top(set(got), {**used, **forced}, how.kept_blocks, slack)
                    slots_of = [s for s in slots_of if s // how.block in got]
                if how.levels != "blocks":
                    scores = token_oracle(q[b, g], keys[b, g], slots_of, index.channels[g].long(), how)
                    got = [s for s in index.chosen_tokens[b, g].tolist() if s >= 0]
                    found["order"] += got != sorted(set(got))
                    found["tokens"] += valid_top(set(got), scores, how.tokens, slack)
                    slots_of = got
                attended[b, g, : len(slots_of)] = torch.tensor(slots_of, dtype=torch.int32)
        # Attention by brute force over what was chosen.
        k, v = (gather_slots(x, None, attended, how.block) for x in (keys, values))
        for g in range(groups):
            of_keys = torch.where(attended[:, g] >= 0, 0, -1)
            heads_of = slice(g * heads // groups, (g + 1) * heads // groups)
            expected = attention(
                query[:, heads_of], k[:, g : g + 1], v[:, g : g + 1], of_keys, torch.zeros_like(now), key_size**-0.5,
                0, softcap,
            )  # fmt: skip
            expected[(now < 0)[:, 0]] = 0
            found["attention"] = max(found["attention"], error(out[:, :, heads_of], expected))
        last_scores = these
    return found


def latent_errors(
    kernels: Any, batch: int, heads: int, slots: int, key_size: int, value_size: int, filled: int, padding: int,
    **of: Any,
) -> dict[str, float]:  # fmt: skip
    """Errors of dense `cached_attention` over latents; behind `filled` stands NaN."""
    torch.manual_seed(slots)
    latents = torch.randn(batch, 1, slots, key_size, **of)
    latents[:, :, filled:] = float("nan")
    values = latents[..., :value_size]
    positions = positions_of([filled - padding] + [filled] * (batch - 1), slots, 0).to(of["device"])
    query = torch.randn(batch, 1, heads, key_size, **of).transpose(1, 2)
    now = positions[:, filled - 1 : filled].contiguous()
    end = torch.tensor([filled], dtype=torch.int32, device=of["device"])
    got = kernels.cached_attention(query, latents, values, positions, now, end, key_size**-0.5, 0, 0.0)
    known = latents.nan_to_num()
    expected = attention(query, known, known[..., :value_size], positions, now, key_size**-0.5, 0, 0.0)
    return {"attention": error(got, expected)}


def prompt_errors(
    kernels: Any, how: BlockSelection, B: int, H: int, G: int, T: int, S: int, K: int, V: int, filled: int,
    padding: int, softcap: float, **of: Any,
) -> dict[str, float]:  # fmt: skip
    """Lists that differ from those of a loop over blocks, and attention over the lists by brute force."""
    torch.manual_seed(S + T)
    device = of["device"]
    query = torch.randn(B, T, H, K, **of).transpose(1, 2)
    # Of a cache that is longer than what is read.
    keys, values = (torch.randn(B, G, S + 48, size, **of)[:, :, :S] for size in (K, V))
    keys[:, :, filled:], values[:, :, filled:] = 0, 0
    positions = positions_of([filled - padding] + [filled] * (B - 1), S, 0).to(device)
    now = positions[:, filled - T : filled].contiguous()
    found, places = {"lists": 0.0}, how.places(S)
    spans = Spans.of(positions, now, how.block_q, how.block_k)
    tiles = spans.earliest.shape[1]
    w = torch.rand(B, G, tiles, spans.low.shape[1], device=device)
    seen = (spans.high >= 0)[:, None] & (spans.low[:, None] <= spans.latest[:, :, None])
    w = w.masked_fill(~seen[:, None], -1)
    module = _kernels("block_sparse_attention") if device.type == "cuda" else kernels
    select = getattr(module, "selected", _selected)
    lists, counts = select(w, spans, 0, how.block_k, how.sink, how.recent, how.density, how.threshold, places)
    lists, counts = lists.cpu(), counts.cpu()
    attended = torch.full((B, G, T, S), -1, dtype=torch.int32)
    for b, g, t in ((b, g, t) for b in range(B) for g in range(G) for t in range(tiles)):
        expected = listed_blocks(w[b, g, t].cpu(), spans, b, t, how, places)
        whole, end = counts[b, g, t].tolist()
        got = lists[b, g, t, :end].tolist()
        found["lists"] += (got[:whole], got[whole:]) != expected
        slots = [s for n in got for s in range(n * how.block_k, min((n + 1) * how.block_k, S))]
        attended[b, g, t * how.block_q : (t + 1) * how.block_q, : len(slots)] = torch.tensor(slots, dtype=torch.int32)
    out = kernels.block_sparse_attention(
        query, keys, values, positions, now, lists.to(device), counts.to(device), K**-0.5, softcap, how.block_q,
        how.block_k,
    )  # fmt: skip
    worst = 0.0
    for g, t in ((g, t) for g in range(G) for t in range(T)):
        slots = attended[:, g, t].long().to(device)
        k, v = (x[:, g].gather(1, slots.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))[:, None]
                for x in (keys, values))  # fmt: skip
        of_keys = torch.where(slots >= 0, positions.gather(1, slots.clamp(min=0)), -1)
        heads_of = slice(g * H // G, (g + 1) * H // G)
        expected = attention(query[:, heads_of, t : t + 1], k, v, of_keys, now[:, t : t + 1], K**-0.5, 0, softcap)
        difference = out[:, t : t + 1, heads_of].double() - expected
        worst = max(worst, float(difference.abs().max()))
    return {**found, "attention": worst / float(out.abs().max())}


def listed_blocks(
    w: Tensor, spans: Spans, b: int, t: int, how: BlockSelection, places: int
) -> tuple[list[int], list[int]]:
    """Whole and other blocks of one tile's list, one by one."""
    high, least, earliest = spans.high[b].tolist(), spans.least[b].tolist(), int(spans.earliest[b, t])
    seen = [n for n in range(len(w)) if w[n] >= 0]
    forced = [n for i, n in enumerate(seen) if i < how.sink or high[n] >= earliest - how.recent * how.block_k]
    order = forced + sorted((n for n in seen if n not in forced), key=lambda n: -float(w[n]))
    if how.threshold:
        total, count, mass = sum(float(w[n]) for n in seen), 0, 0.0
        while count < len(order) and mass < how.threshold * total:
            mass, count = mass + float(w[order[count]]), count + 1
    else:
        count = -int(-torch.tensor(len(seen)).float() * how.density // 1)
    chosen = sorted(order[: min(max(count, len(forced)), places)])
    whole = [n for n in chosen if least[n] >= 0 and high[n] <= earliest]
    return whole, [n for n in chosen if n not in whole]


def rope_errors(
    kernels: Any,
    B: int,
    H: int,
    G: int,
    T: int,
    S: int,
    K: int,
    V: int,
    start: int,
    rotated: int,
    norm: bool,
    **of: Any,
) -> dict[str, float]:
    """Errors of `rope_cache_write`: of the query, and of the cache."""
    torch.manual_seed(S)
    projected = torch.randn(B, T, H * K + G * K + G * V, **of)
    query, key, value = projected.split([H * K, G * K, G * V], -1)
    query, key, value = query.view(B, T, H, K), key.view(B, T, G, K), value.view(B, T, G, V)
    keys, values = torch.randn(B, G, S, K, **of), torch.randn(B, G, S, V, **of)
    angles = torch.rand(1, T, rotated // 2, **of) * 6
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    query_norm, key_norm = (torch.randn(K, **of), torch.randn(K, **of)) if norm else (None, None)
    expected_keys, expected_values = keys.double(), values.double()
    expected_keys[:, :, start : start + T] = rotate(rms_norm(key, key_norm, 1e-6, 1.0), cos, sin).transpose(1, 2)
    expected_values[:, :, start : start + T] = value.double().transpose(1, 2)
    expected = rotate(rms_norm(query, query_norm, 1e-6, 1.0), cos, sin).transpose(1, 2)
    at = torch.tensor([start], dtype=torch.int32, device=of["device"])
    if not norm:
        expected = rotate(query, cos, sin).transpose(1, 2)
        expected_keys[:, :, start : start + T] = rotate(key, cos, sin).transpose(1, 2)
    got = kernels.rope_cache_write(
        query, key, value, cos, sin, query_norm, key_norm, 1e-6, 1.0, keys, values, at
    )  # fmt: skip
    return {
        "query": error(got, expected),
        "keys": error(keys, expected_keys),
        "values": error(values, expected_values),
    }


_SMALL = {"heads": 4, "groups": 2, "key_size": 32, "value_size": 32, "channels": 32}
STEPS: dict[str, tuple[Selection, dict[str, Any]]] = {
    "both": (
        Selection(tokens=24, blocks=6, block=16, recent=1),
        {**_SMALL, "lengths": [200, 131], "slots": 260, "padding": 3},
    ),
    "both, pages, max, mean and deviation": (
        Selection(tokens=40, blocks=5, block=16, recent=2, statistic="mean_std", aggregation="max"),
        {**_SMALL, "heads": 6, "value_size": 48, "lengths": [163, 70, 163], "slots": 170, "paged": True},
    ),
    "both, mean, softcap, one row of padding": (
        Selection(tokens=17, blocks=4, block=32, statistic="mean"),
        {**_SMALL, "key_size": 40, "value_size": 24, "lengths": [258, 0], "slots": 300, "softcap": 5.0},
    ),
    "both, first tokens, one head a group": (
        Selection(tokens=8, blocks=3, block=16, recent=1, aggregation="max"),
        {**_SMALL, "heads": 2, "key_size": 40, "value_size": 16, "lengths": [5, 1], "slots": 41},
    ),
    "both, pipelined": (
        Selection(tokens=24, blocks=6, block=16, recent=1, is_pipelined=True),
        {**_SMALL, "lengths": [197, 197], "slots": 260},
    ),
    "budget beyond the length": (
        Selection(tokens=256, blocks=16, block=16),
        {**_SMALL, "heads": 3, "groups": 1, "lengths": [143, 60], "slots": 256, "padding": 2},
    ),
    "both, several parts, read at once": (
        Selection(tokens=200, blocks=14, block=16),
        {**_SMALL, "heads": 1, "groups": 1, "lengths": [310], "slots": 310},
    ),
    "blocks": (
        Selection(tokens=96, block=16, levels="blocks"),
        {**_SMALL, "lengths": [250, 131], "slots": 260, "padding": 3},
    ),
    "blocks, pages": (
        Selection(tokens=64, block=16, levels="blocks", recent=1),
        {**_SMALL, "lengths": [163, 70], "slots": 170, "paged": True},
    ),
    "tokens": (Selection(tokens=48, levels="tokens"), {**_SMALL, "lengths": [250, 131], "slots": 260, "padding": 3}),
    "latents": (
        Selection(tokens=33, blocks=6, block=16, recent=1),
        {"heads": 10, "groups": 1, "key_size": 80, "value_size": 64, "channels": 32, "lengths": [200, 131],
         "slots": 260, "latent": True},
    ),
    "latents, pages": (
        Selection(tokens=64, blocks=6, block=16, recent=1),
        {"heads": 10, "groups": 1, "key_size": 48, "value_size": 32, "channels": 48, "lengths": [200],
         "slots": 208, "latent": True, "paged": True},
    ),
    "both, half of the blocks in host memory": (
        Selection(tokens=40, blocks=6, block=16, recent=1),
        {**_SMALL, "value_size": 48, "lengths": [200, 131], "slots": 230, "padding": 3, "hosted": True},
    ),
    "blocks, half of them in host memory": (
        Selection(tokens=96, block=16, levels="blocks"), {**_SMALL, "lengths": [163, 70], "slots": 170, "hosted": True},
    ),
    "latents, half of the blocks in host memory": (
        Selection(tokens=64, blocks=6, block=16, recent=1),
        {"heads": 10, "groups": 1, "key_size": 80, "value_size": 64, "channels": 32, "lengths": [200],
         "slots": 208, "latent": True, "hosted": True},
    ),
}  # fmt: skip
LATENTS = {
    "several parts": (1, 20, 700, 80, 64, 650, 0),
    "padding": (2, 5, 200, 48, 32, 131, 40),
    "first token": (1, 4, 64, 24, 16, 1, 0),
    "a row of padding, 40 heads": (3, 40, 150, 32, 16, 129, 129),
}

# selection, then B, H, G, T, S, K, V, filled, padding, softcap
PROMPTS = {
    "density": (BlockSelection(0.3, block_q=64, block_k=32, recent=1), 1, 4, 2, 200, 400, 32, 32, 390, 0, 0.0),
    "threshold, padding, softcap": (
        BlockSelection(threshold=0.7, block_q=64, block_k=32), 2, 2, 1, 150, 330, 24, 16, 300, 90, 8.0,
    ),
    "a row of padding": (BlockSelection(0.5, block_q=64, block_k=64), 2, 2, 2, 70, 70, 16, 16, 70, 70, 0.0),
    "heads of 128": (BlockSelection(0.6, recent=1), 2, 2, 1, 300, 640, 128, 128, 630, 130, 0.0),
    "larger blocks than are read at once": (
        BlockSelection(0.4, block_q=128, block_k=128, recent=1), 1, 2, 1, 140, 1000, 136, 32, 990, 0, 0.0,
    ),
}  # fmt: skip

# B, H, G, T, S, K, V, start, rotated, norm
ROPES = {"norms": (2, 4, 2, 1, 40, 32, 32, 17, 32, True), "a part is rotated": (1, 3, 1, 3, 20, 24, 16, 5, 16, False)}


def cases(**of: Any) -> Iterator[tuple[str, Callable[[Any], dict[str, float]], str]]:
    """Name, a function of the operators to test, and the kernels' module."""
    for name, (how, sizes) in STEPS.items():
        yield name, lambda ops, how=how, sizes=sizes: step_errors(ops, how, **sizes, **of), "two_level_attention"
    for name, case in LATENTS.items():
        yield f"dense latents: {name}", lambda ops, case=case: latent_errors(ops, *case, **of), "latent_attention"
        half = {**of, "dtype": torch.float16}  # tiles by the tensor memory accelerator
        yield (
            f"half latents: {name}",
            lambda ops, case=case, of=half: latent_errors(ops, *case, **of),
            "latent_attention",
        )
    for name, case in PROMPTS.items():
        yield f"prompt: {name}", lambda ops, case=case: prompt_errors(ops, *case, **of), "block_sparse_attention"
    for name, case in POOLS.items():
        yield name, lambda ops, case=case: pool_errors(ops, *case, **of), "block_pool"
    for name, case in TURNED.items():
        yield f"rope, pages: {name}", lambda ops, case=case: turned_errors(ops, *case, **of), "rope_page_write"
    for name, case in ROPES.items():
        yield f"rope: {name}", lambda ops, case=case: rope_errors(ops, *case, **of), "rope_cache_write"


def tolerance(name: str, dtype: torch.dtype) -> float:
    """Of all that the case `name` finds in `dtype`."""
    return TOLERANCE[torch.float16 if name.startswith("half") else dtype]


# -- programs ---------------------------------------------------------------------------------------------------------


def _kernels(name: str) -> Any:
    import importlib

    return importlib.import_module(f"effpass.lowering.kernels.{name}")


def interpret(only: str = "") -> dict[str, dict[str, float]]:
    """Errors of all cases in float32; outputs and buffers start as NaN."""
    set_up()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    of = {"device": torch.device("cpu"), "dtype": torch.float32}
    return {name: run(_kernels(module)) for name, run, module in cases(**of) if only in name}


def compile_all() -> dict[str, int]:
    """Shared memory of each kernel, compiled for compute capability 9.0 at sizes of real layers."""
    names = (
        "key_index",
        "two_level_attention",
        "chosen_attention",
        "latent_attention",
        "block_sparse_attention",
        "rope_cache_write",
        "block_pool",
        "rope_page_write",
    )
    index_kernels, two_level, chosen, latent, sparse, rope, pool, turned = map(_kernels, names)
    kernels = ("_index", "_score", "_choose", "_narrow", "_attend", "_combine", "_select", "_write", "_plan", "_copy",
               "_arrive", "_turn", "_latent")  # fmt: skip
    launches = compile_instead((index_kernels, two_level, chosen, latent, sparse, rope, pool, turned), kernels)
    shared: dict[str, int] = {}

    def end(case: str) -> None:
        shared.update({f"{case}: {name}": size for name, size in launches})
        launches.clear()

    def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def step(
        how: Selection, B: int, H: int, G: int, K: int, V: int, C: int, S: int, paged: bool = False, far: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        with torch.device("meta"):
            index = KeyIndex.empty(how, some(G, C, dtype=torch.int32), B, S, K, dtype)
        keys = some(B, G, S, K, dtype=dtype)
        values = keys[..., :V] if V < K else some(B, G, S, V, dtype=dtype)
        numbers = some(B, S, dtype=torch.int32), some(B, 1, dtype=torch.int32), some(1, dtype=torch.int32)
        table = some(B, G, S // how.block, dtype=torch.int32) if paged else None
        host = None
        if far:
            table = some(B, G, S // how.block, dtype=torch.int32)
            host = some(B, G, S // how.block, how.block, K if V < K else K + V)
            keys, values = parted(some(B * G * 256, how.block, host.shape[-1]), K, V)
        elif paged:
            keys, values = keys.view(-1, how.block, K), values.view(-1, how.block, V)
        index_kernels.index_keys(
            keys, table, numbers[0], numbers[2], numbers[2], 512, index.channels, index.statistics, index.seen,
            index.labels, index.ranges, how.block, how.statistic,
        )  # fmt: skip
        two_level.two_level_attention(
            some(B, H, 1, K, dtype=dtype), keys, values, table, host, *numbers, index.channels, index.statistics,
            index.seen, index.labels, index.ranges, index.scores, index.chosen_blocks, index.chosen_tokens, 0.1, 0.0,
            how.block, how.sink, how.recent, how.statistic, how.aggregation, how.is_pipelined,
        )  # fmt: skip

    both, gqa, mla = Selection(), (32, 8, 128, 128, 32), (20, 1, 576, 512, 128)
    step(both, 1, *gqa, 98304)
    end("GQA")
    step(both, 8, *gqa, 98304, paged=True)
    end("GQA, pages, batch 8")
    step(both, 1, *gqa, 98304, far=True)
    end("GQA, host memory")
    step(both, 1, *mla, 98304)
    end("MLA")
    step(both, 8, *mla, 98304, far=True)
    end("MLA, host memory, batch 8")
    step(Selection(levels="blocks"), 1, *gqa, 98304)
    end("GQA, blocks")
    step(Selection(levels="tokens"), 1, *gqa, 98304)
    end("GQA, tokens")
    step(Selection(aggregation="max"), 8, *mla, 98304)
    end("MLA, max, batch 8")
    step(Selection(statistic="mean_std", aggregation="max"), 8, *gqa, 98304)
    end("GQA, max, mean and deviation, batch 8")
    step(Selection(tokens=4096, blocks=250, statistic="mean"), 8, 28, 4, 96, 112, 96, 40000)
    end("odd sizes")
    step(both, 1, *gqa, 98304, dtype=torch.float32)
    end("GQA, float32")
    for dtype in (torch.bfloat16, torch.float32):
        latents = some(1, 1, 98304, 576, dtype=dtype)
        numbers = some(1, 98304, dtype=torch.int32), some(1, 1, dtype=torch.int32), some(1, dtype=torch.int32)
        latent.cached_attention(some(1, 20, 1, 576, dtype=dtype), latents, latents[..., :512], *numbers, 0.1, 0, 0.0)
        end(f"dense latents, {dtype}")
    for size, block_k in ((128, 128), (128, 64)):
        how, length = BlockSelection(0.12, block_k=block_k), 65536
        keys, positions = some(1, 8, length, size), some(1, length, dtype=torch.int32)
        spans = Spans.of(positions, positions, how.block_q, block_k)
        w = some(1, 8, length // how.block_q, length // block_k, dtype=torch.float32)
        lists, counts = sparse.selected(
            w, spans, 0, block_k, how.sink, how.recent, how.density, how.threshold, how.places(length)
        )
        sparse.block_sparse_attention(
            some(1, 32, length, size), keys, keys, positions, positions, lists, counts, 0.1, 0.0, how.block_q, block_k
        )
        end(f"prompt, heads of {size}, blocks of {block_k}")
    table = some(1, 1, 128)
    rope.rope_cache_write(
        some(1, 1, 32, 128), some(1, 1, 8, 128), some(1, 1, 8, 128), table, table, some(128), some(128), 1e-6, 0.0,
        some(1, 8, 1024, 128), some(1, 8, 1024, 128), numbers[2],
    )  # fmt: skip
    end("rope")
    for what, groups, key_size, value_size in (("GQA", 8, 128, 128), ("MLA", 1, 512, 64)):
        with torch.device("meta"):
            host = some(2, groups, 1536, 64, key_size + value_size)
            of = BlockPool.empty(host, 384, 128, 16)
            chosen_tokens, filled = some(2, groups, 2048, dtype=torch.int32), some(1, dtype=torch.int32)
        key, value = some(2, groups, 1, key_size), some(2, groups, 1, value_size)
        pool.page_write(key, value, filled, host, of.pages, of.block_table)
        if what == "GQA":
            turned.rope_page_write(
                some(2, 1, 32, 128), some(2, 1, 8, 128), some(2, 1, 8, 128), table, table, some(128), some(128), 1e-6,
                0.0, filled, host, of.pages, of.block_table,
            )  # fmt: skip
        state = (of.block_table, of.owner, of.age, of.clock, of.moves, of.moved, of.counts)
        pool.fetch_blocks(chosen_tokens, filled, host, of.pages, *state, 1)
        pool.arrive(some(3, dtype=torch.int64), waits=True)
        pool.arrive(some(3, dtype=torch.int64), waits=False)
        end(f"pool, {what}")
    return shared


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
        print(json.dumps(interpret(*sys.argv[2:])))
    else:
        print(json.dumps(compile_all()))
