"""effpass::cache_write, cached_attention and rope_cached_attention: what they mean, and what they refuse."""

from __future__ import annotations

import kernel_cases
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import effpass.lowering.ops  # noqa: F401  (registers the operators)
from effpass.core.errors import EffpassError
from effpass.lowering.ops.cached_attention import rotate

ops = torch.ops.effpass
FLOAT32 = 2e-6  # sums of up to some hundred products, relative to the largest value
BOTH = {**kernel_cases.ATTENTIONS, **kernel_cases.PREFILLS}


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("case", BOTH.values(), ids=BOTH)
def test_reference_against_float64(case):
    found = kernel_cases.attention_errors(ops, *case, device="cpu", dtype=torch.float32)
    assert found["attention"] <= FLOAT32
    assert found["unseen"] == 0


@pytest.mark.parametrize("repeat", range(1, 9))
def test_query_heads_share_the_keys_of_their_group(repeat):
    case = (2, 2 * repeat, 2, 3, 20, 16, 16, 17, 5, 0.0, 4)
    found = kernel_cases.attention_errors(ops, *case, device="cpu", dtype=torch.float32)
    assert found["attention"] <= FLOAT32


@pytest.mark.parametrize("name", kernel_cases.ROTATIONS)
def test_rope_against_float64(name):
    case = (*kernel_cases.ATTENTIONS[name], *kernel_cases.ROTATIONS[name])
    found = kernel_cases.rope_errors(ops, *case, device="cpu", dtype=torch.float32)
    assert all(found[what] <= FLOAT32 for what in ("attention", "keys", "values")), found
    assert found["other slots"] == 0


def test_rotation_is_that_of_the_models():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x, angles = torch.randn(2, 5, 3, 16).bfloat16(), torch.rand(2, 5, 8)
    cos, sin = (torch.cat((angles, angles), -1).cos().bfloat16(), torch.cat((angles, angles), -1).sin().bfloat16())
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    assert torch.equal(rotate(x, cos, sin), expected.transpose(1, 2))


def test_an_empty_cache_gives_zeros():
    query, cache, positions = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.full((2, 9), -1).int()
    for filled in (0, 9):
        out = ops.cached_attention(query, cache, cache, positions, torch.zeros(2, 1).int(), int32(filled), 1.0, 0, 0.0)
        assert out.shape == (2, 1, 4, 8)
        assert not out.any()


def test_slots_beyond_filled_are_not_read():
    case = torch.randn(1, 2, 1, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 8)
    positions, now = int32(0, 1, 2, -1, -1, -1)[None], int32(2)[None]
    expected = ops.cached_attention(*case, positions, now, int32(3), 1.0, 0, 0.0)
    case[1][:, :, 3:], case[2][:, :, 3:] = torch.nan, torch.nan
    assert torch.equal(ops.cached_attention(*case, positions, now, int32(3), 1.0, 0, 0.0), expected)


def test_large_scores_stay_finite():
    query, keys = torch.full((1, 1, 2, 4), 1e4), torch.full((1, 1, 3, 4), 1e4)
    values = torch.arange(3.0)[None, None, :, None]
    positions, now = int32(0, 1, 2)[None], int32(1, 2)[None]
    out = ops.cached_attention(query, keys, values, positions, now, int32(3), 1.0, 0, 0.0)
    assert out.flatten().tolist() == [0.5, 1.0]


def test_write_fills_its_slots_and_no_others():
    keys, values = torch.zeros(2, 1, 6, 4), torch.zeros(2, 1, 6, 2)
    new_keys, new_values = torch.randn(2, 3, 1, 4).transpose(1, 2), torch.randn(2, 3, 1, 2).transpose(1, 2)
    ops.cache_write(keys, values, new_keys, new_values, int32(2))
    assert torch.equal(keys[:, :, 2:5], new_keys)
    assert torch.equal(values[:, :, 2:5], new_values)
    assert not keys[:, :, [0, 1, 5]].any()
    assert not values[:, :, [0, 1, 5]].any()
    with pytest.raises(EffpassError, match="3 tokens from slot 4 on don't fit into 6 slots"):
        ops.cache_write(keys, values, new_keys, new_values, int32(4))


def sample() -> dict[str, torch.Tensor]:
    angles = torch.rand(1, 2, 4)
    return {
        "query": torch.randn(1, 2, 4, 8),
        "key": torch.randn(1, 2, 2, 8),
        "value": torch.randn(1, 2, 2, 6),
        "cos": torch.cat((angles, angles), -1).cos(),
        "sin": torch.cat((angles, angles), -1).sin(),
        "keys": torch.randn(1, 2, 5, 8),
        "values": torch.randn(1, 2, 5, 6),
        "key_positions": int32(0, 1, 2, 3, -1)[None],
        "query_positions": int32(2, 3)[None],
    }


def test_the_operators_are_sound():
    given = sample()
    new = given["key"].transpose(1, 2), given["value"].transpose(1, 2)
    torch.library.opcheck(ops.cache_write.default, (given["keys"], given["values"], *new, int32(2)))
    of_cache = given["keys"], given["values"], given["key_positions"], given["query_positions"]
    query = given["query"].transpose(1, 2)
    torch.library.opcheck(ops.cached_attention.default, (query, *of_cache, int32(4), 0.3, 2, 5.0))
    torch.library.opcheck(
        ops.cached_attention.default, (query.detach().requires_grad_(), *of_cache, int32(4), 0.3, 0, 0.0)
    )
    torch.library.opcheck(
        ops.rope_cached_attention.default,
        (
            *(given[name] for name in ("query", "key", "value", "cos", "sin")),
            torch.ones(8), torch.ones(8), 1e-6, 0.0, *of_cache, int32(2), 0.3, 0, 0.0,
        ),
    )  # fmt: skip


def test_gradients_of_attention_are_those_of_its_parts():
    given = sample()
    leaves = [given["query"].transpose(1, 2).contiguous(), given["keys"], given["values"]]
    for leaf in leaves:
        leaf.requires_grad_()
    positions = given["key_positions"], given["query_positions"]
    got = ops.cached_attention(*leaves, *positions, int32(5), 0.3, 0, 0.0)
    visible = (positions[0][:, None] >= 0) & (positions[0][:, None] <= positions[1][:, :, None])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *leaves, attn_mask=visible[:, None], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    out = torch.randn_like(got)
    for mine, its in zip(*(torch.autograd.grad(y, leaves, out) for y in (got, expected)), strict=True):
        torch.testing.assert_close(mine, its)


def test_flops_are_those_of_both_products():
    given = sample()
    of_cache = given["keys"], given["values"], given["key_positions"], given["query_positions"]
    with FlopCounterMode(display=False) as counter:
        ops.cached_attention(given["query"].transpose(1, 2), *of_cache, int32(4), 1.0, 0, 0.0)
    assert counter.get_total_flops() == 2 * 4 * 2 * 5 * (8 + 6)
    with FlopCounterMode(display=False) as counter:
        ops.rope_cached_attention(
            *(given[name] for name in ("query", "key", "value", "cos", "sin")), None, None, 0.0, 0.0, *of_cache,
            int32(2), 1.0, 0, 0.0,
        )  # fmt: skip
    assert counter.get_total_flops() == 2 * 4 * 2 * 5 * (8 + 6)


def test_attention_refuses_sizes_that_do_not_match():
    given = sample()
    rest = given["key_positions"], given["query_positions"], int32(4), 1.0, 0, 0.0
    with pytest.raises(EffpassError, match=r"3 query heads of size 8 can't attend to keys \(1, 2, 5, 8\)"):
        ops.cached_attention(torch.randn(1, 3, 2, 8), given["keys"], given["values"], *rest)
    with pytest.raises(EffpassError, match=r"4 query heads of size 7 can't"):
        ops.cached_attention(torch.randn(1, 4, 2, 7), given["keys"], given["values"], *rest)
    with pytest.raises(EffpassError, match=r"3 tokens .* query_positions \(1, 2\)"):
        ops.cached_attention(torch.randn(1, 4, 3, 8), given["keys"], given["values"], *rest)
