"""Compares the outputs of a program before and after a pass, which `verify: true` in a recipe asks for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from effpass.core.errors import PassRefusedError
from effpass.core.program import Program

__all__ = ["output_difference", "outputs_of", "rounding"]


def outputs_of(program: Program) -> list[Tensor]:
    """Run `program` on the inputs that it was traced with, and return its tensors.

    All inputs but the weights are copied, so that in-place writes (of caches) do not reach the caller's tensors. Random
    numbers are the same in every call, so that dropout is the same before and after a pass.

    Raises:
        PassRefusedError: the program was traced without real inputs.
    """
    if any(isinstance(x, torch._subclasses.FakeTensor) for x in program.inputs):
        raise PassRefusedError("verify: true needs real inputs; this program was traced without them")
    weights = set(program.weights)
    placeholders = program.graph.find_nodes(op="placeholder")
    inputs = [
        x if n in weights or not isinstance(x, Tensor) else x.detach().clone()
        for n, x in zip(placeholders, program.inputs, strict=True)
    ]
    # Use the hints: int() would add a guard on the size, and one graph would be compiled per size.
    inputs = [x.node.hint if isinstance(x, (torch.SymInt, torch.SymFloat)) else x for x in inputs]
    devices = {x.device for x in inputs if isinstance(x, Tensor) and x.device.type != "cpu"}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=kind):
        flat, _ = torch.utils._pytree.tree_flatten(torch.fx.Interpreter(program.gm).run(*inputs))
    return [t for t in flat if isinstance(t, Tensor)]


def output_difference(before: Tensor, after: Tensor) -> float:
    """Largest absolute difference; infinite when a NaN or infinity in one has no equal in the other."""
    same = (before == after) | (before.isnan() & after.isnan())
    found = (before.double() - after.double()).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    return float(found.max()) if found.numel() else 0.0


def rounding(output: Tensor) -> float:
    """Tolerance for an exact pass: a share of the largest absolute value; 0 for integers.

    The share is √ε, with ε the machine epsilon of the dtype, and 3 % at most. It is larger than what a different order
    of summation changes.
    """
    if not output.is_floating_point() or not output.numel():
        return 0.0
    largest = output.double().abs().nan_to_num(nan=0.0, posinf=0.0).amax()
    return float(min(torch.finfo(output.dtype).eps ** 0.5, 0.03) * largest)
