"""Two-level sparse attention on the CPU: what it chooses, against brute force, and what it then computes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import sparse_kernel_cases
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_kernel_cases import in_pages, positions_of

from effpass.core.errors import EffpassError
from effpass.lowering.ops import cached_attention, rope_cache_write, rope_page_write  # noqa: F401  (registers the operators)
from effpass.lowering.ops import two_level_attention as operators
from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection

ops = torch.ops.effpass
CASES = [name for name, _, _ in sparse_kernel_cases.cases(device=torch.device("cpu"), dtype=torch.float32)]


def number(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


def made(how: Selection, slots: int = 200, length: int = 180, **sizes: int) -> dict[str, Any]:
    """An index with `length - 1` keys, and the arguments of the step that adds the last one."""
    B, H, G, K, V = (sizes.get(name, default) for name, default in zip("BHGKV", (2, 4, 2, 16, 8), strict=True))
    torch.manual_seed(length)
    keys, values = torch.randn(B, G, slots, K), torch.randn(B, G, slots, V)
    keys[:, :, length:], values[:, :, length:] = float("nan"), float("nan")  # nobody may read them
    positions = positions_of([length] * B, slots, 0)
    index = KeyIndex.empty(how, torch.arange(K, dtype=torch.int32).expand(G, -1).contiguous(), B, slots, K, keys.dtype)
    index.add(
        keys, torch.where(torch.arange(slots) < length - 1, positions, -1), number(0), number(length - 1), length - 1
    )
    return {
        "index": index,
        "query": torch.randn(B, H, 1, K),
        "keys": keys,
        "values": values,
        "key_positions": positions,
        "query_positions": positions[:, length - 1 : length].contiguous(),
        "filled": number(length),
        "scale": K**-0.5,
    }


def dense(case: dict[str, Any]) -> torch.Tensor:
    names = ("query", "keys", "values", "key_positions", "query_positions", "filled", "scale")
    return ops.cached_attention(*(case[name] for name in names), 0, 0.0)


@pytest.mark.parametrize("name", CASES)
def test_choices_and_sums_against_brute_force(name: str) -> None:
    of = {"device": torch.device("cpu"), "dtype": torch.float32}
    (case,) = [case for known, case, _ in sparse_kernel_cases.cases(**of) if known == name]
    assert all(value <= sparse_kernel_cases.tolerance(name, torch.float32) for value in case(ops).values())


@pytest.mark.parametrize("levels", ["both", "blocks", "tokens"])
@pytest.mark.parametrize("statistic", ["min_max", "mean", "mean_std"])
def test_a_budget_of_the_whole_length_is_dense_attention(levels: Any, statistic: Any) -> None:
    case = made(Selection(tokens=192, blocks=12, block=16, levels=levels, statistic=statistic))
    got = operators.attend(**case)
    # The same sums in another order.
    torch.testing.assert_close(got, dense(case), rtol=1e-5, atol=1e-6)
    if levels != "blocks":
        assert case["index"].chosen_tokens[0, 0].tolist() == [*range(180), *[-1] * 12]


def test_blocks_bound_the_scores_of_their_keys() -> None:
    case = made(Selection(tokens=32, blocks=4, block=16), length=177)
    operators.attend(**case)
    index = case["index"]
    exact = (case["query"].view(2, 2, 2, 16) @ case["keys"][:, :, :176].transpose(-1, -2)).sum(2)
    found = index.scores[:, :, 177 % 2, :11]
    assert (exact.view(2, 2, 11, 16).amax(-1) <= found + 1e-4).all()


def test_equal_scores_leave_the_first() -> None:
    case = made(Selection(tokens=40, blocks=4, block=16, sink=1, recent=1))
    case["query"].zero_()
    operators.attend(**case)
    # Blocks 0 and 11 are kept always; of the others, which are all alike, the first two.
    assert case["index"].chosen_blocks.tolist() == [[[0, 1, 2, 11]] * 2] * 2
    assert case["index"].chosen_tokens.tolist() == [[list(range(40))] * 2] * 2


def test_the_first_and_the_last_blocks_are_kept_whatever_their_scores() -> None:
    case = made(Selection(tokens=64, blocks=6, block=16, sink=2, recent=3))
    case["keys"][:, :, :32] = -100 * torch.sign(case["query"].view(2, 2, 2, 16).sum(2))[:, :, None]
    case["index"].add(case["keys"], case["key_positions"], number(0), number(179), 179)
    operators.attend(**case)
    assert (case["index"].chosen_blocks[:, :, :2] == torch.tensor([0, 1])).all()
    assert (case["index"].chosen_blocks[:, :, 3:] == torch.tensor([9, 10, 11])).all()


def test_sinks_of_a_padded_row_stand_at_its_first_token() -> None:
    case = made(Selection(tokens=16, blocks=3, block=16, recent=1), length=180)
    case["key_positions"][0, :70] = -1
    case["key_positions"][0, 70:180] = torch.arange(110)
    case["query_positions"][0] = 109
    case["index"].add(case["keys"], case["key_positions"], number(0), number(179), 179)
    operators.attend(**case)
    assert case["index"].chosen_blocks[0, :, 0].tolist() == [4, 4]  # slot 70 is in block 4
    assert case["index"].chosen_blocks[1, :, 0].tolist() == [0, 0]


def test_a_query_that_sees_nothing_gives_zero() -> None:
    case = made(Selection(tokens=16, blocks=4, block=16))
    case["query_positions"][1] = -1
    got = operators.attend(**case)
    assert got[1].abs().sum() == 0
    assert got[0].isfinite().all()


def test_a_pipeline_uses_the_blocks_of_the_step_before() -> None:
    plain, piped = (made(Selection(tokens=32, blocks=4, block=16, recent=1, is_pipelined=p)) for p in (False, True))
    index, query = piped["index"], torch.randn(2, 4, 1, 16)
    ops.score_blocks(query, index.statistics, index.seen, number(179), index.scores, 16, "min_max", "sum")
    operators.attend(**{**plain, "query": query})
    operators.attend(**piped)
    # Scored by the query before, blocks are those that it would have chosen itself.
    assert torch.equal(index.chosen_blocks, plain["index"].chosen_blocks)
    operators.attend(**plain)
    assert not torch.equal(index.chosen_blocks, plain["index"].chosen_blocks)
    torch.testing.assert_close(index.scores[:, :, 0], plain["index"].scores[:, :, 0])


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_an_index_that_grew_is_that_of_all_keys(data: st.DataObject) -> None:
    """Appended in any pieces, over any borders of blocks, in pages or not: the same numbers."""
    block = data.draw(st.sampled_from([16, 32]))
    slots = data.draw(st.integers(20, 150))
    how = Selection(tokens=16, blocks=4, block=block, statistic=data.draw(st.sampled_from(["min_max", "mean_std"])))
    torch.manual_seed(slots)
    keys, positions = torch.randn(2, 2, slots, 8), positions_of([slots, slots // 2], slots, 0)
    channels = torch.tensor([[0, 3, 4, 7], [1, 2, 5, 6]], dtype=torch.int32)
    stored, table = in_pages(keys, block) if data.draw(st.booleans()) else (keys, None)
    grown, whole = (KeyIndex.empty(how, channels, 2, slots, 8, keys.dtype) for _ in range(2))
    begin = 0
    while begin < slots:
        end = data.draw(st.integers(begin + 1, slots))
        here = torch.where(torch.arange(slots) < end, positions, -1)
        grown.add(stored, here, number(begin), number(end), end - begin, table)
        begin = end
    whole.add(keys, positions, number(0), number(slots), slots)
    for name in ("statistics", "seen", "labels", "ranges"):
        assert torch.equal(getattr(grown, name), getattr(whole, name)), name


def test_labels_keep_four_bits() -> None:
    index = made(Selection(tokens=16, blocks=4, block=16))["index"]
    case = made(Selection(tokens=16, blocks=4, block=16))
    labels, (step, low) = index.labels[:, :, :179], index.ranges[:, :, :179].float().unbind(-1)
    codes = torch.cat((labels & 15, labels >> 4), -1)
    back = low[..., None] + step[..., None] * codes
    # Half a step, and float16's rounding of step and low.
    assert ((back - case["keys"][:, :, :179]).abs() <= 0.51 * step[..., None] + 2e-3).all()
    assert index.bytes_per_token == pytest.approx(2 * (8 + 4 + 16 * 2 * 4 / 16 + 3 * 4 / 16), rel=0.05)


def test_bad_sizes_are_named() -> None:
    case = made(Selection(tokens=16, blocks=4, block=16))
    with pytest.raises(EffpassError, match=r"a query \(2, 4, 2, 16\) can't attend"):
        operators.attend(**{**case, "query": torch.zeros(2, 4, 2, 16)})
    with pytest.raises(EffpassError, match=r"keys \(2, 2, 100, 16\) for key_positions \(2, 200\)"):
        operators.attend(**{**case, "keys": case["keys"][:, :, :100], "values": case["values"][:, :, :100]})
    for options, message in (
        ({"block": 48}, "block is 48"),
        ({"statistic": "max"}, "statistic is 'max'"),
        ({"blocks": 2, "tokens": 64}, "2 blocks are kept, of which 1 [+] 2 always"),
        ({"blocks": 8, "tokens": 1000}, "fewer than 1000 tokens"),
    ):
        with pytest.raises(EffpassError, match=message):
            Selection(**options)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_what_a_gpu_has_kernels_for() -> None:
    both, blocks = Selection(), Selection(levels="blocks")
    half, single = torch.bfloat16, torch.float32
    taken = [
        (both, 32, 8, 128, 128, 32, half), (both, 20, 1, 576, 512, 128, half), (both, 32, 1, 256, 256, 256, single),
        (blocks, 4, 2, 16, 16, 16, single),
    ]  # fmt: skip
    refused = [
        (both, 64, 1, 128, 128, 32, half), (both, 4, 2, 512, 512, 32, half), (both, 4, 2, 16, 16, 16, single),
        (both, 20, 1, 560, 432, 128, half), (both, 32, 8, 128, 128, 32, torch.float64), (blocks, 4, 2, 8, 8, 8, half),
    ]  # fmt: skip
    assert [operators.has_kernels(*case) for case in taken + refused] == [True] * len(taken) + [False] * len(refused)


def test_opcheck() -> None:
    case = made(Selection(tokens=16, blocks=4, block=16))
    index, how = case["index"], case["index"].selection
    state = (index.statistics, index.seen, index.labels, index.ranges)
    chosen = (index.scores, index.chosen_blocks, index.chosen_tokens)
    keys, values = case["keys"].nan_to_num(), case["values"].nan_to_num()
    places = (case["key_positions"], case["query_positions"], case["filled"])
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        ops.two_level_attention.default,
        (case["query"], keys, values, None, None, *places, index.channels, *state, *chosen, 0.25, 0.0, 16, 1, 2,
         "min_max", "sum", False),
        test_utils=tests,
    )  # fmt: skip
    torch.library.opcheck(
        ops.index_keys.default,
        (keys, None, places[0], number(3), number(9), 6, index.channels, *state, how.block, how.statistic),
        test_utils=tests,
    )
    torch.library.opcheck(
        ops.score_blocks.default,
        (case["query"], index.statistics, index.seen, places[2], index.scores, 16, "min_max", "sum"),
        test_utils=tests,
    )
