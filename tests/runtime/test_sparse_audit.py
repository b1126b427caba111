"""How good a choice of keys is: recall and mass against sums over single keys."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sparse_kernel_cases import positions_of

from effpass.lowering.ops import two_level_attention as operators
from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection
from effpass.runtime.sparse_audit import Audit, chosen_slots, recall_and_mass

LENGTHS, SLOTS, SCALE = [90, 37], 100, 0.3  # the second row is padded on the left


def step(how: Selection, query: torch.Tensor | None = None) -> tuple[KeyIndex, torch.Tensor, tuple[Any, ...]]:
    """A step's index, query, and what `recall_and_mass` takes behind them."""
    torch.manual_seed(0)
    of_blocks = torch.randn(2, 2, 7, 1, 16).expand(-1, -1, -1, 16, -1).flatten(2, 3)[:, :, :SLOTS]
    keys, values = torch.randn(2, 2, SLOTS, 16) + 2 * of_blocks, torch.randn(2, 2, SLOTS, 8)
    positions, end = positions_of(LENGTHS, SLOTS, 0), max(LENGTHS)
    filled = torch.tensor([end], dtype=torch.int32)
    channels = torch.arange(16, dtype=torch.int32).expand(2, -1).contiguous()
    index = KeyIndex.empty(how, channels, 2, SLOTS, 16, keys.dtype)
    index.add(keys, positions, torch.zeros_like(filled), filled - 1, end - 1)
    query = torch.randn(2, 4, 1, 16) if query is None else query
    now = positions[:, end - 1 : end].contiguous()
    if how.is_pipelined:
        torch.ops.effpass.score_blocks(
            -query, index.statistics, index.seen, filled - 1, index.scores, how.block, "min_max", "sum"
        )
    operators.attend(index, query, keys, values, positions, now, filled, SCALE)
    return index, query, (keys, positions, now, SCALE)


@pytest.mark.parametrize("aggregation", ["sum", "max"])
@pytest.mark.parametrize("levels", ["both", "blocks", "tokens"])
def test_recall_and_mass_against_single_keys(levels: Any, aggregation: Any) -> None:
    how = Selection(tokens=48, blocks=4, block=16, recent=1, levels=levels, aggregation=aggregation)
    index, query, rest = step(how)
    recall, mass = recall_and_mass(index, query, *rest)
    keys, positions = rest[0], rest[1]
    for b, g in ((b, g) for b in range(2) for g in range(2)):
        there = [s for s in range(SLOTS) if positions[b, s] >= 0]
        each = {s: [float(query[b, h, 0] @ keys[b, g, s]) for h in (2 * g, 2 * g + 1)] for s in there}
        order = sorted(there, key=lambda s: -(sum(each[s]) if aggregation == "sum" else max(each[s])))
        best, chosen = set(order[:48]), set(chosen_slots(index, SLOTS)[b, g].nonzero().flatten().tolist())
        assert recall[b, g] == pytest.approx(len(best & chosen) / len(best))
        shares = []
        for h in range(2):
            weights = {s: math.exp(SCALE * each[s][h]) for s in there}
            shares.append(sum(w for s, w in weights.items() if s in chosen) / sum(weights.values()))
        assert mass[b, g] == pytest.approx(sum(shares) / 2, rel=1e-4)


def test_a_budget_of_everything_holds_everything() -> None:
    index, query, rest = step(Selection(tokens=96, blocks=7, block=16))
    recall, mass = recall_and_mass(index, query, *rest)
    assert (recall == 1).all()
    torch.testing.assert_close(mass, torch.ones_like(mass))


def test_blocks_of_another_query_hold_less() -> None:
    """What a pipeline loses where the query has turned shows."""
    how = {"tokens": 16, "blocks": 2, "block": 16, "recent": 1, "sink": 0}
    fresh, query, rest = step(Selection(**how))
    stale, _, _ = step(Selection(**how, is_pipelined=True), query)
    now, before = (recall_and_mass(index, query, *rest)[0].mean() for index in (fresh, stale))
    assert before < now < 1


def test_padding_counts_in_no_mean() -> None:
    index, query, (keys, positions, now, scale) = step(Selection(tokens=16, blocks=3, block=16, recent=1))
    audit = Audit(torch.device("cpu"))
    assert all(math.isnan(x) for x in audit.result())
    now[1] = -1
    audit.look(index, query, keys, positions, now, scale)
    audit.look(index, query, keys, positions, now, scale)
    recall, mass = recall_and_mass(index, query, keys, positions, now, scale)
    assert audit.result() == pytest.approx((float(recall[0].mean()), float(mass[0].mean())))
