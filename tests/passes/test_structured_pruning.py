"""`structured_pruning`: the sliced model is the masked one, in its modules, as a checkpoint, and in the graph."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, make
from torch import nn

import effpass.backend as backend
from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, EffpassError, ModelError, PassRefusedError
from effpass.core.exported import program_from_exported, to_exported
from effpass.core.manager import PassManager
from effpass.passes.weights.keep_indices import KeepIndices, make_keep_artifact
from effpass.passes.weights.merge_lora import MergeLora, MergeLoraOptions
from effpass.passes.weights.structured_pruning import StructuredPruning, StructuredPruningOptions, save_pruned

# Float32 logits of size one; the products skip zeros, so most cases are equal to the last bit.
ROUNDING = 2e-6
GROUPS = [[1], [0]]
CHANNELS = [list(range(0, 80, 2)), list(range(40, 80))]
BIASED = {"attention_bias": True, "mlp_bias": True}

# case → (family, settings, what can be pruned: linear layers per unit family)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "llama": ("llama", {}, {"kv_groups": 8, "ffn_channels": 6}),
    "llama biased": ("llama", BIASED, {"kv_groups": 8, "ffn_channels": 6}),
    "llama tied": ("llama", {"tie_word_embeddings": True}, {"ffn_channels": 6}),
    "qwen3": ("qwen3", {}, {"kv_groups": 8, "ffn_channels": 6}),
    "mistral": ("mistral", {}, {"kv_groups": 8, "ffn_channels": 6}),
    "gemma3": ("gemma3", {}, {"kv_groups": 8, "ffn_channels": 6}),
    "phi3": ("phi3", {}, {"kv_groups": 4, "ffn_channels": 4}),
    "gpt2": ("gpt2", {}, {"ffn_channels": 4}),
    "olmo2": ("olmo2", {}, {"ffn_channels": 6}),
    "mixtral": ("mixtral", {}, {"kv_groups": 8}),
    "qwen3_moe": ("qwen3_moe", {}, {"kv_groups": 8}),
}
KEPT = {"kv_groups": GROUPS, "ffn_channels": CHANNELS}


def build(case: str) -> Any:
    family, settings, _ = CASES[case]
    model = make(family, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # transformers starts biases at zero
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def artifact(model: nn.Module, folder: Path, *families: str) -> Path:
    make_keep_artifact(model, folder, **{f: KEPT[f] for f in families})
    return folder


def pruning(folder: Path) -> StructuredPruning:
    return StructuredPruning(StructuredPruningOptions(folder))


def masked(model: Any, *families: str) -> Any:
    """The dense model with the removed units' columns of o_proj and down_proj at zero."""
    config = model.config
    per_group = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        for name, module in model.named_modules():
            end = name.rpartition(".")[2]
            if end not in ("o_proj", "down_proj") and not name.endswith("mlp.c_proj"):
                continue
            family = "kv_groups" if end == "o_proj" else "ffn_channels"
            if family not in families:
                continue
            layer = int(next(part for part in name.split(".") if part.isdigit()))
            columns = module.weight if end == "c_proj" else module.weight.T  # [in, out]
            units = columns.unflatten(0, (-1, per_group * head if family == "kv_groups" else 1))
            gone = sorted(set(range(units.shape[0])) - set(KEPT[family][layer]))
            units[gone] = 0
    return model


def logits(model: Any, length: int = 12) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch(length), use_cache=False).logits


# -- on the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_sliced_is_masked_and_loads_as_it_was_saved(case: str, tmp_path: Path) -> None:
    families = tuple(CASES[case][2])
    folder = artifact(build(case), tmp_path / "keep", *families)
    dense, model = build(case), build(case)
    expected = logits(masked(build(case), *families))
    assert (logits(dense) - expected).abs().max() > 0.03, "the mask must do something, or this test is empty"
    pass_ = pruning(folder)
    pass_.check_model(model)
    assert pass_.prepare(model) == (sum(CASES[case][2].values()), [])
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ROUNDING)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())

    save_pruned(model, tmp_path / "pruned")
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded.eval()), logits(model))
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    if "kv_groups" in families:
        assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 16)
    if "ffn_channels" in families:
        assert config["n_inner" if case == "gpt2" else "intermediate_size"] == 40
    assert (tmp_path / "pruned" / "generation_config.json").is_file()


def test_an_ordinary_model_again(tmp_path: Path) -> None:
    """Cached generation, a training step, and the modules' own sizes."""
    model = build("llama")
    pruning(artifact(model, tmp_path / "keep", "kv_groups", "ffn_channels")).prepare(model)
    reference = masked(build("llama"), "kv_groups", "ffn_channels")
    ids = batch(6, padding=0)["input_ids"]
    for cache in ("dynamic", "static"):
        options = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": cache}
        assert torch.equal(model.generate(ids, **options), reference.generate(ids, **options))
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert (attention.q_proj.out_features, attention.k_proj.out_features, attention.o_proj.in_features) == (32, 16, 32)
    assert (mlp.gate_proj.out_features, mlp.down_proj.in_features, mlp.intermediate_size) == (40, 40, 40)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[2] < losses[0]


def test_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    pruning(artifact(model, tmp_path / "keep", "ffn_channels")).prepare(model)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    save_pruned(model, tmp_path / "pruned", Tokenizer())
    assert (tmp_path / "pruned" / "tokenizer.json").is_file()
    with pytest.raises(ArtifactError, match="is there already"):
        save_pruned(model, tmp_path / "pruned")
    monkeypatch.setattr(Tokenizer, "save_pretrained", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_pruned(model, tmp_path / "other", Tokenizer())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keep", "pruned"]


def test_units_chosen_by_magnitude(tmp_path: Path) -> None:
    for case, group in (("llama", 1), ("phi3", 1)):
        model = build(case)
        d = model.config
        with torch.no_grad():
            for layer in model.model.layers:
                o = layer.self_attn.o_proj.weight
                o[:, : o.shape[1] // 2] *= 0.01  # group 0 adds little
                layer.mlp.down_proj.weight[:, 7] *= 100
        keep = make_keep_artifact(model, tmp_path / case, kv_groups=1, ffn_channels=9)
        assert [kept.tolist() for kept in keep.units["kv_groups"].values()] == [[group]] * 2
        assert all(len(kept) == 9 and 7 in kept.tolist() for kept in keep.units["ffn_channels"].values())
        assert (keep.after.num_attention_heads, keep.after.intermediate_size) == (2, 9)
        assert keep.before.intermediate_size == d.intermediate_size


# -- refused before anything changes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "units", "reason"),
    [
        ("gpt2", {"kv_groups": [[0]] * 2}, "their size is width / heads"),
        ("olmo2", {"kv_groups": [[0]] * 2}, r"self_attn\.q_norm\.weight normalizes over all heads together"),
        ("olmo2", {"query_heads": [[[0], [0]]] * 2}, r"self_attn\.q_norm\.weight normalizes over all heads together"),
        ("deepseek_v3", {"query_heads": [[[0]] * 4] * 2}, "each query head is the only one of its group"),
        ("qwen3_moe", {"ffn_channels": {0: [0], 1: [0]}}, "layer 0 has no mlp.down_proj or mlp.c_proj"),
        ("llama", {"kv_groups": {0: [0]}}, "layer 1 has .*o_proj.*, and the artifact leaves it out"),
        ("deepseek_v3", {"ffn_channels": {1: [0]}}, "layer 0 has mlp.down_proj .* and the artifact leaves it out"),
        ("deepseek_v3", {"experts": [[0, 2]]}, "2 experts are too few: the router chooses from 4 at least"),
        ("qwen3_moe", {"experts": [[0]] * 2}, "1 experts are too few: the router chooses from 2 at least"),
    ],
)
def test_architectures_without_such_units(family: str, units: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = make(family)
    make_keep_artifact(model, tmp_path / "keep", **units)
    before = [p.clone() for p in model.parameters()]
    for act in (pruning(tmp_path / "keep").check_model, pruning(tmp_path / "keep").prepare):
        with pytest.raises(ModelError, match=reason):
            act(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_head_count_that_the_config_does_not_accept(tmp_path: Path) -> None:
    """Llama's config wants a width divisible by the number of heads."""
    model = make("llama", num_attention_heads=8, num_key_value_heads=4)
    make_keep_artifact(model, tmp_path / "keep", kv_groups=3)
    with pytest.raises(ModelError, match="accepts no config of 6 query heads, 3 key-value heads") as error:
        pruning(tmp_path / "keep").check_model(model)
    assert "not a multiple" in error.value.message


def test_heads_that_make_no_groups(tmp_path: Path) -> None:
    model = make("qwen3", num_attention_heads=6, num_key_value_heads=4, head_dim=16)
    make_keep_artifact(model, tmp_path / "keep", kv_groups=[[0, 1], [2, 3]])
    with pytest.raises(ModelError, match="6 query heads can't be paired with 4 key-value heads"):
        pruning(tmp_path / "keep").check_model(model)


def test_other_models(tmp_path: Path) -> None:
    folder = artifact(build("llama"), tmp_path / "keep", "kv_groups")
    with pytest.raises(ArtifactError, match="wrong weights"):
        pruning(folder).check_model(make("llama", seed=1))
    with pytest.raises(ArtifactError, match="wrong model"):
        pruning(folder).check_model(make("llama", num_hidden_layers=3))
    with pytest.raises(ModelError, match="Linear is no transformers model"):
        pruning(folder).check_model(nn.Linear(2, 2))
    model = build("llama")
    pruning(folder).prepare(model)
    with pytest.raises(ModelError, match="already has the sizes"):
        pruning(folder).check_model(model)
    quantized = build("llama")
    q_proj = quantized.model.layers[0].self_attn.q_proj
    q_proj.weight = nn.Parameter(q_proj.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(EffpassError, match="q_proj"):
        pruning(folder).check_model(quantized)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.1.kv_groups": [2]}, r"layers\.1\.kv_groups\[0\] is 2, expected 0 to 1"),
        ({"layers.1.kv_groups": [-1]}, r"layers\.1\.kv_groups\[0\] is -1, expected 0 to 1"),
        ({"layers.0.kv_groups": [1, 0], "layers.1.kv_groups": [0, 1]}, r"layers\.0\.kv_groups\[1\] is 0 after 1"),
        ({"layers.0.ffn_channels": [3, 3]}, r"layers\.0\.ffn_channels\[1\] is 3 after 3, expected ascending"),
        ({"layers.1.kv_groups": [0, 1]}, "layer 0 keeps 1 kv_groups and layer 1 keeps 2"),
        ({"layers.0.kv_groups": []}, r"layers\.0\.kv_groups is torch.int64 \[0\], expected int64 indices \[n\], n > 0"),
        ({"layers.2.kv_groups": [0]}, r"unknown tensor 'layers\.2\.kv_groups' for 2 layers"),
        ({"layers.0.heads": [0]}, r"unknown tensor 'layers\.0\.heads'"),
        ({f"layers.{i}.{f}": None for i in (0, 1) for f in KEPT}, "no kept units"),
        ({"layers": [0]}, r"keeps whole layers and layers\.0\.ffn_channels"),
        ({"layers.0.query_heads": [0]}, r"query_heads is torch.int64 \[1\], expected int64 indices \[1, n\]"),
    ],
)
def test_artifacts_that_are_refused(changes: dict[str, list[int] | None], message: str, tmp_path: Path) -> None:
    good = KeepIndices.load(artifact(build("llama"), tmp_path / "good", "kv_groups", "ffn_channels")).artifact
    tensors = dict(good.tensors)
    for name, values in changes.items():
        tensors.pop(name, None)
        if values is not None:
            tensors[name] = torch.tensor(values, dtype=torch.int64)
    Artifact(good.pass_name, 1, good.options, good.fingerprint, tensors=tensors).save(tmp_path / "bad")
    with pytest.raises(ArtifactError, match=message):
        KeepIndices.load(tmp_path / "bad")


@pytest.mark.parametrize("options", [{}, {"head_dim": 16}, {"num_attention_heads": "4"}])
def test_artifacts_without_the_models_sizes(options: dict, tmp_path: Path) -> None:
    good = KeepIndices.load(artifact(build("llama"), tmp_path / "good", "kv_groups")).artifact
    given = {**good.options, **options} if "num_attention_heads" in options else options
    Artifact(good.pass_name, 1, given, good.fingerprint, tensors=good.tensors).save(tmp_path / "bad")
    with pytest.raises(ArtifactError, match="expected the model's sizes"):
        KeepIndices.load(tmp_path / "bad")


def test_indices_are_checked_when_an_artifact_is_made(tmp_path: Path) -> None:
    model = build("llama")
    for given, message in (
        ({"kv_groups": [[0], [5]]}, r"layers\.1\.kv_groups\[0\] is 5"),
        ({"kv_groups": [[0]]}, "is given for 1 layers, the model has 2"),
        ({"ffn_channels": 0}, "0 are to be kept of 96"),
        ({"ffn_channels": 97}, "97 are to be kept of 96"),
    ):
        with pytest.raises(ArtifactError, match=message):
            make_keep_artifact(model, tmp_path / "keep", **given)
        assert not (tmp_path / "keep").exists()
    with pytest.raises(ModelError, match="MixtralForCausalLM has no ffn_channels"):
        make_keep_artifact(make("mixtral"), tmp_path / "keep", ffn_channels=3)
    with pytest.raises(ArtifactError, match="the model has no ffn_channels"):
        make_keep_artifact(make("mixtral"), tmp_path / "keep", ffn_channels={0: [1]})
    with pytest.raises(ArtifactError, match="unknown units 'heads', did you mean 'query_heads'"):
        make_keep_artifact(make("llama"), tmp_path / "keep", heads=1)


def lora(model: Any, folder: Path) -> MergeLora:
    """A merge of a random adapter for `model`."""
    import peft

    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(folder)
    return MergeLora(MergeLoraOptions(adapter=folder))


def test_after_a_merge(tmp_path: Path) -> None:
    """On the model each pass finds what the one before it left; in one graph that is refused, and never skipped."""
    keep = pruning(artifact(build("llama"), tmp_path / "keep", "kv_groups", "ffn_channels"))
    merging = lora(build("llama"), tmp_path / "adapter")
    model, expected = build("llama"), build("llama")
    report = PassManager([merging, keep]).prepare(model)
    assert [entry.hits for entry in report.passes] == [4, 14]
    merging.prepare(expected)
    torch.testing.assert_close(
        logits(model), logits(masked(expected, "kv_groups", "ffn_channels")), rtol=0, atol=ROUNDING
    )
    with torch.no_grad():
        inputs = {"input_ids": batch(8)["input_ids"], "use_cache": False}
        program = torch.export.export(build("llama"), (), inputs)
    with pytest.raises(PassRefusedError, match=r"both change \S+, which one graph can't do twice") as error:
        PassManager([merging, keep]).run(program_from_exported(copy.deepcopy(program)))
    assert "effpass.prepare(model, recipe)" in str(error.value)
    with pytest.raises(PassRefusedError, match="merge_lora comes after structured_pruning, which changes sizes"):
        PassManager([keep, merging]).run(program_from_exported(program))


# -- in the graph ---------------------------------------------------------------------------------------------------


def compiled(model: Any, folder: Path, inner: str = "eager", **options: Any) -> Any:
    backend.reports.clear()
    passes = [{"structured_pruning": {"artifact": str(folder)}}]
    return torch.compile(model, backend="effpass", options={"inner": inner, "passes": passes}, **options)


def hits() -> list[int]:
    return [sum(p.hits for p in r.passes) for r in backend.reports]


def exported(model: Any, pass_: StructuredPruning) -> tuple[Any, Any]:
    """The pruned program of a model exported with a dynamic length, and the pass's report."""
    inputs = {"input_ids": batch(8)["input_ids"], "use_cache": False}
    length = torch.export.Dim("T", min=2, max=200)
    with torch.no_grad():
        program = program_from_exported(
            torch.export.export(model, (), inputs, dynamic_shapes={"input_ids": {1: length}, "use_cache": None})
        )
        report = PassManager([pass_]).run(program)
        return to_exported(program), report.passes[0]


EXPORTED = ("llama biased", "gemma3", "phi3", "gpt2", "mixtral")  # each shape of graph once; the others are slow


@pytest.mark.parametrize("case", [c if c in EXPORTED else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_pruned_in_an_export(case: str, tmp_path: Path) -> None:
    families = tuple(CASES[case][2])
    folder = artifact(build(case), tmp_path / "keep", *families)
    reference = build(case)
    pruning(folder).prepare(reference)
    program, report = exported(build(case), pruning(folder))
    assert report.hits == sum(CASES[case][2].values())
    ids = batch(11)["input_ids"]
    with torch.no_grad():
        actual, expected = (m(input_ids=ids, use_cache=False).logits for m in (program.module(), reference))
    torch.testing.assert_close(actual, expected, rtol=0, atol=ROUNDING)
    size = sum(t.numel() for t in program.state_dict.values() if isinstance(t, nn.Parameter))
    tied = reference.lm_head.weight.numel() if reference.config.tie_word_embeddings and size else 0
    assert size <= sum(p.numel() for p in reference.parameters()) + tied, "the unpruned weights are gone"


@pytest.mark.parametrize(("case", "attention"), [("llama biased", "eager"), ("phi3", "sdpa")])
def test_pruned_in_the_graph(case: str, attention: str, tmp_path: Path) -> None:
    folder = artifact(build(case), tmp_path / "keep", "kv_groups", "ffn_channels")
    reference, dense = build(case), build(case)
    pruning(folder).prepare(reference)
    dense.set_attn_implementation(attention)
    reference.set_attn_implementation(attention)
    run = compiled(dense, folder, dynamic=True)
    for length in (12, 9):
        torch.testing.assert_close(logits(run, length), logits(reference, length), rtol=0, atol=ROUNDING)
    assert hits() == [sum(CASES[case][2].values())]
    assert dense.model.layers[0].self_attn.o_proj.weight.shape == (64, 64), "the model itself stays as it was"


def test_gradients_reach_the_kept_rows_and_no_others(tmp_path: Path) -> None:
    folder = artifact(build("llama"), tmp_path / "keep", "kv_groups", "ffn_channels")
    dense, reference = build("llama").train(), build("llama").train()
    pruning(folder).prepare(reference)
    dense.gradient_checkpointing_enable()
    inputs = {**batch(8), "labels": batch(8)["input_ids"], "use_cache": False}
    compiled(dense, folder, inner="aot_eager")(**inputs).loss.backward()
    reference(**inputs).loss.backward()
    assert hits() == [14]
    cuts = pruning(folder).keep.cuts([n for n, _ in dense.named_parameters()])
    for (name, p), q in zip(dense.named_parameters(), reference.parameters(), strict=True):
        if name in cuts:
            dim = cuts[name].dim(2, transposed=False)
            gone = sorted(set(range(p.shape[dim])) - set(cuts[name].index.tolist()))
            assert not p.grad.index_select(dim, torch.tensor(gone)).any()
            torch.testing.assert_close(p.grad.index_select(dim, cuts[name].index), q.grad, rtol=0, atol=1e-6)
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-6)


def refusal(run: Any, **inputs: Any) -> EffpassError:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as error, torch.no_grad():
        run(**batch(9), **inputs)
    assert isinstance(error.value.inner_exception, EffpassError)
    return error.value.inner_exception


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_of_all_heads_needs_the_first_hand(cache: str, tmp_path: Path) -> None:
    """A bare compile can't prune the cache that the caller owns: an error, not wrong numbers."""
    from transformers import DynamicCache, StaticCache

    model = build("llama")
    run = compiled(model, artifact(model, tmp_path / "keep", "kv_groups"))
    past = (
        DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(config=model.config, max_cache_len=32)
    )
    error = refusal(run, past_key_values=past)
    assert isinstance(error, PassRefusedError)
    assert "effpass.prepare(model, recipe) before torch.compile" in str(error)


def test_channels_alone_work_with_a_cache(tmp_path: Path) -> None:
    model, reference = build("llama"), build("llama")
    folder = artifact(model, tmp_path / "keep", "ffn_channels")
    pruning(folder).prepare(reference)
    with torch.no_grad():
        actual, expected = (m(**batch(9), use_cache=True) for m in (compiled(model, folder), reference))
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=ROUNDING)
    assert hits() == [6]


def test_graphs_it_stays_away_from(tmp_path: Path) -> None:
    folder = artifact(build("llama"), tmp_path / "keep", "kv_groups")
    model = build("llama")
    pruning(folder).prepare(model)
    program, report = exported(model, pruning(folder))
    (refused,) = report.refusals
    assert (report.hits, refused.reason) == (0, "its weights are pruned already")
    ids = batch(8)["input_ids"]
    with torch.no_grad():
        assert torch.equal(program.module()(input_ids=ids, use_cache=False).logits, model(input_ids=ids).logits)


def test_graphs_of_other_models(tmp_path: Path) -> None:
    folder = artifact(build("llama"), tmp_path / "keep", "kv_groups")
    with pytest.raises(PassRefusedError, match="makes heads of 8, expected 16"):
        exported(make("llama", num_attention_heads=8, num_key_value_heads=4), pruning(folder))
    other = make("llama", hidden_size=128, head_dim=16, num_attention_heads=8)
    with pytest.raises(
        ArtifactError, match=r"q_proj\.weight is \(128, 128\), the artifact prunes dimension 0 of size 64"
    ):
        exported(other, pruning(folder))
