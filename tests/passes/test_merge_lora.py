"""`merge_lora` on the module, in the graph and in exports, against PEFT's own forward."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, make
from torch import nn

import effpass.backend as backend
from effpass.core.errors import ArtifactError, ModelError, PassRefusedError, RecipeError
from effpass.core.exported import program_from_exported, to_exported
from effpass.core.manager import PassManager
from effpass.core.recipe import Recipe
from effpass.passes.weights.merge_lora import MergeLora, MergeLoraOptions, WeightedAdapter, logit_difference, swap

peft = pytest.importorskip("peft")

# Float32 logits of size one, summed in another order: some ten units in the last place.
ROUNDING = 5e-6
LINEARS = ["q_proj", "v_proj", "up_proj"]


def attached(
    family: str = "llama", seed: int = 1, model: Any = None, make_options: dict | None = None, **config: Any
) -> Any:
    """A PeftModel in `eval()` mode whose adapter does something."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM", **config}
    base = make(family, **(make_options or {})) if model is None else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()
    stir(wrapped, seed)
    return wrapped


def stir(wrapped: nn.Module, seed: int) -> None:
    """Random values in everything that training would have changed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator))
            elif p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))


def logits(model: nn.Module, length: int = 12) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(length), use_cache=False).logits


def saved(wrapped: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(folder)
    return folder


def merge(folder: Path, **options: Any) -> MergeLora:
    return MergeLora(MergeLoraOptions(adapter=folder, **options))


CASES = {
    "lora": ("llama", {}, {}, 6),
    "rslora": ("llama", {"use_rslora": True}, {}, 6),
    "dora": ("llama", {"use_dora": True}, {}, 6),
    "all-linear": ("qwen3", {"target_modules": "all-linear"}, {}, 14),
    "regex": ("llama", {"target_modules": r".*\.1\..*(q|o)_proj"}, {}, 2),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {r"layers\.0\..*": 3, "up_proj": 5}}, {}, 6),
    "layers": ("llama", {"layers_to_transform": [1]}, {}, 3),
    "orthogonal init": ("llama", {"init_lora_weights": "orthogonal"}, {}, 6),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"]}, {}, 8),
    "gpt2 dora": ("gpt2", {"target_modules": ["c_attn"], "use_dora": True}, {}, 2),
    "phi3 fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}, {}, 4),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, {}, 3),
    "embedding dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, {}, 1),
    "scaled embedding": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}, {}, 3),
    "lora_bias": ("llama", {"target_modules": ["q_proj"], "lora_bias": True}, {"attention_bias": True}, 4),
    "bias all": ("llama", {"bias": "all"}, {"attention_bias": True}, 14),
    "modules_to_save": ("llama", {"modules_to_save": ["lm_head", "norm"]}, {}, 12),
    "tied lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}, {"tie_word_embeddings": True}, 3),
    "tied embedding": ("llama", {"target_modules": ["embed_tokens"]}, {"tie_word_embeddings": True}, 1),
    "tied both": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}, {"tie_word_embeddings": True}, 2),
    "tied modules_to_save": ("llama", {"modules_to_save": ["lm_head"]}, {"tie_word_embeddings": True}, 7),
}


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


def unchanged(model: nn.Module, seed_model: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), seed_model.parameters(), strict=True))


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


def plain(model: nn.Module) -> bool:
    return not any("lora" in type(m).__module__ or hasattr(m, "base_layer") for m in model.modules())


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
    model.add_adapter(peft.LoraConfig(r=4, target_modules=LINEARS))
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


# -- quantised weights ----------------------------------------------------------------------------------------------


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' class of this name: the weight is kept as bytes and scales."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.scale = linear.weight.detach().abs().max() / 7
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


def float8_linear(linear: nn.Linear) -> nn.Linear:
    """transformers' FP8Linear with one scale per block of 32 x 32, run in float32."""
    finegrained = pytest.importorskip("transformers.integrations.finegrained_fp8")

    class FP8Linear(finegrained.FP8Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(x, expand(self.weight_scale_inv) * self.weight.float(), self.bias)

    out, features = linear.weight.shape

    def expand(scale: torch.Tensor) -> torch.Tensor:
        return scale.repeat_interleave(32, 0).repeat_interleave(32, 1)[:out, :features]

    quantised = FP8Linear(features, out, block_size=(32, 32))
    blocks = (
        nn.functional.pad(linear.weight.detach(), (0, -features % 32, 0, -out % 32)).unfold(0, 32, 32).unfold(1, 32, 32)
    )
    scale = blocks.abs().amax(dim=(2, 3)) / 448
    quantised.weight_scale_inv = nn.Parameter(scale)
    quantised.weight = nn.Parameter(
        (linear.weight.detach() / expand(scale)).to(torch.float8_e4m3fn), requires_grad=False
    )
    quantised.bias = linear.bias
    return quantised


def bitsandbytes_linear(linear: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    quantised = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32)
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def torchao_linear(linear: nn.Linear) -> nn.Module:
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(linear, ao.Int8WeightOnlyConfig())
    return linear


SCHEMES = {"float8": float8_linear, "bitsandbytes": bitsandbytes_linear, "torchao": torchao_linear}
# bitsandbytes' CPU kernel rounds activations and scales to bfloat16, in its own moment.
WITHIN = {"float8": ROUNDING, "bitsandbytes": 1e-3, "torchao": ROUNDING}


def quantise(model: nn.Module, how: Any) -> nn.Module:
    """Quantise one kind of adapted layer, and others that no adapter touches."""
    names = ("q_proj", "k_proj") if how is bitsandbytes_linear else ("q_proj", "k_proj", "down_proj")
    for name, module in list(model.named_modules()):
        if name.endswith(names):
            model.set_submodule(name, how(module))
    return model


def test_quantised_weights_are_refused_by_name(tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    model = quantise(make("llama"), Linear4bit)
    with pytest.raises(
        ModelError, match=r"layers\.0\.self_attn\.q_proj is quantised \(bitsandbytes Linear4bit\)"
    ) as error:
        merge(folder).check_model(model)
    assert "quantized: keep" in str(error.value)
    assert "quantized: dequantize" in str(error.value)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("home", ["named", "attached"])
def test_dequantised_on_request(scheme: str, home: str, tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    model = quantise(make("llama"), SCHEMES[scheme])
    if home == "attached":
        model = peft.PeftModel.from_pretrained(model, folder).eval()
        expected = logits(model)
        refused = MergeLora().prepare(model)
        assert refused[0] == 0
        assert {r.node.rpartition(".")[2] for r in refused[1]} == {"q_proj"}
        pass_ = MergeLora(MergeLoraOptions(quantized="dequantize"))
    else:
        twin = peft.PeftModel.from_pretrained(quantise(make("llama"), SCHEMES[scheme]), folder).eval()
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
def test_kept_beside_a_quantised_weight(scheme: str, home: str, tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    twin = peft.PeftModel.from_pretrained(quantise(make("llama"), SCHEMES[scheme]), folder).eval()
    expected = logits(twin)
    model = twin if home == "attached" else quantise(make("llama"), SCHEMES[scheme])
    pass_ = MergeLora(MergeLoraOptions(quantized="keep")) if home == "attached" else merge(folder, quantized="keep")
    pass_.check_model(model)
    quantised = {n: p.clone() for n, p in model.named_parameters() if p.dtype not in (torch.float32,)}
    grads = [p.requires_grad for p in model.parameters() if p.dtype is torch.float32][:1]
    hits, refusals = pass_.prepare(model)
    assert (hits, len(refusals)) == (4, 2)
    assert all("stays beside it" in r.reason for r in refusals)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=WITHIN[scheme])
    for p, q in zip(
        quantised.values(), (p for p in model.parameters() if p.dtype not in (torch.float32,)), strict=True
    ):
        assert torch.equal(p.view(torch.uint8), q.view(torch.uint8)), "no weight was quantised a second time"
    assert grads == [p.requires_grad for p in model.parameters() if p.dtype is torch.float32][:1]


def test_dora_beside_a_quantised_weight_is_refused(tmp_path: Path) -> None:
    folder = saved(attached(use_dora=True), tmp_path / "adapter")
    model = quantise(make("llama"), Linear4bit)
    with pytest.raises(ModelError, match="its adapter is more than B A"):
        merge(folder, quantized="keep").check_model(model)


def test_a_scheme_that_cant_be_read_back(tmp_path: Path) -> None:
    folder = saved(attached(), tmp_path / "adapter")
    model = quantise(make("llama"), Linear4bit)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ModelError, match="can't be dequantised here"):
        merge(folder, quantized="dequantize").prepare(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# -- in the graph ---------------------------------------------------------------------------------------------------


def compiled(model: nn.Module, *passes: Any, **options: Any) -> Any:
    backend.reports.clear()
    dynamic, inner = options.pop("dynamic", None), options.pop("inner", "eager")
    given = {"passes": list(passes)} if passes else {}
    return torch.compile(model, backend="effpass", dynamic=dynamic, options={"inner": inner, **given, **options})


ONE = {"num_hidden_layers": 1}  # one layer shows every pattern, and compiles in half the time


def hits() -> list[int]:
    return [sum(p.hits for p in r.passes) for r in backend.reports]


def named(folder: Path, **options: Any) -> dict[str, Any]:
    return {"merge_lora": {"adapter": str(folder), **options}}


# case → uses of changed parameters in the graph; a tied weight that the adapter saved whole has two uses
IN_GRAPH = {"gpt2 dora": 1, "lora_bias": 2, "modules_to_save": 7, "tied lm_head": 3}


@pytest.mark.parametrize("case", IN_GRAPH)
def test_folder_merged_in_the_graph(case: str, tmp_path: Path) -> None:
    family, config, options, _ = CASES[case]
    options = {**options, **ONE}
    wrapped = attached(family, make_options=options, **config)
    folder = saved(wrapped, tmp_path / "adapter")
    model = make(family, **options)
    run = compiled(model, named(folder))
    torch.testing.assert_close(logits(run), logits(wrapped), rtol=0, atol=ROUNDING)
    assert hits() == [IN_GRAPH[case]]
    assert all(not p.refusals for r in backend.reports for p in r.passes)
    assert unchanged(model, make(family, **options))


@pytest.mark.parametrize(("family", "dynamic"), [("llama", None), ("gpt2", True)])
def test_attached_merged_in_the_graph(family: str, dynamic: bool | None) -> None:
    targets = {"llama": LINEARS, "gpt2": ["c_attn", "c_fc"]}[family]
    wrapped = attached(family, target_modules=targets, lora_dropout=0.1, make_options=ONE)
    run = compiled(wrapped, dynamic=dynamic)
    for length in (12, 9):
        torch.testing.assert_close(logits(run, length), logits(wrapped, length), rtol=0, atol=ROUNDING)
    expected = len(targets)
    assert hits() == ([expected] if dynamic else [expected] * 2)
    report = backend.reports[0].passes[0]
    assert report.refusals == []
    assert report.ops["aten.mul.Tensor"] == -expected
    assert sum(report.ops[op] for op in report.ops if "linear" in op) == -2 * expected


def test_attached_adapters_stay_fresh() -> None:
    """The merged weight follows an adapter that is trained further or loaded anew, without a recompilation."""
    wrapped, other = attached(make_options=ONE), attached(seed=9, make_options=ONE)
    run = compiled(wrapped)
    logits(run)
    for change in (lambda: stir(wrapped, 7), lambda: wrapped.load_state_dict(other.state_dict())):
        before = logits(wrapped)
        change()
        expected = logits(wrapped)
        assert (expected - before).abs().max() > 0.05
        torch.testing.assert_close(logits(run), expected, rtol=0, atol=ROUNDING)
    assert hits() == [3]


def test_scaling_that_changes_is_followed_under_dynamic_shapes() -> None:
    wrapped = attached(make_options=ONE, target_modules=["up_proj"])
    run = compiled(wrapped, dynamic=True)
    before = logits(run)
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)
    expected = logits(wrapped)
    assert (expected - before).abs().max() > 0.05
    torch.testing.assert_close(logits(run), expected, rtol=0, atol=ROUNDING)
    assert set(hits()) == {1}


def reasons() -> set[str]:
    return {r.reason for report in backend.reports for p in report.passes for r in p.refusals}


def test_an_adapter_in_training_is_left_alone() -> None:
    wrapped = attached(make_options=ONE, target_modules=["q_proj"]).train()
    wrapped.add_adapter("other", peft.LoraConfig(lora_dropout=0.1, target_modules=["up_proj"]))
    wrapped.base_model.set_adapter(["default", "other"])
    run = compiled(wrapped)
    inputs = {**batch(8), "labels": batch(8)["input_ids"], "use_cache": False}
    torch.manual_seed(3)
    run(**inputs).loss.backward()
    assert hits() == [0]
    assert len(reasons()) == 2
    assert any("a weight requires grad" in reason for reason in reasons())
    assert any("its dropout is active" in reason for reason in reasons())
    grads = [p.grad.clone() for p in wrapped.parameters() if p.requires_grad]
    wrapped.zero_grad()
    torch.manual_seed(3)
    wrapped(**inputs).loss.backward()
    for ours, eager in zip(grads, (p.grad for p in wrapped.parameters() if p.requires_grad), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=1e-6)


def test_stays_away_from_a_model_without_adapters() -> None:
    model = make("llama", **ONE)
    assert torch.equal(logits(compiled(model)), logits(model))
    assert sum(hits()) == 0


@pytest.mark.slow  # the checkpointed case below is the same and more
def test_a_trained_base_gets_gradients_through_the_merged_weight(tmp_path: Path) -> None:
    """Named adapter, base in training: the fold is part of the graph, and dW' = dW."""
    folder = saved(attached(make_options=ONE), tmp_path / "adapter")
    model, merged = (make("llama", **ONE).train() for _ in range(2))
    merge(folder).prepare(merged)
    inputs = {**batch(8), "labels": batch(8)["input_ids"], "use_cache": False}
    compiled(model, named(folder), inner="aot_eager")(**inputs).loss.backward()
    merged(**inputs).loss.backward()
    assert hits() == [3]
    for ours, theirs in zip(model.parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


def test_gradient_checkpointing_bodies(tmp_path: Path) -> None:
    folder = saved(attached(make_options=ONE), tmp_path / "adapter")
    model, merged = (make("llama", **ONE).train() for _ in range(2))
    merge(folder).prepare(merged)
    model.gradient_checkpointing_enable()
    inputs = {**batch(8), "labels": batch(8)["input_ids"], "use_cache": False}
    compiled(model, named(folder), inner="aot_eager")(**inputs).loss.backward()
    merged(**inputs).loss.backward()
    assert hits() == [3]
    for ours, theirs in zip(model.parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)


def test_swap_without_recompiling(tmp_path: Path) -> None:
    one, two = attached(make_options=ONE), attached(seed=2, r=2, make_options=ONE)  # another rank
    few = attached(seed=3, target_modules=["q_proj"], make_options=ONE)
    folders = [saved(w, tmp_path / str(i)) for i, w in enumerate((one, two, few))]
    model, other = make("llama", **ONE), make("llama", **ONE)
    run, other_run = (compiled(m, named(folders[0])) for m in (model, other))
    logits(run)
    logits(run, 9)  # a second compiled variant of the same weights
    count = len(backend.reports)
    for wrapped, folder in ((two, folders[1]), (few, folders[2]), (one, folders[0])):
        assert swap(model, folder) == 3
        for length in (12, 9):
            torch.testing.assert_close(logits(run, length), logits(wrapped, length), rtol=0, atol=ROUNDING)
    assert len(backend.reports) == count == 2
    torch.testing.assert_close(logits(other_run), logits(one), rtol=0, atol=ROUNDING)
    swap(model, folders[1])  # the other model was compiled with the same adapter, and follows
    torch.testing.assert_close(logits(other_run), logits(two), rtol=0, atol=ROUNDING)


def test_a_swap_that_does_not_fit(tmp_path: Path) -> None:
    one = attached(make_options=ONE)
    folder = saved(one, tmp_path / "one")
    more = saved(attached(target_modules=[*LINEARS, "o_proj"], make_options=ONE), tmp_path / "more")
    dora = saved(attached(use_dora=True, make_options=ONE), tmp_path / "dora")
    wide = saved(attached(make_options={"hidden_size": 128, "head_dim": 16, **ONE}), tmp_path / "wide")
    model = make("llama", **ONE)
    with pytest.raises(ModelError, match="no compiled graph of this model merges"):
        swap(model, folder)
    run = compiled(model, named(folder))
    logits(run)
    for other, message in (
        (more, "changes model.layers.0.self_attn.o_proj.weight"),
        (dora, "merges a, b, the new adapter has a, b, magnitude"),
        (wide, "do not fit the weight that they change"),
        (tmp_path / "none", "no such folder"),
    ):
        with pytest.raises(ArtifactError, match=message):
            swap(model, other)
    torch.testing.assert_close(logits(run), logits(one), rtol=0, atol=ROUNDING)


# -- in exports -----------------------------------------------------------------------------------------------------


def exported(model: Any, pass_: MergeLora) -> tuple[torch.Tensor, Any, Any]:
    """Logits of the rewritten export of `model` on tokens `[2, 8]`, the pass's report, and the export itself."""
    inputs = {"input_ids": batch(8)["input_ids"], "use_cache": False}
    with torch.no_grad():
        program = program_from_exported(torch.export.export(model, (), inputs))
        report = PassManager([pass_]).run(program)
        rewritten = to_exported(program)
        return rewritten.module()(**inputs).logits, report.passes[0], rewritten


def unpadded(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=batch(8)["input_ids"], use_cache=False).logits


@pytest.mark.parametrize(("case", "uses"), [("lora", 3), ("tied lm_head", 3), ("gpt2", 4), ("embedding", 2)])
def test_folder_merged_in_an_export(case: str, uses: int, tmp_path: Path) -> None:
    family, config, options, _ = CASES[case]
    options = {**options, **ONE}
    wrapped = attached(family, make_options=options, **config)
    actual, report, program = exported(make(family, **options), merge(saved(wrapped, tmp_path / "adapter")))
    assert (report.hits, report.refusals) == (uses, [])
    torch.testing.assert_close(actual, unpadded(wrapped), rtol=0, atol=ROUNDING)
    if case == "lora":
        assert len(program.state_dict) == len(make(family, **ONE).state_dict()), "the originals are gone"


def test_attached_merged_in_an_export() -> None:
    """Two active adapters, one of them on layers that the other leaves alone."""
    wrapped = attached(make_options=ONE)
    wrapped.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "o_proj"]))
    wrapped.base_model.set_adapter(["default", "other"])
    stir(wrapped, 3)
    actual, report, program = exported(wrapped.eval(), MergeLora())
    assert (report.hits, report.refusals) == (4, [])
    assert not any("lora_A" in name or "lora_B" in name for name in program.state_dict)
    torch.testing.assert_close(actual, unpadded(wrapped), rtol=0, atol=ROUNDING)


def test_float32_adapters_beside_a_bfloat16_base() -> None:
    """PEFT keeps adapters in float32; merged in the graph or on the model, the product is the same bfloat16 one."""
    wrapped, twin = (attached(model=make("llama", **ONE).to(torch.bfloat16)) for _ in range(2))
    assert wrapped.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"].weight.dtype == torch.float32
    before = unpadded(wrapped)
    actual, report, _ = exported(wrapped, MergeLora())
    MergeLora().prepare(twin)
    assert report.hits == 3
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, unpadded(twin))
    torch.testing.assert_close(actual, before, rtol=0, atol=0.03)  # a few bfloat16 roundings of logits of size one


def test_patterns_that_are_not_plain_lora_say_so() -> None:
    wrapped = attached(target_modules=["embed_tokens"], make_options=ONE)
    actual, report, _ = exported(wrapped, MergeLora())
    assert torch.equal(actual, unpadded(wrapped))
    assert report.hits == 0
    (refusal,) = report.refusals
    assert "does not compute base(x) + B A x" in refusal.reason
    assert "effpass.prepare" in refusal.hint


def test_not_merged_twice_after_prepare(tmp_path: Path) -> None:
    wrapped = attached(make_options=ONE)
    pass_ = merge(saved(wrapped, tmp_path / "adapter"))
    model = make("llama", **ONE)
    pass_.prepare(model)
    actual, report, _ = exported(model, pass_)
    torch.testing.assert_close(actual, unpadded(wrapped), rtol=0, atol=ROUNDING)
    assert report.hits == 0
    assert {r.reason for r in report.refusals} == {"merged already by effpass.prepare"}


def test_a_quantised_weight_in_the_graph_is_an_error(tmp_path: Path) -> None:
    folder = saved(attached(make_options=ONE), tmp_path / "adapter")
    with pytest.raises(PassRefusedError, match=r"q_proj\.weight is quantised \(torch\.int8\)") as error:
        exported(quantise(make("llama", **ONE), Linear4bit), merge(folder))
    assert "effpass.prepare(model, recipe) before compiling" in str(error.value)
