"""Tiny random models of the transformers architectures that effpass rewrites."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MOE = {"num_experts_per_tok": 2, "experts_implementation": "grouped_mm"}

CONFIGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4, **MOE}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16, "decoder_sparse_step": 1, **MOE},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            **MOE,
        },
    ),
}

FAMILIES = list(CONFIGS)


def writes_angles_as_a_product() -> bool:
    """Whether this transformers computes the angles of rotary embedding by `matmul`, as it did before 5.23 at least."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return " @ " in inspect.getsource(LlamaRotaryEmbedding)


def make(family: str, seed: int = 0, **overrides: Any) -> Any:
    """A float32 model in `eval()` mode with random weights fixed by `seed`."""
    transformers = importlib.import_module("transformers")
    config_name, model_name, extra = CONFIGS[family]
    common = {} if family == "gpt2" else COMMON
    settings = {**common, **extra, **overrides}
    if family == "gpt2":
        settings = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
    experts = settings.pop("experts_implementation", None)
    config = getattr(transformers, config_name)(**settings)
    if experts is not None:
        config._experts_implementation = experts
    torch.manual_seed(seed)
    return getattr(transformers, model_name)(config).eval()


def batch(length: int, *, padding: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two sequences `[2, length]`, the first with `padding` positions of left padding."""
    generator = torch.Generator().manual_seed(seed + length)
    ids = torch.randint(3, 96, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def padded(length: int) -> dict[str, torch.Tensor]:
    """Four sequences `[4, length]`, three of them padded on the left, as `generate` takes them."""
    ids = torch.randint(3, 96, (4, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((5, 0, 11, 2)):
        mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def quantized(model: Any, scheme: str) -> Any:
    """The model with torchao's weights, ``"int8"`` or ``"float8"``, in its linear layers; the others as they are."""
    ao = importlib.import_module("torchao.quantization")
    ao.quantize_(model, {"int8": ao.Int8WeightOnlyConfig, "float8": ao.Float8WeightOnlyConfig}[scheme]())
    return model


class Count:
    """A backend that counts compiled graphs and their runs, in front of another.

    Counts compilations that *returned*: with ``dynamic=True`` Dynamo calls an AOT backend once more and restarts.
    """

    def __init__(self, inner: Callable[..., Any]) -> None:
        self.inner = inner
        self.compiled = 0
        self.ran = 0

    def __call__(self, gm: Any, inputs: Any, **kwargs: Any) -> Callable[..., Any]:
        compiled = self.inner(gm, inputs, **kwargs)
        self.compiled += 1

        def run(*args: Any) -> Any:
            self.ran += 1
            return compiled(*args)

        return run
