"""`rotary_table` against transformers' own rotary embedding."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import effpass.lowering.ops.rotary_table  # noqa: F401  (registers the operator)

op = torch.ops.effpass.rotary_table


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_it_is_transformers_table_bit_for_bit(stored: torch.dtype) -> None:
    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4)).to(stored)
    positions = torch.tensor([[0, 1, 77], [5, 6, 4095]])
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = embedding(torch.empty(1, dtype=dtype), positions)
        for kind in (torch.int32, torch.int64):
            ours = op(positions.to(kind), embedding.inv_freq, embedding.attention_scaling, dtype)
            assert torch.equal(ours[0], cos)
            assert torch.equal(ours[1], sin)


def test_an_angle_is_that_of_a_matrix_product_bit_for_bit() -> None:
    """Its inner dimension is 1, so that it has nothing to sum: each float32 product is rounded once in both."""
    positions = torch.randint(0, 1 << 26, (2, 1000))  # above 2^24, float32 rounds positions too
    frequencies = 1e6 ** -torch.rand(64)
    angles = (frequencies[None, :, None].expand(2, -1, 1) @ positions[:, None, :].float()).transpose(1, 2)
    both = torch.cat((angles, angles), dim=-1)
    cos, sin = op(positions, frequencies, 1.0, torch.float32)
    assert torch.equal(positions[:, :, None].float() * frequencies, angles)
    assert torch.equal(cos, both.cos())
    assert torch.equal(sin, both.sin())


def test_opcheck_and_flops() -> None:
    for positions in (torch.arange(6).view(2, 3), torch.arange(6, dtype=torch.int32).view(3, 2).T):
        for dtype in (torch.float32, torch.float16):
            torch.library.opcheck(op, (positions, torch.rand(5), 0.5, dtype))
    with FlopCounterMode(display=False) as counter:
        op(torch.ones(1, 1, dtype=torch.long), torch.rand(4), 1.0, torch.float32)
    assert counter.get_total_flops() == 0
