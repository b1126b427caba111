"""Standard PEFT LoRA adapters on the linear layers of a model, as the trainers use them with and without annealing."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from effpass.core.errors import EffpassError, ModelError
from effpass.passes.weights.attached_lora import tuner_layers
from effpass.passes.weights.quantized import scheme_of
from effpass.trainers.mona.groups import output_heads, routers

__all__ = ["LoraSettings", "add_lora", "linear_layers"]

ALL = "all-linear"


@dataclass(frozen=True)
class LoraSettings:
    """Settings of a LoRA adapter.

    Attributes:
        rank: rank r.
        alpha: numerator of the scale alpha / r; None for 2 r.
        dropout: dropout probability of the adapter's input during training.
        targets: names of linear layers as PEFT takes them (full names or suffixes), or `all-linear` for all linear
            layers except output heads and routers. Stacked experts are not linear layers and get no adapter.
            `all-linear` also leaves out layers whose names PEFT takes for parts of stacked experts.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise EffpassError(f"rank: got {self.rank}, expected at least 1")
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise EffpassError(f"alpha: got {self.alpha}, expected a positive number")
        if not 0 <= self.dropout < 1:
            raise EffpassError(f"dropout: got {self.dropout}, expected a share from 0 to below 1")

    @property
    def scale_numerator(self) -> float:
        """Numerator of the scale, with the default applied."""
        return 2 * self.rank if self.alpha is None else self.alpha


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return linear layers between hidden states by name: `nn.Linear` and GPT-2 `Conv1D`, except heads and routers."""
    heads, chosen = output_heads(model), routers(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D")
        and id(module.weight) not in heads
        and name not in chosen
    }


def add_lora(model: nn.Module, settings: LoraSettings) -> Any:
    """Add LoRA to linear layers of `model`, in place, and freeze all other parameters.

    The adapter's weights are float32. A is drawn from torch's global generator and B is zero, so that the outputs of
    the model do not change.

    Args:
        model: transformers model, or any module with linear layers.
        settings: rank, scale, dropout and target layers.

    Returns:
        The `PeftModel` around `model`.

    Raises:
        ModelError: if the model has quantized weights or adapters already, or if the targets match no linear layer that
            can have an adapter.
    """
    from peft import LoraConfig, get_peft_model

    if tuner_layers(model):
        raise ModelError(
            "the model has adapters attached already",
            hint="merge them first: effpass.prepare(model, {'version': 1, 'passes': ['merge_lora']})",
        )
    quantized = {name: scheme for name, module in model.named_modules() if (scheme := scheme_of(module)) is not None}
    if quantized:
        name, scheme = next(iter(quantized.items()))
        raise ModelError(
            f"{name} is quantized ({scheme}): what is learned beside a quantized weight can't be merged exactly",
            hint="load the model unquantized",
        )
    layers = linear_layers(model)
    wanted = (settings.targets,) if isinstance(settings.targets, str) else settings.targets
    is_all = wanted == (ALL,)
    for target in () if is_all else wanted:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ModelError(
                f"no linear layer of {type(model).__name__} is called {target!r}",
                hint=f"ends of names such as {', '.join(sorted({n.rpartition('.')[2] for n in layers})[:8])}",
            )
    mistaken = _taken_for_experts(model, layers)
    for target in () if is_all else wanted:
        if odd := sorted(name for name in mistaken if f".{name}".endswith(f".{target}")):
            raise ModelError(
                f"{odd[0]} can have no adapter: PEFT takes its name for a part of the stacked experts",
                hint=f"leave {target!r} out, or train all weights",
            )
    if not layers.keys() - mistaken:
        raise ModelError(f"{type(model).__name__} has no linear layer to put an adapter beside")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale_numerator,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=sorted(layers.keys() - mistaken) if is_all else list(wanted),
        task_type="CAUSAL_LM" if hasattr(model, "generate") else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns that it sets fan_in_fan_out for Conv1D, as it should
        return get_peft_model(model, config)  # type: ignore[arg-type]


def _taken_for_experts(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names that PEFT takes for parts of the experts that transformers 5 stacks, in any layer."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return set()
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )

    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))  # type: ignore[arg-type]
    return set(names) - set(config.target_modules or ())
