"""Triton kernel of `effpass::greedy_tokens`, in one launch.

    token[r] = argmax_v logits[r, v] if sequence r is unfinished, else pad

Each program finds the best logit of a part of one sequence's logits; the last program to finish combines the parts of
all sequences and does the bookkeeping. A logit, as float32, and its index form one int64 whose order is that of the
logits, with smaller indices first among equals and NaN above all numbers; the result therefore does not depend on the
order in which programs finish.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from effpass.lowering.kernels.launch import counters, launch_options, overlaps

__all__ = ["greedy_tokens", "supported"]

_MOST_ROWS, _MOST_PARTS = 64, 128


def supported(logits: Tensor) -> bool:
    """Return whether the kernel applies: up to 64 sequences, a 16-bit or 32-bit dtype, contiguous vocabulary."""
    return (
        0 < logits.shape[0] <= _MOST_ROWS
        and logits.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and logits.stride(1) == 1
        and 0 < logits.shape[1] < 2**31
    )


def greedy_tokens(
    logits: Tensor, ends: Tensor, pad: Tensor, tokens: Tensor, ids: Tensor, column: Tensor, unfinished: Tensor,
    goes_on: Tensor, lasted: Tensor,
) -> None:  # fmt: skip
    """Run `effpass::greedy_tokens` on tensors that are :func:`supported`."""
    (rows, vocabulary), device = logits.shape, logits.device
    size = max(2048, triton.next_power_of_2(triton.cdiv(vocabulary, _MOST_PARTS)))
    parts = triton.cdiv(vocabulary, size)
    best = ids.new_empty(rows, parts)
    _best[(parts, rows)](
        logits, best, counters(device, 1), ends, pad, tokens, ids, column, unfinished, goes_on, lasted, rows,
        vocabulary, parts, logits.stride(0), tokens.stride(0), ids.stride(0), SIZE=size, ENDS=ends.numel(),
        ROWS=triton.next_power_of_2(rows), PARTS=triton.next_power_of_2(parts), PDL=overlaps(device),
        **launch_options(device, 4),
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "vocabulary", "parts"])
def _best(
    logits, best, done, ends, pad, tokens, ids, column, unfinished, goes_on, lasted, rows, vocabulary, parts,
    stride_of_logits, stride_of_tokens, stride_of_ids, SIZE: tl.constexpr, ENDS: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    index = part * SIZE + tl.arange(0, SIZE)
    value = tl.load(logits + row.to(tl.int64) * stride_of_logits + index, mask=index < vocabulary, other=0)
    value = value.to(tl.float32)
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # make -0.0 and 0.0 equal
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(value != value, 0x7FFFFFFF, key)
    order = (key.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)
    order = tl.where(index < vocabulary, order, -0x7FFFFFFFFFFFFFFF)
    tl.store(best + row * parts + part, tl.max(order, 0))
    tl.debug_barrier()  # the counter must be incremented after the stores of all threads
    if tl.atomic_add(done, 1, sem="acq_rel") == rows * parts - 1:
        tl.store(done, 0)
        of_row, of_part = tl.arange(0, ROWS), tl.arange(0, PARTS)
        inside = of_row < rows
        places, both = of_row[:, None] * parts + of_part[None, :], inside[:, None] & (of_part < parts)[None, :]
        all_best = tl.load(best + places, mask=both, other=-0x7FFFFFFFFFFFFFFF, cache_modifier=".cg")
        winner = 0x7FFFFFFF - (tl.max(all_best, 1) & 0x7FFFFFFF)
        going = tl.load(unfinished + of_row, mask=inside, other=0)
        token = tl.where(going == 1, winner, tl.load(pad))
        tl.store(tokens + of_row * stride_of_tokens, token, mask=inside)
        place = tl.load(column)
        tl.store(ids + of_row.to(tl.int64) * stride_of_ids + place, token, mask=inside)
        tl.store(column, place + 1)
        for end in tl.static_range(ENDS):
            going = tl.where(token == tl.load(ends + end), 0, going)
        tl.store(unfinished + of_row, going, mask=inside)
        any_goes = tl.max(going, 0)
        tl.store(goes_on, any_goes > 0)
        tl.store(lasted, tl.load(lasted) + any_goes)
