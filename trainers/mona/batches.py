"""Orthogonalization and update of many matrices with few operations: matrices of equal shape form one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from effpass.core.errors import EffpassError, did_you_mean
from effpass.trainers.mona.layout import Part
from effpass.trainers.mona.newton_schulz import NewtonSchulz

__all__ = ["SCALES", "Piece", "apply_update", "orthogonalize", "scale_of"]

SCALES = ("rms_matched", "spectral")


@dataclass(frozen=True)
class Piece:
    """Block of a parameter with its orthogonalized update O, and the factor s for the shape of its matrices."""

    parameter: Tensor
    update: Tensor
    scale: float


def scale_of(kind: str, m: int, n: int) -> float:
    """Return the factor s on the learning rate for an m × n matrix.

    ``rms_matched`` is 0.2·√max(m, n), with which the root mean square of the update equals that of AdamW's updates
    (arXiv 2502.16982), so that learning rates of AdamW can be used. ``spectral`` is √max(1, m/n), where m is the output
    dimension.
    """
    if kind == "rms_matched":
        return 0.2 * math.sqrt(max(m, n))
    if kind == "spectral":
        return math.sqrt(max(1.0, m / n))
    raise EffpassError(f"unknown scale {kind!r}{did_you_mean(kind, SCALES)}")


def orthogonalize(
    parameters: Sequence[Tensor],
    updates: Sequence[Tensor],
    parts: Sequence[Sequence[Part]],
    newton_schulz: NewtonSchulz,
    scale: str,
) -> list[Piece]:
    """Return the orthogonalized updates of the parts of each parameter.

    Args:
        parameters: parameters.
        updates: update of each parameter, in its shape.
        parts: parts of each parameter.
        newton_schulz: orthogonalization.
        scale: kind of the factor s, see :func:`scale_of`.
    """
    batches: dict[tuple[int, int, torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
    for parameter, update, own in zip(parameters, updates, parts, strict=True):
        for part in own:
            block = parameter.narrow(part.dim, part.start, part.size)
            key = (*part.matrices[1:], update.dtype, update.device)
            batches.setdefault(key, []).append((block, part.take(update)))
    pieces = []
    for (m, n, *_), members in batches.items():
        matrices = [update for _, update in members]
        stacked = matrices[0] if len(matrices) == 1 else torch.cat(matrices)
        results = newton_schulz(stacked).split([len(matrix) for matrix in matrices])
        factor = scale_of(scale, m, n)
        pieces += [
            Piece(block, result.reshape(block.shape), factor)
            for (block, _), result in zip(members, results, strict=True)
        ]
    return pieces


def apply_update(pieces: Sequence[Piece], lr: float | Tensor, weight_decay: float, cautious: bool) -> None:
    """Update parameters: W ← (1 − ηλ) W − η s O.

    If `cautious`, only entries whose sign is that of O are decayed (2510.12402).
    """
    by_scale: dict[float, list[Piece]] = {}
    for piece in pieces:
        by_scale.setdefault(piece.scale, []).append(piece)
    for factor, members in by_scale.items():
        parameters = [piece.parameter for piece in members]
        updates = [piece.update for piece in members]
        if weight_decay and cautious:
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.sub_(parameter * (parameter * update > 0) * (lr * weight_decay))
        elif weight_decay:
            torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        if isinstance(lr, Tensor):
            torch._foreach_sub_(parameters, torch._foreach_mul(updates, lr * factor))
        else:
            torch._foreach_add_(parameters, updates, alpha=-lr * factor)
