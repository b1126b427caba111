"""The model that a head is trained for, which provides features and target distributions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from effpass.runtime.speculative.session import decoder_layers

__all__ = ["Seen", "Target"]


class Seen(NamedTuple):
    """Outputs of the model for a batch of texts.

    Attributes:
        features: `[B, T, len(taps) · D]`, concatenated inputs of the tapped layers.
        logits: `[B, T, V]`, logits of the model.
    """

    features: Tensor
    logits: Tensor


class Target:
    """A frozen model with access to the inputs of some of its layers.

    Args:
        model: a transformers causal LM, which is set to `eval()` mode and frozen.
        taps: indices of the layers whose inputs are the features.
    """

    def __init__(self, model: Any, taps: tuple[int, ...]) -> None:
        self.model = model.eval().requires_grad_(False)
        self._layers = [decoder_layers(model)[tap] for tap in taps]

    @torch.no_grad()
    def see(self, input_ids: Tensor, position_ids: Tensor) -> Seen:
        """Run the model without gradients.

        Args:
            input_ids: int64 `[B, T]`, token ids of packed texts.
            position_ids: int64 `[B, T]`, positions of the tokens, which start at 0 in each text of a row.
        """
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
