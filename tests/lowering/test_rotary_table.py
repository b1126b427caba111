"""`rotary_table` against transformers' own rotary embedding."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import effpass.lowering.ops.rotary_table  # noqa: F401  (registers the operator)

op = torch.ops.effpass.rotary_table


def test_it_is_transformers_table_bit_for_bit() -> None:
    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=4))
    positions = torch.tensor([[0, 1, 77], [5, 6, 4095]])
    angles = positions[:, :, None].float() * embedding.inv_freq
    for dtype in (torch.float32, torch.bfloat16):
        cos, sin = embedding(torch.empty(1, dtype=dtype), positions)
        ours = op(angles, embedding.attention_scaling, dtype)
        assert torch.equal(ours[0], cos)
        assert torch.equal(ours[1], sin)


def test_opcheck_and_flops() -> None:
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(op, (torch.rand(2, 3, 5), 0.5, dtype))
    with FlopCounterMode(display=False) as counter:
        op(torch.rand(1, 1, 4), 1.0, torch.float32)
    assert counter.get_total_flops() == 0
