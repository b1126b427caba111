"""mla_absorption: the same function over the latents themselves."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import families
import pytest
import torch
from lora_models import SCHEMES

import effpass
from effpass.core.errors import ModelError
from effpass.passes.weights.quantized import scheme_of
from effpass.runtime.attention import reading_cache
from effpass.runtime.latent_attention import Absorbed
from effpass.runtime.session import Session

ABSORBED = {"version": 1, "passes": ["mla_absorption"]}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
MODELS = {
    "deepseek_v2": ("DeepseekV2Config", "DeepseekV2ForCausalLM", {"topk_method": "greedy"}),
    "deepseek_v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {}),
    "deepseek_v3, whole queries": ("DeepseekV3Config", "DeepseekV3ForCausalLM", {"q_lora_rank": None}),
    "glm4_moe_lite": ("Glm4MoeLiteConfig", "Glm4MoeLiteForCausalLM", {"mlp_layer_types": ["dense", "sparse"]}),
}


def make(name: str, **more: Any) -> Any:
    transformers = importlib.import_module("transformers")
    config_name, model_name, extra = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**{**families.COMMON, **LATENT, **extra, **more})
    return getattr(transformers, model_name)(config).eval()


def generate(model: Any, given: dict[str, torch.Tensor], new: int = 8) -> Any:
    return model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [9, 40])
def test_decoding_is_the_same_function(name: str, length: int) -> None:
    """Against transformers' own attention; a short prompt runs over latents, a longer one is expanded."""
    model, given = make(name), families.batch(length)
    expected = generate(model, given)
    ready = effpass.prepare(copy.deepcopy(model), ABSORBED)
    absorbed = [m for m in ready.modules() if isinstance(m, Absorbed)]
    got = generate(ready, given)
    assert ready.effpass_report.hits == len(absorbed) == 2
    assert [m.absorbs(length) for m in absorbed] == [length == 9] * 2
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        # The same products in another order: 1e-6 of the logits' size.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe_lite"])
def test_a_step_expands_no_latents(name: str) -> None:
    model, seen = effpass.prepare(make(name), ABSORBED), []
    for module in model.modules():
        if isinstance(module, Absorbed):
            module.kv_b_proj.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[attr-defined]
    with torch.no_grad(), reading_cache(model):
        session = Session(model, 2, 64, None)
        session.begin(2)
        session.prefill(families.batch(40)["input_ids"], None, 64)
        assert len(seen) == 2  # the prompt's
        session.tokens.fill_(5)
        session.step()
    assert len(seen) == 2
    layer = session.cache.buffers(0)
    assert layer.latents is not None
    assert layer.latents.shape == (2, 1, 64, 40)
    assert layer.keys is not None
    assert layer.keys.data_ptr() == layer.latents.data_ptr()


def test_the_recorded_step_reads_latents_as_one_key() -> None:
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    model, given = effpass.prepare(make("deepseek_v3"), ABSORBED), families.batch(40)
    with torch.no_grad(), reading_cache(model):
        ours, plain = (Session(model, 4, 64, backend) for _ in range(2))
        for session in (ours, plain):
            session.begin(2)
            session.prefill(given["input_ids"], given["attention_mask"].bool(), 64)
        compiled = ours._compile()
        for _ in range(3):
            token = plain.logits.argmax(-1, keepdim=True)
            ours.tokens.copy_(token)
            plain.tokens.copy_(token)
            plain.step()
            with ours._recording():
                ours._move()
                ours.cache.append(ours._position)
                ours._forward(compiled, None)
            ours.cache.advance(1)
            torch.testing.assert_close(ours.logits[:2], plain.logits[:2], rtol=1e-5, atol=2e-6)
    torch._dynamo.reset()
    reads = [n for n in graphs[0].graph.nodes if "cached_attention" in str(n.target)]
    assert [n.args[1].meta["example_value"].shape for n in reads] == [(4, 1, 64, 40)] * 2
    assert [n.args[2].meta["example_value"].shape for n in reads] == [(4, 1, 64, 32)] * 2


def test_outside_the_engine_the_model_is_as_it_was() -> None:
    model, given = make("deepseek_v3"), families.batch(12)
    with torch.no_grad():
        expected = model(**given).logits
        ready = effpass.prepare(model, ABSORBED)
        assert torch.equal(ready(**given).logits, expected)
        twin = copy.deepcopy(ready)
        assert torch.equal(twin(**given).logits, expected)
    names = {type(m).__name__ for m in twin.modules() if isinstance(m, Absorbed)}
    assert names == {"DeepseekV3Attention"}


def test_weights_may_change_afterwards() -> None:
    model = make("deepseek_v3")
    given, ready = families.batch(12), effpass.prepare(copy.deepcopy(model), ABSORBED)
    for changed in (model, ready):
        with torch.no_grad():
            changed.model.layers[1].self_attn.kv_b_proj.weight.mul_(1.5)
    torch.testing.assert_close(generate(ready, given).logits[3], generate(model, given).logits[3], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "bitsandbytes"])
def test_a_quantized_projection_is_dequantized(scheme: str) -> None:
    model = make("deepseek_v3")
    for layer in model.model.layers:
        layer.self_attn.kv_b_proj = SCHEMES[scheme](layer.self_attn.kv_b_proj)
        layer.self_attn.o_proj = SCHEMES[scheme](layer.self_attn.o_proj)
    given, ready = families.batch(12), effpass.prepare(copy.deepcopy(model), ABSORBED)
    assert [scheme_of(layer.self_attn.kv_b_proj) for layer in ready.model.layers] == [None, None]
    assert None not in [scheme_of(layer.self_attn.o_proj) for layer in ready.model.layers]
    got, wanted = generate(ready, given), generate(model, given)
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(got.logits[3], wanted.logits[3], rtol=1e-4, atol=1e-5)
    if scheme == "torchao":
        attention = ready.model.layers[1].self_attn
        attention.kv_b_proj = SCHEMES[scheme](attention.kv_b_proj)
        with pytest.raises(ModelError, match="kv_b_proj of layer 1 holds a Int8Tensor, and was absorbed as it was"):
            generate(ready, given)


def test_models_that_have_nothing_to_absorb_are_refused() -> None:
    with pytest.raises(ModelError, match="LlamaForCausalLM has no latent attention"):
        effpass.prepare(families.make("llama"), ABSORBED)
    model = make("deepseek_v3")
    old = model.model.layers[0].self_attn.kv_b_proj
    model.model.layers[0].self_attn.kv_b_proj = torch.nn.Linear(old.in_features, old.out_features, bias=True)
    with pytest.raises(ModelError, match=r"layers.0.self_attn.kv_b_proj is a Linear, and only a plain linear"):
        effpass.prepare(model, ABSORBED)
    assert not any(isinstance(m, Absorbed) for m in model.modules())
