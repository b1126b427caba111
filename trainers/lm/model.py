"""The model of a run: a new one from a transformers config, or a checkpoint's weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from effpass.core.errors import EffpassError, ModelError, did_you_mean

__all__ = ["decoder_layers", "make_model", "model_config", "set_experts"]

_EXPERTS = "effpass_autocast"

# Keys that models read and not every config class lists.
_READ_BY_MODELS = ("head_dim",)


def model_config(given: dict[str, Any], tokenizer: Any, longest: int) -> Any:
    """The transformers config, with vocabulary, special tokens and positions of the run where `given` leaves them out.

    Args:
        given: the config's `model`.
        tokenizer: of the run.
        longest: tokens of the longest sequence.

    Raises:
        EffpassError: an unknown `model_type` or key, a vocabulary smaller than the tokenizer's, too few positions.
        ModelError: the checkpoint can't be read.
    """
    from transformers import AutoConfig

    if "from" in given:
        try:
            config = AutoConfig.from_pretrained(given["from"], local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"model.from: {given['from']}: {' '.join(str(error).split())[:200]}") from error
    else:
        config = _new_config(given, tokenizer, longest)
    if config.vocab_size < len(tokenizer):
        raise EffpassError(f"model.vocab_size: got {config.vocab_size}, and the tokenizer has {len(tokenizer)} tokens")
    if getattr(config, "max_position_embeddings", longest) < longest:
        raise EffpassError(
            f"model.max_position_embeddings: got {config.max_position_embeddings}, and a stage has sequences of"
            f" {longest}"
        )
    return config


def make_model(config: Any, source: str | None, seed: int) -> nn.Module:
    """The model in float32, with new weights drawn by `seed` or those of the checkpoint `source`.

    Raises:
        ModelError: the architecture has no causal language model, or the checkpoint is not one of it.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    try:
        if source is not None:
            return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
        config.dtype = torch.float32
        return AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {' '.join(str(error).split())[:300]}") from error


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated blocks of a transformers model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    yield from (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def set_experts(model: Any) -> None:
    """Let stacked experts follow autocast: their grouped products would run in float32, many times slower."""
    ExpertsInterface.register(_EXPERTS, _autocast_experts)
    model.set_experts_implementation(_EXPERTS)


def _autocast_experts(module: nn.Module, *args: Any) -> Tensor:
    """What a model's experts call, with float32 weights or, once cast, with autocast's."""
    device = args[0].device.type
    dtype = torch.get_autocast_dtype(device)
    weights = dict(module.named_parameters())
    if torch.is_autocast_enabled(device) and any(w.dtype != dtype for w in weights.values()):
        return functional_call(module, {name: w.to(dtype) for name, w in weights.items()}, args)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *args)


def _new_config(given: dict[str, Any], tokenizer: Any, longest: int) -> Any:
    from transformers import CONFIG_MAPPING

    kind = given["model_type"]
    if kind not in CONFIG_MAPPING:
        raise EffpassError(
            f"model.model_type: unknown {kind!r}{_close(kind, set(CONFIG_MAPPING))}",
            hint="transformers' names: llama, qwen3, qwen3_moe, deepseek_v3, …",
        )
    config_class = CONFIG_MAPPING[kind]
    known = {*config_class().to_dict(), *getattr(config_class, "attribute_map", {}), "model_type", *_READ_BY_MODELS}
    unknown = [name for name in given if name not in known]
    if unknown:  # transformers would keep it as an attribute that nothing reads
        raise EffpassError(f"model.{unknown[0]}: unknown key of {kind}{_close(unknown[0], known)}")
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": longest,
        "use_cache": True,
    }
    settings = {name: value for name, value in {**defaults, **given}.items() if name in known - {"model_type"}}
    try:
        return config_class(**settings)
    except Exception as error:  # transformers' own validation, of several types
        raise EffpassError(f"model: {kind} refuses it: {' '.join(str(error).split())[:300]}") from error


def _close(name: str, known: set[str]) -> str:
    found = did_you_mean(name, known)
    return found if "did you mean" in found else ""
