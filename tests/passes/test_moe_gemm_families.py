"""`moe_gemm` on families beyond the six that are tested in depth, and on a trained model: it hits, or says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from decode_step import enliven
from families import COMMON, batch
from moe_families import OTHERS

import effpass
from effpass.backend import reports

ROOT = Path(__file__).parents[2]
FAST = ("Qwen2Moe", "Glm4Moe", "NemotronH", "Llama4")


def _compiled(model, inner="eager"):
    torch._dynamo.reset()
    reports.clear()
    return torch.compile(model, backend="effpass", options={"passes": ["moe_gemm"], "inner": inner})


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in OTHERS])
def test_it_hits_or_says_why(family):
    sizes, expected = OTHERS[family]
    config = getattr(transformers, f"{family}Config" if family != "Llama4" else "Llama4TextConfig", None)
    if config is None:
        pytest.skip(f"this transformers has no {family}")
    known = {key: value for key, value in {**COMMON, **sizes}.items() if value is not None}
    model = enliven(getattr(transformers, f"{family}ForCausalLM")(config(**known)).eval())
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    inputs = batch(9, padding=0)
    torch._dynamo.reset()
    reports.clear()
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        prepared = effpass.optimize(model, {"version": 1, "passes": ["moe_gemm"]}, inner="eager")
        torch.testing.assert_close(prepared(**inputs, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5)
    assert len(model.effpass_report.changed) == model._can_set_experts_implementation()
    (entry,) = reports[-1].passes
    if isinstance(expected, int):
        assert (entry.hits, entry.refusals) == (expected, [])
    else:
        assert entry.hits == 0
        assert any(expected in refusal.reason for refusal in entry.refusals), entry.refusals


def _trained(length):
    """A small trained model, and a text of `length` tokens, of which each is a byte."""
    model = transformers.AutoModelForCausalLM.from_pretrained(ROOT / "models" / "tiny-moe").float()
    return model, torch.tensor([list((ROOT / "docs" / "architecture.md").read_bytes()[:length])])


def test_a_trained_model():
    """With the routing that training leaves, the loss of a text is the same."""
    model, ids = _trained(384)
    with torch.no_grad():
        expected = model(ids, labels=ids)
        found = _compiled(model)(ids, labels=ids)
    (entry,) = reports[-1].passes
    assert entry.hits == model.config.num_hidden_layers
    assert expected.loss < 3.5  # a model that knows nothing has 5.6
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)


def test_gradients_of_a_trained_model():
    """In two of its layers, every weight has the gradient that it has without the pass."""
    model, ids = _trained(96)
    model.model.layers = model.model.layers[:2]

    def gradients(run):
        model.zero_grad()
        run(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients(model), gradients(_compiled(model, "aot_eager"))
    assert sum(entry.hits for report in reports for entry in report.passes) == 2
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=1e-4, atol=1e-5, msg=name)
