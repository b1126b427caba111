"""The decode graph: one program for prefill and decode, with the model's own weight names, for every family."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch

from effpass.core.errors import ExportError
from effpass.lowering.targets.cache_layers import CacheLayer, cache_layers
from effpass.lowering.targets.decode_graph import DecodeGraph, export_decode_graph
from effpass.lowering.targets.validation import DecodeCase, record_model, record_step

# float32, two layers, logits of about 0.5: a few hundred roundings of 6e-8
ROUNDING = 2e-5


def case(*chunks: int, batch: int = 2, padding: int = 2) -> DecodeCase:
    ids = torch.randint(3, 96, (batch, sum(chunks)))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return DecodeCase("test", ids, mask, chunks)


def difference(model: Any, graph: DecodeGraph, a: DecodeCase) -> float:
    (ours,) = record_step(graph.module(), graph.layers, graph.dtype, [a])
    (theirs,) = record_model(model, [a])
    return float((ours.logits - theirs.logits).abs().max())


@pytest.fixture(scope="module")
def llama() -> tuple[Any, DecodeGraph]:
    model = families.make("llama")
    return model, export_decode_graph(model)


@pytest.mark.parametrize(
    "a",
    [
        case(1, batch=1, padding=0),
        case(5, batch=1, padding=0),
        case(6, 1, 1, 1),
        case(1, 1, padding=0),
        case(4, 3, batch=3),
    ],
    ids=lambda a: f"{len(a.input_ids)}x{a.chunks}",
)
def test_one_graph_serves_all_sizes(llama: tuple[Any, DecodeGraph], a: DecodeCase) -> None:
    assert difference(*llama, a) < ROUNDING


def test_batch_tokens_and_past_are_the_only_free_sizes(llama: tuple[Any, DecodeGraph]) -> None:
    ranges = {str(k): (v.lower, v.upper) for k, v in llama[1].program.range_constraints.items() if k.is_symbol}
    assert sorted(int(low) for low, _ in ranges.values()) == [0, 1, 1]


def test_names_and_weights(llama: tuple[Any, DecodeGraph]) -> None:
    model, graph = llama
    assert graph.layers == (CacheLayer(2, 16, 16), CacheLayer(2, 16, 16))
    assert graph.input_names[:5] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        "past_key_values.0.key",
        "past_key_values.0.value",
    ]
    assert graph.output_names == ["logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value"]
    parameters = dict(model.named_parameters())
    in_graph = graph.program.graph_signature.inputs_to_parameters.values()
    assert set(in_graph) == set(parameters)
    assert all(graph.program.state_dict[n].data_ptr() == p.data_ptr() for n, p in parameters.items())


def test_attention_stays_whole_and_copies_no_keys(llama: tuple[Any, DecodeGraph]) -> None:
    targets = [str(n.target) for n in llama[1].program.graph.nodes]
    assert targets.count("aten.scaled_dot_product_attention.default") == 2
    of_angles = 1 + families.writes_angles_as_a_product()  # for the rotary table: of the positions, and frequencies
    assert targets.count("aten.expand.default") == of_angles


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_sliding_window_holds_beyond_its_length(family: str) -> None:
    model = families.make(family)  # the window is 8
    graph = export_decode_graph(model)
    assert difference(model, graph, case(20, 1, 1)) < ROUNDING
    assert difference(model, graph, case(3, 10, 7)) < ROUNDING


def test_latent_attention_caches_latents() -> None:
    graph = export_decode_graph(families.make("deepseek_v3"))
    assert graph.layers == (CacheLayer(1, 16, 8), CacheLayer(1, 16, 8))
    assert [int(v.lower) for k, v in graph.program.range_constraints.items() if k.is_symbol] == [1, 1, 0]
    assert not any(n.target is torch.ops.aten.copy_.default for n in graph.program.graph.nodes)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_the_model_is_left_as_it_was(experts: str) -> None:
    model = families.make("mixtral", num_hidden_layers=1, experts_implementation=experts)
    model.set_attn_implementation("eager")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    graph = export_decode_graph(model)
    assert model.config._attn_implementation == "eager"
    assert model.config._experts_implementation == experts
    assert "forward" not in vars(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert difference(model, graph, case(5, 1)) < ROUNDING


def test_a_forward_that_was_replaced_is_captured_and_put_back() -> None:
    model = families.make("llama", num_hidden_layers=1)
    original = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        out.logits = out.logits * 2
        return out

    model.forward = doubled
    graph = export_decode_graph(model)
    assert model.forward is doubled
    assert difference(model, graph, case(5, 1)) < ROUNDING


def test_an_unmerged_adapter_stays_in_the_graph() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(families.make("llama"), config).eval()
    graph = export_decode_graph(model)
    assert sum("lora_" in name for name in graph.program.state_dict) == 4
    assert difference(model, graph, case(5, 1)) < ROUNDING


def test_training_mode_and_other_devices_are_refused() -> None:
    with pytest.raises(ExportError, match=r"in training mode\n.*model\.eval\(\)"):
        export_decode_graph(families.make("llama").train())
    with pytest.raises(ExportError, match=r"weights on meta\n.*model\.to\('cpu'\)"):
        export_decode_graph(families.make("llama").to("meta"))


def test_a_layer_that_caches_something_else_is_refused() -> None:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(**families.COMMON, layer_types=["full_attention", "conv"])
    with pytest.raises(ExportError, match=r"layer 1 of Lfm2ForCausalLM caches a \w+; .* keys and values only"):
        cache_layers(Lfm2ForCausalLM(config).eval())


def test_a_branch_on_values_names_the_model() -> None:
    model = families.make("llama", num_hidden_layers=1)
    layer = model.model.layers[0].mlp
    inner = layer.forward
    layer.forward = lambda x: inner(x) if x.sum() > 0 else x
    with pytest.raises(ExportError, match=r"LlamaForCausalLM can't be captured as one graph at modeling_llama\.py:\d+"):
        export_decode_graph(model)
    assert "forward" not in vars(model)


def test_attention_arguments_that_the_graph_lacks_are_refused() -> None:
    model = families.make("llama", num_hidden_layers=1)
    attention = model.model.layers[0].self_attn
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: inner(*args, **kwargs, s_aux=torch.zeros(4))
    with pytest.raises(ExportError, match="LlamaAttention passes s_aux to attention"):
        export_decode_graph(model)
