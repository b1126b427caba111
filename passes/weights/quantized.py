"""Detection and dequantization of quantized weights; used by the passes that change or inspect weights.

Quantization schemes are detected by the names of classes and attributes, so that no quantization package needs to be
imported for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.errors import ModelError

__all__ = ["dequantize_linears", "dequantized", "plain_linear", "scheme_of", "tensor_scheme"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor_scheme(weight: Tensor) -> str | None:
    """Return the scheme of a quantized weight, as ``"torchao Int8Tensor"`` or ``"torch.float8_e4m3fn"``, else None."""
    if type(weight).__module__.split(".")[0] == "torchao":
        return f"torchao {type(weight).__name__}"
    if type(weight).__name__ in ("Params4bit", "Int8Params"):
        return f"bitsandbytes {type(weight).__name__}"
    return None if weight.dtype in _FLOATS else str(weight.dtype)


def scheme_of(module: nn.Module) -> str | None:
    """Return the quantization scheme of a layer, such as ``"bitsandbytes Linear4bit"``; None if it is not quantized."""
    name = type(module).__name__
    if hasattr(module, "base_layer"):
        return None  # a PEFT wrapper exposes the weight of the layer inside it
    if name in ("Linear4bit", "Linear8bitLt"):
        return f"bitsandbytes {name}"
    if any(hasattr(module, attribute) for attribute in ("qweight", "W_q", "weight_packed")):
        return name  # GPTQ, AWQ, HQQ, compressed-tensors
    weight = getattr(module, "weight", None)
    scheme = tensor_scheme(weight) if isinstance(weight, Tensor) else None
    return f"{name} ({scheme})" if scheme and "torchao" not in scheme else scheme


def dequantized(module: nn.Module) -> Tensor:
    """Return the weight `[out, in]` of a quantized layer as float32.

    Raises:
        ModelError: weights of this scheme can't be dequantized here.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return _from_float8(weight, getattr(module, "weight_scale_inv", None), getattr(module, "block_size", None))
    scheme = (tensor_scheme(weight) or "") if isinstance(weight, Tensor) else ""
    if scheme.startswith("torchao"):
        return weight.dequantize().float()  # type: ignore[union-attr]
    if scheme.startswith("bitsandbytes"):
        from peft.utils.integrations import dequantize_module_weight

        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            module.state_dict()  # makes bitsandbytes convert the weight back from the layout of its CPU kernel
        return dequantize_module_weight(module).detach().float()
    raise ModelError(
        f"the weight of a {type(module).__name__} ({scheme_of(module)}) can't be dequantized here",
        hint="load the model unquantized",
    )


def plain_linear(module: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Return an ordinary `nn.Linear` of `dtype` that is equivalent to a quantized layer.

    Raises:
        ModelError: as :func:`dequantized`.
    """
    weight, bias = dequantized(module).to(dtype), getattr(module, "bias", None)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().to(dtype), False))
    return linear.train(module.training)


def _from_float8(weight: Tensor, scale: Tensor | None, block_size: tuple[int, int] | None) -> Tensor:
    """Return W · s, with one scale per block of `block_size` (the last ones may be partial), or one for all of W."""
    if scale is None:
        return weight.float()
    scale = scale.float()
    if scale.dim() == 2 and block_size is not None:
        for dim, (size, block) in enumerate(zip(weight.shape, block_size, strict=True)):
            scale = scale.repeat_interleave(block, dim=dim).narrow(dim, 0, size)
    return weight.float() * scale


def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> int:
    """Replace every quantized layer by an ordinary `nn.Linear` of `dtype`, and remove the quantization config.

    All layers are replaced, not only those that an adapter changes, because loading a partially quantized checkpoint
    would silently quantize it again.

    Returns:
        The number of layers replaced.

    Raises:
        ModelError: one of them can't be dequantized; the model is unchanged.
    """
    quantized = {name: module for name, module in model.named_modules() if scheme_of(module) is not None}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if tensor_scheme(parameter) and (owner not in quantized or isinstance(quantized[owner], nn.Embedding)):
            raise ModelError(
                f"{name} ({tensor_scheme(parameter)}) is no linear layer's weight and can't be dequantized here",
                hint="load the model unquantized",
            )
    linears = {name: plain_linear(module, dtype) for name, module in quantized.items()}
    for name, linear in linears.items():
        model.set_submodule(name, linear)
    if quantized:
        for attribute in (
            "hf_quantizer",
            "quantization_method",
            "is_loaded_in_4bit",
            "is_loaded_in_8bit",
            "is_quantized",
        ):
            model.__dict__.pop(attribute, None)
        config: Any = getattr(model, "config", None)
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config
    return len(quantized)
