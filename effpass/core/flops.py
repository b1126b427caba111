"""FLOP formulas of operators, as expressions of their sizes.

A size is an int, or a sympy expression of a program's symbols. The formulas of PyTorch (`torch.utils.flop_counter`) are
used where they exist, so a custom operator that registers its formula there is counted. The formulas below are for
operators that PyTorch's counter sees only after decomposition. :mod:`effpass.core.cost` is built on this module.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node
from torch.utils.flop_counter import conv_flop_count, flop_registry

__all__ = [
    "Reading",
    "Size",
    "evaluate",
    "flop_formula",
    "hinted",
    "is_grouped_product",
    "larger",
    "numel",
    "packet_of",
    "smaller",
    "symbolic",
    "values_of",
]

aten = torch.ops.aten

Size: TypeAlias = "int | sympy.Expr"
#: Function that converts a dimension to a size: :func:`symbolic` or :func:`hinted`.
Reading: TypeAlias = Callable[[Any], Size]


def symbolic(dimension: Any) -> Size:
    """A dimension as an int, or as the expression of its SymInt; adds no guard."""
    return dimension.node.expr if isinstance(dimension, torch.SymInt) else dimension


def hinted(dimension: Any) -> int:
    """The size of a dimension when the program was traced; adds no guard."""
    return int(dimension.node.hint or 0) if isinstance(dimension, torch.SymInt) else dimension


def evaluate(size: Size, values: Mapping[Any, int]) -> int:
    """Evaluate `size`, with the symbols (or their names) replaced by `values`.

    Raises:
        KeyError: a symbol of `size` has no value.
    """
    if not isinstance(size, sympy.Basic):
        return int(size)
    return _evaluated(size, frozenset((str(symbol), value) for symbol, value in values.items()))


@functools.lru_cache(maxsize=4096)  # the same expressions recur in all layers
def _evaluated(size: sympy.Expr, values: frozenset[tuple[str, int]]) -> int:
    named = dict(values)
    return int(size.subs({symbol: named[str(symbol)] for symbol in size.free_symbols}))


def smaller(a: Size, b: Size) -> Size:
    """The smaller of two sizes; an int if both are ints."""
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else sympy.Min(a, b)


def larger(a: Size, b: Size) -> Size:
    """The larger of two sizes; an int if both are ints."""
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else sympy.Max(a, b)


def values_of(node: Node) -> list[torch.Tensor]:
    """The (fake) tensors that `node` computes; an empty list if it computes none."""
    value = node.meta.get("val", node.meta.get("example_value"))
    leaves = value if isinstance(value, (tuple, list)) else (value,)
    return [v for v in leaves if isinstance(v, torch.Tensor)]


def packet_of(target: Any) -> Any:
    """The operator without its overload, `aten.add` for `aten.add.Tensor`; any other target unchanged."""
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def numel(value: torch.Tensor, size: Reading) -> Size:
    """The number of elements of `value` as a size."""
    return functools.reduce(operator.mul, (size(d) for d in value.shape), 1)


class _Shape(tuple):  # type: ignore[type-arg]
    """A shape with an attribute `shape`, which makes formulas of `torch.utils.flop_counter` accept it as a tensor."""

    @property
    def shape(self) -> _Shape:
        return self


def _shape(node: Any, size: Reading) -> _Shape:
    return _Shape(size(d) for d in values_of(node)[0].shape)


def is_grouped_product(packet: Any) -> bool:
    """Whether an operator is a grouped matrix product, in which each group of tokens has its own matrix."""
    return str(packet).split(".")[-1] in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback")


def flop_formula(node: Node) -> Callable[[Node, Reading], Size] | None:
    """The FLOP formula of an operator: one of this module or of PyTorch's counter; None when there is none."""
    packet = packet_of(node.target)
    if is_grouped_product(packet):
        return _product
    return _WHOLE.get(packet) or (_registered if packet in flop_registry else None)


def _registered(node: Node, size: Reading) -> Size:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: _shape(n, size) if values_of(n) else n)
    outputs = [_Shape(size(d) for d in v.shape) for v in values_of(node)]
    return flop_registry[packet_of(node.target)](*args, **kwargs, out_val=outputs[0] if len(outputs) == 1 else outputs)


def _linear(node: Node, size: Reading) -> Size:
    return 2 * numel(values_of(node.args[0])[0], size) * _shape(node.args[1], size)[0]  # type: ignore[arg-type]


def _product(node: Node, size: Reading) -> Size:
    """matmul, mv, dot and grouped products: one multiply-add per element of the first and column of the second."""
    second = _shape(node.args[1], size)
    return 2 * numel(values_of(node.args[0])[0], size) * (second[-1] if len(second) > 1 else 1)  # type: ignore[arg-type]


def _attention(node: Node, size: Reading) -> Size:
    """Both products of attention over all pairs of positions, as in PyTorch's counter; a mask does not reduce them."""
    (*batch, tokens, key_size), key, value = (_shape(a, size) for a in node.args[:3])
    return 2 * functools.reduce(operator.mul, batch, 1) * tokens * key[-2] * (key_size + value[-1])


def _convolution(node: Node, size: Reading) -> Size:
    x, weight, out = _shape(node.args[0], size), _shape(node.args[1], size), _shape(node, size)
    return conv_flop_count(x, weight, out)  # type: ignore[arg-type,return-value]


def _einsum(node: Node, size: Reading) -> Size:
    """One multiply-add per combination of all indices."""
    equation, operands = node.args[:2]
    spelled = str(equation).replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, Size] = {}
    for letters, operand in zip(spelled, operands, strict=True):  # type: ignore[call-overload,arg-type]
        shape = _shape(operand, size)
        leading = len(shape) - len(letters.replace("...", ""))
        names = [f".{i}" for i in range(leading)] if "..." in letters else []
        sizes.update(zip([*names, *letters.replace("...", "")], shape, strict=True))
    return 2 * functools.reduce(operator.mul, sizes.values(), 1)


_WHOLE: dict[Any, Callable[[Node, Reading], Size]] = {
    aten.linear: _linear,
    aten.matmul: _product,
    aten.mv: _product,
    aten.dot: _product,
    aten.scaled_dot_product_attention: _attention,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.einsum: _einsum,
}
