"""The choice of the largest scores inside one program, against a stable sort: on a GPU, or in Triton's interpreter.

`python largest_cases.py` prints as JSON how many places differ in each case.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton_interpreter import set_up

from effpass.lowering.kernels.largest import FORCED, NEVER, choose, cut, in_order, ranks, write_ranked

__all__ = ["CASES", "differences"]

INF, NAN = float("inf"), float("nan")


@triton.jit
def _matrix(scores, forced, out, count, WANTED: tl.constexpr, ALL: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr):
    place = tl.arange(0, ROWS)[:, None] * C + tl.arange(0, C)[None, :]
    score = tl.load(scores + place, mask=place < ALL, other=float("-inf"))
    always = tl.load(forced + place, mask=place < ALL, other=0) > 0
    key = tl.where(score > float("-inf"), tl.minimum(in_order(score), FORCED - 1), NEVER)
    key = tl.where(always, FORCED, key)
    chosen, chosen_count = cut(key, place, WANTED, ROWS * C)
    write_ranked(out, ranks(chosen), place, chosen)
    tl.store(count, chosen_count)


@triton.jit
def _vector(scores, forced, out, count, WANTED: tl.constexpr, ALL: tl.constexpr, PLACES: tl.constexpr):
    place = tl.arange(0, PLACES)
    score = tl.load(scores + place, mask=place < ALL, other=float("-inf"))
    always = tl.load(forced + place, mask=place < ALL, other=0) > 0
    key = tl.where(score > float("-inf"), tl.minimum(in_order(score), FORCED - 1), NEVER)
    chosen, rank, chosen_count = choose(tl.where(always, FORCED, key), WANTED)
    tl.store(out + rank, place, mask=chosen)
    tl.store(count, chosen_count)


def _scores(what: str, count: int) -> Tensor:
    torch.manual_seed(count)
    normal, place = torch.randn(count), torch.arange(count)
    powers = torch.where(torch.rand(count) < 0.5, -1.0, 1.0) * 10 ** (torch.rand(count) * 76 - 38)
    return {
        "normal": normal,
        "far from zero": 1e4 + normal,
        "all equal": torch.full((count,), 2.5),
        "zeros of both signs": torch.where(normal > 0, 0.0, -0.0),
        "few values": (normal * 2).round(),
        "heavy tail": normal.exp() ** 4,
        "any power of ten": powers,
        "largest and smallest": torch.where(normal > 1, 3.4e38, torch.where(normal < -1, -3.4e38, normal * 1e-35)),
        "two groups": normal + (torch.rand(count) < 0.2) * 1e6,
        "infinite": torch.where(normal > 0.5, INF, torch.where(normal < -0.5, -INF, normal)),
        "some are NaN": torch.where(normal > 0.5, NAN, normal),
        "one is there": torch.where(place == count // 2, 1.0, -INF),
        "none is there": torch.full((count,), -INF),
        "in order": place.float(),
        "halved again and again": 2.0 ** -(place % 250).float(),
    }[what]


# What the scores are, how many there are, how many are wanted, and which are wanted in any case.
CASES: dict[str, tuple[str, int, int, int]] = {
    **{f"{what}, 1000": (what, 1000, 260, 0) for what in (
        "normal", "far from zero", "all equal", "zeros of both signs", "few values", "heavy tail", "any power of ten",
        "largest and smallest", "two groups", "infinite", "some are NaN", "one is there", "none is there", "in order",
        "halved again and again",
    )},
    "tokens": ("normal", 8192, 2048, 0),
    "blocks": ("heavy tail", 1537, 128, 3),
    "as many as are there": ("normal", 512, 512, 0),
    "more than are there": ("some are NaN", 300, 299, 2),
    "one": ("few values", 77, 1, 0),
    "as many as are forced": ("normal", 90, 5, 5),
    "fewer than are forced": ("normal", 90, 3, 7),
    "all that there may be": ("few values", 16384, 4096, 9),
}  # fmt: skip


def differences(name: str, device: str) -> dict[str, int]:
    """Places that the two ways of choosing get wrong."""
    what, count, wanted, always = CASES[name]
    scores = _scores(what, count)
    forced = torch.zeros(count, dtype=torch.int32)
    forced[torch.randperm(count)[:always]] = 1
    values, first = scores.tolist(), forced.tolist()
    there = [i for i, x in enumerate(values) if x > -INF or first[i]]
    order = sorted(there, key=lambda i: -INF if first[i] else -values[i] if values[i] < INF else -3.5e38)
    expected = sorted(order[:wanted])
    columns = min(64, triton.next_power_of_2(max(count, 16)))
    rows = triton.next_power_of_2(max(count, 16)) // columns
    scores, forced = scores.to(device), forced.to(device)
    found = {}
    for way, kernel, shape in (("matrix", _matrix, (rows, columns)), ("vector", _vector, (rows * columns,))):
        out, number = (torch.full((size,), -1, dtype=torch.int32, device=device) for size in (wanted, 1))
        kernel[(1,)](scores, forced, out, number, wanted, count, *shape)
        got = out.tolist()
        found[way] = sum(a != b for a, b in zip(got, expected + [-1] * (wanted - len(expected)), strict=True))
        found[f"{way}, count"] = int(number.item() != len(expected))
    return found


def interpret() -> dict[str, Any]:
    set_up()
    return {name: differences(name, "cpu") for name in CASES}


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
    print(json.dumps(interpret()))
