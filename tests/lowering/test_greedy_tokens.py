"""`greedy_tokens` against a loop over rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effpass.lowering.ops.greedy_tokens  # noqa: F401  (registers the operator)

op = torch.ops.effpass.greedy_tokens


def state(rows: int, device: str = "cpu", ends: tuple[int, ...] = (), pad: int = 0) -> dict[str, torch.Tensor]:
    of: dict[str, Any] = {"dtype": torch.long, "device": device}
    return {
        "ends": torch.tensor([*ends, -1], **of),
        "pad": torch.tensor(pad, **of),
        "tokens": torch.full((rows, 3), -7, **of)[:, 1],
        "ids": torch.full((rows + 1, 9), -7, **of)[:rows],
        "column": torch.tensor([4], **of),
        "unfinished": torch.ones(rows, **of),
        "goes_on": torch.zeros((), dtype=torch.bool, device=device),
        "lasted": torch.tensor(2, **of),
    }


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 1), (1, 49152), (5, 2049), (64, 3000), (65, 70), (2, 300_001)])
def test_each_row_takes_its_first_best(device: str, dtype: torch.dtype, rows: int, vocabulary: int) -> None:
    torch.manual_seed(rows + vocabulary)
    # Few values: in bfloat16 of a large vocabulary the best one stands in many places.
    logits = torch.randint(-9, 9, (rows, vocabulary), device=device).to(dtype)
    expected = [row.index(max(row)) for row in logits.tolist()]
    given = state(rows, device)
    for step in range(2):
        op(logits, **given)
        assert given["tokens"].tolist() == expected
        assert given["ids"][:, 4 + step].tolist() == expected
    assert (given["ids"][:, :4] == -7).all()
    assert (given["ids"][:, 6:] == -7).all()
    assert (int(given["column"]), int(given["lasted"]), bool(given["goes_on"])) == (6, 4, True)
    assert (given["unfinished"] == 1).all()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_end_and_are_padded(device: str) -> None:
    given = state(3, device, ends=(5, 8), pad=1)
    chosen = [[5, 2, 3], [4, 8, 3], [4, 4, 5], [7, 7, 7]]
    for row in chosen:
        op(torch.nn.functional.one_hot(torch.tensor(row, device=device), 10).float(), **given)
        if row == chosen[1]:
            assert given["unfinished"].tolist() == [0, 0, 1]
            assert bool(given["goes_on"])
    assert given["ids"][:, 4:8].tolist() == [[5, 1, 1, 1], [2, 8, 1, 1], [3, 3, 5, 1]]
    assert not bool(given["goes_on"])
    assert int(given["lasted"]) == 4  # two more than the two before


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([0.0, float("nan"), float("inf"), float("nan")], 1),
        ([-float("inf")] * 3, 0),
        ([-1.0, -0.0, 0.0], 1),
        ([-3.0, -1e-30, -1e30], 1),
        ([float("inf"), float("inf")], 0),
    ],
)
def test_zeros_infinities_and_nan(device: str, values: list[float], best: int) -> None:
    given = state(1, device)
    op(torch.tensor([values], device=device), **given)
    assert given["tokens"].tolist() == [best]


def test_opcheck() -> None:
    torch.library.opcheck(op, (torch.randn(2, 7),), state(2, ends=(3,)))


def test_it_counts_no_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        op(torch.randn(2, 7), **state(2))
    assert counter.get_total_flops() == 0
