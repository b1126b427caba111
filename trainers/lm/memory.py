"""What a run takes of the device's memory, said before it starts.

Activations are counted by running the model on fake tensors, which have shapes and no data: the bytes of every tensor
that autograd would keep for the backward pass, each storage once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.initialization import no_init_weights

from effpass.core.errors import EffpassError
from effpass.lowering.targets.host_memory import available_memory
from effpass.trainers.lm.batches import most_pictures
from effpass.trainers.lm.config import Config
from effpass.trainers.lm.model import make_model, set_experts
from effpass.trainers.lm.optimizers import STATE_BYTES
from effpass.trainers.lm.pictures_input import PictureInput, model_inputs

__all__ = ["Estimate", "check_memory", "estimate"]

_FLOAT = 4
_CAUSAL = "effpass_causal"
# Where tensors without data pretend to be. Fused attention keeps the same for the backward pass on every device.
_SHAPES = torch.device("cpu")


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device.

    Attributes:
        parameters: how many.
        state: weights, gradients and the optimiser's state.
        activations: what is kept for the backward pass, in the stage that keeps most; None where the model can't be run
            on tensors without data.
        stage: that stage.
        available: on the device before the run; None where it does not say.
    """

    parameters: int
    state: int
    activations: int | None
    stage: int
    available: int | None

    @property
    def total(self) -> int:
        return self.state + (self.activations or 0)

    def __str__(self) -> str:
        found = "unknown" if self.available is None else f"{self.available / 1e9:.2f} GB"
        kept = "activations, which can't be counted for this model"
        if self.activations is not None:
            kept = f"{self.activations / 1e9:.2f} GB of activations in stages[{self.stage}]"
        return (
            f"{self.parameters / 1e6:.2f} M parameters; {self.total / 1e9:.2f} GB on each device:"
            f" {self.state / 1e9:.2f} GB of weights, gradients and optimiser state, and {kept}; available: {found}"
        )


def estimate(
    config: Config, model_config: object, device: torch.device, world: int, pictures: PictureInput | None = None
) -> Estimate:
    """The memory of a run on one of `world` devices.

    Args:
        pictures: how the model takes pictures; None where it takes none.
    """
    shards = world if config.fsdp else 1
    activations, stage = None, 0
    with FakeTensorMode(), _SHAPES:
        with no_init_weights():  # a vision tower's weights are drawn again where they fall outside of a range
            model: Any = make_model(model_config, None, 0)
        model.tie_weights()
        parameters = sum(p.numel() for p in model.parameters())
        # Told by fake tensors, transformers can't see that a mask is causal, and would build one as large as T².
        AttentionInterface.register(_CAUSAL, _causal_attention)
        model.set_attn_implementation(_CAUSAL if pictures is None else {"text_config": _CAUSAL})
        set_experts(model)
        with suppress(RuntimeError, NotImplementedError):  # an operator whose shapes depend on data
            activations, stage = max((_kept(config, model, i, world, pictures), i) for i in range(len(config.stages)))
    state = parameters * (2 * _FLOAT + STATE_BYTES[config.optimizer.name]) // shards
    if config.dtype == "bfloat16":
        state += 2 * parameters  # autocast's copy of the weights
    return Estimate(parameters, state, activations, stage, _available(device))


def check_memory(found: Estimate) -> None:
    """Raise an :class:`EffpassError` when the run would not fit."""
    if found.available is not None and found.total > found.available:
        raise EffpassError(
            f"the run does not fit: {found}",
            hint=f"raise 'accumulate', or lower 'batch' or 'sequence_length' of stages[{found.stage}]",
        )


def _kept(config: Config, model: Any, index: int, world: int, pictures: PictureInput | None) -> int:
    """Bytes that autograd keeps in a stage, and those that the backward pass begins with."""
    stage = config.stages[index]
    rows = max(1, stage.batch // (stage.accumulate * world))
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    storages: dict[int, tuple[object, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = (storage, storage.nbytes())  # held, so that no other takes its address
        return tensor

    ids = torch.zeros(rows, stage.sequence_length, dtype=torch.long)
    autocast = torch.autocast(_SHAPES.type, torch.bfloat16, enabled=config.dtype == "bfloat16")
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inputs = {"input_ids": ids}
        count = most_pictures(config, index, world, pictures)
        if pictures is not None and count:
            pixels = keep(torch.zeros(count, pictures.size, pictures.size, 3, dtype=torch.uint8))
            inputs = _with_pictures(model, {"input_ids": ids, "pixels": pixels}, keep)
        logits = model(**inputs, use_cache=False).logits.float()
        cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none")
    gradients = 2 * _FLOAT * logits.numel()
    return sum(size for key, (_, size) in storages.items() if key not in own) + gradients


def _with_pictures(model: Any, batch: dict[str, Tensor], keep: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What LLaVA's forward does before its language model, less its check of the tokens' values, which aren't there."""
    inputs = model_inputs(batch)
    features = torch.cat(model.get_image_features(keep(inputs["pixel_values"])).pooler_output)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    is_picture = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)[..., None]
    return {"inputs_embeds": embeddings.masked_scatter(is_picture, features.to(embeddings.dtype))}


def _causal_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any) -> Any:
    """What a model's attention layer calls; registered without a builder of masks."""
    is_grouped = query.shape[1] != key.shape[1]
    scale = kwargs.get("scaling")
    out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=is_grouped)
    return out.transpose(1, 2).contiguous(), None


def _available(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_memory()
