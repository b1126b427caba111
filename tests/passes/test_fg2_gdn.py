"""`fg2_gdn`: hits, what becomes of the model, and what is refused before anything changes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, batch, make
from safetensors.torch import load_file, save_file
from torch._dynamo.exc import BackendCompilerFailed

import effpass
from effpass.api import save
from effpass.core.errors import ArtifactError, EffpassError
from effpass.core.fingerprint import Fingerprint
from effpass.core.model import load_model
from effpass.passes.weights.fg2_gdn import Learned, make_artifact
from effpass.runtime.linear_attention import GatedDeltaAttention, GatedDeltaSettings, is_hybrid, make_hybrid


def learned(
    folder: Path, family: str = "llama", layers: tuple[int, ...] = (0, 1), mode: str = "fg2+", rest: bool = False
):
    """The model of the artifact that is written."""
    model = make(family)
    original, settings = Fingerprint.of(model), GatedDeltaSettings(mode, 4, 4, 16, 16, gate_rank=8)
    torch.manual_seed(1)
    made = make_hybrid(model, layers, settings)
    changed = {}
    if rest:
        name = "model.norm.weight"
        model.get_parameter(name).data.mul_(1.5)
        changed = {name: model.get_parameter(name)}
    make_artifact(folder, original, made, rest=changed, provenance={"seed": 1}, metrics={"loss": 2.0})
    return model.eval()


def recipe(folder: Path, **options) -> dict:
    return {"version": 1, "passes": [{"fg2_gdn": {"artifact": str(folder), **options}}]}


def logits(model, **changes) -> torch.Tensor:
    with torch.no_grad():
        return model(**{**batch(14), **changes}).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_becomes_the_hybrid_that_was_learned(family, tmp_path):
    hybrid = learned(tmp_path / "a", family)
    model = effpass.prepare(make(family), recipe(tmp_path / "a"))
    assert model.effpass_report.hits == 2
    assert sum(isinstance(m, GatedDeltaAttention) for m in model.modules()) == 2
    assert torch.equal(logits(model), logits(hybrid))
    given = {name: batch(9)[name] for name in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, **how), hybrid.generate(**given, **how))


@pytest.mark.parametrize("mode", ["gdn", "kda", "fg2", "fg2+"])
def test_every_mode_becomes_the_hybrid_that_was_learned(mode, tmp_path):
    hybrid = learned(tmp_path / "a", "qwen3", mode=mode)
    model = effpass.prepare(make("qwen3"), recipe(tmp_path / "a"))
    assert {m.settings.mode for m in model.modules() if isinstance(m, GatedDeltaAttention)} == {mode}
    assert torch.equal(logits(model), logits(hybrid))
    save(model, tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved").model), logits(hybrid))
    given = {name: batch(9)[name] for name in ("input_ids", "attention_mask")}
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(**given, **how), hybrid.generate(**given, **how))


def test_chosen_layers_alone_and_the_rest_of_the_model(tmp_path):
    learned(tmp_path / "a")
    model = effpass.prepare(make("llama"), recipe(tmp_path / "a", layers=[1]))
    assert model.effpass_report.hits == 1
    assert [type(layer.self_attn).__name__ for layer in model.model.layers] == ["LlamaAttention", "GatedDeltaAttention"]
    whole = learned(tmp_path / "b", rest=True)
    model = effpass.prepare(make("llama"), recipe(tmp_path / "b"))
    assert torch.equal(logits(model), logits(whole))
    assert not torch.equal(model.model.norm.weight, make("llama").model.norm.weight)


def test_compiled_with_the_passes_behind_it(tmp_path):
    hybrid = learned(tmp_path / "a", layers=(1,))
    items = [*recipe(tmp_path / "a")["passes"], "fuse_linears"]
    model = effpass.optimize(make("llama"), {"version": 1, "passes": items}, inner="eager", dynamic=True)
    for length in (14, 23):
        with torch.no_grad():
            found, wanted = model(**batch(length)).logits, hybrid(**batch(length)).logits
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_prepared_model_is_saved_as_a_checkpoint(tmp_path):
    hybrid = learned(tmp_path / "a", "qwen3", (1,))
    save(effpass.prepare(make("qwen3"), recipe(tmp_path / "a")), tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved").model), logits(hybrid))


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", (1,)), pytest.param("gemma3", (0, 1), marks=pytest.mark.slow)]
)
def test_onnx_runtime_decodes_the_hybrid(family, layers, tmp_path):
    learned(tmp_path / "a", family, layers)
    done = effpass.export(make(family), recipe(tmp_path / "a"), tmp_path / "m.onnx")
    assert max(check.export_error for check in done.checks) < 1e-4
    assert max(check.cache_error for check in done.checks) < 1e-4
    names = [x.name for x in _inputs(tmp_path / "m.onnx")]
    assert {"past_key_values.1.conv", "past_key_values.1.state"} <= set(names)
    assert ("past_key_values.0.key" in names) == (layers == (1,))
    assert done.reports[0].hits == len(layers)


def _inputs(file: Path):
    import onnxruntime

    return onnxruntime.InferenceSession(str(file)).get_inputs()


def test_inspect_says_what_becomes_of_the_cache_and_of_a_hybrid(tmp_path):
    hybrid = learned(tmp_path / "a", layers=(1,))
    found = effpass.inspect(
        make("llama"), recipe(tmp_path / "a"), tokens=0, cache_length=200, batch=2, predict_for="h100"
    )
    engine = effpass.prepare(make("llama"), recipe(tmp_path / "a")).effpass_engine
    with engine.session(2, 16) as session:
        session.prefill(batch(5)["input_ids"], None, 16)
        own = sum(t.numel() * t.element_size() for t in session.cache.layers[1].own_state())
    keys_and_values = 2 * 2 * 2 * 200 * 16 * 4  # of two sequences and two heads, in float32
    wanted = f"takes {own / 1e6:.2f} MB at any number of positions, in place of {keys_and_values / 1e6:.2f} MB at 200"
    (entry,) = found.prepared
    assert entry.note == f"the cache of 1 layer {wanted}"
    assert found.memory.cache == 2 * keys_and_values
    prefill, decode = effpass.inspect(hybrid, {"passes": []}, tokens=8, predict_for="h100").workloads
    assert prefill.stages
    assert "linear attention, whose state has no place" in decode.missing[0]


# -- what is refused --------------------------------------------------------------------------------------------------


def refused(model, message: str, given: dict) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(EffpassError) as caught:
        effpass.prepare(model, given)
    assert message in f"{caught.value.message} {caught.value.hint}"
    after = model.state_dict()
    assert not is_hybrid(model.config)
    assert before.keys() == after.keys()
    assert all(torch.equal(x, after[name]) for name, x in before.items())


def test_other_models_layers_and_choices_are_refused(tmp_path):
    learned(tmp_path / "a")
    learned(tmp_path / "rest", rest=True)
    learned(tmp_path / "one", layers=(1,))
    refused(make("llama", seed=5), "wrong weights", recipe(tmp_path / "a"))
    refused(make("qwen3"), "wrong model", recipe(tmp_path / "a"))
    refused(make("llama"), "layers: 7 of [1, 7] were not learned", recipe(tmp_path / "a", layers=[1, 7]))
    refused(make("llama"), "give each layer once", recipe(tmp_path / "a", layers=[]))
    refused(make("llama"), "give each layer once", recipe(tmp_path / "a", layers=[1, 1]))
    refused(make("llama"), "weights of the rest of the model", recipe(tmp_path / "rest", layers=[1]))
    quantized = make("llama")
    quantized.model.layers[1].self_attn.q_proj.weight = torch.nn.Parameter(
        torch.zeros(64, 64, dtype=torch.int8), requires_grad=False
    )
    given = json.loads((tmp_path / "one" / "effpass.json").read_text())
    given["fingerprint"]["weights"] = "any"
    (tmp_path / "one" / "effpass.json").write_text(json.dumps(given))
    refused(quantized, "layer 1: self_attn.q_proj.weight is quantized", recipe(tmp_path / "one"))
    twice = {"version": 1, "passes": [*recipe(tmp_path / "a", layers=[0])["passes"], *recipe(tmp_path / "a")["passes"]]}
    refused(make("llama"), "fg2_gdn occurs twice", twice)
    hybrid = effpass.prepare(make("llama"), recipe(tmp_path / "one"))
    with pytest.raises(EffpassError, match="has linear attention already"):
        effpass.prepare(hybrid, recipe(tmp_path / "one"))


def test_a_bare_torch_compile_is_told_the_way(tmp_path):
    learned(tmp_path / "a")
    model = torch.compile(make("llama"), backend="effpass", options={"recipe": recipe(tmp_path / "a")})
    with pytest.raises(BackendCompilerFailed, match=r"fg2_gdn needs effpass\.prepare"):
        model(**batch(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, o: t.pop("layers.0.conv.weight"), "missing tensors: layers.0.conv.weight"),
        (lambda t, o: o["options"]["settings"].update(mode="kda"), "layers.0.b_proj.weight is"),
        (lambda t, o: o["options"]["settings"].update(rank=3), "unknown setting 'rank'"),
        (lambda t, o: o["options"].update(layers=[]), "expected layers and settings"),
        (lambda t, o: o["options"].update(layers=[0]), "unknown tensor 'layers.1."),
        (lambda t, o: o.update(version=2), "this effpass reads 1"),
        (lambda t, o: o.update({"pass": "merge_lora"}), "an artifact for the pass 'merge_lora'"),
    ],
)
def test_a_damaged_artifact(change, message, tmp_path):
    folder = tmp_path / "a"
    learned(folder)
    tensors = load_file(folder / "effpass.safetensors")
    content = json.loads((folder / "effpass.json").read_text())
    change(tensors, content)
    save_file(tensors, folder / "effpass.safetensors")
    (folder / "effpass.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError) as caught:
        Learned.load(folder)
    assert message in caught.value.message


def test_an_artifact_comes_back_as_it_was(tmp_path):
    model = learned(tmp_path / "a", rest=True)
    found = Learned.load(tmp_path / "a")
    assert found.settings == GatedDeltaSettings("fg2+", 4, 4, 16, 16, gate_rank=8)
    assert sorted(found.layers) == [0, 1]
    for name, parameter in model.model.layers[1].self_attn.named_parameters():
        assert torch.equal(found.layers[1][name], parameter)
    assert list(found.rest) == ["model.norm.weight"]
    assert (found.artifact.provenance, found.artifact.metrics) == ({"seed": 1}, {"loss": 2.0})
