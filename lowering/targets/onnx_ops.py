"""ONNX translations of operators for which PyTorch's exporter has none or a slow one, and a light graph clean-up.

:mod:`effpass.lowering.targets.onnx_translate` passes :func:`translations` to the exporter and applies :func:`tidy` to
its result. This module imports onnxscript, an optional dependency, so import it lazily.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import INT64, opset18, script
from onnxscript.function_libs.torch_lib.ops.nn import aten_scaled_dot_product_attention
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat, TInt
from onnxscript.optimizer import fold_constants

from effpass.lowering.targets.onnx_gated_delta_rule import gated_delta_rule

__all__ = ["tidy", "translations"]

# Untyped, because onnxscript annotates its operations as if they were executed eagerly on tensors.
op: Any = opset18


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return a map from PyTorch operators to functions of the same arguments, written in onnxscript operations."""
    table: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.scaled_dot_product_attention.default: attention,
        torch.ops.aten._grouped_mm.default: grouped_mm,
    }
    fallback = getattr(torch.ops.transformers, "grouped_mm_fallback", None)  # registered by transformers' MoE code
    if fallback is not None:
        table[fallback.default] = grouped_mm
    experts = getattr(torch.ops.effpass, "moe_ffn", None)  # registered by the pass that introduces it
    if experts is not None:
        table[experts.default] = moe_ffn
    delta_rule = getattr(torch.ops.effpass, "gated_delta_rule", None)
    if delta_rule is not None:
        table[delta_rule.default] = gated_delta_rule
    return table


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Translate softmax(scale · q kᵀ + mask) v without copying keys and values for each query head.

    The H / G query heads of each KV head become rows of one matrix product:
    query `[B, H, T, K]` → `[B, G, (H/G)·T, K]`, key `[B, G, S, K]`, value `[B, G, S, V]`, mask `[B, 1, T, S]` boolean.
    Other cases use the exporter's own translation.
    """
    heads, groups = query.shape[1], key.shape[1]
    plain = attn_mask is not None and attn_mask.dtype == ir.DataType.BOOL and attn_mask.shape[1] == 1
    sizes = (heads, groups, query.shape[3], value.shape[3])
    if not plain or is_causal or dropout_p or not all(isinstance(n, int) for n in sizes):
        return aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    dtype = query.dtype.numpy()
    # Half of the lowest finite number instead of -inf: exp still gives 0 next to any attended key, and the output of a
    # padding token that attends to nothing stays finite. It must, since as a value of the next layer it would reach the
    # other tokens as 0 · NaN.
    blocked = op.Constant(value=ir.tensor(np.array(np.finfo(dtype).min / 2, dtype)))
    zero = op.Constant(value=ir.tensor(np.array(0, dtype)))
    bias = op.Where(attn_mask, zero, blocked)  # the same in all layers, so one node remains after the clean-up
    rows = op.Mul(query, op.Constant(value=ir.tensor(np.array(scale or sizes[2] ** -0.5, dtype))))
    if heads != groups:
        rows = op.Reshape(rows, op.Constant(value_ints=[0, groups, -1, sizes[2]]))
        bias = op.Concat(*[bias] * (heads // groups), axis=2)
    scores = op.MatMul(rows, op.Transpose(key, perm=[0, 1, 3, 2]))
    out = op.MatMul(op.Softmax(op.Add(scores, bias), axis=-1), value)
    return op.Reshape(out, op.Constant(value_ints=[0, heads, -1, sizes[3]])) if heads != groups else out


def grouped_mm(rows: Any, weight: Any, ends: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Translate a grouped matrix product: out[r] = rows[r] @ weight[group of r].

    rows is `[M, K]`, sorted by group; weight is `[E, K, N]`; ends is `[E]`, the row at which each group ends.
    """
    if bias is not None or out_dtype is not None or len(rows.shape) != 2 or len(weight.shape) != 3:
        raise NotImplementedError("grouped_mm with a bias, an output dtype, or operands other than [M, K] x [E, K, N]")
    return _grouped_mm(rows, weight, ends)


@script(default_opset=opset18)
def _grouped_mm(rows: TFloat, weight: TFloat, ends: TInt) -> TFloat:
    """Loop over the groups that have rows, so that a decode step reads the weights of the chosen experts only."""
    last = op.Cast(ends, to=INT64.dtype)
    first = op.Concat(op.Constant(value_ints=[0]), op.Slice(last, [0], [-1], [0]), axis=0)
    hit = op.Squeeze(op.NonZero(op.Greater(last, first)), [0])
    count = op.Squeeze(op.Shape(hit), [0])
    out = op.CastLike(
        op.Expand(
            op.Constant(value_float=0.0),
            op.Concat(op.Shape(rows, start=0, end=1), op.Shape(weight, start=2, end=3), axis=0),
        ),
        rows,
    )
    for i in range(count):
        group = op.Gather(hit, i)
        picked = op.Range(op.Gather(first, group), op.Gather(last, group), op.Constant(value_int=1))
        product = op.MatMul(op.Gather(rows, picked), op.Gather(weight, group))
        out = op.ScatterND(out, op.Unsqueeze(picked, [1]), product)
    return out


def moe_ffn(
    x: Any,
    experts: Any,
    weights: Any,
    gate_up: Any,
    gate_up_bias: Any,
    down: Any,
    down_bias: Any,
    activation: str,
    alpha: float,
    limit: float,
    offset: float,
    interleaved: bool,
    keep: bool,
) -> Any:
    """Translate `effpass::moe_ffn`: two products, each a loop over the chosen experts, and the gate between them."""
    if keep:
        raise NotImplementedError("effpass::moe_ffn of a program that records gradients")
    each, count, width, inner = experts.shape[1], gate_up.shape[0], down.shape[1], down.shape[2]
    ids = op.Reshape(op.Cast(experts, to=INT64.dtype), op.Constant(value_ints=[-1]))
    rows = op.Reshape(
        op.Expand(op.Unsqueeze(x, [1]), op.Constant(value_ints=[1, each, 1])), op.Constant(value_ints=[-1, width])
    )
    last = op.Constant(value_int=count - 1)
    projected = _by_expert(rows, gate_up, ids)
    if gate_up_bias is not None:
        projected = op.Add(projected, op.Gather(gate_up_bias, op.Min(ids, last)))
    hidden = _gate(projected, inner, activation, alpha, limit, offset, interleaved)
    outputs = _by_expert(hidden, down, ids)
    if down_bias is not None:
        outputs = op.Add(outputs, op.Gather(down_bias, op.Min(ids, last)))
    here = op.Cast(op.LessOrEqual(ids, last), to=ir.DataType.FLOAT)
    scale = op.Mul(op.Cast(op.Reshape(weights, op.Constant(value_ints=[-1])), to=ir.DataType.FLOAT), here)
    weighted = op.Mul(op.Cast(outputs, to=ir.DataType.FLOAT), op.Unsqueeze(scale, [1]))
    total = op.ReduceSum(op.Reshape(weighted, op.Constant(value_ints=[-1, each, width])), [1], keepdims=0)
    return op.CastLike(total, x), op.CastLike(op.Constant(value_floats=[]), x)


def _gate(
    projected: Any, inner: int, activation: str, alpha: float, limit: float, offset: float, interleaved: bool
) -> Any:
    def number(value: float) -> Any:
        return op.CastLike(op.Constant(value_float=value), projected)

    start, step = (inner, 1) if not interleaved else (1, 2)
    gate = op.Slice(projected, [0], [2 * inner if interleaved else inner], [1], [step])
    up = op.Slice(projected, [start], [2 * inner], [1], [step])
    if limit:
        gate, up = op.Min(gate, number(limit)), op.Max(op.Min(up, number(limit)), number(-limit))
    if activation == "silu":
        active = op.Mul(gate, op.Sigmoid(gate if alpha == 1 else op.Mul(gate, number(alpha))))
    elif activation == "relu":
        active = op.Relu(gate)
    elif activation == "gelu":
        wide = op.Add(op.Erf(op.Mul(gate, number(0.5**0.5))), number(1.0))
        active = op.Mul(op.Mul(gate, number(0.5)), wide)
    else:
        cube = op.Mul(op.Mul(op.Mul(gate, gate), gate), number(0.044715))
        tanh = op.Tanh(op.Mul(op.Add(gate, cube), number((2 / np.pi) ** 0.5)))
        active = op.Mul(op.Mul(gate, number(0.5)), op.Add(tanh, number(1.0)))
    return op.Mul(active, op.Add(up, number(offset)) if offset else up)


@script(default_opset=opset18)
def _by_expert(rows: TFloat, weight: TFloat, ids: TInt) -> TFloat:
    """Compute out[r] = W[ids[r]] rows[r] for weight W `[E, N, K]`; out[r] is zero if ids[r] is not below E."""
    met, _, _, _ = op.Unique(ids, sorted=1)
    here = op.Compress(met, op.Less(met, op.Squeeze(op.Shape(weight, start=0, end=1), [0])))
    count = op.Squeeze(op.Shape(here), [0])
    out = op.CastLike(
        op.Expand(
            op.Constant(value_float=0.0),
            op.Concat(op.Shape(rows, start=0, end=1), op.Shape(weight, start=1, end=2), axis=0),
        ),
        rows,
    )
    for i in range(count):
        expert = op.Gather(here, i)
        picked = op.Squeeze(op.NonZero(op.Equal(ids, expert)), [0])
        product = op.Gemm(op.Gather(rows, picked), op.Gather(weight, expert), transB=1)
        out = op.ScatterND(out, op.Unsqueeze(picked, [1]), product)
    return out


def tidy(model: ir.Model) -> None:
    """Fold constants, merge equal nodes and remove unused ones, in place.

    The exporter's own optimizer does little more for a decoder and takes ten times as long, since one of its rules
    compares every pair of Slice nodes.
    """
    common.InlinePass()(model)
    fold_constants(model)
    _divide_by_root(model.graph)
    for clean in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        common.ClearMetadataAndDocStringPass(),  # removes stack traces with local paths
    ):
        clean(model)


def _divide_by_root(graph: ir.Graph) -> None:
    """Rewrite x · (1 / √v) to x / √v, the form of RMSNorm that runtimes recognize and run as one kernel."""
    for node in list(graph):
        if node.op_type != "Reciprocal" or len(node.outputs[0].uses()) != 1:
            continue
        (use,) = node.outputs[0].uses()
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if use.node.op_type != "Mul" or producer is None or producer.op_type != "Sqrt" or use.node.graph is not graph:
            continue
        old = use.node.outputs[0]
        divide = ir.node("Div", [use.node.inputs[1 - use.idx], node.inputs[0]])
        divide.outputs[0].shape, divide.outputs[0].type = old.shape, old.type
        graph.insert_after(use.node, divide)
        ir.convenience.replace_all_uses_with(old, divide.outputs[0], replace_graph_outputs=True)
        graph.remove([use.node, node], safe=True)
