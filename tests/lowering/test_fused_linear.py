"""effpass::fused_linear and effpass::gated_linear: what they mean, and what they refuse."""

from __future__ import annotations

import itertools

import kernel_cases
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import effpass.lowering.ops  # noqa: F401  (registers the operators)
from effpass.core.errors import EffpassError
from effpass.lowering.ops.fused_linear import rms_norm

ops = torch.ops.effpass


@pytest.mark.parametrize("case", kernel_cases.LINEARS.values(), ids=kernel_cases.LINEARS)
def test_reference_against_float64(case):
    """Within what adding up `inner` products in some order costs: the order is the machine's matrix library's."""
    tolerance = torch.finfo(torch.float32).eps * case[1] ** 0.5  # of a random walk of roundings, to the largest value
    found = kernel_cases.linear_errors(ops, *case, device="cpu", dtype=torch.float32)
    assert set(found) > {"product 0", "product 1", "product 2", "residual"}
    assert all(value <= tolerance for value in found.values()), found


@pytest.mark.parametrize("activation", kernel_cases.ACTIVATIONS)
def test_activations(activation):
    x, gate, up = torch.randn(2, 3, 8), torch.randn(5, 8), torch.randn(5, 8)
    expected = kernel_cases.activation(x.double() @ gate.double().T, activation) * (x.double() @ up.double().T)
    got = ops.gated_linear(x, gate, up, None, 0.0, 0.0, activation)
    assert got.shape == (2, 3, 5)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_norm_rounds_as_the_models_do():
    """Bit for bit in bfloat16: Llama casts before its weight, Gemma after it."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(4, 64).bfloat16() * 5
    llama, gemma = LlamaRMSNorm(64, eps=1e-5).bfloat16(), Gemma3RMSNorm(64, eps=1e-6).bfloat16()
    with torch.no_grad():
        llama.weight.normal_()
        gemma.weight.normal_()
        assert torch.equal(rms_norm(x, llama.weight, 1e-5, 0.0), llama(x))
        assert torch.equal(rms_norm(x, gemma.weight, 1e-6, 1.0), gemma(x))


def test_the_operators_are_sound():
    x, norm = torch.randn(2, 3, 16), torch.randn(16)
    weights, biases = [torch.randn(n, 16) for n in (8, 4, 4)], [None, torch.randn(4), None]
    torch.library.opcheck(ops.fused_linear.default, (x, weights, biases, norm, 1e-6, 1.0, None))
    torch.library.opcheck(ops.fused_linear.default, (x, weights[:1], [None], None, 0.0, 0.0, torch.randn(2, 3, 8)), {})
    torch.library.opcheck(ops.gated_linear.default, (x, weights[1], weights[2], norm, 1e-6, 0.0, "silu"))
    x.requires_grad_()
    torch.library.opcheck(ops.gated_linear.default, (x, weights[1], weights[2], norm, 1e-6, 0.0, "gelu"))


def test_gradients_are_those_of_the_reference():
    leaves = [torch.randn(3, 16), torch.randn(8, 16), torch.randn(8), torch.randn(16), torch.randn(3, 8)]
    for leaf in leaves:
        leaf.requires_grad_()
    x, weight, bias, norm, residual = leaves
    (got,) = ops.fused_linear(x, [weight], [bias], norm, 1e-6, 1.0, residual)
    expected = F.linear(rms_norm(x, norm, 1e-6, 1.0), weight, bias) + residual
    out = torch.randn(3, 8)
    for mine, its in zip(*(torch.autograd.grad(y, leaves, out) for y in (got, expected)), strict=True):
        torch.testing.assert_close(mine, its)


def test_flops_are_those_of_the_products():
    x, weights = torch.randn(2, 3, 16), [torch.randn(8, 16), torch.randn(4, 16)]
    with FlopCounterMode(display=False) as counter:
        ops.fused_linear(x, weights, [None, None], torch.randn(16), 1e-6, 0.0, None)
        ops.gated_linear(x, weights[0], weights[0], None, 0.0, 0.0, "relu")
    assert counter.get_total_flops() == 2 * 6 * 16 * (8 + 4) + 2 * 6 * 16 * 16


def test_no_rows():
    (y,) = ops.fused_linear(torch.randn(2, 0, 16), [torch.randn(8, 16)], [None], torch.randn(16), 1e-6, 0.0, None)
    assert y.shape == (2, 0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], None), "effpass::fused_linear got 0 weights and 0 biases"),
        (([torch.ones(4, 16)], [None, None], None), "got 1 weights and 2 biases"),
        (([torch.ones(4, 15)], [None], None), r"x is \(3, 16\), and a weight is \(4, 15\)"),
        (([torch.ones(4, 16)] * 2, [None] * 2, torch.ones(3, 4)), "got a residual and 2 weights"),
    ],
)
def test_fused_linear_refuses(arguments, message):
    weights, biases, residual = arguments
    with pytest.raises(EffpassError, match=message):
        ops.fused_linear(torch.ones(3, 16), weights, biases, None, 0.0, 0.0, residual)


def test_gated_linear_refuses():
    x, weight = torch.ones(3, 16), torch.ones(4, 16)
    with pytest.raises(EffpassError, match="activation 'gelu_tan', did you mean 'gelu_tanh'"):
        ops.gated_linear(x, weight, weight, None, 0.0, 0.0, "gelu_tan")
    with pytest.raises(EffpassError, match=r"gate \(4, 16\) and up \(5, 16\)"):
        ops.gated_linear(x, weight, torch.ones(5, 16), None, 0.0, 0.0, "silu")


@pytest.mark.parametrize("limit", [227 << 10, 163 << 10, 99 << 10])
def test_tiles_of_several_tokens(limit, monkeypatch):
    """At least two stages fit into the shared memory of any GPU, and the parts cover the inner dimension."""
    small_linear = pytest.importorskip("effpass.lowering.kernels.small_linear")
    monkeypatch.setattr(small_linear, "shared_memory", lambda device: limit)
    monkeypatch.setattr(small_linear, "multiprocessors", lambda device: 132)
    sizes = [(4096, 1024, 1024), (14336,), (4096,), (128256,), (576,), (1536,), (96,)]
    for rows, inner, outputs, gated, element in itertools.product(
        (2, 17, 64), (72, 576, 2048, 2056, 14336), sizes, (False, True), (2, 4)
    ):
        shape = small_linear.few_rows_shape(rows, inner, outputs, gated, element, torch.device("cuda"))
        columns = shape["BLOCK_N"] * (2 if gated else 1) + shape["BLOCK_M"]
        assert shape["num_stages"] >= 2
        assert shape["num_stages"] * columns * shape["BLOCK_K"] * element < limit
        steps = -(-inner // shape["BLOCK_K"])
        assert 1 <= shape["SPLITS"] <= steps
        assert shape["BLOCK_M"] >= rows
    # The products of an 8B model with 8 tokens are read by about one program per multiprocessor.
    shapes = [small_linear.few_rows_shape(8, *of, 2, torch.device("cuda")) for of in _OF_8B]
    assert [(s["BLOCK_N"], s["SPLITS"]) for s in shapes] == [(64, 1), (64, 2), (128, 1), (64, 2), (128, 1)]


@pytest.mark.parametrize("limit", [227 << 10, 163 << 10, 99 << 10])
def test_tiles_of_whole_rows(limit, monkeypatch):
    """They fit into shared memory, and the two ranges of columns cover the inner dimension."""
    small_linear = pytest.importorskip("effpass.lowering.kernels.small_linear")
    monkeypatch.setattr(small_linear, "shared_memory", lambda device: limit)
    monkeypatch.setattr(small_linear, "multiprocessors", lambda device: 132)
    found = []
    for rows, inner, outputs, gated in itertools.product(
        (2, 16, 17, 32), (72, 256, 576, 1024, 1544, 2040), [(576, 192, 192), (576,), (16384,)], (False, True)
    ):
        shape = small_linear.whole_rows_shape(rows, inner, outputs, gated, 2, torch.device("cuda"))
        if shape is None:
            continue
        found.append(shape["BLOCK_N"])
        assert shape["FIRST"] + shape["REST"] >= inner
        assert shape["FIRST"] <= inner or shape["REST"] == 0
        columns = shape["BLOCK_N"] * (2 if gated else 1) + shape["BLOCK_M"]
        assert columns * (shape["FIRST"] + shape["REST"]) * 2 < limit
        assert shape["BLOCK_M"] >= rows
    assert {16, 64} == set(found)
    for rows, inner, outputs, element in (
        (33, 576, (576,), 2),
        (8, 2048, (576,), 2),
        (8, 576, (49152,), 2),
        (8, 576, (576,), 4),
    ):
        assert small_linear.whole_rows_shape(rows, inner, outputs, False, element, torch.device("cuda")) is None
    assert small_linear.whole_rows_shape(8, 1536, (8960,), True, 2, torch.device("cuda")) is None


_OF_8B = [
    (4096, (4096, 1024, 1024), False), (4096, (4096,), False), (4096, (14336,), True), (14336, (4096,), False),
    (4096, (128256,), False),
]  # fmt: skip
