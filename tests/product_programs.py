"""Programs of a few products, for the tests of `fuse_linears`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.core.manager import PassManager
from effpass.core.program import Program
from effpass.lowering.ops import fused_linear as operators
from effpass.passes.graph.fuse_linears import FuseLinears

__all__ = ["SCALE", "WIDE", "D", "X", "fused", "llama_norm", "program_of", "reasons", "weight"]

D, WIDE = 16, 24


def program_of(fn: Callable[..., object], *inputs: torch.Tensor, mode: str = "fake", grad: bool = False) -> Program:
    with torch.set_grad_enabled(grad):
        gm = make_fx(fn, tracing_mode=mode, pre_dispatch=True)(*inputs)
    return Program(gm, "dynamo", {}, list(inputs), grad_enabled=grad)


def fused(fn: Callable[..., object], *inputs: torch.Tensor):
    """Run the pass; the numbers must stay. Returns its report and the arguments of the operators it made."""
    program = program_of(fn, *inputs)
    entry = PassManager([FuseLinears()]).run(program).passes[0]
    tolerance = operators.TOLERANCE[inputs[0].dtype]
    torch.testing.assert_close(program.gm(*inputs), fn(*inputs), rtol=tolerance, atol=tolerance)
    ours = [n for n in program.graph.nodes if str(n.target).startswith("effpass")]
    assert len(ours) == entry.hits
    return entry, [dict(zip((a.name for a in n.target._schema.arguments), n.args, strict=True)) for n in ours]


def reasons(entry) -> list[str]:
    return [f"{r.reason} → {r.hint}" if r.hint else r.reason for r in entry.refusals]


def weight(*shape: int) -> torch.Tensor:
    return torch.randn(*shape) * shape[-1] ** -0.5


X, SCALE = torch.randn(2, 3, D), torch.rand(D) + 0.5


def llama_norm(x, w):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return w * wide.to(x.dtype)
