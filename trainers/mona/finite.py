"""Check that every gradient on every process is finite, before a step writes anything."""

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
    """Return whether all gradients are finite, as a bool on a device; processes that share parameters get the same.

    Args:
        plans: plans of the parameters whose gradients the kernels read.
        others: other parameters with a gradient.
        everything: all parameters with a gradient.
        replicas: process group of replicated plain parameters; None without replicas.

    Returns:
        The flag, or None if there is no gradient.
    """
    flags: dict[torch.device, Tensor] = {}
    for plan in plans:
        plan.check_finite(flags)
    grads = [local_grad(parameter) for parameter in others]
    for kind in dict.fromkeys((grad.device, grad.dtype) for grad in grads):
        filled = [grad for grad in grads if (grad.device, grad.dtype) == kind and grad.numel()]
        if filled:
            # The maximum norm, because the 2-norm of finite elements may overflow.
            largest = torch.stack(torch._foreach_norm(filled, float("inf"))).isfinite().all()
            flags[kind[0]] = flags[kind[0]] & largest if kind[0] in flags else largest
    return agree(flags, everything, replicas)


def asked(finite: Tensor) -> Callable[[], bool]:
    """Start copying the flag to the host, and return a function that waits for the copy and returns the flag.

    The wait does not include work that was queued in the meantime.
    """
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
    """Return the names of parameters whose gradients on this process are not finite, for a message."""
    bad = [name for name, parameter in named if not bool(local(parameter.grad).isfinite().all())]
    shown = bad[:3] or ["a shard on another process"]
    return ", ".join(shown) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
