"""Translation of `effpass::gated_delta_rule` into ONNX operators: elementwise preparation and a Scan over the tokens.

The recurrence runs token by token rather than in chunks: a decode step has one token, and for prompts no runtime fuses
the matrix products of chunks. This module imports onnxscript, an optional dependency, so import it lazily.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import graph, opset18, script
from onnxscript.function_libs.torch_lib.tensor_typing import TFloat

from effpass.lowering.ops.gated_delta_rule_inputs import EPSILON

__all__ = ["gated_delta_rule"]

# Untyped, because onnxscript annotates its operations as if they were executed eagerly on tensors.
op: Any = opset18


def gated_delta_rule(
    q: Any,
    k: Any,
    v: Any,
    gate: Any,
    beta: Any,
    write_beta: Any,
    A_log: Any,
    dt_bias: Any,
    initial_state: Any,
    cu_seqlens: Any,
    lower_bound: float | None,
    scale: float,
    normalize: bool,
    beta_logits: bool,
) -> Any:
    """Translate the operator; see :mod:`effpass.lowering.ops.gated_delta_rule` for its arguments and results."""
    if cu_seqlens is not None:
        raise NotImplementedError("effpass::gated_delta_rule of packed sequences; give it a batch")
    heads, key_size, value_size = v.shape[2], q.shape[3], v.shape[3]
    query, key = (_repeated(_normed(_float(x), normalize), q.shape[2], heads, key_size) for x in (q, k))
    erase = _root(_float(beta), beta_logits)
    write = erase if write_beta is None else _root(_float(write_beta), beta_logits)
    erase, write = (r if len(beta.shape) == 4 else op.Unsqueeze(r, _ints(-1)) for r in (erase, write))
    is_scalar = len(gate.shape) == 3
    g = _gates(_float(gate), A_log, dt_bias, lower_bound, is_scalar)
    decay = op.Exp(op.Unsqueeze(g, _ints(-1)) if is_scalar else g)
    if initial_state is None:
        shape = op.Concat(op.Shape(q, start=0, end=1), _ints(heads, key_size, value_size), axis=0)
        initial_state = op.Expand(_number(0.0), shape)
    by_token = [op.Unsqueeze(op.Transpose(x, perm=[1, 0, 2, 3]), _ints(3)) for x in
                (op.Mul(query, _number(scale)), op.Mul(erase, key), op.Mul(write, _float(v)))]  # fmt: skip
    decay = op.Unsqueeze(op.Transpose(decay, perm=[1, 0, 2, 3]), _ints(4))
    recurrence: Any = _recurrence
    out, last = recurrence(*by_token, decay, initial_state)
    return op.CastLike(op.Transpose(op.Squeeze(out, _ints(3)), perm=[1, 0, 2, 3]), v), last


@script(default_opset=opset18)
def _recurrence(query: TFloat, key: TFloat, value: TFloat, decay: TFloat, state: TFloat) -> tuple[TFloat, TFloat]:
    """Run the recurrence with an ONNX Scan.

    query and key are [T, B, HV, 1, K], value is [T, B, HV, 1, V], decay is [T, B, HV, K or 1, 1], and state is
    [B, HV, K, V]. Returns the outputs [T, B, HV, 1, V] and the last state.
    """

    @graph()
    def token(before, q, k, v, factor):  # type: ignore[no-untyped-def]
        decayed = op.Mul(before, factor)
        change = op.Sub(v, op.MatMul(k, decayed))
        after = op.Add(decayed, op.MatMul(op.Transpose(k, perm=[0, 1, 3, 2]), change))
        return after, op.MatMul(q, after)

    last, out = op.Scan(state, query, key, value, decay, body=token, num_scan_inputs=4)
    return out, last


def _ints(*values: int) -> Any:
    return op.Constant(value_ints=list(values))


def _number(value: float) -> Any:
    return op.Constant(value=ir.tensor(np.array(value, np.float32)))


def _float(x: Any) -> Any:
    return op.Cast(x, to=ir.DataType.FLOAT)


def _normed(x: Any, normalize: bool) -> Any:
    if not normalize:
        return x
    squares = op.ReduceSum(op.Mul(x, x), _ints(-1), keepdims=1)
    return op.Div(x, op.Sqrt(op.Add(squares, _number(EPSILON))))


def _repeated(x: Any, heads: int, wanted: int, size: int) -> Any:
    if heads == wanted:
        return x
    wide = op.Expand(op.Unsqueeze(x, _ints(3)), _ints(1, 1, 1, wanted // heads, 1))
    return op.Reshape(wide, _ints(0, 0, wanted, size))


def _root(beta: Any, beta_logits: bool) -> Any:
    return op.Sqrt(op.Sigmoid(beta) if beta_logits else beta)


def _gates(gate: Any, A_log: Any, dt_bias: Any, lower_bound: float | None, is_scalar: bool) -> Any:
    if A_log is None:
        return gate
    rate = op.Exp(_float(A_log))
    if not is_scalar:
        rate = op.Unsqueeze(rate, _ints(1))
    raw = gate if dt_bias is None else op.Add(gate, _float(dt_bias))
    if lower_bound is None:
        return op.Neg(op.Mul(rate, op.Softplus(raw)))
    return op.Mul(_number(lower_bound), op.Sigmoid(op.Mul(rate, raw)))
