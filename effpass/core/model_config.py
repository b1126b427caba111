"""Reads the config of a model, checks its kind, and converts loading errors of transformers to clear messages."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from effpass.core.errors import ModelError

# Model types defined by effpass → the module that registers them with transformers, imported when such a type is read.
_OWN_TYPES = {"effpass_hybrid": "effpass.runtime.linear_attention"}

__all__ = ["check_causal_lm", "check_reads_images", "hub_is_out_of_reach", "load_error", "read_config"]


def read_config(where: str | Path, name: str, **options: Any) -> Any:
    """Call ``AutoConfig.from_pretrained`` and convert its errors to a :class:`ModelError`.

    Args:
        where: hub id or folder.
        name: source as the user gave it, for messages.
        options: arguments of ``from_pretrained``.
    """
    from transformers import AutoConfig

    options = {"trust_remote_code": False, **options}
    try:
        return AutoConfig.from_pretrained(where, **options)
    except Exception as error:  # any error of transformers becomes one clear message
        own = next((module for kind, module in _OWN_TYPES.items() if f"`{kind}`" in str(error)), None)
        if own is None or own in sys.modules:
            raise load_error(error, name, None) from error
    importlib.import_module(own)
    return read_config(where, name, **options)


def check_causal_lm(config: Any, name: str, *, trust_remote_code: bool = False) -> None:
    """Raise a :class:`ModelError` unless `config` belongs to a causal language model that reads text only."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    hint = "effpass rewrites causal language models: Llama, Qwen3, Mistral, Gemma3, GPT-2, Mixtral, DeepSeek-V3, ..."
    architectures = list(getattr(config, "architectures", None) or [])
    model_type = getattr(config, "base_model_type", config.model_type)
    if model_type != config.model_type:  # a hybrid, whose class name is derived from that of its base model
        architectures = [name.removeprefix("Hybrid") for name in architectures]
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if architectures and not known.intersection(architectures):
        raise ModelError(f"{name} is a {architectures[0]}, which is no causal language model", hint=hint)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name} has the model type {config.model_type!r}, which has no causal language model", hint=hint
        )
    for part in ("vision_config", "audio_config"):
        if getattr(config, part, None) is not None:
            raise ModelError(
                f"{name} ({config.model_type}) reads more than text: its config has a {part}",
                hint="save its language model as a checkpoint of its own and pass that folder",
            )


def check_reads_images(config: Any, name: str) -> None:
    """Raise a :class:`ModelError` unless `config` belongs to a vision-language model that generates text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ModelError(
            f"{name} has the model type {config.model_type!r}, which reads no images",
            hint="leave the images out, or pass a vision-language model: LLaVA, ...",
        )


def load_error(error: Exception, name: str, quantized: Any) -> ModelError:
    """Convert an exception of transformers to a :class:`ModelError` with a clear message.

    Args:
        error: exception that transformers raised.
        name: source of the model as the user gave it.
        quantized: `quantization_config` of the config; None for ordinary weights.
    """
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return ModelError(
            f"{name} brings its own Python code, which effpass does not run unless asked",
            hint="read the code, then pass trust_remote_code=True (--trust-remote-code)",
        )
    if quantized is not None:
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized.quant_method
        return ModelError(
            f"{name} has weights quantized with {getattr(method, 'value', method)}, which can't be loaded here: {text}",
            hint="install the library named above, or use the unquantized checkpoint",
        )
    if _caused_by(error, "HFValidationError"):
        return ModelError(f"{name!r} is no folder or file here, and no name of a model on the hub: {text[:200]}")
    if _caused_by(error, "LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"):
        return ModelError(
            f"{name!r} is no folder or file here, and the model hub can't be reached",
            hint="check the name and the network, or pass a folder with the model",
        )
    if _caused_by(error, "HfHubHTTPError"):
        return ModelError(f"{name!r} is no folder or file here, and the model hub refuses it: {text[:300]}")
    return ModelError(f"{name} can't be loaded: {type(error).__name__}: {text}")


def hub_is_out_of_reach() -> bool:
    """Whether the model hub can't be reached, so that only the local cache of the hub library can be used.

    One request with a timeout answers this, whereas the library would retry for half a minute.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return True
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # versions of the library use different HTTP clients, whose errors have no common base class
        return True
    return False


def _caused_by(error: BaseException | None, *names: str) -> bool:
    """Whether `error` or one of its causes is an exception of one of the named classes."""
    while error is not None:
        if any(c.__name__ in names for c in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False
