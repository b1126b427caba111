"""The model that a head is learned for, as a teacher."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effpass.runtime.speculative.session import decoder_layers

__all__ = ["Seen", "Target"]


class Seen(NamedTuple):
    """What the model makes of a text.

    Attributes:
        features: `[B, T, taps D]`: inputs of the tapped layers, side by side.
        logits: `[B, T, V]`.
    """

    features: Tensor
    logits: Tensor


class Target:
    """A frozen model.

    Args:
        model: in `eval()` mode.
        taps: layers whose inputs are the features.
    """

    def __init__(self, model: Any, taps: tuple[int, ...]) -> None:
        self.model = model.eval().requires_grad_(False)
        self._layers = [decoder_layers(model)[tap] for tap in taps]

    @torch.no_grad()
    def see(self, input_ids: Tensor, position_ids: Tensor) -> Seen:
        """Run texts int64 `[B, T]`; positions start at 0 in each of a row."""
        inputs: list[Tensor] = []

        def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])

        handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in self._layers]
        try:
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return Seen(torch.cat(inputs, -1), logits)
