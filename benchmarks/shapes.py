"""Models of real shapes with random weights: for speed only, never for quality."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["SHAPES", "head_dim", "random_model"]

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m": (
        "llama",
        {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    ),
    "qwen3-1.7b": (
        "qwen3",
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
         "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "llama-3.1-8b": (
        "llama",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
    ),
    "qwen3-8b": (
        "qwen3",
        {"vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
         "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
         "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
         "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
         "tie_word_embeddings": False},
    ),
    "glm-4.7-flash": ("glm4_moe_lite", {}),  # the defaults of transformers' config
    "tiny-qwen3": (
        "qwen3",
        {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    ),
    "tiny-moe": (
        "qwen3_moe",
        {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
         "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False},
    ),
    "tiny-glm": (
        "glm4_moe_lite",
        {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "moe_intermediate_size": 32, "q_lora_rank": 24, "kv_lora_rank": 32, "qk_rope_head_dim": 16,
         "qk_nope_head_dim": 16, "v_head_dim": 16, "mlp_layer_types": ["dense", "sparse"]},
    ),
    "tiny": (
        "llama",
        {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}  # fmt: skip


def head_dim(config: Any) -> int:
    """Size of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def random_model(shape: str, device: str, dtype: torch.dtype, **overrides: Any) -> Any:
    """A transformers causal LM of this shape in `eval()` mode; weights are made on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, settings = SHAPES[shape]
    config_class: Any = type(AutoConfig.for_model(kind))
    model_class: Any = AutoModelForCausalLM._model_mapping[config_class]
    config = config_class(**{**settings, "max_position_embeddings": 8192, **overrides})
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return model_class(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
