"""One pass: an RMSNorm that a model spells out in eight operators becomes `aten.rms_norm`.

y = w · x / √(mean(x²) + ε)            Zhang and Sennrich 2019, arXiv:1910.07467, equation 4
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch.fx.experimental.symbolic_shapes import statically_known_true

from effpass import GraphPass, Match, Program, Refusal

__all__ = ["RMSNorm"]


class RMSNorm(GraphPass):
    """Turns the RMSNorm of Llama, Mistral, Qwen, Gemma and Phi, and their q and k norms, into one operator."""

    name = "rms_norm"
    exact = True

    def pattern(self, x: torch.Tensor, weight: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        hidden = x.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
        return weight * hidden.to(x.dtype)

    def replacement(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, eps)

    def example_inputs(self) -> Sequence[torch.Tensor]:
        # x [B, T, D], weight [D]; in a model eps is a number, which the pattern's third tensor stands for as well.
        return torch.ones(2, 3, 4), torch.ones(4), torch.ones(())

    def check(self, program: Program, match: Match) -> Refusal | None:
        eps = match.nodes["eps"]
        if not isinstance(eps, float):
            return Refusal(match.anchor.name, f"eps is computed by {eps}, not a number")
        x, weight = (match.nodes[name].meta["val"] for name in ("x", "weight"))
        if weight.dim() != 1 or not statically_known_true(weight.shape[0] == x.shape[-1]):
            return Refusal(
                match.anchor.name, f"the weight is {list(weight.shape)}, not one number for each of x's last"
            )
        if x.dtype is torch.float64:
            return Refusal(match.anchor.name, "x is float64, which the model rounds to float32 and rms_norm does not")
        return None
