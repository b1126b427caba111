"""`merge_lora` on quantized weights: refused by name, dequantized on request, or kept beside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import make
from lora_models import (
    SCHEMES,
    WITHIN,
    Linear4bit,
    attached,
    logits,
    merge,
    plain,
    quantize,
    saved,
)
from torch import nn

from effpass.core.errors import ModelError
from effpass.passes.weights.merge_lora import MergeLora, MergeLoraOptions

peft = pytest.importorskip("peft")


def test_quantized_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    model = quantize(make("llama"), Linear4bit)
    with pytest.raises(
        ModelError, match=r"layers\.0\.self_attn\.q_proj is quantized \(bitsandbytes Linear4bit\)"
    ) as error:
        merge(folder).check_model(model)
    assert "quantized: keep" in str(error.value)
    assert "quantized: dequantize" in str(error.value)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("home", ["named", "attached"])
def test_dequantized_on_request(scheme: str, home: str, tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    model = quantize(make("llama"), SCHEMES[scheme])
    if home == "attached":
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        expected = logits(model)
        refused = MergeLora().prepare(model)
        assert refused[0] == 0
        assert {r.node.rpartition(".")[2] for r in refused[1]} == {"q_proj"}
        pass_ = MergeLora(MergeLoraOptions(quantized="dequantize"))
    else:
        twin = peft.PeftModel.from_pretrained(quantize(make("llama"), SCHEMES[scheme]), folder).eval()
        expected = logits(twin)
        pass_ = merge(folder, quantized="dequantize")
    pass_.check_model(model)
    assert pass_.prepare(model) == (6, [])
    model = model.get_base_model() if home == "attached" else model
    assert plain(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=WITHIN[scheme])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("home", ["named", "attached"])
def test_kept_beside_a_quantized_weight(scheme: str, home: str, tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    twin = peft.PeftModel.from_pretrained(quantize(make("llama"), SCHEMES[scheme]), folder).eval()
    expected = logits(twin)
    model = twin if home == "attached" else quantize(make("llama"), SCHEMES[scheme])
    pass_ = MergeLora(MergeLoraOptions(quantized="keep")) if home == "attached" else merge(folder, quantized="keep")
    pass_.check_model(model)
    quantized = {n: p.clone() for n, p in model.named_parameters() if p.dtype not in (torch.float32,)}
    grads = [p.requires_grad for p in model.parameters() if p.dtype is torch.float32][:1]
    hits, refusals = pass_.prepare(model)
    assert (hits, len(refusals)) == (4, 2)
    assert all("stays beside it" in r.reason for r in refusals)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=WITHIN[scheme])
    for p, q in zip(
        quantized.values(), (p for p in model.parameters() if p.dtype not in (torch.float32,)), strict=True
    ):
        assert torch.equal(p.view(torch.uint8), q.view(torch.uint8)), "no weight was quantized a second time"
    assert grads == [p.requires_grad for p in model.parameters() if p.dtype is torch.float32][:1]


def test_dora_beside_a_quantized_weight_is_refused(tmp_path: Path) -> None:
    folder = saved(attached(use_dora=True), tmp_path / "adapter")
    model = quantize(make("llama"), Linear4bit)
    with pytest.raises(ModelError, match="its adapter is more than B A"):
        merge(folder, quantized="keep").check_model(model)


def test_a_scheme_that_cant_be_read_back(tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    model = quantize(make("llama"), Linear4bit)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ModelError, match="can't be dequantized here"):
        merge(folder, quantized="dequantize").prepare(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
