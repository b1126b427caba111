"""Gradients for functional operators by differentiating their reference, which the backward pass recomputes.

Decoding needs no gradients; where they are requested nevertheless, they are those of the reference, at its cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

__all__ = ["differentiate_by_reference"]


def differentiate_by_reference(op: Any, reference: Callable[..., Any]) -> None:
    """Register the gradients of `reference` for `op`, a `torch.library.custom_op` without mutated arguments."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.structure = tree_flatten(list(inputs))
        ctx.save_for_backward(*(leaf for leaf in leaves if isinstance(leaf, Tensor)))
        ctx.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def backward(ctx: Any, *gradients: Any) -> Any:
        saved = iter(ctx.saved_tensors)
        leaves = [next(saved).detach() if constant is None else constant[0] for constant in ctx.constants]
        with torch.enable_grad():
            wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
            for leaf in wanted:
                leaf.requires_grad_()
            outputs = tree_flatten(reference(*tree_unflatten(leaves, ctx.structure)))[0]
        found = iter(torch.autograd.grad(outputs, wanted, tree_flatten(gradients)[0], allow_unused=True))
        needed = {id(leaf) for leaf in wanted}
        return tuple(tree_unflatten([next(found) if id(leaf) in needed else None for leaf in leaves], ctx.structure))

    op.register_autograd(backward, setup_context=save)
