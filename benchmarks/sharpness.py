"""The largest eigenvalue of a loss's Hessian, by Lanczos on exact Hessian-vector products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["top_eigenvalue"]


def top_eigenvalue(loss: Tensor, parameters: Sequence[Tensor], iterations: int = 16) -> tuple[float, float]:
    """The largest eigenvalue λ of ∂²loss, and the error bound ‖Hx − λx‖ of its vector x.

    The gradient's graph is built once; an iteration is one more backward through it.

    Args:
        loss: a scalar, of operations that can be differentiated twice.
        parameters: in float32 or float64.
        iterations: Hessian-vector products; the largest eigenvalues of a trained network stand apart, and come first.
    """
    slopes = torch.autograd.grad(loss, parameters, create_graph=True, materialize_grads=True)
    gradient = torch.cat([slope.flatten() for slope in slopes])
    generator = torch.Generator(gradient.device).manual_seed(0)
    vector = torch.randn(gradient.shape, dtype=gradient.dtype, device=gradient.device, generator=generator)
    basis = [vector / vector.norm()]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for _ in range(min(iterations, len(vector))):
        product = torch.autograd.grad(gradient, parameters, basis[-1], retain_graph=True, materialize_grads=True)
        rest = torch.cat([p.flatten() for p in product])
        diagonal.append(rest @ basis[-1])
        for _ in range(2):  # once would leave rounding errors that bring copies of the same eigenvalue
            for other in basis:
                rest = rest - (rest @ other) * other
        beside.append(rest.norm())
        if beside[-1] <= 1e-6 * diagonal[0].abs():
            break
        basis.append(rest / beside[-1])
    tridiagonal = torch.diag(torch.stack(diagonal).double())
    off = torch.stack(beside[: len(diagonal) - 1]).double() if len(diagonal) > 1 else tridiagonal.new_zeros(0)
    tridiagonal = tridiagonal + torch.diag(off, 1) + torch.diag(off, -1)
    values, vectors = torch.linalg.eigh(tridiagonal.cpu())
    return values[-1].item(), abs(beside[-1].item() * vectors[-1, -1].item())
