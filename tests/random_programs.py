"""Random small programs as models write them: a list of steps that hypothesis draws, and the function it stands for.

Every value is `[B, T, D]`. A step reads values by number, so that sharing, late residuals, values that are read twice
and values that are written in place come out by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["BATCHED", "STEPS", "D", "T", "function", "inputs", "steps"]

T, D, WIDE, HEADS, EXPERTS, EACH, SLOTS, FILLED = 3, 16, 24, 4, 4, 2, 8, 2
K = D // HEADS

# Inputs whose first size is the batch.
BATCHED = ("x", "keys", "values", "positions")

Weights = Callable[..., Tensor]
Step = Callable[..., Tensor]


# -- what a step does: (value, another value, weights, variant) → a value ---------------------------------------------


def linear(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    return F.linear(x, w(D, D), w(D) if variant % 2 else None)


def product(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    return x @ w(D, D)


def residual(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    added = F.linear(x, w(D, D))
    return y + added if variant % 2 else added + y


def elementwise(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    return (x + y, x * torch.sigmoid(y), x - 0.5 * y, F.silu(x), torch.tanh(x) * 2)[variant % 5]


def norm(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    if variant % 4 == 3:
        return F.layer_norm(x, (D,), w(D))
    if variant % 4 == 2:
        return F.rms_norm(x, (D,), w(D), 1e-5)
    wide = x.to(torch.float32)
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return w(D) * scaled.to(x.dtype) if variant % 4 else (scaled * (1.0 + w(D).float())).type_as(x)


def projections(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    """Two or three products of one norm, which another may read too."""
    n = norm(x, y, w, variant)
    found = F.linear(n, w(D, D)) + torch.tanh(F.linear(n, w(D, D), w(D)))
    return found + n * F.linear(n, w(D, D)) if variant % 3 else found


def gate(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    if variant % 3 == 2:
        first, second = F.linear(x, w(2 * WIDE, D)).chunk(2, dim=-1)
    else:
        first, second = F.linear(x, w(WIDE, D)), F.linear(x, w(WIDE, D))
    activated = F.gelu(first, approximate="tanh") if variant % 2 else F.silu(first)
    return F.linear(activated * second, w(D, WIDE))


def attention(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    q, k, v = (_heads(F.linear(x, w(D, D))) for _ in range(3))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=bool(variant % 2))
    return F.linear(out.transpose(1, 2).reshape(x.shape), w(D, D))


def cached_attention(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    """As the decode engine's models have it, over a cache that other steps write too."""
    places, frequencies = w("tokens"), w("frequencies")
    if variant % 3:
        angles = places[..., None].float() * frequencies
    else:
        angles = (frequencies[None, :, None] @ places[:, None, :].float()).transpose(1, 2)
    both = torch.cat((angles, angles), dim=-1)
    cos, sin = both.cos() * 1.0, both.sin() * 1.0
    q, k = (_rotate(_heads(F.linear(x, w(D, D))), cos, sin) for _ in range(2))
    v = _heads(F.linear(y, w(D, D)))
    keys, values, positions, start = (w(name) for name in ("keys", "values", "positions", "start"))
    torch.ops.effpass.cache_write(keys, values, k, v, start)
    new = positions[:, FILLED : FILLED + T]
    out = torch.ops.effpass.cached_attention(q, keys, values, positions, new, start + T, K**-0.5, 0, 0.0)
    return F.linear(out.reshape(x.shape), w(D, D))


def experts(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    """A layer of experts on rows in the order of their experts, as transformers computes it."""
    rows = x.reshape(-1, D)
    weights, ids = torch.softmax(F.linear(rows, w(EXPERTS, D)), dim=-1).topk(EACH)
    flat, order = torch.sort(ids.reshape(-1))
    ends = torch.cumsum(torch.histc(flat.float(), bins=EXPERTS, min=0, max=EXPERTS - 1), dim=0, dtype=torch.int32)
    grouped = torch.ops.transformers.grouped_mm_fallback
    first, second = grouped(rows[order // EACH], w(EXPERTS, 2 * WIDE, D).transpose(-2, -1), ends).chunk(2, dim=-1)
    out = grouped(F.silu(first) * second, w(EXPERTS, D, WIDE).transpose(-2, -1), ends)
    out = out * weights.reshape(-1)[order].unsqueeze(-1)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0])
    return out[places].view(-1, EACH, D).sum(dim=1).reshape(x.shape)


def write(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    """In place, on a value that others have read, or on a view of it."""
    (x.mul_(0.5), x[0].add_(1.0), x.view(-1, D).copy_(y.reshape(-1, D) * 0.5))[variant % 3]
    return x if variant % 2 else x.view(x.shape)


def interrupted(x: Tensor, y: Tensor, w: Weights, variant: int) -> Tensor:
    """Products that would be one, were it not for the write between them."""
    n = norm(x, y, w, variant) if variant % 2 else x
    first = F.linear(n, w(D, D))
    (n, x, y)[variant % 3][0].mul_(0.5)  # through a view, or what is read later would be another node
    return first + F.linear(n, w(D, D))


STEPS: tuple[Step, ...] = (
    linear, product, residual, elementwise, norm, projections, gate, attention, cached_attention, experts, write,
    interrupted,
)  # fmt: skip


def _heads(x: Tensor) -> Tensor:
    return x.view(*x.shape[:2], -1, K).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = torch.cat((-x[..., K // 2 :], x[..., : K // 2]), dim=-1)
    return x * cos + turned * sin


# -- a program --------------------------------------------------------------------------------------------------------

Drawn = Sequence[tuple[Step, int, int, int]]


def steps(least: int = 4, most: int = 8) -> st.SearchStrategy[Drawn]:
    """(what, value, another value, variant) a step; numbers count values from the newest."""
    step = st.tuples(st.sampled_from(STEPS), st.integers(0, 3), st.integers(0, 3), st.integers(0, 29))
    return st.lists(step, min_size=least, max_size=most)


def function(drawn: Drawn, names: Sequence[str]) -> Callable[..., tuple[Tensor, ...]]:
    """The program: of x, the cache and weights, by position, to every value that is not read again."""

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, given, strict=True))
        numbers = iter(range(len(names)))

        def weights(*size: Any) -> Tensor:
            return named[size[0] if isinstance(size[0], str) else _name(next(numbers), size)]

        values = [named["x"] * 1.0]
        for step, one, other, variant in drawn:
            x, y = (values[-1 - number % len(values)] for number in (one, other))
            values.append(step(x, y, weights, variant))
        return tuple(values[-2:])

    return run


def inputs(drawn: Drawn, batch: int) -> dict[str, Tensor]:
    """What the program of these steps reads, by name; for another batch size the weights are the same."""
    positions = torch.full((batch, SLOTS), -1, dtype=torch.int32)
    positions[:, : FILLED + T] = torch.arange(FILLED + T, dtype=torch.int32)
    generator = torch.Generator().manual_seed(batch)
    found: dict[str, Tensor] = {
        "x": torch.randn(batch, T, D, generator=generator),
        "tokens": torch.randint(0, 9, (1, T), generator=generator),
        "frequencies": torch.rand(K // 2, generator=generator),
        "keys": torch.randn(batch, HEADS, SLOTS, K, generator=generator),
        "values": torch.randn(batch, HEADS, SLOTS, K, generator=generator),
        "positions": positions,
        "start": torch.tensor([FILLED], dtype=torch.int32),
    }
    seeded = torch.Generator().manual_seed(0)
    count = 0

    def weights(*size: Any) -> Tensor:
        nonlocal count
        if isinstance(size[0], str):
            return found[size[0]].clone()
        name, count = _name(count, size), count + 1
        scale = 1.0 if len(size) == 1 else size[-1] ** -0.5
        found[name] = torch.randn(*size, generator=seeded) * scale
        return found[name]

    for step, _, _, variant in drawn:
        blank = torch.zeros(batch, T, D)
        step(blank, blank.clone(), weights, variant)
    return found


def _name(number: int, size: Sequence[int]) -> str:
    return f"w{number}_{'x'.join(map(str, size))}"
