"""Greedy choice of the next token of each sequence, with its bookkeeping, in one kernel launch.

    token[r] = argmax_v logits[r, v] if sequence r is unfinished, else pad

The token is written to the output, and sequences that chose an end token are marked as finished.
:mod:`effpass.runtime.choice` calls the operator at the end of a decode step.

Shapes: R sequences, V vocabulary size, E end tokens, C columns of the output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["greedy_tokens"]


def _greedy_tokens(
    logits: Tensor, ends: Tensor, pad: Tensor, tokens: Tensor, ids: Tensor, column: Tensor, unfinished: Tensor,
    goes_on: Tensor, lasted: Tensor,
) -> None:  # fmt: skip
    goes = unfinished == 1
    tokens.copy_(torch.where(goes, logits.argmax(-1), pad))
    ids.index_copy_(1, column, tokens[:, None])
    column.add_(1)
    unfinished.mul_((tokens[:, None] != ends).all(1))
    goes_on.copy_(unfinished.any())
    lasted.add_(goes_on)


@torch.library.custom_op(
    "effpass::greedy_tokens",
    mutates_args=("tokens", "ids", "column", "unfinished", "goes_on", "lasted"),
    schema=(
        "(Tensor logits, Tensor ends, Tensor pad, Tensor(a!) tokens, Tensor(b!) ids, Tensor(c!) column, "
        "Tensor(d!) unfinished, Tensor(e!) goes_on, Tensor(f!) lasted) -> ()"
    ),
)
def greedy_tokens(
    logits: Tensor, ends: Tensor, pad: Tensor, tokens: Tensor, ids: Tensor, column: Tensor, unfinished: Tensor,
    goes_on: Tensor, lasted: Tensor,
) -> None:  # fmt: skip
    """Write the best token of each sequence and update which sequences are unfinished. The host does not wait.

    Among equal logits the first wins, and the first NaN beats all numbers, as in `torch.argmax` on a CPU.

    Args:
        logits: floating-point [R, V].
        ends: int64 [E], tokens that end a sequence; -1 is ignored.
        pad: int64 [], token of finished sequences.
        tokens: int64 [R], chosen tokens; written.
        ids: int64 [R, C], output, written at `column`. The caller must ensure column < C.
        column: int64 [1], current column; incremented by one.
        unfinished: int64 [R], 1 for unfinished and 0 for finished sequences; updated.
        goes_on: bool [], whether any sequence is unfinished; written.
        lasted: int64 [], number of steps after which any sequence was unfinished; updated.
    """
    _greedy_tokens(logits, ends, pad, tokens, ids, column, unfinished, goes_on, lasted)


@greedy_tokens.register_fake
def _(logits, ends, pad, tokens, ids, column, unfinished, goes_on, lasted):  # type: ignore[no-untyped-def]
    return None


@greedy_tokens.register_kernel("cuda")
def _(logits, *state):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("greedy_tokens")
    if kernels and kernels.supported(logits):
        kernels.greedy_tokens(logits, *state)
    else:
        _greedy_tokens(logits, *state)


@register_flop_formula(torch.ops.effpass.greedy_tokens)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
