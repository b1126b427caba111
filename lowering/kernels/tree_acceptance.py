"""Triton kernels around a verified token tree: `effpass::accept_tokens`, `take_tokens` and `move_slots`.

    accept   one program per sequence: follows the target's choices from the root and emits the accepted tokens
    take     one program per sequence: collects emitted tokens that a draft model has not seen
    move     one program per layer, sequence, KV head and node of a path: copies its key and value to the prefix

Each is one launch without work on the host. What concerns all sequences, such as whether any continues and the new
lengths of prefixes, is written by the last program to finish.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import counters, launch_options, overlaps

__all__ = ["accept_tokens", "can_accept", "move_slots", "take_tokens"]


def can_accept(tokens: Tensor, ends: Tensor) -> bool:
    """Return whether the kernel of `accept_tokens` applies: up to 1024 nodes, and up to 64 end tokens."""
    return tokens.shape[1] <= 1024 and len(ends) <= 64


def accept_tokens(
    choices: Tensor, tokens: Tensor, parents: Tensor, ends: Tensor, limit: Tensor, ids: Tensor, count: Tensor,
    position: Tensor, root: Tensor, goes_on: Tensor, totals: Tensor, steps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run `effpass::accept_tokens` on tensors for which :func:`can_accept` is true."""
    (batch, nodes), device = tokens.shape, tokens.device
    choices, tokens, parents = choices.contiguous(), tokens.contiguous(), parents.contiguous()
    path, taken = tokens.new_empty((batch, steps)), tokens.new_empty((batch,))
    _accept[(batch,)](
        choices, tokens, parents, ends, limit, ids, count, position, root, goes_on, totals, path, taken,
        counters(device, 2), batch, nodes, ids.shape[1], ids.stride(0), steps, ENDS=triton.next_power_of_2(len(ends)),
        COUNT=len(ends), BLOCK=triton.next_power_of_2(nodes), PDL=overlaps(device), **launch_options(device, 1),
    )  # fmt: skip
    return path, taken


def take_tokens(
    ids: Tensor, count: Tensor, position: Tensor, entered: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `effpass::take_tokens`."""
    batch, device = count.shape[0], ids.device
    tokens, positions = ids.new_empty((batch, width)), position.new_empty((batch, width))
    chain, taken = ids.new_empty((batch, width, 1)), ids.new_empty((batch,))
    _take[(batch,)](
        ids, count, position, entered, tokens, positions, chain, taken, ids.stride(0), width,
        BLOCK=triton.next_power_of_2(width), PDL=overlaps(device), **launch_options(device, 1),
    )  # fmt: skip
    return tokens, positions, chain, taken


def move_slots(
    keys: Tensor, values: Tensor, positions: Tensor, lengths: Tensor, path: Tensor, taken: Tensor, first: int,
    moves_on: bool,
) -> None:  # fmt: skip
    """Run `effpass::move_slots`; the last dimensions of keys and values must be contiguous."""
    (layers, batch, groups, _, key_size), value_size = keys.shape, values.shape[4]
    steps, device = path.shape[1], keys.device
    path = path if path.stride(1) == 1 else path.contiguous()
    rows = layers * batch * groups
    _move[(rows, steps)](
        keys, values, positions, lengths, path, taken, counters(device, 1), *keys.stride()[:4], *values.stride()[:4],
        positions.stride(0), path.stride(0), first, batch, GROUPS=groups, KEY=key_size, VALUE=value_size, STEPS=steps,
        MOVES_ON=moves_on, ROWS=triton.next_power_of_2(batch), COLUMNS=triton.next_power_of_2(steps),
        BLOCK=triton.next_power_of_2(max(key_size, value_size)), PDL=overlaps(device), **launch_options(device, 1),
    )  # fmt: skip


# -- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["batch", "nodes", "columns", "steps"])
def _accept(
    choices, tokens, parents, ends, limit, ids, count, position, root, goes_on, totals, path, taken, done, batch, nodes,
    columns, stride_of_ids, steps, ENDS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    node = tl.arange(0, BLOCK)
    inside = node < nodes
    token_of = tl.load(tokens + b * nodes + node, mask=inside, other=-1)
    parent_of = tl.load(parents + b * nodes + node, mask=inside, other=-1)
    e = tl.arange(0, ENDS)
    end = tl.load(ends + e, mask=e < COUNT, other=-1)
    at, before = tl.load(position + b), tl.load(count + b)
    most = tl.load(limit)
    ids += b.to(tl.int64) * stride_of_ids
    here = 0
    walks = tl.where(at >= 0, 1, 0)
    goes = walks
    gained = 0
    for step in range(steps):
        tl.store(path + b * steps + step, (here * walks).to(tl.int64))
        token = tl.load(choices + b * nodes + here)
        column = before + gained
        tl.store(ids + column, token, mask=(walks == 1) & (column < columns))
        tl.store(root + b, token, mask=walks == 1)
        gained += walks
        ended = (tl.sum((end == token).to(tl.int32), 0) > 0) | (before + gained >= most)
        goes = tl.where((walks == 1) & ended, 0, goes)
        child = tl.min(tl.where((parent_of == here) & (token_of == token) & inside, node, BLOCK), 0)
        walks = tl.where(ended | (child >= BLOCK), 0, walks)
        here = child * walks
    tl.store(count + b, before + gained)
    tl.store(position + b, tl.where(goes == 1, at + gained, -1))
    tl.store(taken + b, (gained * goes).to(tl.int64))
    emits = tl.where(gained > 0, 1, 0).to(tl.int64)
    tl.atomic_add(totals, emits)
    tl.atomic_add(totals + 1, tl.sum((parent_of >= 0).to(tl.int64), 0) * emits)
    tl.debug_barrier()
    tl.atomic_add(done + 1, goes)
    if tl.atomic_add(done, 1, sem="acq_rel") == batch - 1:
        left = tl.atomic_xchg(done + 1, 0)
        tl.store(done, 0)
        tl.store(goes_on, left > 0)


@triton.jit(do_not_specialize=["width"])
def _take(
    ids, count, position, entered, tokens, positions, chain, taken, stride_of_ids, width, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    step = tl.arange(0, BLOCK)
    first, end, at = tl.load(entered + b), tl.load(count + b), tl.load(position + b)
    column = first + step
    there = (column < end) & (at >= 0) & (step < width)
    out = b * width + step
    token = tl.load(ids + b.to(tl.int64) * stride_of_ids + column, mask=there, other=0)
    tl.store(tokens + out, token, mask=step < width)
    tl.store(positions + out, tl.where(there, at - (end - 1 - column).to(tl.int32), -1), mask=step < width)
    bits = (tl.full([BLOCK], 2, tl.int64) << step.to(tl.int64)) - 1
    tl.store(chain + out, tl.where(there, bits, 0), mask=step < width)
    many = tl.sum(there.to(tl.int64), 0)
    tl.store(taken + b, many)
    tl.store(entered + b, first + many)


@triton.jit(do_not_specialize=["first", "batch"])
def _move(
    keys, values, positions, lengths, path, taken, done, keys_l, keys_b, keys_h, keys_s, values_l, values_b, values_h,
    values_s, positions_b, path_b, first, batch, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    STEPS: tl.constexpr, MOVES_ON: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row, step = tl.program_id(0), tl.program_id(1)
    layer, b, group = row // GROUPS // batch, row // GROUPS % batch, row % GROUPS
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if step < tl.load(taken + b):
        source = (tl.load(path + b * path_b + step) + first).to(tl.int64)
        target = (tl.load(lengths + b) + step).to(tl.int64)
        d = tl.arange(0, BLOCK)
        keys += layer.to(tl.int64) * keys_l + b * keys_b + group * keys_h
        values += layer.to(tl.int64) * values_l + b * values_b + group * values_h
        tl.store(keys + target * keys_s + d, tl.load(keys + source * keys_s + d, mask=d < KEY), mask=d < KEY)
        tl.store(
            values + target * values_s + d, tl.load(values + source * values_s + d, mask=d < VALUE), mask=d < VALUE
        )
    if MOVES_ON:
        tl.debug_barrier()  # all threads have read the length before the counter is incremented
        if tl.atomic_add(done, 1, sem="acq_rel") == tl.num_programs(0) * tl.num_programs(1) - 1:
            tl.store(done, 0)
            r, s = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
            of_row = r < batch
            many = tl.load(taken + r, mask=of_row, other=0)
            length = tl.load(lengths + r, mask=of_row, other=0)
            there = of_row[:, None] & (s[None, :] < many[:, None])
            source = tl.load(path + r[:, None] * path_b + s[None, :], mask=there, other=0) + first
            base = positions + r[:, None].to(tl.int64) * positions_b
            position = tl.load(base + source, mask=there, other=-1)
            tl.store(base + length[:, None] + s[None, :], position, mask=there)
            tl.store(lengths + r, length + many.to(tl.int32), mask=of_row)
