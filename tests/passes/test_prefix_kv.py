"""The pass `prefix_kv`: what it changes, where it refuses, and its profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import effpass
from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, EffpassError, ModelError, PassRefusedError, RecipeError
from effpass.passes.runtime.prefix_kv import PrefixKV
from effpass.passes.weights.structured_pruning import make_keep_artifact
from effpass.runtime.prefix_kv.calibrate import calibrate
from effpass.runtime.prefix_kv.profile import BUDGETS, Profile
from effpass.runtime.prefix_kv.session import BudgetSession


def recipe(**options: Any) -> dict[str, Any]:
    return {"version": 1, "passes": [{"prefix_kv": options}]}


def prepared(family: str = "llama", **options: Any) -> Any:
    return effpass.prepare(families.make(family), recipe(**options))


def generate(model: Any, length: int = 80, padding: int = 3, **more: Any) -> torch.Tensor:
    given = families.batch(length, padding=padding)
    given.pop("position_ids")
    return model.generate(**given, **{"max_new_tokens": 12, "eos_token_id": None, **more})


def lengths(model: Any) -> list[int]:
    (session,) = model.effpass_engine._free.values()
    return [layer.slots.length for layer in session.cache.layers]


def profile_of(model: Any, **options: Any) -> Profile:
    prompts = [{"input_ids": families.batch(128 + 8 * i)["input_ids"][1:]} for i in range(2)]
    return calibrate(model, prompts, **options)


# -- what it does ------------------------------------------------------------------------------------------------------


def test_layers_are_hits_and_those_that_slide_are_left_alone() -> None:
    model = prepared("gemma3", budget=0.5, recent=4, page=1)
    (report,) = model.effpass_report.passes
    assert (report.name, report.exact, report.hits) == ("prefix_kv", False, 1)
    assert str(report.refusals[0]) == "layer 0: it sees 8 positions only, and stays outside the budget"
    generate(model, padding=0, max_new_tokens=1)
    assert lengths(model) == [80, 40]


def test_a_model_whose_layers_all_slide_is_left_alone() -> None:
    model = prepared("mistral", budget=0.5)
    assert model.effpass_report.hits == 0
    assert torch.equal(generate(model), generate(families.make("mistral")))
    with pytest.raises(PassRefusedError, match="prefix_kv is required and rewrote nothing"):
        effpass.prepare(families.make("mistral"), recipe(budget=0.5, require=True))


@pytest.mark.parametrize(
    ("budget", "kept"), [(0.5, 80), (50, 100), ("40960 B", 80)], ids=["a share", "tokens", "bytes"]
)
def test_budgets(budget: float | int | str, kept: int) -> None:
    model = prepared(budget=budget, page=1)  # 512 bytes a token and sequence: 2 layers, 2 heads of 16, float32
    generate(model, padding=0, max_new_tokens=1)
    assert sum(lengths(model)) == kept


def test_pages() -> None:
    model = prepared(budget=0.6, recent=4, page=8)
    generate(model, padding=0, max_new_tokens=1)
    assert sum(lengths(model)) == 96
    assert all(n % 8 == 0 for n in lengths(model))


def test_bits_and_shares_compose() -> None:
    model = prepared(budget=0.5, kv_cache_dtype="int8")
    generate(model, padding=0)
    (session,) = model.effpass_engine._free.values()
    assert isinstance(session, BudgetSession)
    keys, scales = session._kept(0).storage()[:2]
    assert (keys.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    assert keys.shape[2] == scales.shape[2] < 256
    # 2 layers, 2 heads, keys and values, 16 numbers of one byte and a scale of two
    assert session.token_bytes == 2 * 2 * 2 * (16 + 2)


def test_it_composes_with_pruning(tmp_path: Path) -> None:
    make_keep_artifact(families.make("llama"), tmp_path / "keep", kv_groups=1, ffn_channels=48)
    steps = [{"structured_pruning": {"artifact": str(tmp_path / "keep")}}, {"prefix_kv": {"budget": 1.0}}]
    both = effpass.prepare(families.make("llama"), {"version": 1, "passes": steps})
    pruned = effpass.prepare(families.make("llama"), {"version": 1, "passes": steps[:1]})
    assert torch.equal(generate(both), generate(pruned))
    (session,) = both.effpass_engine._free.values()
    assert session._kept(0).keys.shape[1] == 1


def test_preparing_again_takes_the_new_budget() -> None:
    model = prepared(budget=0.5, page=1)
    generate(model, padding=0, max_new_tokens=1)
    model = effpass.prepare(model, recipe(budget=0.75, page=1))
    generate(model, padding=0, max_new_tokens=1)
    assert sum(lengths(model)) == 120


# -- the profile --------------------------------------------------------------------------------------------------


def test_a_profile_from_calibration_to_a_recipe(tmp_path: Path) -> None:
    model = families.make("llama", num_hidden_layers=3)
    profile = profile_of(model)
    assert profile.shares.shape == (len(BUDGETS), 3)
    torch.testing.assert_close(profile.shares.mean(1), torch.tensor(BUDGETS), rtol=0, atol=0.01)  # of 128 tokens: 1/256
    assert (profile.shares.diff(dim=0) >= 0).all()
    assert profile.artifact.provenance == {"samples": 2, "tokens": 264}
    profile.artifact.save(tmp_path / "profile")
    ready = effpass.prepare(model, recipe(budget=0.5, artifact=str(tmp_path / "profile"), page=1, recent=4))
    generate(ready, 100, 0, max_new_tokens=1)
    shares = profile.at(0.5)
    assert sum(lengths(ready)) == 150
    assert all(abs(n - 100 * share) <= 2 for n, share in zip(lengths(ready), shares, strict=True))


def test_shares_are_interpolated() -> None:
    shares = torch.linspace(0.1, 1, len(BUDGETS))[:, None].expand(-1, 2) * torch.tensor([1.0, 0.5])
    profile = Profile.make(families.make("llama"), shares, {}, {})
    assert profile.at(1.0) == pytest.approx([1, 0.5])
    below, above = profile.at(0.2), profile.at(0.25)
    assert profile.at(0.225) == pytest.approx([(a + b) / 2 for a, b in zip(below, above, strict=True)], rel=1e-5)
    assert profile.at(0.01) == pytest.approx([x / 2 for x in profile.at(0.02)])


def test_the_profile_of_another_model(tmp_path: Path) -> None:
    profile_of(families.make("llama")).artifact.save(tmp_path / "profile")
    for other, message in (
        (families.make("llama", seed=1), "wrong weights"),
        (families.make("llama", num_hidden_layers=3), "wrong model"),
        (families.make("qwen3"), "wrong model: architecture is 'Qwen3ForCausalLM'"),
    ):
        with pytest.raises(ArtifactError, match=message):
            effpass.prepare(other, recipe(budget=0.5, artifact=str(tmp_path / "profile")))
        assert not hasattr(other, "effpass_engine")
    with pytest.raises(ArtifactError, match="learned with importance 'both', and the recipe says 'full'"):
        prepared(budget=0.5, artifact=str(tmp_path / "profile"), importance="full")
    with pytest.raises(ArtifactError, match="learned with pool 7, and the recipe says 1"):
        prepared(budget=0.5, artifact=str(tmp_path / "profile"), pool=1)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"budgets": torch.tensor([0.5, 1.0])}, "missing tensors: shares"),
        ({"budgets": torch.tensor([0.5, 1.0]), "shares": torch.rand(3, 2)}, r"budgets \[2\] and shares \[3, 2\]"),
        ({"budgets": torch.tensor([1.0, 0.5]), "shares": torch.rand(2, 2)}, r"budgets are \[1.0, 0.5\]"),
        ({"budgets": torch.tensor([0.5, 1.0]), "shares": torch.tensor([[0.5, 1.5], [1, 1]])}, r"shares\[0, 1\] is 1.5"),
        ({"budgets": torch.tensor([0.5, 1.0]), "shares": torch.full((2, 2), torch.nan)}, r"shares\[0, 0\] is nan"),
    ],
)
def test_a_damaged_profile(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    good = profile_of(families.make("llama")).artifact
    Artifact("prefix_kv", 1, good.options, good.fingerprint, tensors=tensors).save(tmp_path / "profile")
    with pytest.raises(ArtifactError, match=message):
        prepared(budget=0.5, artifact=str(tmp_path / "profile"))


def test_calibration_that_can_not_be() -> None:
    model = families.make("llama")
    with pytest.raises(EffpassError, match="there is no prompt to calibrate with"):
        calibrate(model, [])
    with pytest.raises(EffpassError, match="prompt 0 has 20 tokens; a profile needs 128 or more"):
        calibrate(model, [{"input_ids": families.batch(20)["input_ids"][:1]}])
    with pytest.raises(EffpassError, match="prompt 0 has 300 tokens, and the model 256 positions"):
        calibrate(model, [{"input_ids": families.batch(300)["input_ids"][:1]}])
    with pytest.raises(ModelError, match="every layer of the model has a sliding window"):
        profile_of(families.make("mistral"))
    assert model.config._attn_implementation == "sdpa"


# -- what it refuses ----------------------------------------------------------------------------------------------


def test_only_prepare_can_give_a_model_a_cache() -> None:
    sentence = r"prefix_kv needs effpass.prepare\(model, recipe\) before torch.compile"
    compiled = torch.compile(
        families.make("llama"), backend="effpass", options={"passes": [{"prefix_kv": {"budget": 0.5}}]}
    )
    with pytest.raises(Exception, match=sentence):
        compiled(**families.batch(8))
    with pytest.raises(PassRefusedError, match="prefix_kv rewrites the graph or the runtime, which a checkpoint can't"):
        effpass.api.check_savable(effpass.api.read_recipe(recipe(budget=0.5)), "nowhere")


def test_an_export_has_no_such_cache(tmp_path: Path) -> None:
    with pytest.raises(PassRefusedError, match="prefix_kv"):
        effpass.export(families.make("llama"), recipe(budget=0.5), tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "option 'budget' is missing"),
        ({"budget": 0}, "budget: got 0, expected tokens a layer, 1 or more; a share is written with a point: 1.0"),
        ({"budget": 1.5}, "budget: got 1.5, expected a share above 0 and up to 1.0"),
        ({"budget": "8 cats"}, "budget: got '8 cats', expected bytes such as '512 MiB' or '8 GB'"),
        ({"budget": 20}, "budget: 20 tokens are fewer than the protected ones, 4 first (sink) and 32 last (recent)"),
        ({"budget": 0.5, "recent": 0}, "recent: got 0, expected 1 or more"),
        ({"budget": 0.5, "page": 0}, "page: got 0, expected 1 or more"),
        ({"budget": 0.5, "pool": 4}, "pool: got 4, expected an odd number"),
        ({"budget": 0.5, "kv_cache_dtype": "int2"}, "got 'int2' (str), expected 'auto' or 'int8' or 'fp8' or 'int4'"),
        ({"budgett": 0.5}, "budgett: unknown option, did you mean 'budget'?"),
    ],
)
def test_options_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        prepared(**options)
    assert message in str(caught.value)


def test_bytes_that_do_not_hold_what_is_protected() -> None:
    with pytest.raises(
        EffpassError, match="1000 bytes are 2 tokens a layer, fewer than the protected ones: 4 first, 32"
    ):
        prepared(budget="1 KB")


def test_int4_needs_pairs() -> None:
    odd = families.make("qwen3")
    odd.config.head_dim = 15
    with pytest.raises(ModelError, match=r"int4 stores two numbers a byte, and a head has 15\n.*use int8 or fp8"):
        effpass.prepare(odd, recipe(budget=0.5, kv_cache_dtype="int4"))


def test_a_module_that_does_not_generate() -> None:
    with pytest.raises(ModelError, match="Linear is no transformers model that generates"):
        effpass.prepare(torch.nn.Linear(2, 2), recipe(budget=0.5))


def test_options_come_back_as_they_were_given(tmp_path: Path) -> None:
    parsed = effpass.api.read_recipe(recipe(budget="1.5 GiB", kv_cache_dtype="fp8", importance="full"))
    parsed.save(tmp_path / "r.yaml")
    again = effpass.api.read_recipe(tmp_path / "r.yaml")
    assert again.steps == parsed.steps
    assert json.loads(json.dumps(PrefixKV(again.steps[0].options).options.budget)) == "1.5 GiB"
