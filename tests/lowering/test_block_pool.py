"""The pool of blocks on the CPU: its state against brute force, attention that reads through it, what is refused."""

from __future__ import annotations

from typing import Any

import block_pool_cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effpass.core.errors import EffpassError
from effpass.lowering.ops import two_level_attention as operators
from effpass.lowering.ops.block_pool import COUNTED, BlockPool
from effpass.lowering.ops.two_level_attention_index import KeyIndex, Selection

ops = torch.ops.effpass
NO_ERRORS = dict.fromkeys(("table", "pages", "moves", "counts", "bytes"), 0.0)


def number(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


@pytest.mark.parametrize("name", block_pool_cases.POOLS)
def test_a_pool_against_brute_force(name: str) -> None:
    of = {"device": torch.device("cpu"), "dtype": torch.float32}
    assert block_pool_cases.pool_errors(ops, *block_pool_cases.POOLS[name], **of) == NO_ERRORS


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_pool_against_brute_force(data: st.DataObject) -> None:
    blocks, most = data.draw(st.integers(3, 14)), data.draw(st.integers(2, 5))
    case = (
        1, data.draw(st.integers(1, 2)), blocks, 16, 4, 4, data.draw(st.integers(min(most + 1, blocks), 16)), most,
        data.draw(st.integers(0, most)), data.draw(st.sampled_from([1, 16])), data.draw(st.integers(1, blocks * 16)),
        12,
    )  # fmt: skip
    of = {"device": torch.device("cpu"), "dtype": torch.float32}
    assert block_pool_cases.pool_errors(ops, *case, **of) == NO_ERRORS


@pytest.mark.parametrize("levels", ["both", "blocks"])
@pytest.mark.parametrize(("groups", "key_size", "value_size"), [(2, 16, 16), (2, 16, 8), (1, 24, 16)])
def test_attention_through_a_pool_is_attention_bit_for_bit(
    levels: Any, groups: int, key_size: int, value_size: int
) -> None:
    """Whatever is evicted, and when; heads of their own, values of another size, latents."""
    how, batch, slots, latent = Selection(tokens=48, blocks=6, block=16, levels=levels), 2, 300, groups == 1
    most = how.kept_blocks
    torch.manual_seed(key_size + value_size)
    rows = torch.zeros(batch, groups, slots, key_size if latent else key_size + value_size)
    host = torch.zeros(batch, groups, -(-slots // 16), 16, rows.shape[-1])
    positions = torch.full((batch, slots), -1, dtype=torch.int32)
    channels = torch.arange(key_size, dtype=torch.int32).expand(groups, -1).contiguous()
    resident, offloaded = (KeyIndex.empty(how, channels, batch, slots, key_size, torch.float32) for _ in range(2))
    pool = BlockPool.empty(host, most + 2, most, most)
    keys = rows[..., :key_size]
    values = rows[..., :value_size] if latent else rows[..., key_size:]
    evicted = 0
    for end in range(1, 200):
        new = torch.randn(batch, groups, 1, rows.shape[-1])
        rows[:, :, end - 1 : end] = new
        positions[:, end - 1] = end - 1
        first = value_size if latent else key_size  # as a cache is given latents: in two parts
        ops.page_write(new[..., :first], new[..., first:], number(end - 1), host, pool.pages, pool.block_table)
        query, now = torch.randn(batch, 4, 1, key_size), positions[:, end - 1 : end].contiguous()
        expected = operators.attend(resident, query, keys, values, positions, now, number(end), 0.25)
        got = operators.attend(
            offloaded, query, *pool.cached(key_size, value_size), positions, now, number(end), 0.25, 0.0,
            pool.block_table, pool.host,
        )  # fmt: skip
        assert torch.equal(got, expected)
        chosen = offloaded.chosen_tokens if levels == "both" else offloaded.chosen_blocks
        assert torch.equal(chosen, resident.chosen_tokens if levels == "both" else resident.chosen_blocks)
        pool.fetch(chosen, number(end), 1 if levels == "both" else 16)
        # Somebody else evicts what he likes, and leaves nonsense behind.
        gone = torch.rand(pool.owner.shape) < 0.3
        evicted += int((gone & (pool.owner >= 0)).sum())
        for b, g, page in gone.nonzero().tolist():
            if (block := int(pool.owner[b, g, page])) >= 0:
                pool.block_table[b, g, block] = -1
            pool.owner[b, g, page] = pool.age[b, g, page] = -1
            pool.pages.view(*pool.owner.shape, *pool.pages.shape[1:])[b, g, page] = torch.nan
    found = dict(zip(COUNTED, pool.counts.sum((0, 1)).tolist(), strict=True))
    assert evicted > 300
    assert 0 < found["missing_blocks"] < found["blocks"]
    assert 0 < found["missing_tokens"] < found["tokens"]


def test_a_pool_that_a_step_does_not_fit_into_is_refused() -> None:
    host = torch.zeros(1, 1, 20, 16, 8)
    with pytest.raises(EffpassError, match="a pool of 8 blocks, and a step wants 9"):
        BlockPool.empty(host, 8, 8, 4)
    assert BlockPool.empty(host, 9, 8, 4).owner.shape == (1, 1, 9)
    assert BlockPool.empty(host[:, :, :5], 9, 8, 4).owner.shape == (1, 1, 5)  # all there are


def test_a_token_of_another_width_is_refused() -> None:
    pool = BlockPool.empty(torch.zeros(1, 2, 4, 16, 8), 4, 3, 3)
    with pytest.raises(EffpassError, match=r"keys \(1, 2, 1, 4\) and values \(1, 2, 1, 5\) for blocks"):
        pool.write(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 5), number(0))
    with pytest.raises(EffpassError, match="one token of each head"):
        pool.write(torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4), number(0))


def test_a_host_that_does_not_belong_to_the_table_is_refused() -> None:
    how = Selection(tokens=16, blocks=3, block=16)
    index = KeyIndex.empty(how, torch.arange(4, dtype=torch.int32).expand(2, -1), 1, 64, 4, torch.float32)
    pages, table = torch.zeros(8, 16, 4), torch.zeros(1, 2, 4, dtype=torch.int32)
    arguments = (index, torch.zeros(1, 2, 1, 4), pages, pages, torch.zeros(1, 64, dtype=torch.int32))
    now = (torch.zeros(1, 1, dtype=torch.int32), number(1), 1.0, 0.0)
    with pytest.raises(EffpassError, match=r"host \(1, 2, 4, 16, 9\) for a block_table \(1, 2, 4\)"):
        operators.attend(*arguments, *now, table, torch.zeros(1, 2, 4, 16, 9))


def test_opcheck() -> None:
    pool = BlockPool.empty(torch.randn(1, 2, 8, 16, 8), 6, 4, 4)
    tests = ("test_schema", "test_faketensor")
    new = torch.randn(1, 2, 1, 4)
    torch.library.opcheck(
        ops.page_write.default, (new, new, number(20), pool.host, pool.pages, pool.block_table), test_utils=tests
    )
    state = (pool.block_table, pool.owner, pool.age, pool.clock, pool.moves, pool.moved, pool.counts)
    chosen = torch.tensor([[[0, 17, 20], [3, -1, -1]]], dtype=torch.int32)
    torch.library.opcheck(
        ops.fetch_blocks.default, (chosen, number(21), pool.host, pool.pages, *state, 1), test_utils=tests
    )
