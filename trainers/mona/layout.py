"""Layout of a parameter: the matrices that it holds.

A parameter is a single matrix, a stack of experts, a fused projection of several parts, heads, or a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from effpass.core.errors import ModelError

__all__ = ["Layout", "Part"]


@dataclass(frozen=True)
class Part:
    """Block of a parameter that is a batch of equal matrices.

    Attributes:
        dim: dimension along which the block is cut from the parameter.
        start, size: position and size of the block along `dim`.
        matrices: shape (B, M, N) of the block as a batch of matrices.
    """

    dim: int
    start: int
    size: int
    matrices: tuple[int, int, int]

    def take(self, tensor: Tensor) -> Tensor:
        """Return the block of `tensor` as [B, M, N]; a view if the memory layout allows it."""
        return tensor.narrow(self.dim, self.start, self.size).reshape(self.matrices)


@dataclass(frozen=True)
class Layout:
    """Division of a parameter with two or more dimensions into matrices.

    Args:
        split: sizes of the parts of a fused projection along `dim`; () for a single part.
        dim: dimension of the parameter that `split` refers to.
        heads: number of heads into which the output dimension of each part is divided; each head is a matrix.
        convolution: whether the first dimension is the output and all others together are the input.
    """

    split: tuple[int, ...] = ()
    dim: int = 0
    heads: int = 1
    convolution: bool = False

    def parts(self, shape: Sequence[int], name: str = "a parameter") -> list[Part]:
        """Return the parts of a parameter of this shape.

        Args:
            shape: shape of the parameter.
            name: name of the parameter, for messages.

        Raises:
            ModelError: if the layout does not fit the shape.
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
