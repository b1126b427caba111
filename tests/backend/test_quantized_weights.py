"""Graphs whose weights are quantized: what a subclass of Tensor does with them stays its own affair."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import batch, make, quantized

import effpass
from effpass.backend import reports
from effpass.core.dynamo import program_from_dynamo

pytest.importorskip("torchao")

SCHEMES = ("int8", "float8")


def made(family: str, scheme: str) -> Any:
    return quantized(make(family, num_hidden_layers=1).to(torch.bfloat16), scheme)


def logits(model: Any, length: int) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(length), use_cache=False).logits.float()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_passes_act_around_them(family: str, scheme: str, toy_passes: Any) -> None:
    """Rounding of bfloat16, 2⁻⁸, in logits of size one: experts add up in another order. Else bit for bit."""
    model = made(family, scheme)
    ready = copy.deepcopy(model)
    passes, within = (["moe_gemm"], 0.02) if family == "qwen3_moe" else (["touch"], 0.0)
    effpass.optimize(ready, {"version": 1, "passes": passes}, inner="aot_eager")
    reports.clear()
    for length in (9, 14):
        expected = logits(model, length)
        assert (logits(ready, length) - expected).abs().max() <= within * expected.abs().max()
    assert all(report.hits for report in reports)
    assert len(reports) == 2  # one length, then any


def test_the_program_has_no_constants_of_theirs() -> None:
    programs: list[Any] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        programs.append(program_from_dynamo(gm, inputs))
        return gm.forward

    model = made("llama", "int8")
    logits(torch.compile(model, backend=backend), 9)
    (program,) = programs
    assert not list(program.gm.named_buffers())
    on_weights = [node for node in program.graph.nodes if node.target is torch._C._nn.linear]
    assert len(on_weights) == 7 + 1
    assert all(node.meta["val"].dtype == torch.bfloat16 for node in on_weights)
