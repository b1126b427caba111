"""Take the best token of each row and note it, in one launch: what greedy decoding does with a step's logits."""

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
    """Write each row's best token, and which rows go on; nothing waits for the device.

    The first of equal logits wins, and the first NaN beats all numbers, as in `torch.argmax` on a CPU.

    Args:
        logits: floating [R, V].
        ends: int64 [E]: tokens that end a row; -1 is none.
        pad: int64 []: the token of rows that have ended.
        tokens: int64 [R], written.
        ids: int64 [R, C], written at `column`. The caller answers for column < C.
        column: int64 [1], moved by one.
        unfinished: int64 [R], 1 or 0: rows that go on; 0 from the end of a row on.
        goes_on: bool [], written: whether any row does.
        lasted: int64 []: one more if so.
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
