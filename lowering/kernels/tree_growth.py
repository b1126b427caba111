"""Triton kernels of `effpass::grow_layer` and `effpass::best_nodes`, with one program per sequence.

The rules are those of :mod:`effpass.lowering.ops.tree_growth`. A program holds all candidates of its sequence in one
tile. They are ranked by int64 numbers that combine a float32 value and a place, with smaller places first among equal
values; the sorted numbers give the places back. Probabilities and confidences are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.largest import in_order, largest
from effpass.lowering.kernels.launch import launch_options, overlaps

__all__ = ["best_nodes", "can_choose", "can_grow", "grow_layer"]

_MOST_CANDIDATES, _MOST_POOL, _MOST_NODES = 1024, 4096, 256


def can_grow(log_p: Tensor, classifier: list[Tensor]) -> bool:
    """Return whether the kernel supports `log_p` [B, F, K]: up to 1024 candidates, up to 128 classifier units."""
    _, frontier, width = log_p.shape
    return frontier * triton.next_power_of_2(width) <= _MOST_CANDIDATES and (
        not classifier or len(classifier[1]) <= 128
    )


def grow_layer(
    log_p: Tensor, tokens: Tensor, entropy: Tensor, path: Tensor, worth: Tensor, number: Tensor, ancestors: Tensor,
    position: Tensor, names: Tensor | None, classifier: list[Tensor], pool_tokens: Tensor, pool_worth: Tensor,
    pool_parents: Tensor, first: int, depth: int, least: float, keeps_all: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Run `effpass::grow_layer` on tensors for which :func:`can_grow` is true."""
    (batch, frontier, width), device = log_p.shape, log_p.device
    words = ancestors.shape[2]
    log_p, tokens, entropy, path, worth, number, ancestors = (
        x.contiguous() for x in (log_p, tokens, entropy, path, worth, number, ancestors)
    )
    new_tokens = torch.empty((batch, width), dtype=torch.long, device=device)
    positions = torch.empty((batch, width), dtype=torch.int32, device=device)
    bits = ancestors.new_empty((batch, width, words))
    up, new_number = torch.empty_like(new_tokens), torch.empty_like(new_tokens)
    new_path, new_worth = (path.new_empty((batch, width)) for _ in range(2))
    inner, bias, outer, offset = classifier or (None,) * 4
    _grow[(batch,)](
        log_p, tokens, entropy, path, worth, number, ancestors, position, names, inner, bias, outer, offset,
        pool_tokens, pool_worth, pool_parents, new_tokens, positions, bits, up, new_path, new_worth, new_number,
        first, depth, least, pool_tokens.stride(0), FRONTIER=frontier, K=width, WORDS=words,
        UNITS=0 if bias is None else len(bias), KEEPS_ALL=keeps_all,
        WIDTH=triton.next_power_of_2(width), BLOCK=triton.next_power_of_2(frontier * width),
        PDL=overlaps(device), **launch_options(device, 4),
    )  # fmt: skip
    return new_tokens, positions, bits, up, new_path, new_worth, new_number


def can_choose(pool_tokens: Tensor, nodes: int) -> bool:
    """Return whether the kernel applies: a pool of up to 4096 candidates, and a tree of up to 256 nodes."""
    return pool_tokens.shape[1] <= _MOST_POOL and nodes <= _MOST_NODES


def best_nodes(
    root: Tensor, position: Tensor, pool_tokens: Tensor, pool_worth: Tensor, pool_parents: Tensor, nodes: int,
    depth: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Run `effpass::best_nodes` on tensors for which :func:`can_choose` is true."""
    batch, pool = pool_tokens.shape
    tokens = root.new_empty((batch, nodes))
    parents, positions = torch.empty_like(tokens), position.new_empty((batch, nodes))
    words = triton.cdiv(nodes, 64)
    ancestors = root.new_empty((batch, nodes, words))
    block = triton.next_power_of_2(nodes)
    _choose[(batch,)](
        root, position, pool_tokens, pool_worth, pool_parents, tokens, parents, positions, ancestors, pool, nodes,
        depth, pool_tokens.stride(0), root.stride(0), WORDS=words, BLOCK=block,
        POOL=max(block, triton.next_power_of_2(pool)), PDL=overlaps(root.device), **launch_options(root.device, 4),
    )  # fmt: skip
    return tokens, parents, positions, ancestors


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def _ranks(value, place, there):
    """int64 in the order of `value`, smaller places first; below all where not `there`."""
    return tl.where(there, (in_order(value).to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64), -(1 << 63))


@triton.jit
def _place(rank):
    return (0x7FFFFFFF - (rank & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def _value(rank):
    bits = (rank >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["first", "depth"])
def _grow(
    log_p, tokens, entropy, path, worth, number, ancestors, position, names, inner, bias, outer, offset, pool_tokens,
    pool_worth, pool_parents, new_tokens, positions, bits, up, new_path, new_worth, new_number, first, depth, least,
    stride_of_pool, FRONTIER: tl.constexpr, K: tl.constexpr, WORDS: tl.constexpr, UNITS: tl.constexpr,
    KEEPS_ALL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    root = tl.load(position + b)
    tokens += b * FRONTIER * K
    log_p += b * FRONTIER * K
    entropy += b * FRONTIER
    path += b * FRONTIER
    worth += b * FRONTIER
    number += b * FRONTIER
    of_pool = b.to(tl.int64) * stride_of_pool + first
    pool_tokens += of_pool
    pool_worth += of_pool
    pool_parents += of_pool
    c = tl.arange(0, BLOCK)
    inside = c < FRONTIER * K
    above = c // K
    probability = tl.load(path + above, mask=inside, other=0) * tl.exp(tl.load(log_p + c, mask=inside, other=0))
    sure = probability
    if UNITS > 0:
        of_node = tl.load(entropy + above, mask=inside, other=0)
        total = tl.zeros([BLOCK], tl.float32) + tl.load(offset)
        for unit in range(UNITS):
            hidden = tl.load(inner + unit * 3) * probability + tl.load(inner + unit * 3 + 1) * of_node
            hidden += tl.load(inner + unit * 3 + 2) * depth + tl.load(bias + unit)
            total += tl.load(outer + unit) * tl.maximum(hidden, 0)
        sure = 1 / (1 + tl.exp(-total))
    of_parent = tl.load(worth + above, mask=inside, other=-1)
    there = inside & (sure >= least) & (of_parent >= 0)
    if KEEPS_ALL:
        token = tl.load(tokens + c, mask=inside, other=0)
        if names is not None:
            token += tl.load(names + token, mask=inside, other=0)
        tl.store(pool_tokens + c, token, mask=inside)
        tl.store(pool_worth + c, tl.where(there, tl.minimum(sure, of_parent), -1.0), mask=inside)
        tl.store(pool_parents + c, tl.load(number + above, mask=inside, other=0), mask=inside)

    best = largest(_ranks(tl.where(there, sure, -1.0), c, inside), WIDTH)
    k = tl.arange(0, WIDTH)
    live = k < K
    picked = tl.where(live, _place(best), 0)
    rank = tl.where(live, _value(best), -1.0)
    parent = picked // K
    of_picked = tl.load(worth + parent, mask=live, other=-1)
    valued = tl.where(rank >= 0, tl.minimum(rank, of_picked), -1.0)
    token = tl.load(tokens + picked, mask=live, other=0)
    if names is not None:
        token += tl.load(names + token, mask=live, other=0)
    if not KEEPS_ALL:
        tl.store(pool_tokens + k, token, mask=live)
        tl.store(pool_worth + k, valued, mask=live)
        tl.store(pool_parents + k, tl.load(number + parent, mask=live, other=0), mask=live)
    alive = (valued >= 0) & (root >= 0)
    out = b * K + k
    tl.store(new_tokens + out, token, mask=live)
    tl.store(positions + out, tl.where(alive, root + depth + 1, -1), mask=live)
    tl.store(up + out, parent.to(tl.int64), mask=live)
    of_path = tl.load(path + parent, mask=live, other=0) * tl.exp(tl.load(log_p + picked, mask=live, other=0))
    tl.store(new_path + out, of_path, mask=live)
    tl.store(new_worth + out, valued, mask=live)
    place = picked if KEEPS_ALL else k
    tl.store(new_number + out, (first + place).to(tl.int64), mask=live)
    slot = depth * K + k
    for word in tl.static_range(WORDS):
        known = tl.load(ancestors + (b * FRONTIER + parent) * WORDS + word, mask=live, other=0)
        mine = tl.where(slot // 64 == word, tl.full([WIDTH], 1, tl.int64) << (slot % 64).to(tl.int64), 0)
        tl.store(bits + out * WORDS + word, tl.where(alive, known | mine, 0), mask=live)


@triton.jit(do_not_specialize=["pool", "nodes", "depth"])
def _choose(
    root, position, pool_tokens, pool_worth, pool_parents, tokens, parents, positions, ancestors, pool, nodes, depth,
    stride_of_pool, stride_of_root, WORDS: tl.constexpr, BLOCK: tl.constexpr, POOL: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    of_pool = b.to(tl.int64) * stride_of_pool
    p = tl.arange(0, POOL)
    value = tl.load(pool_worth + of_pool + p, mask=p < pool, other=-1)
    best = largest(_ranks(value, p, p < pool), BLOCK)
    node = tl.arange(0, BLOCK)
    # The best nodes − 1 candidates in the order of the pool, so that parents precede children; unused entries are last.
    wanted = (node < nodes - 1) & (best > -(1 << 62)) & (_value(best) >= 0)
    chosen = tl.sort(tl.where(wanted, _place(best), POOL))
    # Shift by one: node 0 is the root, and node i is the chosen candidate i - 1.
    before = tl.where(node > 0, tl.gather(chosen, tl.maximum(node - 1, 0), 0), -1)
    is_node = (before < POOL) & (node < nodes)
    inside = is_node & (node > 0)
    above = tl.load(pool_parents + of_pool + before, mask=inside, other=-1).to(tl.int32)
    # Find the node of each parent candidate. Children of the root have parent -1, which is also the root's own entry.
    same = above[:, None] == before[None, :]
    parent = tl.sum(tl.where(same & inside[:, None] & is_node[None, :], node[None, :], 0), 1)
    token = tl.load(pool_tokens + of_pool + before, mask=inside, other=0)
    token = tl.where(node == 0, tl.load(root + b * stride_of_root), token)
    live = node < nodes
    out = b * nodes + node
    tl.store(tokens + out, token, mask=live)
    tl.store(parents + out, tl.where(inside, parent, -1).to(tl.int64), mask=live)
    up = node
    levels = tl.zeros([BLOCK], tl.int32)
    for word in tl.static_range(WORDS):
        mine = tl.where(node // 64 == word, tl.full([BLOCK], 1, tl.int64) << (node % 64).to(tl.int64), 0)
        bits = mine
        up = node
        levels = tl.zeros([BLOCK], tl.int32)
        for _ in range(depth):
            levels += (up > 0).to(tl.int32)
            up = tl.gather(parent, up, 0)
            bits |= tl.gather(mine, up, 0)
        tl.store(ancestors + out * WORDS + word, tl.where(is_node, bits, 0), mask=live)
    at = tl.load(position + b)
    tl.store(positions + out, tl.where(is_node & (at >= 0), at + levels, -1), mask=live)
