"""Newton-Schulz iteration: the nearest semi-orthogonal matrix to each matrix of a batch, by matrix products only.

With X = U Σ Vᵀ, ‖X‖_F = 1, and odd quintics f_k with the chosen coefficients (:mod:`.coefficients`), the result is U
f_K(… f_1(Σ)) Vᵀ ≈ U Vᵀ. Two forms compute the same result:

* standard:  A = XXᵀ,  X ← (aI + bA + cA²) X                          per step
* gram:      G = XXᵀ,  P = aI + bG + cG²,  Q ← PQ,  G ← P²G           per step;  X ← QX once, and at one restart

G has the size of the short side M, so that for elongated matrices (N > M) the Gram form costs little more than its
products with X: 6M²N + 14M³ operations against 15M²N + 5M³ for five steps. Rounding eventually makes small eigenvalues
of G negative, which the quintics amplify; a restart from X after the second step removes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from effpass.core.errors import EffpassError, did_you_mean
from effpass.lowering.ops.symmetric_product import symmetric_product
from effpass.trainers.mona.coefficients import Coefficients, coefficients

__all__ = ["FORMS", "NewtonSchulz"]

FORMS = ("auto", "standard", "gram", "torch")

# Ratio N / M above which the Gram form has fewer operations even if symmetry is not exploited: 8N + 28M < 20N + 10M.
ELONGATED = 1.5
RESTART = 2
# Maximum number of elements per batch, which limits the memory of intermediate products.
CHUNK = 2**28


@dataclass(frozen=True)
class NewtonSchulz:
    """Settings and computation of the orthogonalization.

    Args:
        coefficients: ``"polar_express"``, ``"muon"`` or triples, see :mod:`effpass.trainers.mona.coefficients`.
        steps: number of steps; used with named coefficients only.
        form: ``"standard"``, ``"gram"``, ``"auto"`` (gram if the long side is at least 1.5 times the short one), or
            ``"torch"``: the standard form with the order of operations, and thus the rounding, of torch.optim.Muon.
        dtype: dtype of the products; None for float16 on accelerators, float32 on CPUs, and float64 for float64
            parameters. All factors are below 2¹⁰, so that the range of bfloat16 is not needed, and float16 has three
            more bits.
        eps: lower limit of the norm by which a matrix is divided, so that a matrix of zeros stays zero.
    """

    coefficients: str | Sequence[Sequence[float]] = "polar_express"
    steps: int = 5
    form: str = "auto"
    dtype: torch.dtype | None = None
    eps: float = 1e-7
    triples: Coefficients = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "triples", coefficients(self.coefficients, self.steps))
        if self.form not in FORMS:
            raise EffpassError(f"unknown Newton-Schulz form {self.form!r}{did_you_mean(self.form, FORMS)}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise EffpassError(f"Newton-Schulz dtype {self.dtype} is not a floating-point type")

    def work_dtype(self, like: Tensor) -> torch.dtype:
        """Return the dtype of the products for matrices with the device and dtype of `like`."""
        if self.dtype is not None:
            return self.dtype
        if like.dtype == torch.float64:
            return torch.float64
        return torch.float32 if like.device.type == "cpu" else torch.float16

    def is_gram(self, m: int, n: int) -> bool:
        """Return whether matrices of size m × n use the Gram form."""
        if self.form == "auto":
            return max(m, n) >= ELONGATED * min(m, n) and len(self.triples) > RESTART
        return self.form == "gram"

    def __call__(self, x: Tensor, squared_norm: Tensor | None = None) -> Tensor:
        """Orthogonalize a batch of matrices.

        Args:
            x: matrices [B, M, N] of any dtype.
            squared_norm: squared Frobenius norms ‖x_i‖_F² [B] if they are known already; None to compute them.

        Returns:
            Matrices [B, M, N] in the work dtype, with singular values inside ``band(triples)`` up to rounding.
        """
        results = [result for _, result in self.parts(x, squared_norm)]
        if not results:
            return x.to(self.work_dtype(x))
        return results[0] if len(results) == 1 else torch.cat(results)

    def parts(self, x: Tensor, squared_norm: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the result in pieces, each with the index of its first matrix and matrices [b, M, N].

        Working on pieces limits the memory of intermediate products.
        """
        dtype = self.work_dtype(x)
        iterate = self._gram if self.is_gram(*x.shape[-2:]) else self._standard
        iterate = self._torch_order if self.form == "torch" else iterate
        size = max(1, CHUNK // max(1, x.shape[-2] * x.shape[-1]))
        for start in range(0, x.shape[0], size):
            norms = None if squared_norm is None else squared_norm[start : start + size]
            yield start, iterate(self._normalized(x[start : start + size], norms, dtype))

    def _normalized(self, x: Tensor, squared_norm: Tensor | None, dtype: torch.dtype) -> Tensor:
        if squared_norm is not None and x.is_cuda and not torch.compiler.is_compiling():
            from effpass.lowering.kernels.mona import normalize

            normalize(x, squared_norm, out := torch.empty_like(x, dtype=dtype), self.eps)
            return out
        x = x.float() if dtype == torch.float16 else x.to(dtype)  # float16 has no range for values before normalization
        if squared_norm is None:
            norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
        else:
            norm = squared_norm.sqrt().to(x.dtype)[:, None, None]
        return (x / norm.clamp(min=self.eps)).to(dtype)

    def _standard(self, x: Tensor) -> Tensor:
        tall = x.shape[-2] > x.shape[-1]
        for a, b, c in self.triples:
            gram = symmetric_product(x, x, tall=tall)
            p = symmetric_product(gram, gram, gram, alpha=c, beta=b, gamma=a)
            x = torch.bmm(x, p) if tall else torch.bmm(p, x)
        return x

    def _gram(self, x: Tensor) -> Tensor:
        tall = x.shape[-2] > x.shape[-1]
        last = len(self.triples) - 1
        gram, q = symmetric_product(x, x, tall=tall), None
        for step, (a, b, c) in enumerate(self.triples):
            if step == RESTART and q is not None:
                x, q = torch.bmm(x, q) if tall else torch.bmm(q, x), None
                gram = symmetric_product(x, x, tall=tall)
            p = symmetric_product(gram, gram, gram, alpha=c, beta=b, gamma=a)
            q = p if q is None else symmetric_product(p, q)
            if step != last and step + 1 != RESTART:
                gram = symmetric_product(p, symmetric_product(p, gram))
        assert q is not None
        return torch.bmm(x, q) if tall else torch.bmm(q, x)

    def _torch_order(self, x: Tensor) -> Tensor:
        """Compute the standard form with the order of operations, and the rounding, of torch.optim.Muon."""
        tall = x.shape[-2] > x.shape[-1]
        x = x.mT if tall else x
        for a, b, c in self.triples:
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if tall else x
