"""Both fusing passes on a decode step of every family: how often they act, what is left, and equal logits."""

from __future__ import annotations

import operator

import pytest
import torch
from decode_step import decode, enliven
from families import CONFIGS, make, writes_angles_as_a_product

import effpass.lowering.ops.cached_attention
import effpass.lowering.ops.fused_linear
from effpass.backend import reports
from effpass.core.dynamo import program_from_dynamo
from effpass.core.manager import PassManager
from effpass.core.plan import default_passes
from effpass.lowering.ops.fused_linear import TOLERANCE
from effpass.passes.graph.fuse_linears import FuseLinears
from effpass.passes.graph.fuse_rope_attention import FuseRopeAttention

aten = torch.ops.aten

# Two layers and the head. A dense layer: norm + q, k, v; o + residual; norm + gate + up; down + residual. Gemma and
# OLMo normalize what they add, so o and down stay; OLMo has no norm in front of its products.
DENSE = {"effpass.fused_linear.default": 7, "effpass.gated_linear.default": 2}
NORMED_RESIDUALS = {"effpass.fused_linear.default": 3, "effpass.gated_linear.default": 2}
EXPERTS = {"effpass.fused_linear.default": 5}  # the router and the experts stay
# DeepSeek: norm + q_a, kv_a; norm + q_b; o + residual; a dense layer's gate and down, and those of the shared experts.
# kv_b reads the cache.
LATENT = {"effpass.fused_linear.default": 9, "effpass.gated_linear.default": 2}
# What there is afterwards, and how many of the model's products are in it.
LINEARS = {
    "llama": (DENSE, 15),
    "qwen2": (DENSE, 15),
    "qwen3": (DENSE, 15),
    "mistral": (DENSE, 15),
    "gemma3": (NORMED_RESIDUALS, 11),
    "phi3": (DENSE, 9),
    "gpt2": ({}, 0),
    "olmo2": (NORMED_RESIDUALS, 11),
    "mixtral": (EXPERTS, 9),
    "qwen3_moe": (EXPERTS, 9),
    "deepseek_v3": (LATENT, 15),
}
IN_TWO_ROWS = ("phi3", "gpt2", "mixtral", "deepseek_v3")
REFUSED_LINEARS = {
    "gpt2": ["its weight is not stored [out, in]"] * 8,
    "deepseek_v3": ["the norm stays: its value is also read by view_8"],
}
REFUSED_ATTENTION = {
    "gpt2": "is not rotated, or not by halves from the first feature on",
    "deepseek_v3": "is no buffer that a cache_write in front of it filled",
}

FUSED_ATTENTION = {
    "effpass.rope_cached_attention.default": 2,
    "effpass.cache_write.default": -2,
    "effpass.cached_attention.default": -2,
}

# The operators' references run the same ATen products in the same order; a product of a packed weight's halves, or of
# several rows, may be summed in another.
LOGITS = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    for module in (effpass.lowering.ops.fused_linear, effpass.lowering.ops.cached_attention):
        monkeypatch.setattr(module, "has_kernel", lambda device, dtype, rows: True)
    monkeypatch.setitem(CONFIGS, "qwen2", ("Qwen2Config", "Qwen2ForCausalLM", {}))
    reports.clear()


def compiled(model, *passes, inner="eager"):
    return torch.compile(
        model, backend="effpass", dynamic=False, fullgraph=True, options={"passes": list(passes), "inner": inner}
    )


# Two rows change no rule: of each kind of layer one family, beside the tests of two rows below; the others are slow.
@pytest.mark.parametrize(
    ("family", "rows"),
    [
        *((family, 1) for family in LINEARS),
        *((family, 2) for family in IN_TWO_ROWS),
        *(pytest.param(family, 2, marks=pytest.mark.slow) for family in LINEARS if family not in IN_TWO_ROWS),
    ],
)
def test_a_decode_step(family, rows):
    model = enliven(make(family))
    expected = decode(model, model, rows)
    assert expected.std() > 0.3
    inner = "aot_eager" if rows == 1 else "eager"
    run = compiled(model, "fuse_rope_attention", "fuse_linears", inner=inner)
    torch.testing.assert_close(decode(model, run, rows), expected, **LOGITS)
    (report,) = reports
    attention, linears = report.passes
    fused, products = LINEARS[family]
    assert {op: n for op, n in linears.ops.items() if op.startswith("effpass")} == fused
    assert linears.hits == sum(fused.values())
    assert linears.ops.get("aten.linear.default", 0) == -products
    assert sorted(r.reason for r in linears.refusals) == REFUSED_LINEARS.get(family, [])
    reason = REFUSED_ATTENTION.get(family)
    assert attention.hits == (2 if reason is None else 0)
    assert attention.ops == ({} if reason else {**attention.ops, **FUSED_ATTENTION})
    assert len(attention.refusals) == (2 if reason else 0)
    assert all(str(reason) in refusal.reason for refusal in attention.refusals)


def test_tied_weights():
    """The embedding's weight is the head's: one placeholder, read by the embedding and the last operator."""
    model = enliven(make("llama", tie_word_embeddings=True))
    expected = decode(model, model, 2)
    torch.testing.assert_close(decode(model, compiled(model, "fuse_linears"), 2), expected, **LOGITS)
    assert reports[0].hits == 9


def test_several_tokens():
    """Two sequences of three tokens are six rows: a step that verifies drafts."""
    model = enliven(make("qwen3"))
    expected = decode(model, model, 2, tokens=3)
    actual = decode(model, compiled(model, "fuse_rope_attention", "fuse_linears"), 2, tokens=3)
    torch.testing.assert_close(actual, expected, **LOGITS)
    assert [p.hits for p in reports[0].passes] == [2, 9]


def test_either_order():
    model = enliven(make("phi3"))
    expected = decode(model, model, 1)
    actual = decode(model, compiled(model, "fuse_linears", "fuse_rope_attention"), 1)
    torch.testing.assert_close(actual, expected, **LOGITS)
    assert [p.hits for p in reports[0].passes] == [9, 2]


@pytest.mark.parametrize("family", ["llama", "gemma3", "olmo2"])
def test_bfloat16(family):
    """Its casts are real ones; the references round as transformers does, so that logits are equal here too."""
    model = enliven(make(family)).bfloat16()
    expected = decode(model, model, 2)
    actual = decode(model, compiled(model, "fuse_rope_attention", "fuse_linears"), 2)
    assert reports[0].passes[1].hits == sum(LINEARS[family][0].values())
    assert reports[0].passes[0].hits == 2
    difference = (actual - expected).float().abs().max() / expected.float().abs().max()
    assert difference < TOLERANCE[torch.bfloat16]


VIEWS = (aten.view.default, aten.reshape.default, aten.transpose.int, operator.getitem)


def test_a_layer_of_llama_is_five_launches():
    model, graphs = enliven(make("llama", num_hidden_layers=3)), []

    def backend(gm, inputs):
        program = program_from_dynamo(gm, inputs)
        PassManager([FuseRopeAttention(), FuseLinears()]).run(program)
        graphs.append(program.graph)
        return gm

    decode(model, torch.compile(model, backend=backend, dynamic=False, fullgraph=True), 1)
    nodes = [node for node in graphs[0].nodes if node.op == "call_function"]
    launches = [str(n.target) for n in nodes if n.target not in VIEWS]
    layer = ["fused_linear", "rope_cached_attention", "fused_linear", "gated_linear", "fused_linear"]
    first = next(i for i, name in enumerate(launches) if name.startswith("effpass"))
    assert launches[first:] == [f"effpass.{name}.default" for name in (*layer * 3, "fused_linear")]
    rotary_table = {"unsqueeze", "to", "mul", "cat", "cos", "sin"}
    rotary_table |= {"matmul", "expand"} if writes_angles_as_a_product() else set()
    assert {name.split(".")[1] for name in launches[:first] if name.startswith("aten")} == {"embedding", *rotary_table}


def test_by_default_they_run_behind_passes_that_change_weights():
    """An adapter is merged in the products that the model wrote, which are gone afterwards."""
    first, *others = [planned.pass_.name for planned in default_passes()]
    assert first == "merge_lora"
    assert others == ["fuse_linears", "fuse_rope_attention", "fuse_rotary_table", "moe_gemm", "fuse_routing"]
