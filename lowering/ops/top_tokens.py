"""The most probable tokens of each row of logits and the entropy of the row, in one read of the logits.

    log p_i = x_i − log Σ_j exp x_j        H = −Σ_j p_j log p_j  (nats)

Drafts of speculative decoding build their trees from these (:mod:`effpass.runtime.speculative.growing`).

Shapes: R rows of logits, V vocabulary size, k tokens per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "top_tokens"]

#: Maximum deviation of the kernel's log-probabilities and entropies from the reference, in nats. Both sum in float32,
#: in different orders.
TOLERANCE = 2e-5


def _top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    # Tokens are ranked by logits, since different logits may have equal log-probabilities. Among equal logits argmax
    # takes the first and topk any.
    tokens = logits.argmax(-1, keepdim=True) if k == 1 else logits.topk(k).indices
    return log_p.gather(1, tokens).float(), tokens, entropy.float()


@torch.library.custom_op(
    "effpass::top_tokens", mutates_args=(), schema="(Tensor logits, int k) -> (Tensor, Tensor, Tensor)"
)
def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k most probable tokens of each row, most probable first.

    Args:
        logits: floating-point [R, V].
        k: number of tokens, from 1 to V.

    Returns:
        Log-probabilities float32 [R, k], tokens int64 [R, k], and entropies float32 [R]. Among equal logits the kernel
        takes the first tokens; the reference guarantees this for k = 1 only.

    Raises:
        EffpassError: if k is out of range.
    """
    _check(logits, k)
    return _top_tokens(logits, k)


def _check(logits: Tensor, k: int) -> None:
    if logits.dim() != 2 or not 1 <= k <= logits.shape[1]:
        raise EffpassError(f"effpass::top_tokens: {k} tokens of logits {tuple(logits.shape)}", hint="logits are [R, V]")


@top_tokens.register_fake
def _(logits, k):  # type: ignore[no-untyped-def]
    _check(logits, k)
    of_float, rows = {"dtype": torch.float32}, logits.shape[0]
    return (
        logits.new_empty((rows, k), **of_float),
        logits.new_empty((rows, k), dtype=torch.long),
        logits.new_empty((rows,), **of_float),
    )


@top_tokens.register_kernel("cuda")
def _(logits, k):  # type: ignore[no-untyped-def]
    _check(logits, k)
    kernels = triton_kernels("top_tokens")
    if kernels and kernels.supported(logits, k):
        return kernels.top_tokens(logits, k)
    return _top_tokens(logits, k)


@register_flop_formula(torch.ops.effpass.top_tokens)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
