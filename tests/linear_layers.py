"""Small linear-attention layers and hybrids for tests."""

from __future__ import annotations

import torch
import transformers
from families import COMMON, make

from effpass.runtime.linear_attention import (
    GatedDeltaAttention,
    GatedDeltaSettings,
    make_hybrid,
)

__all__ = ["FAMILIES", "MODELS", "MODES", "greedy", "hybrid", "layer", "other", "settings"]

MODES = ("gdn", "kda", "fg2", "fg2+")
FAMILIES = ("llama", "qwen3", "mistral", "gemma3", "gpt2", "deepseek_v3")


def settings(mode: str = "fg2+", heads: int = 4, **changes) -> GatedDeltaSettings:
    return GatedDeltaSettings(**{"mode": mode, "num_key_heads": heads, "num_value_heads": heads, "key_head_dim": 16,
                                 "value_head_dim": 16, "gate_rank": 8, **changes})  # fmt: skip


def layer(mode: str, **changes) -> GatedDeltaAttention:
    torch.manual_seed(0)
    made = GatedDeltaAttention(settings(mode, **changes), 24, 0).double()
    for parameter in (made.norm_weight, made.g_proj[1].bias):
        torch.nn.init.normal_(parameter)
    return made


def hybrid(family: str = "llama", layers: tuple[int, ...] = (1,), **changes):
    model = make(family)
    torch.manual_seed(0)
    make_hybrid(model, layers, settings(**changes))
    return model.eval()


def greedy(model, inputs, **options) -> torch.Tensor:
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    return model.generate(**given, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, **options)


def other(config: str, name: str, **options):
    """A tiny random model of a family that few tests need."""
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options)).eval()


OLD = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}
MODELS = {
    "gptj": lambda: other("GPTJConfig", "GPTJForCausalLM", **OLD, rotary_dim=8, bos_token_id=1, eos_token_id=2),
    "gpt_bigcode": lambda: other(
        "GPTBigCodeConfig", "GPTBigCodeForCausalLM", **OLD, bos_token_id=1, eos_token_id=2, attn_pdrop=0.0
    ),
    "stablelm": lambda: other("StableLmConfig", "StableLmForCausalLM", **COMMON),
    "qwen3_next": lambda: other(
        "Qwen3NextConfig", "Qwen3NextForCausalLM", **COMMON, head_dim=16, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, shared_expert_intermediate_size=32, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16, layer_types=["linear_attention", "full_attention"],
    ),
    "gemma3n": lambda: other(
        "Gemma3nTextConfig", "Gemma3nForCausalLM",
        **{**COMMON, "num_hidden_layers": 3, "intermediate_size": [96] * 3, "head_dim": 16},
        num_kv_shared_layers=1, layer_types=["sliding_attention", "full_attention", "full_attention"],
        vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 3,
    ),
}  # fmt: skip
