"""Completions of a model while it learns, sampled by the decode engine.

The engine, and on a GPU the CUDA graph of its step, read weights where they lie: what an optimiser writes in place is
in the next completion, and so is β of an AFA adapter, which is a tensor. Nothing is merged, and nothing is copied.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from effpass.core.errors import ModelError
from effpass.runtime.attach import attach

__all__ = ["use_engine"]


def use_engine(model: Any) -> str | None:
    """Let `generate` of this instance run on the decode engine, without dropout.

    Args:
        model: a transformers causal LM, adapters in place.

    Returns:
        Why the engine can't run it, None where it can; transformers' own `generate` stays then.
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
            self.set_experts_implementation("grouped_mm")  # the engine knows what to record in its place
        try:
            return on_engine(*args, **kwargs)
        finally:
            self.train(was_training)
            if has_experts:
                self.set_experts_implementation(experts)

    model.generate = MethodType(generate, model)
    return None
