"""Is every gradient finite, on every process: asked before anything is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from effpass.trainers.mona.distributed import agree
from effpass.trainers.mona.fused import Plan
from effpass.trainers.mona.sharding import local, local_grad

__all__ = ["all_finite", "asked", "not_finite"]


def all_finite(
    plans: Iterable[Plan], others: Sequence[Tensor], everything: Sequence[Tensor], replicas: object
) -> Tensor | None:
    """One bool on a device, the same on all processes that share parameters; None where there is no gradient.

    Args:
        plans: parameters whose gradients the kernels read.
        others: the other parameters with a gradient.
        everything: all of both.
    """
    flags: dict[torch.device, Tensor] = {}
    for plan in plans:
        plan.check_finite(flags)
    grads = [local_grad(parameter) for parameter in others]
    for kind in dict.fromkeys((grad.device, grad.dtype) for grad in grads):
        filled = [grad for grad in grads if (grad.device, grad.dtype) == kind and grad.numel()]
        if filled:
            # The largest magnitude and not the 2-norm, which overflows before its elements do.
            largest = torch.stack(torch._foreach_norm(filled, float("inf"))).isfinite().all()
            flags[kind[0]] = flags[kind[0]] & largest if kind[0] in flags else largest
    return agree(flags, everything, replicas)


def asked(finite: Tensor) -> Callable[[], bool]:
    """Send for the answer now, and wait for it when the result is called: not for what is queued in between."""
    if not finite.is_cuda:
        return lambda: bool(finite)
    answer = torch.empty((), dtype=torch.bool, pin_memory=True)
    answer.copy_(finite, non_blocking=True)
    arrived = torch.cuda.current_stream(finite.device).record_event()

    def wait() -> bool:
        arrived.synchronize()
        return bool(answer)

    return wait


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """Names of the parameters whose gradients here are not finite, for a message."""
    bad = [name for name, parameter in named if not bool(local(parameter.grad).isfinite().all())]
    shown = bad[:3] or ["a shard on another process"]
    return ", ".join(shown) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
