"""Quantised weights as the plain tensors inside them, for as long as a graph is captured.

A file holds tensors, and none of a class of somebody's own. What torchao's linear layers do with the tensors inside
their weights is plain ATen, so that a graph over those needs no torchao, and a file of it no code of torchao's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch._functorch._aot_autograd.subclass_parametrization import unwrap_tensor_subclass_parameters
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["plain_tensors"]


@contextmanager
def plain_tensors(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes its quantised weights from parameters that are plain tensors; then it is as it was.

    A weight `x.weight` becomes `x.parametrizations.weight.original0` and so on.
    """
    wrapped = {
        module: (type(module), dict(module._parameters))
        for module in model.modules()
        if any(is_traceable_wrapper_subclass(weight) for weight in module.parameters(recurse=False))
    }
    try:
        for module in wrapped:
            unwrap_tensor_subclass_parameters(module)
        yield
    finally:
        for module, (cls, parameters) in wrapped.items():
            module.__class__ = cls
            module._modules.pop("parametrizations", None)
            module._parameters.clear()
            module._parameters.update(parameters)
