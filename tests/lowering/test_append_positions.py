"""`append_positions` against a loop, and its kernel against it."""

from __future__ import annotations

import pytest
import torch

import effpass.lowering.ops.append_positions  # noqa: F401  (registers the operator)

op = torch.ops.effpass.append_positions


def table(batch: int, slots: int, filled: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = torch.full((batch, slots), -1, dtype=torch.int32, device=device)
    positions[:, :filled] = torch.arange(filled, dtype=torch.int32, device=device)
    start = torch.full((1,), -7, dtype=torch.int32, device=device)
    return positions, start, torch.full((1,), filled, dtype=torch.int32, device=device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(
    ("batch", "rows", "tokens", "filled"), [(1, 1, 1, 0), (4, 3, 1, 5), (4, 4, 3, 5), (37, 33, 1, 8), (2, 2, 9, 0)]
)
def test_positions_stand_behind_the_slots_in_use(device: str, batch: int, rows: int, tokens: int, filled: int) -> None:
    positions, start, length = table(batch, 9, filled, device)
    new = torch.randint(-1, 99, (rows, tokens), dtype=torch.int32, device=device)
    expected = positions.clone()
    for row in range(rows):
        for token in range(tokens):
            expected[row, filled + token] = new[row, token]
    op(positions, start, length, new)
    assert torch.equal(positions, expected)
    assert (int(start), int(length)) == (filled, filled + tokens)


def test_opcheck() -> None:
    for rows, tokens in ((2, 1), (3, 4)):
        torch.library.opcheck(op, (*table(3, 9, 2), torch.ones(rows, tokens, dtype=torch.int32)))


def test_it_counts_no_flops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        op(*table(2, 9, 2), torch.ones(2, 1, dtype=torch.int32))
    assert counter.get_total_flops() == 0
