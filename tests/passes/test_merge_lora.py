"""`merge_lora` on the module: adapters from folders and attached by PEFT, against PEFT's own forward."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, make
from lora_models import (
    CASES,
    LINEARS,
    ROUNDING,
    attached,
    logits,
    merge,
    plain,
    saved,
    stir,
    unchanged,
)

from effpass.core.errors import ArtifactError, ModelError, RecipeError
from effpass.core.recipe import Recipe
from effpass.passes.weights.merge_lora import MergeLora, MergeLoraOptions, WeightedAdapter, logit_difference

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("case", CASES)
def test_folder_merged_on_the_model(case: str, tmp_path: Path) -> None:
    family, config, options, changed = CASES[case]
    wrapped = attached(family, make_options=options, **config)
    expected = logits(wrapped)
    folder = saved(wrapped, tmp_path / "adapter")
    model = make(family, **options)
    before = logits(model)
    pass_ = merge(folder)
    pass_.check_model(model)
    hits, refusals = pass_.prepare(model)
    assert refusals == []
    assert hits == changed
    assert (before - expected).abs().max() > 100 * ROUNDING, "the adapter must do something, or this test is empty"
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)


def test_config_says_when_the_embeddings_part(tmp_path: Path) -> None:
    """A merge into a tied lm_head leaves the embedding alone, and the checkpoint loads as it was saved."""
    wrapped = attached(make_options={"tie_word_embeddings": True}, target_modules=["lm_head"])
    expected = logits(wrapped)
    model = make("llama", tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight.clone()
    merge(saved(wrapped, tmp_path / "adapter")).prepare(model)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("config", [{"modules_to_save": ["embed_tokens"]}, {"target_modules": ["embed_tokens"]}])
def test_adapters_tied_like_their_weights_stay_tied(config: dict, tmp_path: Path) -> None:
    wrapped = attached(make_options={"tie_word_embeddings": True}, ensure_weight_tying=True, **config)
    expected = logits(wrapped)
    model = make("llama", tie_word_embeddings=True)
    merge(saved(wrapped, tmp_path / "adapter")).prepare(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is True
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)


def test_bfloat16_is_rounded_once(tmp_path: Path) -> None:
    """Folding in float32 and casting gives the nearest bfloat16 to the exact sum; adding in bfloat16 does not."""
    wrapped = attached(target_modules=["q_proj"])
    folder = saved(wrapped, tmp_path / "adapter")
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    model = make("llama").to(torch.bfloat16)
    base = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    delta = layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    merge(folder).prepare(model)
    merged = model.model.layers[0].self_attn.q_proj.weight
    assert merged.dtype == torch.bfloat16
    exact = base.double() + delta
    # half a unit in the last place of bfloat16's 8 significant bits, and float32's own rounding
    assert ((merged.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-7).all()


def test_weighted_sum_of_adapters(tmp_path: Path) -> None:
    one = saved(attached(seed=1), tmp_path / "one")
    two = saved(attached(seed=2, r=2, target_modules=["q_proj", "down_proj"]), tmp_path / "two")
    model, base = make("llama"), make("llama")
    options = MergeLoraOptions(adapters=(WeightedAdapter(one, 0.7), WeightedAdapter(two, -0.3)))
    assert MergeLora(options).prepare(model) == (8, [])
    singles = []
    for folder in (one, two):
        singles.append(make("llama"))
        merge(folder).prepare(singles[-1])
    for name, merged in model.named_parameters():
        w, a, b = (m.get_parameter(name).double() for m in (base, *singles))
        # three float32 roundings of numbers of size one
        torch.testing.assert_close(merged.double(), w + 0.7 * (a - w) - 0.3 * (b - w), rtol=0, atol=5e-7)


def test_logit_difference(tmp_path: Path) -> None:
    wrapped = attached()
    model, base = make("llama"), make("llama")
    ids = batch(9)["input_ids"]
    merge(saved(wrapped, tmp_path / "adapter")).prepare(model)
    assert logit_difference(model, wrapped, ids) < ROUNDING
    with torch.no_grad():
        recorded = base(input_ids=ids).logits
        expected = float((model(input_ids=ids).logits - recorded).abs().max())
    assert logit_difference(model, recorded, ids) == pytest.approx(expected)
    assert expected > 0.1
    with pytest.raises(ModelError, match=r"\(2, 9, 96\) can't be compared with logits \(2, 9, 95\)"):
        logit_difference(model, recorded[..., :-1], ids)


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 32}, r"layers\.0\.mlp\.up_proj is for a weight of shape \(96, 64\), .* is \(96, 32\)"),
        ({"num_hidden_layers": 1}, r"no parameter 'model\.layers\.1\.\S+' \(3 such names\), did you mean 'model\.l"),
    ],
)
def test_an_adapter_of_another_model(overrides: dict, message: str, tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    overrides = {"head_dim": 16, **overrides}
    model = make("llama", **overrides)
    with pytest.raises(ArtifactError, match=message):
        merge(folder).check_model(model)
    with pytest.raises(ArtifactError):
        merge(folder).prepare(model)
    assert unchanged(model, make("llama", **overrides))


def test_options_from_a_recipe(tmp_path: Path) -> None:
    recipe = Recipe.parse(
        {"passes": [{"merge_lora": {"adapters": [{"path": "./a", "weight": 0.7}, {"path": "b"}]}}]}, base=tmp_path
    )
    assert recipe.steps[0].options.named == (WeightedAdapter(tmp_path / "a", 0.7), WeightedAdapter(tmp_path / "b"))
    for bad, message in (
        ({"adapter": "a", "adapters": [{"path": "b"}]}, "both adapter and adapters"),
        ({"adapters": [{"path": "b", "weigth": 1.0}]}, "weigth: unknown option, did you mean 'weight'"),
        ({"adapters": [{"path": "b", "weight": float("nan")}]}, "expected a finite number|nan"),
        ({"quantized": "maybe"}, "'refuse' or 'keep' or 'dequantize'"),
    ):
        with pytest.raises(RecipeError, match=message):
            Recipe.parse({"passes": [{"merge_lora": bad}]}, base=tmp_path)


def test_adapters_that_do_not_add_up(tmp_path: Path) -> None:
    dora = saved(attached(use_dora=True), tmp_path / "dora")
    plain = saved(attached(), tmp_path / "plain")
    head = saved(attached(modules_to_save=["lm_head"]), tmp_path / "head")
    for items, message in (
        ([(dora, 1.0), (plain, 1.0)], "DoRA .* merges alone"),
        ([(dora, 0.5)], "DoRA .* with weight 1"),
        ([(head, 0.5), (plain, 1.0)], "replaces lm_head.weight entirely"),
        ([(head, 1.0), (head, 1.0)], "replaces lm_head.weight entirely"),
    ):
        options = MergeLoraOptions(adapters=tuple(WeightedAdapter(p, w) for p, w in items))
        with pytest.raises(ArtifactError, match=message):
            MergeLora(options).check_model(make("llama"))
    MergeLora(MergeLoraOptions(adapters=(WeightedAdapter(head), WeightedAdapter(plain, 0.5)))).check_model(
        make("llama")
    )


def test_a_model_that_is_not_in_memory(tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    with pytest.raises(ModelError, match="not in memory"):
        merge(folder).check_model(make("llama").to("meta"))


# -- adapters attached by PEFT, on the model ------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_attached_merged_on_the_model(case: str) -> None:
    family, config, options, _ = CASES[case]
    wrapped, twin = (attached(family, make_options=options, **config) for _ in range(2))
    expected = logits(wrapped)
    modules = {
        n for n, m in wrapped.named_modules() if n and (hasattr(m, "base_layer") or hasattr(m, "modules_to_save"))
    }
    hits, refusals = MergeLora().prepare(wrapped)
    assert refusals == []
    assert hits == len(modules) > 0
    model = wrapped.get_base_model()
    assert plain(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(logits(wrapped), expected, rtol=0, atol=ROUNDING)
    if case in ("tied lm_head", "tied embedding", "tied both", "scaled embedding"):
        return  # PEFT's own merge adds the update to the tied weight, and so to both its uses
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = twin.merge_and_unload()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for ours, peft_s in zip(model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(ours, peft_s, rtol=1e-6, atol=1e-6)  # float32, another order of operations
    assert model.config.tie_word_embeddings == theirs.config.tie_word_embeddings


def test_a_merged_peft_model_is_an_ordinary_one(tmp_path: Path) -> None:
    wrapped = attached()
    expected = logits(wrapped)
    assert MergeLora().prepare(wrapped) == (6, [])
    model = wrapped.get_base_model()
    ids = batch(5, padding=0)["input_ids"]
    assert torch.equal(
        wrapped.generate(input_ids=ids, max_new_tokens=3), model.generate(input_ids=ids, max_new_tokens=3)
    )
    model.save_pretrained(tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=ROUNDING)
    again = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).eval()
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=ROUNDING)
    assert MergeLora().prepare(make("llama")) == (0, [])


def test_an_adapter_added_through_transformers() -> None:
    model = make("llama")
    try:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=LINEARS))
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))  # transformers 5.24 asks for a PEFT that is not released
    stir(model, 1)
    model.eval()
    expected = logits(model)
    assert MergeLora().prepare(model) == (6, [])
    assert plain(model)
    assert model._hf_peft_config_loaded is False
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)


def test_several_active_adapters() -> None:
    wrapped = attached()
    wrapped.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"]))
    wrapped.base_model.set_adapter(["default", "other"])
    stir(wrapped, 3)
    expected = logits(wrapped)
    assert MergeLora().prepare(wrapped) == (8, [])
    torch.testing.assert_close(logits(wrapped), expected, rtol=0, atol=ROUNDING)


def refuse_disabled(wrapped: Any) -> None:
    wrapped.base_model.disable_adapter_layers()


def refuse_training(wrapped: Any) -> None:
    wrapped.train()


def refuse_half_merged(wrapped: Any) -> None:
    wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=LINEARS))
    wrapped.merge_adapter(["other"])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (refuse_disabled, "its adapter is disabled"),
        (refuse_training, "the adapter is being trained"),
        (refuse_half_merged, "PEFT has merged other adapters into it"),
    ],
)
def test_attached_adapters_that_are_left_alone(spoil: Any, reason: str) -> None:
    wrapped = attached()
    spoil(wrapped)
    expected = logits(wrapped)
    hits, refusals = MergeLora().prepare(wrapped)
    assert hits == 0
    assert len(refusals) == (12 if spoil is refuse_training else 6)
    assert all(reason in r.reason and r.hint for r in refusals)
    assert torch.equal(logits(wrapped), expected)


def test_other_kinds_of_adapters_are_left_to_peft() -> None:
    model = peft.get_peft_model(make("llama"), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]))
    hits, refusals = MergeLora().prepare(model.eval())
    assert (hits, len(refusals)) == (0, 2)
    assert "ia3" in refusals[0].reason.lower()
    assert "merge_and_unload" in refusals[0].hint
    experts = attached("mixtral", target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    expected = logits(experts)
    hits, refusals = MergeLora().prepare(experts)
    assert (hits, len(refusals)) == (0, 2)
    assert "ParamWrapper" in refusals[0].reason
    assert torch.equal(logits(experts), expected)


def test_named_and_attached_do_not_mix(tmp_path: Path) -> None:
    wrapped = attached()
    folder = saved(wrapped, tmp_path / "adapter")
    with pytest.raises(ModelError, match="already has adapters attached"):
        merge(folder).check_model(wrapped)


def test_already_merged_by_peft() -> None:
    wrapped = attached()
    wrapped.merge_adapter()
    expected = logits(wrapped)
    assert MergeLora().prepare(wrapped) == (6, [])
    assert torch.equal(logits(wrapped.get_base_model()), expected)
