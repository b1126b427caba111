"""How often the pass fires, what is left, that the numbers stay, and what it must not touch."""

from __future__ import annotations

import pytest
import torch
from effpass_rms_norm import RMSNorm
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import effpass.backend
from effpass.core import registry
from effpass.core.exported import program_from_exported, to_exported
from effpass.core.manager import PassManager

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def compiled(model, inner="eager"):
    """The model with only this pass, and the reports of its graphs."""
    torch._dynamo.reset()
    effpass.backend.reports.clear()
    options = {"passes": ["rms_norm"], "inner": inner}
    return torch.compile(model, backend="effpass", options=options), effpass.backend.reports


def test_it_is_registered_by_its_distribution():
    (row,) = [row for row in registry.describe() if row.name == "rms_norm"]
    assert (row.distribution, row.kind, row.exact, row.error) == ("effpass-rms-norm", "graph", True, None)
    assert registry.load("rms_norm") is RMSNorm


@pytest.mark.parametrize(
    ("make", "config", "dtype", "hits"),
    [
        (LlamaForCausalLM, LlamaConfig, torch.float32, 5),  # two for each of two layers, and the last one
        (LlamaForCausalLM, LlamaConfig, torch.bfloat16, 5),
        (Qwen3ForCausalLM, Qwen3Config, torch.bfloat16, 9),  # and two in each attention, on queries and keys
        (Gemma3ForCausalLM, Gemma3TextConfig, torch.bfloat16, 13),  # and two more in each layer
    ],
)
def test_every_norm_is_one_operator(make, config, dtype, hits):
    torch.manual_seed(0)
    model = make(config(**SIZES)).eval().to(dtype)
    tokens = torch.randint(0, 64, (2, 6))
    with torch.no_grad():
        rewritten, reports = compiled(model)
        logits = rewritten(tokens, use_cache=False).logits
        expected = model(tokens, use_cache=False).logits
    (report,) = reports
    assert report.hits == hits
    assert report.passes[0].ops["aten.rms_norm.default"] == hits
    assert report.passes[0].ops["aten.rsqrt.default"] == -hits
    # float32: another order of the same operations. bfloat16: one rounding (2^-8) less in each of the norms in a row.
    tolerance = 1e-5 if dtype is torch.float32 else hits * 2**-8
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)


def test_a_norm_that_rounds_elsewhere_is_left_alone():
    """OLMo 2 multiplies with the weight in float32 and rounds the product: below float32, another function."""
    model = Olmo2ForCausalLM(Olmo2Config(**SIZES)).eval().bfloat16()
    rewritten, reports = compiled(model)
    tokens = torch.randint(0, 64, (1, 6))
    with torch.no_grad():
        assert torch.equal(rewritten(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)
    (report,) = reports
    assert report.hits == 0
    reasons = [refusal.reason for refusal in report.passes[0].refusals]
    assert len(reasons) == 9
    assert all("is torch.bfloat16 where the pattern has torch.float32" in reason for reason in reasons)


class Norm(nn.Module):
    def __init__(self, weight, eps=1e-6, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(weight.to(dtype))
        self.eps = eps

    def forward(self, x):
        hidden = x.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * hidden.to(x.dtype)


@pytest.mark.parametrize(
    ("norm", "dtype", "reason"),
    [
        (Norm(torch.ones(4), eps=nn.Parameter(torch.tensor(1e-6))), torch.float32, "eps is computed by"),
        (Norm(torch.ones(1, 4)), torch.float32, r"the weight is [1, 4], not one number for each"),
        (Norm(torch.ones(1)), torch.float32, r"the weight is [1], not one number for each"),
        (Norm(torch.ones(4), dtype=torch.float64), torch.float64, "x is float64"),
    ],
)
def test_what_it_must_not_touch(norm, dtype, reason):
    rewritten, reports = compiled(norm)
    x = torch.randn(2, 3, 4, dtype=dtype)
    assert torch.equal(rewritten(x), norm(x))
    (report,) = reports
    assert report.hits == 0
    (refusal,) = report.passes[0].refusals
    assert reason in refusal.reason


def test_through_export_with_any_length():
    norm = Norm(torch.rand(4))
    dynamic = ({1: torch.export.Dim("length", min=2, max=64)},)
    program = program_from_exported(torch.export.export(norm, (torch.randn(2, 3, 4),), dynamic_shapes=dynamic))
    report = PassManager([RMSNorm()]).run(program)
    assert (report.entrance, report.hits) == ("program", 1)
    assert program.op_counts() == {"aten.rms_norm.default": 1}
    x = torch.randn(2, 9, 4)
    torch.testing.assert_close(to_exported(program).module()(x), norm(x))


def test_gradients_and_growing_lengths():
    norm = Norm(torch.rand(4))
    rewritten, reports = compiled(norm, inner="aot_eager")
    for length in (3, 5, 7):
        x = torch.randn(2, length, 4, requires_grad=True)
        rewritten(x).square().sum().backward()
        gradient, norm.weight.grad = norm.weight.grad, None
        norm(x).square().sum().backward()
        torch.testing.assert_close(gradient, norm.weight.grad)
        norm.weight.grad = None
    assert [report.hits for report in reports] == [1, 1], "a static graph, then a dynamic one for all further lengths"
