"""Sampling of completions from a model during reinforcement learning, on the decode engine.

The engine, and on a GPU the CUDA graph of its decode step, read the weights of the model in place. An optimizer writes
weights in place, so that the next completion uses them, and the same holds for β of an AFA adapter, which is a tensor.
Nothing is merged or copied.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from effpass.core.errors import ModelError
from effpass.runtime.attach import attach

__all__ = ["use_engine"]


def use_engine(model: Any) -> str | None:
    """Make `generate` of this model instance run on the decode engine, in evaluation mode.

    Args:
        model: transformers causal LM, with adapters in place.

    Returns:
        None, or the reason why the engine can't run the model, which then keeps transformers' `generate`.
    """
    try:
        attach(model)
    except ModelError as reason:
        return str(reason)
    on_engine = model.generate
    has_experts = model._can_set_experts_implementation()

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        was_training, experts = self.training, self.config._experts_implementation
        self.eval()
        if has_experts:
            self.set_experts_implementation("grouped_mm")  # the engine replaces it while it records a CUDA graph
        try:
            return on_engine(*args, **kwargs)
        finally:
            self.train(was_training)
            if has_experts:
                self.set_experts_implementation(experts)

    model.generate = MethodType(generate, model)
    return None
