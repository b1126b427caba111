"""`structured_pruning` of query heads, latent attention, experts and layers: as the masked model, as a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, make

import effpass
from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, ModelError, PassRefusedError
from effpass.core.exported import program_from_exported
from effpass.core.manager import PassManager
from effpass.passes.weights.keep_indices import KeepIndices, make_keep_artifact
from effpass.passes.weights.magnitude import magnitudes
from effpass.passes.weights.structured_pruning import StructuredPruning, StructuredPruningOptions, save_pruned

# Float32 logits of size one.
ROUNDING = 2e-6
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
MANY = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}  # two groups of four

# case → (family, settings, kept units, linear layers and mixtures that are cut, config afterwards)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, dict[str, int]]] = {
    "query heads": (
        "qwen3", {**WIDE, "head_dim": 8}, {"query_heads": [[[0, 3], [1, 2]], [[0, 1], [2, 3]]]}, 2 * 4,
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "query heads of a group": (
        "phi3", {"num_attention_heads": 8, "num_key_value_heads": 4},
        {"kv_groups": [[1, 3], [0, 2]], "query_heads": [[[0], [1]], [[1], [1]]]}, 2 * 2,
        {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
    ),
    "latent attention": (
        "deepseek_v3", {}, {"kv_groups": [[0, 2], [1, 3]]}, 2 * 3,
        {"num_attention_heads": 2, "num_key_value_heads": 2},
    ),
    "latent attention, plain queries": (
        "deepseek_v3", {"q_lora_rank": None}, {"kv_groups": [[0, 2, 3], [1, 2, 3]]}, 2 * 3,
        {"num_attention_heads": 3, "num_key_value_heads": 3},
    ),
    "dense layer among experts": (
        "deepseek_v3", {}, {"ffn_channels": [[*range(40)]]}, 3, {"intermediate_size": 40, "moe_intermediate_size": 32},
    ),
    "experts": (
        "qwen3_moe", {}, {"experts": [[0, 2, 3], [1, 2, 3]]}, 2, {"num_experts": 3, "moe_intermediate_size": 32},
    ),
    "experts without a sum to one": (
        "qwen3_moe", {"norm_topk_prob": False}, {"experts": [[0, 2, 3], [1, 2, 3]]}, 2, {"num_experts": 3},
    ),
    "experts and their channels": (
        "mixtral", {},
        {"experts": [[0, 3], [1, 2]], "expert_channels": [[[*range(0, 96, 2)], [*range(48)]], [[*range(48, 96)]] * 2]},
        2, {"num_local_experts": 2, "intermediate_size": 48},
    ),
    "groups of experts, shared ones": (
        "deepseek_v3", MANY,
        {"experts": [[0, 3, 5, 6]], "expert_channels": [[[*range(16)]] * 4], "shared_channels": [[*range(16, 32)]]},
        1 + 3, {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 1},
    ),
}  # fmt: skip


def build(case: str) -> Any:
    family, settings, _, _, _ = CASES[case]
    model = make(family, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # a router of zeros, as DeepSeek's begins, chooses by ties
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("gate.weight", "e_score_correction_bias")):
                p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if name.endswith("bias") else 1))
    return model


def pruning(folder: Path) -> StructuredPruning:
    return StructuredPruning(StructuredPruningOptions(folder))


def logits(model: Any, length: int = 12) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(length), use_cache=False).logits


def of(kept: dict[str, Any], family: str, layers: list[int]) -> dict[int, torch.Tensor]:
    return {layer: torch.tensor(v) for layer, v in zip(layers, kept.get(family, ()), strict=False)}


def masked(model: Any, kept: dict[str, Any]) -> Any:
    """The whole model, which never chooses a dropped expert, and to which dropped heads and channels add nothing."""
    config = model.config
    first = getattr(config, "first_k_dense_replace", 0)
    every = list(range(config.num_hidden_layers))
    sparse = every[first:]
    groups, own, channels = (
        of(kept, "kv_groups", every),
        of(kept, "query_heads", every),
        of(kept, "ffn_channels", every),
    )
    experts, inner = of(kept, "experts", sparse), of(kept, "expert_channels", sparse)
    shared = of(kept, "shared_channels", sparse)
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            heads = torch.zeros(config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads)
            for row, group in enumerate(groups.get(i, torch.arange(len(heads))).tolist()):
                heads[group, own[i][row] if i in own else slice(None)] = 1
            o_proj = layer.self_attn.o_proj.weight
            o_proj *= heads.flatten().repeat_interleave(o_proj.shape[1] // heads.numel())
            for name, index in (("down_proj", channels.get(i)), ("shared_experts.down_proj", shared.get(i))):
                if index is not None:
                    weight = layer.mlp.get_submodule(name).weight
                    weight *= torch.zeros(weight.shape[1]).index_fill(0, index, 1)
            if i in experts:
                layer.mlp.gate.register_forward_hook(without(config, experts[i]))
            if i in inner:
                down = layer.mlp.experts.down_proj
                stays = torch.zeros(down.shape[0], down.shape[2])
                for row, expert in enumerate(experts[i].tolist() if i in experts else range(len(stays))):
                    stays[expert, inner[i][row]] = 1
                down *= stays[:, None]
    return model


def without(config: Any, kept: torch.Tensor) -> Callable[..., Any]:
    """A hook for a router that lets it choose among `kept` alone, written out for each kind."""

    def hook(gate: Any, args: Any, out: Any) -> Any:
        raw = out[0].float()
        gone = torch.ones(raw.shape[1], dtype=torch.bool).index_fill(0, kept, False)
        if config.model_type != "deepseek_v3":
            best, chosen = raw.masked_fill(gone, -torch.inf).softmax(-1).topk(config.num_experts_per_tok)
            total = best.sum(-1, keepdim=True)
            return raw, (best if getattr(config, "norm_topk_prob", True) is False else best / total), chosen
        scores = raw.sigmoid()
        wanted = (scores + gate.e_score_correction_bias).masked_fill(gone, -torch.inf)
        groups = wanted.unflatten(1, (config.n_group, -1))
        best_groups = groups.topk(2).values.sum(-1).topk(config.topk_group).indices
        inside = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best_groups, True)
        chosen = groups.masked_fill(~inside[..., None], -torch.inf).flatten(1).topk(config.num_experts_per_tok).indices
        weights = scores.gather(1, chosen)
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return raw, weights * config.routed_scaling_factor, chosen

    return hook


@pytest.mark.parametrize("case", CASES)
def test_sliced_is_masked_and_loads_as_it_was_saved(case: str, tmp_path: Path) -> None:
    _, _, kept, hits, sizes = CASES[case]
    make_keep_artifact(build(case), tmp_path / "keep", **kept)
    dense, model = build(case), build(case)
    expected = logits(masked(build(case), kept))
    assert (logits(dense) - expected).abs().max() > 0.01, "the mask must do something, or this test is empty"
    pass_ = pruning(tmp_path / "keep")
    pass_.check_model(model)
    assert pass_.prepare(model) == (hits, [])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)

    save_pruned(model, tmp_path / "pruned")
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=0, atol=ROUNDING)
    assert {name: getattr(loaded.config, name) for name in sizes} == sizes
    ids = batch(6, padding=0)["input_ids"]
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 9)
    loaded.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in loaded.named_parameters() if "experts" not in n)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe", "deepseek_v3"])
def test_whole_layers(family: str, tmp_path: Path) -> None:
    """Dropping a layer is skipping it."""
    count = 4
    extra = {"n_layer" if family == "gpt2" else "num_hidden_layers": count}
    if family == "gemma3":
        extra["layer_types"] = ["sliding_attention", "full_attention"] * 2
    elif family == "qwen3_moe":
        extra["mlp_only_layers"] = [3]
    elif family == "deepseek_v3":
        extra["first_k_dense_replace"] = 2
    model, whole = make(family, **extra), make(family, **extra)
    kept = [0, 2, 3] if family != "deepseek_v3" else [1, 2, 3]
    make_keep_artifact(model, tmp_path / "keep", layers=kept)
    pass_ = pruning(tmp_path / "keep")
    pass_.check_model(model)
    assert pass_.prepare(model) == (1, [])
    stack = whole.transformer.h if family == "gpt2" else whole.model.layers
    (gone,) = set(range(count)) - set(kept)
    stack[gone].forward = lambda hidden_states, *args, **kwargs: hidden_states
    torch.testing.assert_close(logits(model), logits(whole), rtol=0, atol=ROUNDING)
    save_pruned(model, tmp_path / "pruned")
    loaded = effpass.load_model(tmp_path / "pruned").model
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=ROUNDING)
    ids = batch(6, padding=0)["input_ids"]
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), loaded.generate(ids, **options))  # caches know their layers


@pytest.mark.parametrize(
    "case",
    ["query heads", "latent attention", "experts"],
)
def test_a_graph_of_them_needs_the_first_hand(case: str, tmp_path: Path) -> None:
    make_keep_artifact(build(case), tmp_path / "keep", **CASES[case][2])
    with torch.no_grad():
        exported = torch.export.export(build(case), (), {"input_ids": batch(8)["input_ids"], "use_cache": False})
    with pytest.raises(PassRefusedError, match=r"can't cut \w+ of this model in a graph[\s\S]*effpass.prepare"):
        PassManager([pruning(tmp_path / "keep")]).run(program_from_exported(exported))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("experts", {"layers.0.experts": [0, 4, 5]}, r"layers\.0\.experts\[1\] is 4, expected 0 to 3"),
        ("experts", {"layers.0.experts": [0, 1]}, "layer 0 keeps 2 experts and layer 1 keeps 3"),
        ("query heads", {"layers.1.query_heads": [[0, 1], [3, 3]]}, r"query_heads\[1, 1\] is 3 after 3"),
        (
            "query heads of a group", {"layers.0.query_heads": [[0]], "layers.1.query_heads": [[1]]},
            r"query_heads is torch.int64 \[1, 1\], expected int64 indices \[2, n\]",
        ),
        ("groups of experts, shared ones", {"layers.1.experts": [0, 1, 2, 5]}, r"keeps \[3, 1\] of the router's 2"),
        ("groups of experts, shared ones", {"layers.1.shared_channels": None}, "shared experts are 1 times as wide"),
    ],
)  # fmt: skip
def test_artifacts_that_are_refused(case: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = make_keep_artifact(build(case), tmp_path / "good", **CASES[case][2]).artifact
    tensors = {name: t for name, t in good.tensors.items() if changes.get(name, ()) is not None}
    tensors |= {name: torch.tensor(values) for name, values in changes.items() if values is not None}
    Artifact(good.pass_name, 1, good.options, good.fingerprint, tensors=tensors).save(tmp_path / "bad")
    with pytest.raises(ArtifactError, match=message):
        KeepIndices.load(tmp_path / "bad")


def test_magnitudes_of_all_families() -> None:
    """‖W_in‖ · ‖W_out‖, by hand for one unit of each family."""
    model = build("groups of experts, shared ones")
    layer = model.model.layers[1]
    value = layer.self_attn.kv_b_proj.weight.view(4, 32, -1)[2, 16:]
    read = layer.self_attn.o_proj.weight[:, 2 * 16 : 3 * 16]
    torch.testing.assert_close(magnitudes(model, "kv_groups")[1][0, 2], value.norm() * read.norm())
    up, down = layer.mlp.experts.gate_up_proj[5, 32 + 7], layer.mlp.experts.down_proj[5, :, 7]
    channels = magnitudes(model, "expert_channels")[1]
    torch.testing.assert_close(channels[5, 7], up.norm() * down.norm())
    torch.testing.assert_close(magnitudes(model, "experts")[1][1, 1], channels[5].norm())
    shared = layer.mlp.shared_experts
    expected = shared.up_proj.weight[3].norm() * shared.down_proj.weight[:, 3].norm()
    torch.testing.assert_close(magnitudes(model, "shared_channels")[1][0, 3], expected)
    model = build("query heads")
    attention = model.model.layers[0].self_attn
    expected = attention.v_proj.weight[8:].norm() * attention.o_proj.weight[:, 6 * 8 : 7 * 8].norm()
    torch.testing.assert_close(magnitudes(model, "query_heads")[0][1, 2], expected)
    with pytest.raises(ModelError, match="has no experts"):
        magnitudes(model, "experts")
