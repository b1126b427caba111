"""The step of MONA in torch operations: it defines what the kernels compute, and runs wherever they do not.

It is used on CPUs, for layouts and placements that :mod:`.fused` does not support, and under torch.compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.trainers.mona.batches import apply_update, orthogonalize
from effpass.trainers.mona.distributed import Exchange
from effpass.trainers.mona.layout import Layout, Part
from effpass.trainers.mona.newton_schulz import NewtonSchulz
from effpass.trainers.mona.sharding import is_shared, local, local_grad
from effpass.trainers.mona.update import advance, augment_exact, augment_paper

__all__ = ["Member", "extra_buffers", "step"]


@dataclass(frozen=True)
class Member:
    """Parameter with its state, its layout, and the parts of the whole (unsharded) parameter."""

    parameter: Tensor
    state: dict[str, Tensor]
    layout: Layout
    parts: tuple[Part, ...]


def extra_buffers(group: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of the buffers that the group's form of the acceleration keeps in addition to the momentum."""
    if group["alpha"] == 0:
        return ()
    return ("average",) if group["form"] == "exact" else ("acceleration", "previous_grad")


def step(
    members: Sequence[Member],
    group: dict[str, Any],
    newton_schulz: NewtonSchulz,
    exchange: Exchange,
    replicas: Any,
    finite: Tensor | None,
) -> None:
    """Take one step with the hyper-parameters of `group`.

    Args:
        members: parameters of the step.
        group: parameter group with the hyper-parameters.
        newton_schulz: orthogonalization.
        exchange: orthogonalization of matrices that are distributed over processes.
        replicas: process group of replicated plain parameters; None without replicas.
        finite: bool without dimensions; if it is false, nothing changes. None to take the step unconditionally.
    """
    written = [local(t) for member in members for t in (member.parameter, *member.state.values())]
    before = [tensor.clone() for tensor in written] if finite is not None else []
    momenta = [local(member.state["momentum"]) for member in members]
    grads = [local_grad(member.parameter).to(m.dtype) for member, m in zip(members, momenta, strict=True)]
    if finite is not None:
        grads = [torch.where(finite, grad, 0.0) for grad in grads]
    buffers = [[local(member.state[name]) for member in members] for name in extra_buffers(group)]
    if buffers:
        augment = augment_exact if group["form"] == "exact" else augment_paper
        grads = augment(grads, *buffers, alpha=group["alpha"], beta_a=group["beta_a"])
    updates = advance(grads, momenta, momentum=group["momentum"], nesterov=group["nesterov"])

    together = [is_shared(member.parameter, member.layout, replicas) for member in members]
    pieces = []
    if any(together):
        chosen = [(m, update) for m, update, shared in zip(members, updates, together, strict=True) if shared]
        pieces += exchange.orthogonalize(
            [member.parameter for member, _ in chosen],
            [update for _, update in chosen],
            [member.parts for member, _ in chosen],
            newton_schulz,
            group["scale"],
            replicas,
        )
    if not all(together):
        chosen = [(m, update) for m, update, shared in zip(members, updates, together, strict=True) if not shared]
        own = [local(member.parameter) for member, _ in chosen]
        parts = [m.layout.parts(p.shape) if p.numel() else [] for (m, _), p in zip(chosen, own, strict=True)]
        pieces += orthogonalize(own, [update for _, update in chosen], parts, newton_schulz, group["scale"])
    apply_update(pieces, group["lr"], group["weight_decay"], group["cautious"])
    for tensor, old in zip(written, before, strict=False):
        assert finite is not None
        tensor.copy_(torch.where(finite, tensor, old))
