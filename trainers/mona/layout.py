"""Which matrices a parameter holds: one, a stack of experts, parts of a fused projection, heads, a convolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from effpass.core.errors import ModelError

__all__ = ["Layout", "Part"]


@dataclass(frozen=True)
class Part:
    """A block of a parameter that is a batch of equal matrices.

    Attributes:
        start, size: the block along dimension `dim` of the parameter.
        matrices: (B, M, N): the block, reshaped.
    """

    dim: int
    start: int
    size: int
    matrices: tuple[int, int, int]

    def take(self, tensor: Tensor) -> Tensor:
        """[B, M, N] of the block; a view where memory allows."""
        return tensor.narrow(self.dim, self.start, self.size).reshape(self.matrices)


@dataclass(frozen=True)
class Layout:
    """How a parameter of two or more dimensions is cut into matrices.

    Args:
        split: sizes of the parts of a fused projection along `dim`; () where there is one part.
        dim: dimension of `split`, counted in the parameter.
        heads: number of heads that share the output dimension of each part, each a matrix of its own.
        convolution: the first dimension is the output, all others together are the input.
    """

    split: tuple[int, ...] = ()
    dim: int = 0
    heads: int = 1
    convolution: bool = False

    def parts(self, shape: Sequence[int], name: str = "a parameter") -> list[Part]:
        """The parts of a parameter of this shape.

        Raises:
            ModelError: the layout does not fit the shape.
        """
        shape = tuple(shape)
        if len(shape) < 2 or (len(shape) > 3 and not self.convolution):
            raise ModelError(
                f"{name} of shape {shape} is no stack of matrices",
                hint='give it to AdamW (overrides={"' + name + '": "adamw"}), or Layout(convolution=True)',
            )
        if self.split and (sum(self.split) != shape[self.dim] or min(self.split) < 1):
            raise ModelError(
                f"{name} of shape {shape} can't be split into {self.split} along dimension {self.dim}",
                hint=f"the sizes must add up to {shape[self.dim]}",
            )
        found, start = [], 0
        for size in self.split or (shape[self.dim],):
            block = (*shape[: self.dim], size, *shape[self.dim + 1 :])
            if self.convolution:
                rows, columns, batch = block[0], math.prod(block[1:]), 1
            else:
                rows, columns, batch = block[-2], block[-1], math.prod(block[:-2])
            if rows % self.heads:
                raise ModelError(f"{name}: {rows} rows are not {self.heads} heads of equal size")
            found.append(Part(self.dim, start, size, (batch * self.heads, rows // self.heads, columns)))
            start += size
        return found
