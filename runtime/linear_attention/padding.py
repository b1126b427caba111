"""Check that no token of a sequence follows padding that follows another of its tokens.

The state of linear attention passes through every place from a row's first token on, so padding there is part of the
sequence. Padding before the first token leaves the state empty, and padding behind the last one is never read.

Shapes: B batch, S tokens of the whole sequence, T new tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from effpass.core.errors import ModelError

__all__ = ["can_be_read", "check_padding"]


def check_padding(given: Mapping[str, Any]) -> None:
    """Check the padding in a call of a hybrid model; a call in a CUDA graph that is being recorded is not checked.

    Args:
        given: arguments of the call by name, of which `attention_mask` [B, S] and `effpass_cache` are read; a mask of
            another form is not checked.

    Raises:
        ModelError: if a row has padding between its tokens.
    """
    cache, mask = given.get("effpass_cache"), given.get("attention_mask")
    if cache is not None:
        positions = cache.query_positions
        if positions.shape[1] > 1 and not cache.slots.is_dense and can_be_read(positions):
            _refuse(_between_positions(positions))
    elif isinstance(mask, Tensor) and mask.dim() == 2 and can_be_read(mask):
        _refuse(_between(mask.bool()))


def can_be_read(tensor: Tensor) -> bool:
    """Whether the host can read a tensor: not while a model is traced or a CUDA graph is recorded."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor):
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _between(is_token: Tensor) -> Tensor:
    """Return the rows with padding between tokens, bool [B], from the mask of tokens, bool [B, S]."""
    begins = (is_token[:, 1:] & ~is_token[:, :-1]).sum(1) + is_token[:, :1].sum(1)
    return begins > 1


def _between_positions(positions: Tensor) -> Tensor:
    """Return the rows with padding between tokens, bool [B], from the positions of a prompt or a piece of it, [B, T].

    Positions count the tokens of a row, so only the first has position 0. The engine refuses padding behind the last.
    """
    before, after = positions[:, :-1], positions[:, 1:]
    return (((before < 0) & (after > 0)) | ((before >= 0) & (after < 0))).any(1)


def _refuse(rows: Tensor) -> None:
    found = rows.nonzero().flatten().tolist()
    if found:
        raise ModelError(
            f"row {found[0]} of the batch has padding behind its first token, where linear attention can't skip it",
            hint="pad the whole conversation on the left and pass it without the cache, or continue rows one by one",
        )
