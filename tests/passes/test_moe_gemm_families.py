"""`moe_gemm` on families beyond the six that are tested in depth, and on a trained model: it hits, or says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from decode_step import enliven
from families import COMMON, batch
from moe_families import OTHERS

from effpass.backend import reports

ROOT = Path(__file__).parents[2]
FAST = ("Qwen2Moe", "Glm4Moe", "NemotronH", "Llama4")


def _compiled(model):
    torch._dynamo.reset()
    reports.clear()
    return torch.compile(model, backend="effpass", options={"passes": ["moe_gemm"], "inner": "eager"})


@pytest.mark.parametrize("family", [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in OTHERS])
def test_it_hits_or_says_why(family):
    sizes, expected = OTHERS[family]
    config = getattr(transformers, f"{family}Config" if family != "Llama4" else "Llama4TextConfig", None)
    if config is None:
        pytest.skip(f"this transformers has no {family}")
    known = {key: value for key, value in {**COMMON, **sizes}.items() if value is not None}
    model = enliven(getattr(transformers, f"{family}ForCausalLM")(config(**known)).eval())
    inputs = batch(9, padding=0)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
        torch.testing.assert_close(_compiled(model)(**inputs, use_cache=False).logits, logits, rtol=1e-5, atol=1e-5)
    (entry,) = reports[-1].passes
    if isinstance(expected, int):
        assert (entry.hits, entry.refusals) == (expected, [])
    else:
        assert entry.hits == 0
        assert any(expected in refusal.reason for refusal in entry.refusals), entry.refusals


def test_a_trained_model():
    """With the routing that training leaves, the loss of a text is the same."""
    folder = ROOT / "models" / "tiny-moe"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
    text = (ROOT / "docs" / "architecture.md").read_bytes()[:384]
    ids = torch.tensor([list(text)])  # a token a byte
    with torch.no_grad():
        expected = model(ids, labels=ids)
        found = _compiled(model)(ids, labels=ids)
    (entry,) = reports[-1].passes
    assert entry.hits == model.config.num_hidden_layers
    assert expected.loss < 3.5  # a model that knows nothing has 5.6
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-6, atol=1e-6)
