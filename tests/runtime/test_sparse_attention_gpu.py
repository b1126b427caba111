"""Sparse attention and absorbed latents in recorded decode steps."""

from __future__ import annotations

import copy
from typing import Any

import families
import pytest
import torch

import effpass
from effpass.core.errors import EffpassError
from effpass.passes.runtime.sparse_attention import recall

pytestmark = pytest.mark.gpu
WIDE = {"tokens": 256, "blocks": 16, "block": 16}
SIZES = {
    "llama": {"head_dim": 32},
    "qwen3": {"head_dim": 64},
    "deepseek_v3": {"kv_lora_rank": 64, "qk_rope_head_dim": 32},
}


def generate(model: Any, *passes: Any, length: int = 60, new: int = 24) -> Any:
    ready = effpass.prepare(copy.deepcopy(model), {"version": 1, "passes": list(passes)})
    given = families.batch(length)
    return ready, ready.generate(
        input_ids=given["input_ids"].cuda(), attention_mask=given["attention_mask"].cuda(), max_new_tokens=new,
        do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("below", [1, 70])  # from the first step on, and from inside the answer on
def test_a_budget_of_the_whole_context_changes_nothing(family: str, below: int) -> None:
    model = families.make(family, **SIZES[family]).cuda()
    _, expected = generate(model)
    _, got = generate(model, {"sparse_attention": {**WIDE, "dense_below": below}})
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert torch.equal(got.sequences, expected.sequences)


def test_a_recorded_step_without_kernels_says_so() -> None:
    """The pass refuses such a model on a GPU; one that is moved there later gets this far."""
    model = families.make("llama")  # heads of 16, and so are labels
    ready = effpass.prepare(model, {"version": 1, "passes": [{"sparse_attention": {**WIDE, "dense_below": 1}}]}).cuda()
    given = families.batch(60)
    with pytest.raises(EffpassError, match="labels of 16 channels"):
        ready.generate(input_ids=given["input_ids"].cuda(), max_new_tokens=2, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize("family", ["deepseek_v3"])
def test_absorbed_latents_are_the_same_function(family: str) -> None:
    model = families.make(family, **SIZES[family]).cuda()
    _, expected = generate(model)
    _, got = generate(model, "mla_absorption")
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"pipelined": True}, {"levels": "blocks"}, {"levels": "tokens"}])
def test_recorded_steps_choose_as_the_host_does(options: dict[str, Any]) -> None:
    narrow = {"tokens": 32, "blocks": 4, "block": 16, "recent": 1, "dense_below": 1, **options}
    model = families.make("llama", **SIZES["llama"])
    given = families.batch(60)
    ready = effpass.prepare(copy.deepcopy(model), {"version": 1, "passes": [{"sparse_attention": narrow}]})
    on_host = ready.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=8, do_sample=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    _, on_device = generate(model.cuda(), {"sparse_attention": narrow}, new=8)
    for ours, theirs in zip(on_device.logits, on_host.logits, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=2e-3, atol=5e-3)


def test_an_audit_counts_recorded_steps() -> None:
    narrow = {"tokens": 32, "blocks": 4, "block": 16, "recent": 1, "dense_below": 1, "audit": True}
    model = families.make("llama", **SIZES["llama"])
    found = []
    for device in ("cpu", "cuda"):
        of_device = copy.deepcopy(model).to(device)
        ready = effpass.prepare(of_device, {"version": 1, "passes": [{"sparse_attention": narrow}]})
        given = {name: tensor.to(device) for name, tensor in families.batch(60).items()}
        ready.generate(
            input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=8, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        counts = [float(audit.sums[2]) for audit in ready.effpass_reader.audits.values()]
        found.append((counts, recall(ready)))
    assert found[0][0] == found[1][0]
    for layer, expected in found[0][1].items():
        assert found[1][1][layer] == pytest.approx(expected, abs=0.02)
