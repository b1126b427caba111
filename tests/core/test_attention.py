from __future__ import annotations

import pytest
import torch
from families import batch, make

from effpass.core.attention import attentions
from effpass.core.dynamo import program_from_dynamo


def programs(model, inputs):
    found = []

    def collect(gm, example_inputs):
        found.append(program_from_dynamo(gm, example_inputs))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=collect)(**inputs, use_cache=False)
    return found


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "deepseek_v3"])
def test_sdpa_and_eager_models_have_the_same_attention(family):
    described = {}
    for implementation in ("sdpa", "eager"):
        model = make(family)
        model.set_attn_implementation(implementation)
        (program,) = programs(model, batch(10))
        found = list(attentions(program))
        assert [a.implementation for a in found] == [implementation] * 2
        described[implementation] = [
            (*(tuple(n.meta["val"].shape) for n in (a.node, a.query, a.key, a.value)), a.mask is not None, a.scale)
            for a in found
        ]
    for sdpa, eager in zip(described["sdpa"], described["eager"], strict=True):
        assert sdpa[:5] == eager[:5]
        head_dim = sdpa[1][-1]
        assert (sdpa[5] or head_dim**-0.5) == pytest.approx(eager[5])
    if family == "qwen3":
        assert described["sdpa"][0][2] == (2, 2, 10, 16), "keys are found before they are repeated for their group"


def test_attention_description_computes_what_the_model_computes():
    """The parts that `attentions` names give the model's own attention output when put together by hand."""
    model = make("qwen3")
    outputs = {}
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        (program,) = programs(model, batch(10))
        found = next(attentions(program))
        values = {}

        class Keep(torch.fx.Interpreter):
            def run_node(self, n, values=values):
                values[n] = super().run_node(n)
                return values[n]

        with torch.no_grad():
            Keep(program.gm, garbage_collect_values=False).run(*program.inputs)
        q, k, v, mask = (values[n] for n in (found.query, found.key, found.value, found.mask))
        again = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=found.scale, enable_gqa=True)
        outputs[implementation] = (values[found.node], again)
    for actual, again in outputs.values():
        # rows of padded queries attend to nothing real and differ between implementations; compare the others
        torch.testing.assert_close(actual[1], again[1], rtol=1e-5, atol=1e-6)


def test_flash_attention_operator_is_found():
    with torch.library._scoped_library("flash_attn_test", "DEF") as library:
        library.define("forward(Tensor q, Tensor k, Tensor v, float softmax_scale, bool causal) -> (Tensor, Tensor)")

        def forward(q, k, v, softmax_scale, causal):
            return q.clone(), q.new_zeros(q.shape[:-1])

        library.impl("forward", forward, "CompositeExplicitAutograd")

        def model(q, k, v):
            return torch.ops.flash_attn_test.forward(q, k, v, 0.25, True)[0]

        found = []

        def collect(gm, inputs):
            found.extend(attentions(program_from_dynamo(gm, inputs)))
            return gm.forward

        q, kv = torch.randn(2, 10, 4, 16), torch.randn(2, 10, 2, 16)
        torch.compile(model, backend=collect)(q, kv, kv.clone())
    (attention,) = found
    assert (attention.implementation, attention.layout) == ("flash", "BTHD")
    assert (attention.scale, attention.is_causal) == (0.25, True)
    assert attention.node.target is __import__("operator").getitem
    assert tuple(attention.key.meta["val"].shape) == (2, 10, 2, 16)


def test_a_softmax_that_is_no_attention_is_left_alone():
    found = []

    def collect(gm, inputs):
        found.extend(attentions(program_from_dynamo(gm, inputs)))
        return gm.forward

    torch.compile(lambda x: torch.softmax(x @ x.T, -1) + 1, backend=collect)(torch.randn(4, 4))
    torch.compile(lambda x: torch.softmax(x, -1), backend=collect)(torch.randn(4, 4))
    assert found == []
