"""`sparse_verification` through recipes: what it counts, what it leaves alone, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from speculative_drafts import draft_model

import effpass
from effpass.core.errors import ArtifactError, EffpassError, ModelError, PassRefusedError, RecipeError
from effpass.runtime.speculative import Eagle2, ModelDraft
from effpass.runtime.speculative.calibrated import calibrate
from effpass.runtime.speculative.redundancy import Budgets
from effpass.runtime.speculative.sparse import settings_of

GIVEN = families.batch(40)
PADDED = {k: GIVEN[k] for k in ("input_ids", "attention_mask")}
FREE = {"max_new_tokens": 16, "eos_token_id": None, "do_sample": False}
SMALL = {"dense_below": 8, "block": 4}


def recipe(**options: Any) -> dict[str, Any]:
    return {"version": 1, "passes": [{"sparse_verification": options}]}


def speculate(model: Any, family: str) -> torch.Tensor:
    """The text of sparse rounds."""
    speculator = ModelDraft(draft_model("random", family), Eagle2(4, 3, 12))
    return model.generate(**PADDED, **FREE, draft=speculator)


def plain(family: str, **overrides: Any) -> torch.Tensor:
    return families.make(family, **overrides).generate(**PADDED, **FREE)


@pytest.mark.parametrize(
    ("family", "options", "hits"),
    [
        ("llama", {"attention": 1.0}, 2),
        ("gemma3", {"attention": 1.0, "channels": 1.0}, 1 + 2),
        ("qwen3_moe", {"attention": 1.0, "experts": 1.0}, 2 + 2),
        ("deepseek_v3", {"attention": None, "channels": 1.0, "experts": 1.0}, 2 + 1),  # the second one's shared experts
    ],
)
def test_with_all_of_it_the_text_is_the_model_s(family: str, options: dict[str, Any], hits: int) -> None:
    model = effpass.prepare(families.make(family), recipe(**SMALL, **options))
    (entry,) = [e for e in model.effpass_report.passes if e.name == "sparse_verification"]
    assert entry.hits == hits
    assert torch.equal(speculate(model, family), plain(family))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"attention": 0.1}),
        ("llama", {"attention": None, "channels": 0.3}),
        ("llama", {"attention": None, "skip_below": 0.1}),
        ("mixtral", {"attention": None, "experts": 0.25}),
        ("qwen3_moe", {"attention": 0.1, "experts": 0.25}),
        ("deepseek_v3", {"attention": None, "channels": 0.3, "experts": 0.25}),
    ],
)
def test_only_trees_are_verified_sparsely(family: str, options: dict[str, Any]) -> None:
    """Without a draft the text is the model's, and with one it is another."""
    model = effpass.prepare(families.make(family), recipe(**SMALL, **options))
    assert torch.equal(model.generate(**PADDED, **FREE), plain(family))
    assert not torch.equal(speculate(model, family), plain(family))
    assert torch.equal(model.generate(**PADDED, **FREE), plain(family))
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


def test_what_it_leaves_alone() -> None:
    model = effpass.prepare(families.make("gemma3"), recipe(**SMALL))
    (entry,) = [e for e in model.effpass_report.passes if e.name == "sparse_verification"]
    assert [(r.node, r.reason) for r in entry.refusals] == [
        ("layer 0", "it sees 8 positions only, and reads all of that")
    ]


def artifact(folder: Path, family: str = "qwen3_moe", **budgets: Any) -> Path:
    model = families.make(family)
    samples = [families.batch(60, seed=seed)["input_ids"][:1] for seed in range(3)]
    calibrate(model, samples, Budgets(block=4, nodes=8, **budgets)).save(folder)
    return folder


def test_a_calibrated_artifact(tmp_path: Path) -> None:
    """Anchors and shares come from it; up to one expert of two is skipped by each token."""
    folder = artifact(tmp_path / "found")
    options = {**SMALL, "attention": 0.25, "artifact": str(folder), "skip_experts": 1}
    model = effpass.prepare(families.make("qwen3_moe"), recipe(**options))
    settings = settings_of(model)
    assert settings.blocks.anchors[0] == 0
    assert len(settings.experts.shares) == 2
    assert all(0 < share < 0.5 for (share,) in settings.experts.shares)
    assert not torch.equal(speculate(model, "qwen3_moe"), plain("qwen3_moe"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": 0}, "attention: got 0.0, expected a share"),
        ({"channels": 1.5}, "channels: got 1.5, expected a share"),
        ({"block": 0}, "block: got 0, expected 1 or more"),
        ({"refresh": 0}, "refresh: got 0, expected 1 or more"),
        ({"skip_below": -1}, "skip_below: got -1"),
        ({"attention": None}, "nothing is left out: give attention, channels or experts"),
        ({"channels": 0.5, "skip_below": 0.1}, "channels and skip_below are two ways to say it"),
        ({"experts": 0.5, "skip_experts": 1, "artifact": "x"}, "experts and skip_experts are two ways to say it"),
        ({"skip_experts": 1}, "skip_experts: needs shares that were calibrated"),
        ({"atention": 0.5}, "did you mean 'attention'"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        effpass.prepare(families.make("llama"), recipe(**options))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("deepseek_v3", {}, "caches latents, of which no blocks are chosen\n  → attention: null"),
        ("mistral", {}, "no layer of MistralForCausalLM attends to all of its prefix"),
        ("gpt2", {"channels": 0.5}, "GPT2LMHeadModel has no feed-forward network of gate, up and down"),
        ("mixtral", {"channels": 0.5}, "MixtralForCausalLM has no feed-forward network"),
        ("llama", {"experts": 0.5}, "LlamaForCausalLM has no experts"),
    ],
)
def test_models_that_do_not_fit(family: str, options: dict[str, Any], message: str) -> None:
    model = families.make(family)
    with pytest.raises(ModelError) as caught:
        effpass.prepare(model, recipe(**options))
    assert message in str(caught.value)
    assert settings_of(model) is None


@pytest.mark.parametrize("other", [{"prefix_kv": {"budget": 0.5}}, "sparse_attention"])
def test_passes_that_hold_the_cache_in_a_way_of_their_own(other: Any) -> None:
    with pytest.raises(PassRefusedError, match="replaces the key-value cache"):
        effpass.prepare(families.make("llama"), {"version": 1, "passes": [other, "sparse_verification"]})


def test_artifacts_that_do_not_fit(tmp_path: Path) -> None:
    folder = artifact(tmp_path / "found")
    with pytest.raises(ArtifactError, match="calibrated with blocks of 4, and the recipe says 64"):
        effpass.prepare(families.make("qwen3_moe"), recipe(artifact=str(folder)))
    with pytest.raises(ArtifactError):
        effpass.prepare(families.make("qwen3_moe", seed=1), recipe(block=4, artifact=str(folder)))
    with pytest.raises(ModelError, match="skip_experts: 2, and a token takes 2; one at least stays"):
        effpass.prepare(
            families.make("qwen3_moe"), recipe(**SMALL, attention=None, artifact=str(folder), skip_experts=2)
        )
    llama = artifact(tmp_path / "of llama", "llama")
    with pytest.raises(ModelError, match="no experts"):
        effpass.prepare(families.make("llama"), recipe(block=4, artifact=str(llama), skip_experts=1))


def test_more_rounds_than_one_call_takes_are_refused_when_the_tree_is_known() -> None:
    model = effpass.prepare(families.make("llama"), recipe(**SMALL, refresh=90))
    with pytest.raises(EffpassError, match="refresh: 90 rounds of trees of depth 3"):
        speculate(model, "llama")


def test_weights_that_lie_by_channel_are_the_same_weights(tmp_path: Path) -> None:
    """`channels` turns W_down round in memory; outputs, gradients and checkpoints don't know."""
    model, theirs = effpass.prepare(families.make("llama"), recipe(channels=0.5)), families.make("llama")
    weight, other = (m.model.layers[0].mlp.down_proj.weight for m in (model, theirs))
    assert (weight.stride(), other.stride()) == ((1, 64), (96, 1))
    assert torch.equal(weight, other)
    ids = GIVEN["input_ids"]
    for run in (model, theirs):
        run(ids, labels=ids).loss.backward()
    torch.testing.assert_close(weight.grad, other.grad)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(theirs).from_pretrained(tmp_path / "saved")
    assert torch.equal(loaded(ids).logits, theirs(ids).logits)
