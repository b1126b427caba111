"""The largest of some thousand scores, inside one program: a search for the threshold, and ranks.

Every step of the search counts how many scores reach a number in the middle; it ends where the count fits, which takes
about 14 steps for 2048 of 8192 scores and never more than 32. Scores are compared as integers in the order of float32,
so that equal ones are equal, and of those the first are taken: the result is exact and always the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FORCED", "NEVER", "choose", "in_order", "largest"]

NEVER = tl.constexpr(-2147483648)  # below every score
FORCED = tl.constexpr(2147483646)  # above every score


@triton.jit
def in_order(score):
    """int32 in the order of float32; -0.0 and 0.0 are one."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def choose(key, count):
    """The `count` largest of `key` int32 [C], C < 32768; NEVER is not chosen.

    Returns:
        Whether each is chosen, its rank among the chosen by place, and how many are.
    """
    there = key > NEVER
    found = tl.sum(there.to(tl.int32), 0)
    count = tl.minimum(count, found)
    low = tl.min(tl.where(there, key, 2147483647), 0)
    high = tl.max(key, 0) + 1
    # At least `count` reach `low`, fewer reach `high`.
    while (found != count) & (low + 1 < high):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        reach = tl.sum((key >= middle).to(tl.int32), 0)
        enough = reach >= count
        low = tl.where(enough, middle, low)
        found = tl.where(enough, reach, found)
        high = tl.where(enough, high, middle)
    above = (key > low).to(tl.int32)
    equal = ((key == low) & there).to(tl.int32)
    wanted = count - tl.sum(above, 0)
    both = above + (equal << 16)  # two counts in one scan
    before = tl.cumsum(both, 0) - both
    equals_before = before >> 16
    chosen = (above == 1) | ((equal == 1) & (equals_before < wanted))
    return chosen, (before & 0xFFFF) + tl.minimum(equals_before, wanted), count


@triton.jit
def largest(order, COUNT: tl.constexpr):
    """The COUNT largest of int64 [C], largest first; COUNT and C are powers of two."""
    if COUNT == 1:
        return tl.full([1], 0, tl.int64) + tl.max(order, 0)
    else:
        return tl.topk(order, COUNT)
