"""MONA's element-wise part (arXiv 2605.26842, algorithm 1), on lists of tensors of any shape.

    D_k = G_k − G_{k−1}       A_k = β_a A_{k−1} + (1 − β_a) D_k
    G̃_k = G_k + α A_k         M_k = μ M_{k−1} + (1 − μ) G̃_k

With all buffers zero at first. α is negative, −1 / (2(1 − β_a)) by default; α = 0 is Muon. The paper's M_k is this one
over 1 − μ, a factor that orthogonalisation removes. Two forms give the same G̃:

* ``paper``: the buffers A and G_{k−1}.
* ``exact``: one buffer m, the plain average of gradients m_k = β_a m_{k−1} + (1 − β_a) G_k. By induction
  A_k = (1 − β_a)(G_k − m_{k−1}), so G̃_k = G_k + α(1 − β_a)(G_k − m_{k−1}); with the default α, ½(G_k + m_{k−1}).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["advance", "augment_exact", "augment_paper", "default_alpha"]


def default_alpha(beta_a: float) -> float:
    """α = −1 / (2(1 − β_a))."""
    return -1 / (2 * (1 - beta_a))


def augment_exact(grads: list[Tensor], averages: list[Tensor], *, alpha: float, beta_a: float) -> list[Tensor]:
    """G̃ from the one-buffer form; `averages`, of any floating dtype, move on in place."""
    old = [average.to(grad.dtype) for average, grad in zip(averages, grads, strict=True)]
    difference = torch._foreach_sub(grads, old)
    augmented = torch._foreach_add(grads, difference, alpha=alpha * (1 - beta_a))
    torch._foreach_add_(difference := torch._foreach_mul(difference, 1 - beta_a), old)
    torch._foreach_copy_(averages, difference)
    return list(augmented)


def augment_paper(
    grads: list[Tensor], accelerations: list[Tensor], previous: list[Tensor], *, alpha: float, beta_a: float
) -> list[Tensor]:
    """G̃ from the two-buffer form; both buffers move on in place."""
    torch._foreach_mul_(accelerations, beta_a)
    torch._foreach_add_(accelerations, torch._foreach_sub(grads, previous), alpha=1 - beta_a)
    torch._foreach_copy_(previous, grads)
    return list(torch._foreach_add(grads, accelerations, alpha=alpha))


def advance(augmented: list[Tensor], momenta: list[Tensor], *, momentum: float, nesterov: bool) -> list[Tensor]:
    """What is to be orthogonalised: M, or (1 − μ) G̃ + μ M with Nesterov's look-ahead; M moves on in place."""
    torch._foreach_lerp_(momenta, augmented, 1 - momentum)
    return list(torch._foreach_lerp(augmented, momenta, momentum)) if nesterov else momenta
