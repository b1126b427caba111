"""Tiny models with adapters of every kind, and with quantized weights, for tests of `merge_lora`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, make, quantized
from torch import nn

from effpass.passes.weights.merge_lora import MergeLora, MergeLoraOptions

peft = pytest.importorskip("peft")

# Float32 logits of size one, summed in another order: some ten units in the last place.
ROUNDING = 5e-6
LINEARS = ["q_proj", "v_proj", "up_proj"]


def attached(
    family: str = "llama", seed: int = 1, model: Any = None, make_options: dict | None = None, **config: Any
) -> Any:
    """A PeftModel in `eval()` mode whose adapter does something."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **config}
    base = make(family, **(make_options or {})) if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    stir(wrapped, seed)
    return wrapped


def stir(wrapped: nn.Module, seed: int) -> None:
    """Random values in everything that training would have changed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator))
            elif p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def logits(model: nn.Module, length: int = 12) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(length), use_cache=False).logits


def saved(wrapped: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return folder


def unchanged(model: nn.Module, seed_model: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), seed_model.parameters(), strict=True))


def plain(model: nn.Module) -> bool:
    return not any("lora" in type(m).__module__ or hasattr(m, "base_layer") for m in model.modules())


def merge(folder: Path, **options: Any) -> MergeLora:
    return MergeLora(MergeLoraOptions(adapter=folder, **options))


CASES = {
    "lora": ("llama", {}, {}, 6),
    "rslora": ("llama", {"use_rslora": True}, {}, 6),
    "dora": ("llama", {"use_dora": True}, {}, 6),
    "all-linear": ("qwen3", {"target_modules": "all-linear"}, {}, 14),
    "regex": ("llama", {"target_modules": r".*\.1\..*(q|o)_proj"}, {}, 2),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.0\..*": 3, "up_proj": 5}}, {}, 6),
    "layers": ("llama", {"layers_to_transform": [1]}, {}, 3),
    "orthogonal init": ("llama", {"init_lora_weights": "orthogonal"}, {}, 6),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, {}, 8),
    "gpt2 dora": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}, {}, 2),
    "phi3 fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}, {}, 4),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {}, 3),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, {}, 1),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}, {}, 3),
    "lora_bias": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}, {"attention_bias": True}, 4),
    "bias all": ("llama", {"bias": "all"}, {"attention_bias": True}, 14),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "norm"]}, {}, 12),
    "tied lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}, {"tie_word_embeddings": True}, 3),
    "tied embedding": ("llama", {"target_modules": ["embed_tokens"]}, {"tie_word_embeddings": True}, 1),
    "tied both": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, {"tie_word_embeddings": True}, 2),
    "tied modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}, 7),
}


# -- quantized weights ----------------------------------------------------------------------------------------------


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' class of this name: the weight is kept as bytes and scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = linear.weight.detach().abs().max() / 7
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def float8_linear(linear: nn.Linear) -> nn.Linear:
    """transformers' FP8Linear with one scale per block of 32 x 32, run in float32."""
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")

    class FP8Linear(finegrained.FP8Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, expand(self.weight_scale_inv) * self.weight.float(), self.bias)

    out, features = linear.weight.shape

    def expand(scale: torch.Tensor) -> torch.Tensor:
        return scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[:out, :features]

    quantized = FP8Linear(features, out, block_size=(32, 32))
    blocks = (
        nn.functional.pad(linear.weight.detach(), (0, -features % 32, 0, -out % 32)).unfold(0, 32, 32).unfold(1, 32, 32)
    )
    scale = blocks.abs().amax(dim=(2, 3)) / 448
    quantized.weight_scale_inv = nn.Parameter(scale)
    quantized.weight = nn.Parameter(
        (linear.weight.detach() / expand(scale)).to(torch.float8_e4m3fn), requires_grad=False
    )
    quantized.bias = linear.bias
    return quantized


def bitsandbytes_linear(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    quantized = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
    quantized.load_state_dict(linear.state_dict())
    return quantized.to("cpu")


def torchao_linear(linear: nn.Linear) -> nn.Module:
    pytest.importorskip("torchao")
    return quantized(linear, "int8")


SCHEMES = {"float8": float8_linear, "bitsandbytes": bitsandbytes_linear, "torchao": torchao_linear}
# bitsandbytes' CPU kernel rounds activations and scales to bfloat16, in its own moment.
WITHIN = {"float8": ROUNDING, "bitsandbytes": 1e-3, "torchao": ROUNDING}


def quantize(model: nn.Module, how: Any) -> nn.Module:
    """Quantize one kind of adapted layer, and others that no adapter touches."""
    names = ("q_proj", "k_proj") if how is bitsandbytes_linear else ("q_proj", "k_proj", "down_proj")
    for name, module in list(model.named_modules()):
        if name.endswith(names):
            model.set_submodule(name, how(module))
    return model
