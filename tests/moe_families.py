"""Architectures with experts, beside those of `families`."""

from __future__ import annotations

from families import CONFIGS, MOE

__all__ = ["LAYERS", "MORE"]

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
