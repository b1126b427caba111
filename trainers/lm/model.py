"""Model of a pretraining run: a new one from a transformers config, or one with the weights of a checkpoint.

The other trainers use :func:`make_model` and :func:`set_experts` as well, for example for memory estimates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

from effpass.core.errors import EffpassError, ModelError, did_you_mean
from effpass.trainers.lm.tokenizer import PICTURE

__all__ = [
    "auto_class",
    "compile_layers",
    "decoder_layers",
    "make_model",
    "model_config",
    "reads_pictures",
    "set_experts",
]

_EXPERTS = "effpass_autocast"

# Config keys that models read although not every config class lists them.
_READ_BY_MODELS = ("head_dim", "vision_use_head")


def model_config(given: dict[str, Any], tokenizer: Any, longest: int) -> Any:
    """Return the transformers config, completed with the vocabulary, special tokens and positions that the run needs.

    Args:
        given: section `model` of the run's config; its own values are kept.
        tokenizer: tokenizer of the run.
        longest: number of tokens of the longest sequence.

    Raises:
        EffpassError: if `model_type` or a key is unknown, the vocabulary is smaller than that of the tokenizer, or
            there are too few positions.
        ModelError: if the checkpoint can't be read.
    """
    from transformers import AutoConfig

    if "from" in given:
        try:
            config = AutoConfig.from_pretrained(given["from"], local_files_only=True)
        except (OSError, ValueError) as error:
            raise ModelError(f"model.from: {given['from']}: {' '.join(str(error).split())[:200]}") from error
    else:
        config = _new_config(given, tokenizer, longest)
    text = config.get_text_config(decoder=True)
    place = "model" if text is config else "model.text_config"
    if text.vocab_size < len(tokenizer):
        raise EffpassError(f"{place}.vocab_size: got {text.vocab_size}, and the tokenizer has {len(tokenizer)} tokens")
    if getattr(text, "max_position_embeddings", longest) < longest:
        raise EffpassError(
            f"{place}.max_position_embeddings: got {text.max_position_embeddings}, and a stage has sequences of"
            f" {longest}"
        )
    return config


def reads_pictures(config: Any) -> bool:
    """Return whether a transformers config is of the only architecture that is trained on pictures, LLaVA."""
    return config.model_type == "llava"


def auto_class(config: Any) -> Any:
    """Return the class of transformers that creates the model of a config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if reads_pictures(config) else AutoModelForCausalLM


def make_model(config: Any, source: str | None, seed: int) -> nn.Module:
    """Return the model in float32, with new weights drawn with `seed` or with the weights of the checkpoint `source`.

    Raises:
        ModelError: if the architecture has no causal language model, or if the checkpoint does not fit it.
    """
    torch.manual_seed(seed)
    auto = auto_class(config)
    try:
        if source is not None:
            return auto.from_pretrained(source, dtype=torch.float32, local_files_only=True)
        config.dtype = torch.float32
        return auto.from_config(config)
    except (OSError, ValueError) as error:
        raise ModelError(f"model: {' '.join(str(error).split())[:300]}") from error


def decoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the repeated blocks of a transformers model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    yield from (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


def compile_layers(model: Any) -> None:
    """Compile each repeated block; blocks of the language model are compiled once for each stage of the run."""
    vision = set(model.model.vision_tower.modules()) if reads_pictures(model.config) else set()
    for layer in decoder_layers(model):
        if layer in vision:
            # Dynamic shapes, since the number of pictures varies. Only the forward is compiled, because the hooks that
            # record hidden states have no effect when compiled.
            layer.forward = torch.compile(layer.forward)
        else:
            layer.compile(dynamic=False)


def set_experts(model: Any) -> None:
    """Make stacked experts follow autocast; otherwise their grouped products run in float32, many times slower."""
    ExpertsInterface.register(_EXPERTS, _autocast_experts)
    model.set_experts_implementation(_EXPERTS)


def _autocast_experts(module: nn.Module, *args: Any) -> Tensor:
    """Experts implementation that casts float32 weights to the dtype of autocast before the grouped products."""
    device = args[0].device.type
    dtype = torch.get_autocast_dtype(device)
    weights = dict(module.named_parameters())
    if torch.is_autocast_enabled(device) and any(w.dtype != dtype for w in weights.values()):
        return functional_call(module, {name: w.to(dtype) for name, w in weights.items()}, args)
    return ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, *args)


def _new_config(given: dict[str, Any], tokenizer: Any, longest: int, place: str = "model") -> Any:
    from transformers import CONFIG_MAPPING

    kind = given.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise EffpassError(
            f"{place}.model_type: unknown {kind!r}{_close(str(kind), set(CONFIG_MAPPING))}",
            hint="transformers' names: llama, qwen3, qwen3_moe, deepseek_v3, …",
        )
    config_class = CONFIG_MAPPING[kind]
    known = {*config_class().to_dict(), *getattr(config_class, "attribute_map", {}), "model_type", *_READ_BY_MODELS}
    unknown = [name for name in given if name not in known]
    if unknown:  # transformers would silently store it as an attribute that nothing reads
        raise EffpassError(f"{place}.{unknown[0]}: unknown key of {kind}{_close(unknown[0], known)}")
    defaults = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": longest,
        "use_cache": True,
    }
    if kind == "llava":
        defaults |= _parts(given, tokenizer, longest)
        given = {name: value for name, value in given.items() if name not in ("text_config", "vision_config")}
    settings = {name: value for name, value in {**defaults, **given}.items() if name in known - {"model_type"}}
    try:
        return config_class(**settings)
    except Exception as error:  # transformers' own validation, of several types
        raise EffpassError(f"{place}: {kind} refuses it: {' '.join(str(error).split())[:300]}") from error


def _parts(given: dict[str, Any], tokenizer: Any, longest: int) -> dict[str, Any]:
    """Return the configs of a vision-language model's parts, and the keys of its own config that follow from them."""
    for name in ("text_config", "vision_config"):
        if not isinstance(given.get(name), dict):
            raise EffpassError(f"model.{name}: got {given.get(name)!r}, expected a mapping with its model_type")
    text = _new_config(given["text_config"], tokenizer, longest, "model.text_config")
    vision = _new_config(given["vision_config"], tokenizer, longest, "model.vision_config")
    token = tokenizer.convert_tokens_to_ids(PICTURE)
    if token is None or token == tokenizer.unk_token_id:
        raise EffpassError(f"llava reads pictures, and the tokenizer has no token {PICTURE}", hint="tokenizer: bytes")
    return {
        "text_config": text,
        "vision_config": vision,
        "image_token_index": token,
        "image_seq_length": (vision.image_size // vision.patch_size) ** 2,
        "tie_word_embeddings": text.tie_word_embeddings,
    }


def _close(name: str, known: set[str]) -> str:
    found = did_you_mean(name, known)
    return found if "did you mean" in found else ""
