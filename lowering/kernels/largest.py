"""Selection of the largest among up to 16384 scores inside one program, by a search for their threshold, and ranks.

The cost of the search is its number of steps, each of which waits for a reduction over the whole program. A step counts
how many scores reach each of two candidate thresholds. The first candidates lie around the quantile that a normal
distribution of the same mean and standard deviation would have; later ones are interpolated. After a step that leaves
more than a third of the scores undecided, the candidates bisect the remaining interval twice, by its bits. Scores near
a normal distribution thus take few steps, and where thousands of scores are equal, first the interval and then their
places are bisected. Scores are compared as integers in the order of float32, which keeps equal scores equal, and among
equal scores those at the lowest places are chosen: the result is exact and deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["FORCED", "MOST", "NEVER", "choose", "cut", "in_order", "largest", "ranks", "write_ranked", "write_share"]

MOST = 16384  # maximum number of keys: two counts of them are packed into one int32
NEVER = tl.constexpr(-2147483648)  # below every score
FORCED = tl.constexpr(2147483646)  # above every score


@triton.jit
def in_order(score):
    """int32 in the order of float32; -0.0 and 0.0 are one."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _score_of(key):
    """What `in_order` made `key` of."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _quantile(above):
    """How many deviations above the mean a normal distribution has the share `above` over it, to 0.003.

    Abramowitz and Stegun, 26.2.22.
    """
    tail = tl.maximum(tl.minimum(above, 1 - above), 1e-6)
    t = tl.sqrt(-2 * tl.log(tail))
    z = t - (2.30753 + 0.27061 * t) / (1 + t * (0.99229 + 0.04481 * t))
    return tl.where(above < 0.5, z, -z)


@triton.jit
def _middle(low, high):
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def cut(key, place, count, ALL: tl.constexpr):
    """Which of ALL `key` int32 of any shape are the `count` largest; ALL is at most MOST.

    Args:
        key: up to FORCED; NEVER is not chosen. Those of `in_order` take the fewest steps.
        place: int32 from 0 to ALL - 1; of equal keys the first are chosen.
        count: how many to choose; all that are not NEVER where these are fewer.

    Returns:
        `low`, `bound` and how many are chosen: those with (key > low) | ((key == low) & (place < bound)).
    """
    each = tl.ravel(key, can_reorder=True)
    regular = (each > NEVER) & (each < FORCED)
    score = tl.where(regular, _score_of(each), 0.0)
    moments = tl.join(score, score * score)
    numbers = tl.join(regular.to(tl.float32), (each == FORCED).to(tl.float32))
    moments, numbers = tl.split(tl.sum(tl.join(moments, numbers), 0))  # one reduction for all four sums
    total, squares = tl.split(moments)
    number, forced = tl.split(numbers)
    n_high = forced.to(tl.int32)
    n_low = n_high + number.to(tl.int32)
    count = tl.minimum(count, n_low)
    mean = total / tl.maximum(number, 1)
    deviation = tl.sqrt(tl.maximum(squares / tl.maximum(number, 1) - mean * mean, 0.0))
    center = mean + deviation * _quantile((count - n_high).to(tl.float32) / tl.maximum(number, 1))
    reach = 0.1 * deviation
    # Invariant: at least `count` keys are ≥ `low`, and fewer than `count` are ≥ `high`.
    low = tl.where(count <= n_high, FORCED, NEVER + 1)
    high = tl.where(count <= n_high, FORCED + 1, FORCED)
    n_low = tl.where(count <= n_high, n_high, n_low)
    n_high = tl.where(count <= n_high, 0, n_high)
    shrank = True
    while (n_low != count) & (low + 1 < high):
        left = n_low - n_high
        over = n_low - count  # number of undecided keys that will not be chosen
        is_bounded = (low > NEVER + 1) & (high < FORCED)
        if (is_bounded == 0) & (reach > 0) & (reach < 4 * deviation):
            a, b = in_order(center - reach), in_order(center + reach)
            reach = reach * 4
        elif is_bounded & shrank:
            first, share = _score_of(low), over.to(tl.float32) / left
            span = _score_of(high) - first
            # The candidates are the estimate plus and minus 0.7 standard deviations of a share of `left` scores.
            off = 0.7 * tl.sqrt(tl.maximum(share * (1 - share) / left, 0.25 / (left.to(tl.float32) * left)))
            a, b = in_order(first + (share - off) * span), in_order(first + (share + off) * span)
        else:
            b = _middle(low, high)
            a = tl.where(2 * over < left, _middle(low, b), _middle(b, high))
        a, b = tl.minimum(tl.maximum(a, low + 1), high - 1), tl.minimum(tl.maximum(b, low + 1), high - 1)
        a, b = tl.minimum(a, b), tl.maximum(a, b)
        reached = tl.sum(tl.where(each >= a, 1, 0) + tl.where(each >= b, 65536, 0), 0)
        of_a, of_b = reached & 65535, reached >> 16
        low = tl.where(of_b >= count, b, tl.where(of_a >= count, a, low))
        n_low = tl.where(of_b >= count, of_b, tl.where(of_a >= count, of_a, n_low))
        high = tl.where(of_a < count, a, tl.where(of_b < count, b, high))
        n_high = tl.where(of_a < count, of_a, tl.where(of_b < count, of_b, n_high))
        shrank = 3 * (n_low - n_high) <= left
    # If more than `count` keys are ≥ `low`, the surplus is among those equal to `low`; `n_high` keys are above it.
    nobody, bound = tl.minimum(count, 0) - 1, ALL
    while (n_low > count) & (nobody + 1 < bound):
        middle = (nobody + bound) // 2
        enough = tl.sum(((key == low) & (place < middle)).to(tl.int32)) >= count - n_high
        nobody, bound = tl.where(enough, nobody, middle), tl.where(enough, middle, bound)
    return (key > low) | ((key == low) & (place < bound)), count


@triton.jit
def ranks(chosen):
    """Of `chosen` bool [R, C], read row by row, how many stand before each."""
    flags = chosen.to(tl.int32)
    inside = tl.cumsum(flags, 1) - flags
    of_row = tl.sum(flags, 1)
    return inside + (tl.cumsum(of_row, 0) - of_row)[:, None]


@triton.jit
def write_ranked(out, rank, value, wanted):
    """Store `value` int32 at `out` + `rank` where `wanted`, all [R, C].

    Stores of scattered places have a layout of their own, into which three matrices would go through shared memory. As
    a vector of one number each they stay where they are.
    """
    both = (value.to(tl.int64) << 32) | tl.where(wanted, rank, 65535).to(tl.int64)
    both = tl.ravel(both, can_reorder=True)
    rank = (both & 65535).to(tl.int32)
    tl.store(out + rank, (both >> 32).to(tl.int32), mask=rank < 65535)


@triton.jit
def write_share(out, chosen, value, begin, stop, count, SHARE: tl.constexpr):
    """Store what one of several programs writes of a list: `value` int32 [R, C] of those chosen, in order.

    Args:
        out: the list.
        begin, stop: the program's places in it, SHARE at most; those from `count` on become -1.
    """
    rank = ranks(chosen)
    write_ranked(out, rank, value, chosen & (rank >= begin) & (rank < stop))
    rest = begin + tl.arange(0, SHARE)
    tl.store(out + rest, tl.full([SHARE], -1, tl.int32), mask=(rest < stop) & (rest >= count))
    tl.debug_barrier()


@triton.jit
def choose(key, count):
    """The `count` largest of `key` int32 [C], C at most MOST; NEVER is not chosen.

    Returns:
        Whether each is chosen, how many of the chosen stand before it, and how many are.
    """
    place = tl.arange(0, key.shape[0])
    chosen, count = cut(key, place, count, key.shape[0])
    flags = chosen.to(tl.int32)
    return chosen, tl.cumsum(flags, 0) - flags, count


@triton.jit
def largest(order, COUNT: tl.constexpr):
    """The COUNT largest of int64 [C], largest first; COUNT and C are powers of two."""
    if COUNT == 1:
        return tl.full([1], 0, tl.int64) + tl.max(order, 0)
    else:
        return tl.topk(order, COUNT)
