"""Sharing out a budget: exact totals for whatever profile, and the layer that retains least retains most."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effpass.core.errors import EffpassError
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.peers.global_top_k import GlobalTopK
from effpass.runtime.prefix_kv.plan import Growth, Limits, Settings
from effpass.runtime.prefix_kv.policy import Policy
from effpass.runtime.prefix_kv.prefix import PrefixKV
from effpass.runtime.prefix_kv.search import apportion, threshold_counts
from effpass.runtime.prefix_kv.select import cumulative_mass, kept_slots, priority


@st.composite
def profiles(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Importance `[B, L, S]` with ties, zeros and spikes, and a seed."""
    batch, layers, slots = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(2, 40))
    kind, seed = draw(st.sampled_from(["random", "equal", "spikes", "steps"])), draw(st.integers(0, 1 << 20))
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(batch, layers, slots, generator=generator)
    if kind == "equal":
        x = torch.ones_like(x)
    elif kind == "spikes":
        x = (x > 0.9).float() * 100 + 1e-8
    elif kind == "steps":
        x = (x * 3).floor()
    return x.double() + (x.sum(2, keepdim=True) == 0), seed


def mass_of(importance: torch.Tensor) -> torch.Tensor:
    ordered = importance.sort(dim=2, descending=True).values.cumsum(2)
    return (ordered / ordered[:, :, -1:]).clamp(max=1)


@settings(max_examples=150, deadline=None)
@given(profiles(), st.floats(0.01, 1.0))
def test_every_total_is_met(profile: tuple[torch.Tensor, int], ratio: float) -> None:
    importance, seed = profile
    batch, layers, slots = importance.shape
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 3, (layers,), generator=generator).tolist()
    high = torch.randint(2, slots + 1, (batch, layers), generator=generator)
    totals = [max(round(ratio * layers * slots), sum(low))] * batch
    for search in (threshold_counts, GlobalTopK().counts):
        found = search(mass_of(importance), totals, low, high)
        for row, counts in enumerate(found):
            assert sum(counts) == min(totals[row], int(high[row].sum()))
            assert all(min(lo, hi) <= k <= hi for lo, k, hi in zip(low, counts, high[row].tolist(), strict=True))


@settings(max_examples=100, deadline=None)
@given(profiles(), st.floats(0.05, 1.0))
def test_no_other_sharing_retains_more_in_the_worst_layer(profile: tuple[torch.Tensor, int], ratio: float) -> None:
    importance, seed = profile
    mass, (batch, layers, slots) = mass_of(importance), importance.shape
    total = max(round(ratio * layers * slots), layers)
    high = torch.full((batch, layers), slots)

    def least(counts: list[int], row: int) -> float:
        return min(float(mass[row, layer, k - 1]) for layer, k in enumerate(counts))

    found = threshold_counts(mass, [total] * batch, [1] * layers, high)
    generator = torch.Generator().manual_seed(seed)
    for row in range(batch):
        for _ in range(5):
            weights = torch.rand(layers, generator=generator).tolist()
            other = apportion(weights, total, [1] * layers, [slots] * layers)
            # A few thresholds lie closer together than 40 halvings tell apart.
            assert least(found[row], row) >= least(other, row) - 1e-9


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 100), st.integers(0, 20), st.integers(0, 60)), min_size=1, max_size=8),
    st.integers(0, 400),
    st.sampled_from([1, 3, 16]),
)
def test_whole_numbers_with_an_exact_sum(layers: list[tuple[float, int, int]], total: int, page: int) -> None:
    weights, low, more = (list(x) for x in zip(*layers, strict=True))
    high = [a + b for a, b in zip(low, more, strict=True)]
    if sum(low) > min(total, sum(high)):
        with pytest.raises(EffpassError, match=f"{sum(low)} tokens are protected over all layers, and the budget is"):
            apportion(weights, total, low, high, page)
        return
    found = apportion(weights, total, low, high, page)
    assert sum(found) == min(total, sum(high))
    assert all(a <= k <= b for a, k, b in zip(low, found, high, strict=True))
    odd = [k for a, k, b in zip(low, found, high, strict=True) if k % page and k not in (a, b)]
    assert len(odd) <= 1


def test_proportions_are_kept() -> None:
    assert apportion([1, 2, 5], 80, [0, 0, 0], [100, 100, 100]) == [10, 20, 50]
    assert apportion([1, 2, 5], 80, [0, 30, 0], [100, 100, 30]) == [17, 33, 30]


def test_the_order_of_tokens() -> None:
    positions = torch.tensor([[-1, 0, 1, 2, 3, 4, 5, 6]], dtype=torch.int32)
    rank = torch.tensor([[9.0, 0, 1, 5, 3, 2, 0, 0]])
    pinned = torch.zeros_like(rank, dtype=torch.bool)
    pinned[0, 5] = True
    order = priority(rank, positions, pinned, 1, 2)
    assert order.tolist() == [[1, 5, 6, 7, 3, 4, 2, 0]]
    slots, kept = kept_slots(order, positions, 6, torch.tensor([[5]]))
    assert kept.tolist() == [[0, 2, 4, 5, 6, -1]]
    assert slots[0, :5].tolist() == [1, 3, 5, 6, 7]
    mass = cumulative_mass(rank, positions, order, 1)
    assert mass.tolist() == [[0, 2 / 11, 2 / 11, 2 / 11, 7 / 11, 10 / 11, 1, 1]]


def test_neighbors_are_kept_together() -> None:
    positions, received = torch.arange(9, dtype=torch.int32)[None], torch.zeros(1, 9)
    received[0, 4], received[0, 8] = 9, 6
    alone, together = (PrefixKV(None, "full", pool=n).rank(received, received, positions, 0) for n in (1, 3))
    assert torch.equal(alone, received)
    assert together.tolist() == [[0, 0, 0, 3, 3, 3, 0, 2, 3]]


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        (0.2, Budget(ratio=0.2)),
        (1.0, Budget(ratio=1.0)),
        (4096, Budget(tokens=4096)),
        ("512 MiB", Budget(nbytes=512 << 20)),
        ("1.5GB", Budget(nbytes=1_500_000_000)),
    ],
)
def test_budgets(given_: float | str, expected: Budget) -> None:
    assert Budget.parse(given_) == expected


@pytest.mark.parametrize("given_", [0, -3, 0.0, 1.2, "3 cats", "0 GB", "-1 GB", ""])
def test_budgets_that_are_none(given_: float | str) -> None:
    with pytest.raises(EffpassError, match="budget: got"):
        Budget.parse(given_)


def test_what_a_budget_comes_to() -> None:
    assert Budget(ratio=0.25).mean(1000, 4, 100) == 250
    assert Budget(tokens=300).mean(1000, 4, 100) == 300
    assert Budget(tokens=300).mean(200, 4, 100) == 200
    assert Budget(nbytes=80_000).mean(1000, 4, 100) == 200


def test_a_short_prompt_keeps_what_is_protected_and_a_number_of_tokens_must_hold_it() -> None:
    share = Settings(Policy(), Budget(ratio=0.1), sink=4, recent=32)
    assert Limits.of(share, 50, 1, [50] * 3, 0, 1).total == 3 * 36
    assert Limits.of(share, 20, 1, [20] * 3, 0, 1).total == 3 * 20
    with pytest.raises(EffpassError, match=r"0.1 of the tokens are 100 tokens a layer, fewer than the protected"):
        Limits.of(share, 1000, 1, [1000] * 3, 65, 1)
    tokens = Settings(Policy(), Budget(nbytes=30), sink=4, recent=32)
    with pytest.raises(EffpassError, match=r"30 bytes are 30 tokens a layer.*\n.*raise the budget"):
        Limits.of(tokens, 1000, 1, [1000] * 3, 0, 1)


def test_growth() -> None:
    limits = Limits(100, 60, 0, [100, 100])
    share = Settings(Policy(), Budget(ratio=0.3))
    grown = Growth.of(share, [40, 20], limits, 1, 1)
    assert [g.at(200) for g in grown] == [80, 40]
    fixed = Growth.of(Settings(Policy(), Budget(tokens=30)), [40, 20], limits, 1, 1)
    assert [g.at(200) for g in fixed] == [40, 20]
    later = Growth.of(Settings(Policy(), Budget(tokens=150)), [100, 100], limits, 1, 1)
    assert [g.at(120) for g in later] == [120, 120]
    assert [g.at(400) for g in later] == [150, 150]
    assert [g.at(400) for g in Growth.of(Settings(Policy(), Budget(ratio=1.0)), [100], limits, 1, 1)] == [400]
