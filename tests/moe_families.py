"""Architectures with experts, beside those of `families`."""

from __future__ import annotations

from typing import Any

from families import CONFIGS, MOE

__all__ = ["LAYERS", "MORE", "OTHERS"]

MORE = {
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 4, **MOE}),
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {**CONFIGS["deepseek_v3"][2]}),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "num_local_experts": 4,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **MOE,
        },
    ),
}
# Layers with experts in a model of two layers: DeepSeek's first one is dense.
LAYERS = {"mixtral": 2, "qwen3_moe": 2, "olmoe": 2, "gpt_oss": 2, "deepseek_v2": 1, "deepseek_v3": 1}

_SIZES = {"moe_intermediate_size": 32, **MOE}
_DENSE_FIRST = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_FULL = {"layer_types": ["full_attention", "full_attention"]}
# Of other families: the first words of its classes, sizes, and the layers that are rewritten or why none is.
OTHERS: dict[str, tuple[dict[str, Any], int | str]] = {
    "Qwen2Moe": ({"num_experts": 4, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}, 2),
    "Glm4Moe": ({"n_routed_experts": 4, "head_dim": 16, **_DENSE_FIRST}, 1),
    "Ernie4_5_Moe": ({"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0}, 2),
    "Phimoe": ({"num_local_experts": 4}, 2),
    "GraniteMoe": ({"num_local_experts": 4}, 2),
    "GraniteMoeShared": ({"num_local_experts": 4, "shared_intermediate_size": 32}, 2),
    "Dots1": ({"n_routed_experts": 4, "n_shared_experts": 1, **_DENSE_FIRST}, 1),
    "HunYuanMoEV1": ({"num_experts": 4, "moe_topk": 2, "head_dim": 16}, 2),
    "Qwen3Next": (
        {
            "num_experts": 4,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 32,
            "head_dim": 16,
            **_FULL,
        },
        2,
    ),
    "FlexOlmo": ({"num_experts": 4}, 2),
    "MiniMax": ({"num_local_experts": 4, **_FULL}, 2),
    "MiniMaxM2": ({"num_local_experts": 4, "head_dim": 16}, 2),
    "Lfm2Moe": ({"num_experts": 4, "num_dense_layers": 1, **_FULL}, 1),
    "Jamba": (
        {
            "num_experts": 4,
            "expert_layer_period": 1,
            "expert_layer_offset": 0,
            "attn_layer_period": 1,
            "attn_layer_offset": 0,
        },
        2,
    ),
    "SolarOpen": ({"n_routed_experts": 4, "head_dim": 16}, 2),
    "Afmoe": ({"num_experts": 4, "num_shared_experts": 1, "num_dense_layers": 1, "head_dim": 16, **_FULL}, 1),
    "Mellum": ({"num_experts": 4, "head_dim": 16}, 2),
    "Cohere2Moe": ({"num_experts": 4, "head_dim": 16}, 2),
    "NemotronH": (
        {
            "layers_block_type": ["moe", "attention"],
            "n_routed_experts": 4,
            "head_dim": 16,
            "moe_shared_expert_intermediate_size": 32,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "n_groups": 1,
            "ssm_state_size": 16,
        },
        "no gate of two halves of one product",
    ),
    "DeepseekV4": ({"n_routed_experts": 4, "head_dim": 16}, "its value is also read by gather"),
    "Llama4": (
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 1,
            "head_dim": 16,
            "experts_implementation": None,
        },
        "its experts are written neither as grouped nor as copied products, nor as a loop over them",
    ),
}
OTHERS = {name: ({**_SIZES, **sizes}, found) for name, (sizes, found) in OTHERS.items()}
