"""`fuse_rotary_table` on decode steps of every family, and where it must stay away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_step import decode, enliven
from families import COMMON, FAMILIES, make
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import effpass.lowering.ops.rotary_table
from effpass.backend import reports
from effpass.runtime.speculative import EagleHead, HeadConfig

TABLES = {"gpt2": 0, "gemma3": 2}  # Gemma has a table for its full and one for its sliding layers


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effpass.lowering.ops.rotary_table, "has_kernel", lambda device, dtype, rows: True)


def compiled(function: Callable[..., Any], dynamic: bool = False) -> Callable[..., Any]:
    reports.clear()
    options = {"passes": ["fuse_rotary_table"], "inner": "eager"}
    return torch.compile(function, backend="effpass", dynamic=dynamic, fullgraph=True, options=options)


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


def table(angles: Tensor) -> tuple[Tensor, ...]:
    both = torch.cat((angles, angles), dim=-1)
    return (both.cos() * 0.7).to(torch.bfloat16), (both.sin() * 0.7).to(torch.bfloat16)


def two_scalings(angles: Tensor) -> tuple[Tensor, ...]:
    both = torch.cat((angles, angles), dim=-1)
    return (both.cos() * 0.7).to(torch.bfloat16), (both.sin() * 1.4).to(torch.bfloat16)


def by_multiplication(p: Tensor, f: Tensor) -> Tensor:
    return p[..., None].float() * f.to(device=p.device, dtype=torch.float)


def by_product(p: Tensor, f: Tensor) -> Tensor:
    """As transformers wrote it in most models before 5.23."""
    f = f[None, :, None].expand(p.shape[0], -1, 1).to(dtype=torch.float, device=p.device)
    return (f @ p[:, None, :].float()).transpose(1, 2)


def by_product_of_floats(p: Tensor, f: Tensor) -> Tensor:
    """As it wrote it in the others."""
    f = f[None, :, None].float().expand(p.shape[0], -1, 1).to(p.device)
    return (f.float() @ p[:, None, :].float().float()).transpose(1, 2)


ANGLES = [by_multiplication, by_product, by_product_of_floats]


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize("angles", ANGLES)
def test_angles_of_either_form(
    angles: Callable[..., Any], kind: torch.dtype, stored: torch.dtype, dynamic: bool
) -> None:
    frequencies = torch.rand(8).to(stored)

    def function(p: Tensor) -> tuple[Tensor, ...]:
        return table(angles(p.clamp(0, 4000), frequencies))

    run = compiled(function, dynamic)
    for size in ((2, 3), (5, 70)) if dynamic else ((1, 1), (2, 3)):
        positions = torch.randint(-5, 5000, size, dtype=kind)
        with torch.no_grad():
            torch.testing.assert_close(run(positions), function(positions), rtol=0, atol=0)
    assert [entry.hits for report in reports for entry in report.passes] == [1] * (1 if dynamic else 2)
    # The clamp is left.
    assert all(entry.ops.get("effpass.rotary_table.default") == 1 for report in reports for entry in report.passes)
    gone = ("aten.matmul.default", "aten.cat.default", "aten.unsqueeze.default", "aten.clamp.default")
    counts = [reports[0].passes[0].ops.get(name, 0) for name in gone]
    assert counts == ([0, -1, -1, 0] if angles is by_multiplication else [-1, -1, -3, 0])


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_decode_step_of_older_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = enliven(make(family, **({} if family == "gemma3" else {"num_hidden_layers": 1})))

    def forward(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple[Tensor, ...]:
        prefix = "" if layer_type is None else f"{layer_type}_"
        angles = by_product(position_ids, getattr(self, f"{prefix}inv_freq"))
        both, scaling = torch.cat((angles, angles), dim=-1), getattr(self, f"{prefix}attention_scaling")
        return (both.cos() * scaling).to(x.dtype), (both.sin() * scaling).to(x.dtype)

    expected = decode(model, model, rows=2)
    monkeypatch.setattr(type(model.model.rotary_emb), "forward", forward)
    torch.testing.assert_close(decode(model, compiled(model), rows=2), expected, rtol=1e-5, atol=1e-6)
    assert reports[-1].passes[0].hits == TABLES.get(family, 1)
    assert reports[-1].passes[0].ops["aten.matmul.default"] == -TABLES.get(family, 1)


@pytest.mark.usefixtures("_kernels")
def test_a_dynamic_number_of_tokens_and_a_scaling() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}
    rotary = LlamaRotaryEmbedding(LlamaConfig(**COMMON, rope_parameters=yarn))
    assert rotary.attention_scaling > 1.1
    run, x = compiled(rotary, dynamic=True), torch.empty(1)
    with torch.no_grad():
        for size in ((2, 3), (5, 70)):
            positions = torch.randint(0, 256, size)
            torch.testing.assert_close(run(x, positions), rotary(x, positions), rtol=0, atol=0)
    assert [report.passes[0].hits for report in reports] == [1]


@pytest.mark.usefixtures("_kernels")
def test_a_draft_head() -> None:
    config = HeadConfig(LlamaConfig(**{**COMMON, "num_hidden_layers": 1}), 96, (0, 1))
    rotary = EagleHead(config).rotary_emb
    x, positions = torch.empty(1, dtype=torch.bfloat16), torch.tensor([[3, 4, 4, 9]], dtype=torch.int32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(rotary)(x, positions), rotary(x, positions), rtol=0, atol=0)
    assert reports[-1].passes[0].hits == 1


P, F = torch.randint(0, 99, (1, 4)), torch.rand(8)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    ("function", "hits"),
    [
        (lambda: table(by_multiplication(P, F)), 1),
        (lambda: table(F.float() * P[..., None].float()), 1),
        (lambda: table(by_multiplication(P.expand(2, -1), F)), 1),
        (lambda: two_scalings(by_multiplication(P, F)), 0),
        (lambda: (*table(a := by_multiplication(P, F)), torch.cat((a, a), dim=-1), a + 1), 1),  # a sum of its own
        (lambda: torch.cat((a := by_multiplication(P, F), a + 1), dim=-1).cos(), 0),
        (
            lambda: (torch.cat((a := by_multiplication(P, F), a), -1).cos(), torch.cat((a, a), -1).sin()),
            0,
        ),  # two doublings
    ],
)
def test_what_is_a_table(function: Callable[..., Any], hits: int) -> None:
    with torch.no_grad():
        got = compiled(function)()
        torch.testing.assert_close(got, function(), rtol=0, atol=0)
    assert sum(entry.hits for report in reports for entry in report.passes) == hits


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    "function",
    [
        lambda: by_multiplication(P, F) + 1,
        lambda: by_multiplication(P.float() * 0.5, F),  # positions that are not integers
        lambda: by_multiplication(P.bfloat16(), F),  # rounded positions
        lambda: P[..., None].float() * torch.rand(1, 4, 8),  # frequencies of each token
        lambda: P[..., None].float() * F[None, :4, None],  # [1, 4, 1]: of each token too
        lambda: by_multiplication(P.expand(3, 2, 4), F),  # of several axes
        lambda: P[..., None].float() * F.expand(3, 1, 8),  # B is not that of the positions
        lambda: (F[None, :, None].expand(1, 8, 2) @ P[:, None].float().expand(1, 2, 4)).transpose(1, 2),  # a sum of two
        lambda: F[None, :, None] @ P[:, None, :].float(),  # not transposed
    ],
)
def test_other_angles_stay(function: Callable[..., Any]) -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        expected = table(function())
        torch.manual_seed(0)
        torch.testing.assert_close(compiled(lambda: table(function()))(), expected, rtol=0, atol=0)
    (entry,) = reports[-1].passes
    assert entry.hits == 0
    assert entry.refusals[0].reason.endswith("is no product of positions and frequencies")


@pytest.mark.usefixtures("_kernels")
def test_positions_that_are_written_in_between_stay() -> None:
    def function(p: Tensor) -> tuple[Tensor, ...]:
        angles = by_multiplication(p, F)
        p.add_(1)
        return table(angles)

    with torch.no_grad():
        torch.testing.assert_close(compiled(function)(P.clone()), function(P.clone()), rtol=0, atol=0)
    (entry,) = reports[-1].passes
    assert entry.hits == 0
    assert "is written between" in entry.refusals[0].reason


def test_there_is_no_kernel_for_a_cpu() -> None:
    with torch.no_grad():
        compiled(lambda p: table(by_multiplication(p, F)))(P)
    (entry,) = reports[-1].passes
    assert entry.hits == 0
    assert entry.refusals[0].reason == "no kernel for cpu: this fuses launches on a GPU"


@pytest.mark.usefixtures("_kernels")
def test_a_program_that_records_gradients_stays() -> None:
    compiled(lambda f: table(by_multiplication(P, f)))(torch.rand(8, requires_grad=True))
    assert reports[-1].passes[0].refusals[0].reason == "the program records gradients"
