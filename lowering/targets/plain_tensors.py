"""Unwrapping of quantized weights into the plain tensors they consist of, while a graph is captured.

Exported files hold plain tensors, not tensor subclasses. torchao's linear layers compute on the tensors inside their
quantized weights with plain ATen operators, so a graph over these tensors, and a file made from it, does not need
torchao.
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
    """Context manager in which the quantized weights of `model` are computed from parameters that are plain tensors.

    A weight `x.weight` becomes `x.parametrizations.weight.original0` and so on. The model is restored on exit.
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
