"""Hybrid models: transformers models in which some attention layers are linear attention, as their config describes.

Model class and config class of a hybrid are subclasses of those of its model family, created on first use. In
config.json, `model_type` is ``effpass_hybrid``, `base_model_type` is that of the family, `linear_attention` holds the
layer indices and settings, and everything else is as the family writes it. A library that does not know this
`model_type` refuses the checkpoint, instead of loading it without the linear-attention layers.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from effpass.core.errors import ModelError
from effpass.runtime.linear_attention.attention_layers import attention_layers
from effpass.runtime.linear_attention.documents import CU_SEQLENS, documents
from effpass.runtime.linear_attention.layer import WIDE, GatedDeltaAttention
from effpass.runtime.linear_attention.padding import check_padding
from effpass.runtime.linear_attention.settings import GatedDeltaSettings
from effpass.runtime.passed_arguments import drops_arguments

__all__ = ["MODEL_TYPE", "hybrid_config", "is_hybrid", "linear_layers", "make_hybrid"]

MODEL_TYPE = "effpass_hybrid"


class HybridConfig(PreTrainedConfig):
    """Config class that `AutoConfig` finds for ``effpass_hybrid``; it creates configs of the family's subclass."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        base = str(config_dict.get("base_model_type"))
        if base not in CONFIG_MAPPING:
            raise ModelError(f"a hybrid of base_model_type {base!r}, which this transformers does not know")
        family: Any = CONFIG_MAPPING[base]
        config = _config_class(family).from_dict(config_dict, **kwargs)
        linear_layers(config[0] if isinstance(config, tuple) else config)  # raises for invalid settings
        return config


@functools.cache
def _config_class(base: Any) -> Any:
    """Return the config class of a family's hybrids, and register the matching model class."""
    name = f"Hybrid{base.__name__}"
    members = {"model_type": MODEL_TYPE, "base_model_type": base.model_type, "__doc__": base.__doc__}
    config = type(name, (base,), {**members, "__module__": __name__, "__reduce__": _reduced_config})
    if base in MODEL_FOR_CAUSAL_LM_MAPPING:
        AutoModelForCausalLM.register(config, _model_class(MODEL_FOR_CAUSAL_LM_MAPPING[base], config), exist_ok=True)
    return config


def _reduced_config(self: Any) -> Any:
    """Support copying and pickling of a config, whose class is not an attribute of any module."""
    return _restored_config, (type(self).__mro__[1], dict(self.__dict__))


def _restored_config(base: type, content: dict[str, Any]) -> Any:
    config = _config_class(base).__new__(_config_class(base))
    config.__dict__.update(content)
    return config


@functools.cache
def _model_class(base: Any, config_class: Any) -> Any:
    names = list(inspect.signature(base.forward).parameters)[1:]

    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        _replace(self, *linear_layers(config))

    def _init_weights(self: Any, module: nn.Module) -> None:
        base._init_weights(self, module)
        if isinstance(module, GatedDeltaAttention):
            module.reset_own_parameters()

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        check_padding(given)
        if found := documents(given):
            given |= found
            if given[CU_SEQLENS] is not None and self._not_told is not None:
                raise ModelError(
                    f"a row holds several documents, and {self._not_told} is not told where they end, as its decoder"
                    " layer does not pass on arguments that it does not know",
                    hint="give each document a row of its own, with padding",
                )
            return base.forward(self, **given)
        return base.forward(self, *args, **kwargs)

    members = {
        "config_class": config_class,
        "forward": forward,
        "_keep_in_fp32_modules_strict": {*(base._keep_in_fp32_modules_strict or ()), *WIDE},
        "__init__": __init__,
        "_init_weights": _init_weights,
        "__doc__": base.__doc__,
        "__module__": __name__,
    }
    return type(f"Hybrid{base.__name__}", (base,), members)


def is_hybrid(config: Any) -> bool:
    """Whether `config` is that of a hybrid."""
    return getattr(config, "linear_attention", None) is not None


def linear_layers(config: Any) -> tuple[list[int], GatedDeltaSettings]:
    """Return the indices of the linear-attention layers, and their settings.

    Raises:
        ModelError: if the config has no valid list of layers.
        EffpassError: if the settings are invalid.
    """
    content, count = config.linear_attention, config.num_hidden_layers
    layers = content.get("layers") if isinstance(content, Mapping) else None
    fits = isinstance(layers, list) and layers and all(type(i) is int and 0 <= i < count for i in layers)
    if not fits or len(set(layers)) != len(layers):  # type: ignore[arg-type]
        raise ModelError(f"linear_attention: layers is {layers!r}, expected numbers below {count}")
    return sorted(layers), GatedDeltaSettings.from_dict({k: v for k, v in content.items() if k != "layers"})  # type: ignore[arg-type]


def make_hybrid(model: Any, layers: Sequence[int], settings: GatedDeltaSettings) -> dict[int, GatedDeltaAttention]:
    """Replace attention layers of a model by new linear-attention layers, in place.

    Args:
        model: a transformers causal LM.
        layers: indices of the layers to replace.
        settings: settings of the new layers.

    Returns:
        The new layers by layer index; their weights are random.

    Raises:
        ModelError: if the model has no such layers, or is a hybrid already; the model is unchanged then.
    """
    config = model.config
    if is_hybrid(config):
        raise ModelError(f"{type(model).__name__} has linear attention already", hint="convert the model as it was")
    attention_layers(model, layers)
    _describe(config, layers, settings)  # one object, shared by the model's modules
    made = _replace(model, sorted(layers), settings)
    of_model: Any = type(model)
    model.__class__ = _model_class(of_model, config.__class__)
    return made


def hybrid_config(config: Any, layers: Sequence[int], settings: GatedDeltaSettings) -> Any:
    """Return the config that :func:`make_hybrid` gives a model with `config`, which is not changed."""
    config = copy.deepcopy(config)
    _describe(config, layers, settings)
    return config


def _describe(config: Any, layers: Sequence[int], settings: GatedDeltaSettings) -> None:
    base: Any = type(config)
    config.__class__ = _config_class(base)
    config.base_model_type = base.model_type
    config.linear_attention = {"layers": sorted(layers), **settings.to_dict()}


def _replace(model: Any, layers: Sequence[int], settings: GatedDeltaSettings) -> dict[int, GatedDeltaAttention]:
    config: Any = model.config
    made: dict[int, GatedDeltaAttention] = {}
    eps = next((getattr(config, n) for n in ("rms_norm_eps", "layer_norm_epsilon") if hasattr(config, n)), 1e-6)
    for index, (parent, name) in attention_layers(model, layers).items():
        old = getattr(parent, name)
        weight = next(old.parameters())
        with weight.device:
            made[index] = GatedDeltaAttention(settings, config.hidden_size, index, eps).to(weight.dtype)
        made[index].train(old.training)
        setattr(parent, name, made[index])
    model._not_told = drops_arguments(model)  # the first layer that would not learn where documents end
    return made


AutoConfig.register(MODEL_TYPE, HybridConfig, exist_ok=True)
