"""Layers of linear attention in transformers models: the layer, its caches, hybrids on disk, and what they refuse."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from families import batch, make
from linear_layers import FAMILIES, MODELS, MODES, greedy, hybrid, layer, settings
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import effpass
from effpass.core.errors import EffpassError, ModelError
from effpass.core.model import load_model
from effpass.lowering.ops.gated_delta_rule import reference
from effpass.lowering.ops.gated_delta_rule_inputs import Inputs, Settings
from effpass.runtime.linear_attention import (
    GatedDeltaAttention,
    StateLayer,
    is_hybrid,
    linear_layers,
    make_hybrid,
)

# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_layer_is_the_equation_token_by_token(mode):
    made = layer(mode, num_key_heads=2)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    of, by_channel = made.settings, (2, 7, 4, 16)
    mixed = torch.cat((made.q_proj(x), made.k_proj(x), made.v_proj(x)), -1)
    padded = torch.cat((mixed.new_zeros(2, 3, mixed.shape[-1]), mixed), 1)
    conv = sum(padded[:, i : i + 7] * made.conv.weight[:, 0, i] for i in range(4))
    q, k, v = torch.nn.functional.silu(conv).split((32, 32, 64), -1)
    gate, beta = made.f_proj(x), made.b_proj(x)
    gate = gate if mode == "gdn" else gate.view(by_channel)
    beta = beta.view(by_channel) if mode.startswith("fg2") else beta
    write = made.w_proj(x).view(by_channel) if mode == "fg2+" else None
    dt_bias = made.dt_bias if mode == "gdn" else made.dt_bias.view(4, 16)
    inputs = Inputs(
        q.view(2, 7, 2, 16), k.view(2, 7, 2, 16), v.view(by_channel), gate, beta, write, made.A_log, dt_bias
    )
    out, _ = reference(inputs, Settings(of.lower_bound, 16**-0.5, True, True), None, [0, 7, 14])
    normed = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + 1e-6) * made.norm_weight
    wanted = made.o_proj((normed * made.g_proj(x).view(by_channel).sigmoid()).flatten(2))
    found, weights = made(x)
    assert weights is None
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)  # the norm computes in float32


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_learns(mode):
    made = layer(mode, beta_rank=3)
    made(torch.randn(1, 9, 24, dtype=torch.float64))[0].square().sum().backward()
    assert {n for n, p in made.named_parameters() if p.grad is None or not bool(p.grad.any())} == set()


@pytest.mark.parametrize("bound", [-5.0, -0.5, None])
@pytest.mark.parametrize("mode", ["gdn", "kda"])
def test_the_gates_begin_with_memories_of_many_lengths(mode, bound):
    """From about one token to a thousand; a bound is approached where it is near."""
    torch.manual_seed(0)
    rate = -initial_log_decay(GatedDeltaAttention(settings(mode, 64, lower_bound=bound), 24, 0))
    most = 1.6 if bound is None else 1.6 / (1 - 1.6 / bound)
    assert 0.99e-3 <= float(rate.min()) < 0.01 < 0.2 < float(rate.max()) <= most + 1e-5


def initial_log_decay(made):
    """Of a token whose gate is 0, [heads] or [heads, channels]."""
    rate, bias = made.A_log.detach().exp(), made.dt_bias.detach().view(len(made.A_log), -1)
    if made.settings.lower_bound is None:
        return -rate[:, None] * torch.nn.functional.softplus(bias)
    return made.settings.lower_bound * torch.sigmoid(rate[:, None] * bias)


@pytest.mark.parametrize("pieces", [(9,), (1, 8), (2, 3, 4), (1,) * 9])
def test_pieces_of_a_sequence_with_a_cache_equal_the_whole(pieces):
    made = layer("fg2+")
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    cache, found = DynamicCache(), []
    for piece in x.split(pieces, 1):
        found.append(made(piece, past_key_values=cache)[0])
    torch.testing.assert_close(torch.cat(found, 1), made(x)[0], rtol=1e-5, atol=1e-6)
    assert isinstance(cache.layers[0], StateLayer)
    assert cache.get_seq_length() == 9


def test_padding_changes_nothing_whatever_the_mask():
    made = layer("kda")
    x = torch.randn(2, 6, 24, dtype=torch.float64)
    plain = made(x[:1, 2:])[0]
    is_token = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]]).bool()
    causal = torch.ones(6, 6).tril().bool() & is_token[:, None, None]
    additive = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    window = causal & torch.ones(6, 6).triu(-1).bool()
    for mask in (causal, additive, window, is_token.long()):
        torch.testing.assert_close(made(x, attention_mask=mask)[0][:1, 2:], plain)
    with pytest.raises(ModelError, match="given a dict"):
        made(x, attention_mask={})


# -- caches -----------------------------------------------------------------------------------------------------------


def test_a_cache_layer_follows_its_sequences_and_takes_none_of_its_tokens_back():
    made = layer("fg2")
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    cache = DynamicCache()
    made(x, past_key_values=cache)
    held = cache.layers[0]
    state = held.state.clone()
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(held.state, state[[2, 0, 0]])
    cache.batch_select_indices(torch.tensor([0, 1]))
    cache.batch_repeat_interleave(2)
    torch.testing.assert_close(held.state, state[[2, 2, 0, 0]])
    assert not cache.is_croppable
    with pytest.raises(EffpassError, match="2 tokens were to be taken back"):
        cache.crop(-2)
    cache.crop(-5)
    assert held.seen == 0
    assert held.state is None
    with pytest.raises(ModelError, match="caches no keys"):
        held.update(x, x)


def test_a_cache_that_has_keys_in_the_layers_place_is_refused():
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), 0)
    with pytest.raises(ModelError, match="layer 0 is linear attention, and its cache a DynamicLayer"):
        layer("kda")(torch.randn(1, 1, 24, dtype=torch.float64), past_key_values=cache)


# -- hybrids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hybrid_saves_loads_and_generates_alike_everywhere(family, tmp_path):
    model, inputs = hybrid(family), batch(12)
    with torch.no_grad():
        logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, logits)
    assert type(loaded) is type(model)
    assert isinstance(loaded.get_submodule(_attention(loaded, 1)), GatedDeltaAttention)
    tokens = greedy(loaded, inputs)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, 8, dtype=torch.long)), 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        whole = loaded(input_ids=tokens, attention_mask=mask, position_ids=places).logits
    assert torch.equal(whole[:, 11:-1].argmax(-1), tokens[:, 12:])  # steps with a cache, and none
    prepared = effpass.prepare(copy.deepcopy(loaded), {"version": 1, "passes": []})
    assert torch.equal(greedy(prepared, inputs), tokens)  # the decode engine
    assert torch.equal(greedy(prepared, inputs), tokens)  # and again, in the same buffers


def _attention(model, index: int) -> str:
    return next(n for n, m in model.named_modules() if getattr(m, "layer_idx", None) == index and "attn" in n)


@pytest.mark.parametrize(("family", "layers"), [("gptj", (0,)), ("gpt_bigcode", (0, 1)), ("qwen3_next", (1,))])
def test_decoder_layers_that_name_the_cache_otherwise_or_are_recurrent(family, layers):
    model, inputs = MODELS[family](), batch(12)
    make_hybrid(model, layers, settings())
    model.eval()
    assert torch.equal(greedy(model, inputs), greedy(model, inputs, use_cache=False))
    ids = inputs["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache, steps = DynamicCache(config=model.config), []
        for piece in ids.split(5, 1):
            steps.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert all(isinstance(cache.layers[i], StateLayer) for i in layers)


def test_all_layers_may_be_linear():
    model, inputs = hybrid(layers=(0, 1), mode="kda"), batch(9)
    tokens = greedy(model, inputs)
    assert torch.equal(greedy(effpass.prepare(model, {"version": 1, "passes": []}), inputs), tokens)
    cache = model.effpass_engine._free[2].cache
    assert [list(t.shape) for t in cache.layers[0].own_state()] == [[2, 3, 192], [2, 4, 16, 16]]
    assert cache.layers[0].keys is None


def test_the_engine_runs_a_prompt_in_pieces_and_goes_on_with_its_cache():
    model = effpass.prepare(hybrid(), {"version": 1, "passes": []})
    inputs = batch(20)
    whole = greedy(model, inputs)
    for tokens in (6, 2):  # the latter is one token of each sequence, which may be padding
        model.effpass_engine.prefill_tokens = tokens
        assert torch.equal(greedy(model, inputs), whole)
    model.effpass_engine.prefill_tokens = 6
    first = greedy(model, inputs, return_dict_in_generate=True, max_length=60)
    more = torch.cat((first.sequences, first.sequences[:, :3]), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, more.shape[1] - 20, dtype=torch.long)), 1)
    again = {"input_ids": more, "attention_mask": mask}
    assert torch.equal(greedy(model, again, past_key_values=first.past_key_values), greedy(model, again))


def test_a_step_compiles_as_one_graph():
    model = hybrid()
    engine = effpass.prepare(model, {"version": 1, "passes": []}).effpass_engine
    with torch.no_grad(), engine.session(1, 16) as session:
        ids = torch.arange(5, 9)[None]
        session.prefill(ids, None, 16)
        before = [t.clone() for t in session.cache.state()]
        session.tokens.fill_(9)

        def step(forward):
            session._move()
            session.cache.append(session._position)
            session.cache.advance(1)
            return session._call(forward, session.tokens, session._index).clone()

        plain = step(model)
        session.cache.slots.length -= 1
        session.cache.slots.seen -= 1
        session._position -= 1
        session._index -= 1
        for tensor, value in zip(session.cache.state(), before, strict=True):
            tensor.copy_(value)
        torch._dynamo.reset()
        session.cache.slots.is_replayed = True
        compiled = torch.compile(lambda *a, **k: model.forward(*a, **k), backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(step(compiled), plain)


def test_config_and_checkpoint_name_the_layers(tmp_path):
    model = hybrid("qwen3", layers=(0,), mode="kda")
    model.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["model_type"], content["base_model_type"]) == ("effpass_hybrid", "qwen3")
    assert content["linear_attention"]["layers"] == [0]
    config = AutoConfig.from_pretrained(tmp_path)
    assert is_hybrid(config)
    assert linear_layers(config) == ([0], settings("kda"))
    assert linear_layers(copy.deepcopy(config)) == linear_layers(config)
    loaded = load_model(tmp_path).model
    assert type(loaded).__name__ == "HybridQwen3ForCausalLM"
    fresh = AutoModelForCausalLM.from_config(config)
    rate = -initial_log_decay(fresh.model.layers[0].self_attn)
    assert 0.99e-3 <= float(rate.min()) <= float(rate.max()) <= 1.22


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_decay_stays_float32_in_a_model_of_lower_precision(dtype, tmp_path):
    model = hybrid()
    model.save_pretrained(tmp_path)
    gates = {n: p for n, p in model.named_parameters() if n.endswith((".A_log", ".dt_bias"))}
    moved, made = copy.deepcopy(model).to(dtype), make("llama").to(dtype)
    make_hybrid(made, (1,), settings())
    for found in (moved, made, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)):
        assert {n for n, p in found.named_parameters() if p.dtype != dtype} == set(gates)
        assert all(found.get_parameter(n).dtype == torch.float32 for n in gates)
        assert found is made or all(torch.equal(found.get_parameter(n), p) for n, p in gates.items())
    assert greedy(moved.eval(), batch(9)).shape == (2, 17)
    moved.train()(**batch(9), labels=batch(9)["input_ids"]).loss.backward()
    assert all(moved.get_parameter(n).grad.dtype == torch.float32 for n in gates)
    assert {p.dtype for p in moved.double().parameters()} == {torch.float64}


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "fg3"}, "mode: got 'fg3'"),
        ({"num_value_heads": 3, "num_key_heads": 2}, "3 heads of values and 2 of keys"),
        ({"key_head_dim": 512}, "heads of 512 channels"),
        ({"mode": "fg2", "value_head_dim": 8}, "keys of 16 and values of 8"),
        ({"conv_kernel_size": 1}, "convolution over one token"),
        ({"lower_bound": 0.5}, "lower_bound: got 0.5"),
        ({"gate_rank": 0}, "gate_rank: got 0"),
        ({"beta_rank": 1.5}, "beta_rank: got 1.5"),
    ],
)
def test_settings_that_no_layer_has(changes, message):
    with pytest.raises(EffpassError, match=message) as caught:
        settings(**changes)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"layers": [5]}, r"layers is \[5\], expected numbers below 2"),
        ({"layers": [0, 0]}, "layers is"),
        ({"mood": "kda"}, "unknown setting 'mood'"),
        ({"base_model_type": "lama"}, "base_model_type 'lama'"),
    ],
)
def test_a_checkpoint_whose_config_is_no_hybrids(content, message, tmp_path):
    hybrid().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    target = config if "base_model_type" in content else config["linear_attention"]
    target |= content
    path.write_text(json.dumps(config))
    with pytest.raises(EffpassError, match=message):
        AutoConfig.from_pretrained(tmp_path)


def test_layers_that_are_not_there_and_models_that_are_hybrids():
    model = make("llama")
    for layers, message in (((7,), "no layer 7"), ((), "give each layer once"), ((1, 1), "give each layer once")):
        with pytest.raises(ModelError) as caught:
            make_hybrid(model, layers, settings())
        assert message in f"{caught.value.message} {caught.value.hint}"
        assert not is_hybrid(model.config)
    with pytest.raises(ModelError, match="has linear attention already"):
        make_hybrid(hybrid(), (0,), settings())
    with pytest.raises(ModelError, match="attention is known in 0"):
        make_hybrid(_no_attention(), (0,), settings())


def _no_attention():
    model = torch.nn.Module()
    model.config = make("llama").config
    return model


@pytest.mark.parametrize(
    ("family", "layers", "message"),
    [
        ("qwen3_next", (0,), "layer 0 of Qwen3NextForCausalLM is of type linear_attention"),
        ("qwen3_next", (0, 1), "layer 0 of Qwen3NextForCausalLM is of type linear_attention"),
        ("gemma3n", (1,), "layer 1 of Gemma3nForCausalLM computes keys and values that other layers attend to"),
        ("gemma3n", (2,), "layer 2 of Gemma3nForCausalLM attends to the keys and values of another layer"),
    ],
)
def test_layers_whose_place_linear_attention_can_not_take(family, layers, message):
    model = MODELS[family]()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ModelError, match=message):
        make_hybrid(model, layers, settings())
    assert [type(module) for module in model.modules()] == kinds
    assert not is_hybrid(model.config)


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
def test_static_caches_of_transformers_are_refused(layers):
    with pytest.raises(ModelError, match=f"layer {layers[0]} is linear attention, whose state has no place in a Stat"):
        greedy(hybrid(layers=layers), batch(9), cache_implementation="static")


@pytest.mark.parametrize("layers", [(), (0,), (1,), (0, 1)])
def test_transformers_decodes_where_decoder_layers_drop_the_engines_arguments(layers):
    model, inputs = MODELS["stablelm"](), batch(9)
    if layers:
        make_hybrid(model, layers, settings())
    wanted = greedy(model.eval(), inputs, use_cache=False)
    prepared = effpass.prepare(model, {"version": 1, "passes": []})
    assert "the decode engine's cache does not reach layers.0.self_attn" in prepared.effpass_report.generates
    assert torch.equal(greedy(prepared, inputs), wanted)


def test_a_layer_refuses_the_engines_cache_without_its_padding():
    engine = effpass.prepare(hybrid(layers=(0, 1)), {"version": 1, "passes": []}).effpass_engine
    with engine.session(1, 16) as session, pytest.raises(ModelError, match="layer 0 was given the decode engine's"):
        engine.model(input_ids=torch.ones(1, 2, dtype=torch.long), past_key_values=session.cache)


BETWEEN = "row 1 of the batch has padding behind its first token"


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # the latter has other positional arguments
def test_padding_between_tokens_is_refused(family):
    model = hybrid(family)
    ids, mask = batch(9)["input_ids"], torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = mask[1, 7:] = 0
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits  # on the right and on the left
        torch.testing.assert_close(found[1:, :7], model(input_ids=ids[1:, :7]).logits)
        mask[1, 8] = 1
        with pytest.raises(ModelError, match=BETWEEN):
            model(input_ids=ids, attention_mask=mask)
        with pytest.raises(ModelError, match=BETWEEN):
            model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask)
        places = (ids, None, mask) if family == "gpt2" else (ids, mask)
        with pytest.raises(ModelError, match=BETWEEN):
            model(*places)


@pytest.mark.parametrize("prepared", [False, True])
def test_padding_before_a_second_turn_is_refused(prepared):
    model, inputs = hybrid(), batch(9)
    if prepared:
        effpass.prepare(model, {"version": 1, "passes": []})
    first = greedy(model, inputs, return_dict_in_generate=True, max_length=60)
    more = torch.cat((first.sequences, first.sequences[:, :4]), 1)
    mask = torch.cat((inputs["attention_mask"], torch.ones(2, more.shape[1] - 9, dtype=torch.long)), 1)
    mask[1, -4:-2] = 0
    again = {"input_ids": more, "attention_mask": mask}
    with pytest.raises(ModelError, match=BETWEEN) as caught:
        greedy(model, again, past_key_values=first.past_key_values)
    assert "continue rows one by one" in caught.value.hint
    with pytest.raises(ModelError, match=BETWEEN):
        greedy(model, again)


def test_padding_on_the_right_is_refused_as_soon_as_a_token_follows():
    model, inputs = hybrid(), batch(9)
    inputs["attention_mask"] = inputs["attention_mask"].flip(0, 1)
    with pytest.raises(ModelError, match=BETWEEN):
        greedy(model, inputs)


def test_drafts_refuse_a_hybrid():
    model = effpass.prepare(hybrid(), {"version": 1, "passes": []})
    with pytest.raises(EffpassError, match="linear attention"):
        greedy(model, {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": None}, draft="ngram")


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_generation_on_a_gpu_equals_that_of_transformers(mode):
    model = hybrid("qwen3", mode=mode).cuda()
    inputs = {name: x.cuda() for name, x in batch(70).items()}
    wanted = greedy(model, inputs)
    prepared = effpass.prepare(copy.deepcopy(model), {"version": 1, "passes": []})
    assert torch.equal(greedy(prepared, inputs), wanted)
    assert torch.equal(greedy(prepared, inputs), wanted)
    first = {name: x[1:] for name, x in inputs.items()}
    assert torch.equal(greedy(prepared, first), greedy(model, first))


@pytest.mark.gpu
def test_a_hybrid_learns_on_a_gpu_as_on_a_cpu():
    model = hybrid("llama", layers=(0, 1)).train()
    moved = copy.deepcopy(model).cuda()
    ids = batch(70)["input_ids"]
    grads = []
    for run in (model, moved):
        given = ids.to(run.device)
        run(input_ids=given, labels=given).loss.backward()
        grads.append({n: p.grad.cpu() for n, p in run.named_parameters()})
    far = {n: float((grads[1][n] - x).norm() / x.norm().clamp(min=1e-12)) for n, x in grads[0].items()}
    assert {n: x for n, x in far.items() if not x < 5e-3} == {}
