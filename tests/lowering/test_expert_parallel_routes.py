"""Who sends what to whom: every row once, whatever the number of stages, and back to where it came from."""

from __future__ import annotations

import pytest
import torch
from expert_exchange import start

from effpass.lowering.ops.expert_parallel_routes import arrivals

# ranks, local experts, experts a token, stages, tokens of each rank
SIZES = [
    (2, 4, 3, 1, [5, 7]),
    (2, 4, 3, 4, [5, 7]),
    (4, 6, 4, 3, [9, 0, 3, 11]),
    (3, 4, 5, 2, [20, 17, 2]),
    (4, 4, 2, 2, [1, 0, 0, 0]),
    (2, 1, 2, 1, [6, 6]),
]


def routing(world, local, each, tokens, skewed=False):
    torch.manual_seed(sum(tokens))
    ids = [torch.rand(count, world * local + 2).topk(each).indices for count in tokens]  # two that nobody holds
    if skewed:
        ids[0] = torch.full_like(ids[0], local + local // 2)
    return ids, [torch.rand(count, each) for count in tokens]


@pytest.mark.parametrize("skewed", [False, True])
@pytest.mark.parametrize(("world", "local", "each", "stages", "tokens"), SIZES)
def test_everything_arrives_once_and_comes_back(world, local, each, stages, tokens, skewed):
    ids, weights = routing(world, local, each, tokens, skewed)
    ranks = start(ids, weights, local, stages)
    number = torch.arange(sum(tokens)).split(tokens)
    pairs = [arrivals(words, plan) for words, plan in zip(ranks.words, ranks.plans, strict=True)]
    held = [ranks.arrive(list(number), me) for me in range(world)]
    for me in range(world):
        own, plan, every = pairs[me], ranks.plans[me], torch.cat(ids)
        mine = (every >= me * local) & (every < me * local + local)
        assert sorted(held[me].tolist()) == mine.any(1).nonzero()[:, 0].tolist()  # a token once
        row, expert, token = own.words[:, :3].long().unbind(1)
        assert torch.equal(held[me][row], token)
        found = sorted(zip(token.tolist(), (expert + me * local).tolist(), own.weights.tolist(), strict=True))
        where = mine.nonzero()
        assert found == sorted(
            zip(where[:, 0].tolist(), every[mine].tolist(), torch.cat(weights)[mine].tolist(), strict=True)
        )
        assert torch.equal(expert[own.order], expert.sort().values)
        assert own.starts.diff().tolist() == plan.loads
        # A row is there when the first of its experts is computed, and leaves after the last.
        arrived, left = torch.tensor(list(map(sum, plan.got))), torch.tensor(list(map(sum, plan.returned)))
        stage_of_row = torch.arange(stages).repeat_interleave(arrived)
        stage_of_leaving = torch.arange(stages).repeat_interleave(left)
        for place, (begin, end) in enumerate(zip(own.begin.tolist(), own.end.tolist(), strict=True)):
            assert len(set(row[begin:end].tolist())) == 1
            computed = expert[begin:end] // plan.size
            assert int(computed.min()) == int(stage_of_row[row[begin]])
            assert int(computed.max()) == int(stage_of_leaving[place])
    sums = [held[me][pairs[me].words[pairs[me].begin.long(), 0].long()] for me in range(world)]
    for me in range(world):
        returned, back = ranks.come_back(sums, me), ranks.departures[me].back
        here = ranks.summaries[me].first < local
        assert torch.equal(here, back >= 0)
        assert torch.equal(returned[back[here]], number[me].unsqueeze(1).expand_as(back)[here])


def test_what_travels_does_not_depend_on_stages():
    ids, weights = routing(4, 6, 4, [40, 30, 20, 10])
    rows = {stages: [plan.rows_sent for plan in start(ids, weights, 6, stages).plans] for stages in (1, 2, 3, 6)}
    assert len({tuple(sent) for sent in rows.values()}) == 1
    assert rows[1] == [sum(len({int(e) // 6 for e in token if e < 24}) for token in each) for each in ids]


def test_words_of_either_width():
    """Weights arrive bit for bit, float64 ones in two words."""
    ids, weights = routing(2, 4, 3, [5, 7])
    for dtype in (torch.float32, torch.float64):
        exact = [(w.double() / 3).to(dtype) for w in weights]
        ranks = start(ids, exact, 4, 2)
        got = torch.cat([arrivals(w, p).weights for w, p in zip(ranks.words, ranks.plans, strict=True)])
        assert got.dtype == dtype
        known = torch.cat(ids) < 8
        assert torch.equal(got.sort().values, torch.cat(exact)[known].sort().values)
