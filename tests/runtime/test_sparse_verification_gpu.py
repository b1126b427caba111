"""Sparse verification on a GPU: in the round's CUDA graph, with kernels, and waiting for nothing."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from speculative_drafts import draft_model
from torch import Tensor

import effpass
from effpass.runtime.attention import reading_cache
from effpass.runtime.speculative import Eagle2, ModelDraft, Speculator, generate

pytestmark = pytest.mark.gpu

FREE = {"max_new_tokens": 40, "eos_token_id": None}
GIVEN = families.batch(190)
BLOCKS = {"attention": 0.2, "dense_below": 64, "block": 64, "refresh": 5}


def speculate(family: str, device: str, **options: Any) -> tuple[Tensor, Speculator, Any]:
    """The text where every step is a sparse round; in float32."""
    recipe = {"version": 1, "passes": [{"sparse_verification": options}]}
    model = effpass.prepare(families.make(family).to(device), recipe)
    draft = ModelDraft(draft_model("random", family).to(device), Eagle2(4, 3, 12), model.effpass_engine.backend)
    speculator = Speculator(model.effpass_engine, draft, switches=False)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    given = {k: GIVEN[k].to(device) for k in ("input_ids", "attention_mask")}
    return type(model).generate(model, **given, **FREE, custom_generate=loop).cpu(), speculator, model


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", BLOCKS),
        ("llama", {"attention": None, "channels": 0.4}),
        ("qwen3_moe", {"attention": None, "experts": 0.5}),
        ("qwen3_moe", {**BLOCKS, "experts": 0.5}),
        ("deepseek_v3", {"attention": None, "channels": 0.4, "experts": 0.5}),
    ],
)
def test_kernels_in_a_graph_give_the_text_of_references(family: str, options: dict[str, Any]) -> None:
    plain = families.make(family).generate(**{k: GIVEN[k] for k in ("input_ids", "attention_mask")}, **FREE)
    expected, _, _ = speculate(family, "cpu", **options)
    assert not torch.equal(expected, plain)
    found, speculator, _ = speculate(family, "cuda", **options)
    assert torch.equal(found, expected)
    (round_,) = speculator._free.values()
    assert {key[0] for key in round_._graphs} == {"sparse round", "dense again"}


def test_nothing_waits_for_the_device() -> None:
    _, speculator, model = speculate("qwen3_moe", "cuda", **BLOCKS, experts=0.5)
    (round_,) = speculator._free.values()
    with torch.no_grad(), reading_cache(model), round_.target.attached(), speculator.draft.running():
        round_.progress.position.fill_(192)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(12):
                round_.step(reached=192)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
