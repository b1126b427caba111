"""`fuse_rotary_table` on decode steps of every family, and where it must stay away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_step import decode, enliven
from families import FAMILIES, make

import effpass.lowering.ops.rotary_table
from effpass.backend import reports

TABLES = {"gpt2": 0, "gemma3": 2}  # Gemma has a table for its full and one for its sliding layers


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effpass.lowering.ops.rotary_table, "has_kernel", lambda device, dtype, rows: True)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    reports.clear()
    options = {"passes": ["fuse_rotary_table"], "inner": "eager"}
    return torch.compile(function, backend="effpass", dynamic=False, fullgraph=True, options=options)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_step(family: str) -> None:
    # All layers read one table; Gemma's are of two kinds.
    layers: dict[str, Any] = {"gemma3": {}, "gpt2": {"n_layer": 1}}
    model = enliven(make(family, **layers.get(family, {"num_hidden_layers": 1})))
    expected = decode(model, model, rows=2)
    # The same operators in the same order; the products around them are untouched.
    torch.testing.assert_close(decode(model, compiled(model), rows=2), expected, rtol=1e-5, atol=1e-6)
    assert reports[-1].passes[0].hits == TABLES.get(family, 1)


def table(angles: torch.Tensor, other: float = 1.0) -> tuple[torch.Tensor, ...]:
    both = torch.cat((angles, angles), dim=-1)
    return (both.cos() * 0.7).to(torch.bfloat16), (both.sin() * (0.7 * other)).to(torch.bfloat16)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    ("function", "hits"),
    [
        (table, 1),
        (lambda a: table(a, other=2.0), 0),  # two scalings
        (lambda a: (*table(a), torch.cat((a, a), dim=-1)), 1),  # a sum of its own
        (lambda a: torch.cat((a, a + 1), dim=-1).cos(), 0),
        (lambda a: (torch.cat((a, a), -1).cos(), torch.cat((a, a), -1).sin()), 0),  # two doublings
        (lambda a: table(a[:, None].expand(-1, 65, -1)), 0),  # 65 rows
    ],
)
def test_what_is_a_table(function: Callable[..., Any], hits: int) -> None:
    angles = torch.rand(1, 8)
    with torch.no_grad():
        got = compiled(function)(angles)
        torch.testing.assert_close(got, function(angles), rtol=0, atol=0)
    assert sum(entry.hits for report in reports for entry in report.passes) == hits


def test_there_is_no_kernel_for_a_cpu() -> None:
    with torch.no_grad():
        compiled(table)(torch.rand(1, 8))
    (entry,) = reports[-1].passes
    assert entry.hits == 0
    assert entry.refusals[0].reason == "no kernel for cpu: this fuses launches on a GPU"


@pytest.mark.usefixtures("_kernels")
def test_a_program_that_records_gradients_stays() -> None:
    compiled(table)(torch.rand(1, 8, requires_grad=True))
    assert reports[-1].passes[0].refusals[0].reason == "the program records gradients"
