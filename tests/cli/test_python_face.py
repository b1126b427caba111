"""What the commands stand on: prepare, optimize, inspect, save and export, in Python."""

from __future__ import annotations

import pytest
import torch

import effpass
from effpass import api
from effpass.core.errors import EffpassError, ExportError, PassRefusedError
from effpass.core.manager import Planned
from effpass.core.plan import plan


@pytest.fixture
def model(tiny_model):
    return effpass.load_model(tiny_model).model


@pytest.fixture
def ids():
    return torch.arange(12).reshape(2, 6)


def adapted(tiny_model, tiny_adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(effpass.load_model(tiny_model).model, str(tiny_adapter)).eval()


def test_prepare_gives_back_the_plain_model_of_a_merged_peft_model(tiny_model, tiny_adapter, ids):
    peft_model = adapted(tiny_model, tiny_adapter)
    with torch.no_grad():
        expected = peft_model(ids).logits
    prepared = effpass.prepare(peft_model, {"passes": ["merge_lora"]})
    assert type(prepared).__name__ == "LlamaForCausalLM"
    assert prepared.effpass_report.hits == 14
    with torch.no_grad():
        torch.testing.assert_close(prepared(ids).logits, expected, atol=2e-5, rtol=1e-5)
    assert prepared.generate(ids, max_new_tokens=2).shape[0] == 2


def test_prepare_without_a_recipe_applies_exact_passes(tiny_model, tiny_adapter):
    prepared = effpass.prepare(adapted(tiny_model, tiny_adapter))
    assert [entry.name for entry in prepared.effpass_report.passes] == ["merge_lora"]
    assert prepared.effpass_report.hits == 14


def test_prepare_keeps_a_prompt_tuned_model_whole(tiny_model, model):
    from peft import PromptTuningConfig, get_peft_model

    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert effpass.prepare(tuned, {"passes": ["merge_lora"]}) is tuned


def test_preparing_twice_merges_once(model, tiny_adapter, ids):
    recipe = {"passes": [{"merge_lora": {"adapter": str(tiny_adapter)}}]}
    with torch.no_grad():
        once = effpass.prepare(model, recipe)(ids).logits
        again = effpass.prepare(model, recipe)
        assert torch.equal(again(ids).logits, once)
    assert again.effpass_report.hits == 0
    assert {r.reason for r in again.effpass_report.passes[0].refusals} == {"merged already by effpass.prepare"}


def test_nothing_is_changed_when_one_pass_of_several_cannot_act(model, tiny_adapter, tmp_path):
    before = {n: p.clone() for n, p in model.named_parameters()}
    recipe = {"passes": [{"merge_lora": {"adapter": str(tiny_adapter)}}, {"merge_lora": {"adapter": str(tmp_path)}}]}
    with pytest.raises(EffpassError):
        effpass.prepare(model, recipe)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_optimize_compiles_what_prepare_left(model, tiny_adapter, ids, toy_passes):
    import effpass.backend

    effpass.backend.reports.clear()
    recipe = {"passes": [{"merge_lora": {"adapter": str(tiny_adapter)}}, {"scale": {"only": "v_proj", "factor": 1.5}}]}
    merged = effpass.prepare(effpass.load_model(model.config._name_or_path).model, {"passes": recipe["passes"][:1]})
    for layer in merged.model.layers:
        layer.self_attn.v_proj.weight.data.mul_(1.5)
    optimized = effpass.optimize(model, recipe, inner="eager")
    with torch.no_grad():
        expected, got = merged(ids, use_cache=False).logits, optimized(ids, use_cache=False).logits
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    (report,) = effpass.backend.reports
    assert [(entry.name, entry.hits) for entry in report.passes] == [("scale", 2)]


def test_inspect_changes_nothing_and_counts_peft_s_operators(tiny_model, tiny_adapter, ids):
    peft_model = adapted(tiny_model, tiny_adapter).train()
    before = {n: p.clone() for n, p in peft_model.named_parameters()}
    found = effpass.inspect(peft_model, {"passes": ["merge_lora"]}, input_ids=ids)
    assert peft_model.training
    assert all(torch.equal(p, before[n]) for n, p in peft_model.named_parameters())
    # A, B and the scaling of 14 layers go, and 14 sums; the head has no adapter.
    assert found.ops_before["aten.linear.default"] == 43
    assert found.ops_after["aten.linear.default"] == 15
    (entry,) = found.reports[0].passes
    assert entry.ops == {"aten.linear.default": -28, "aten.mul.Tensor": -14, "aten.add.Tensor": -14}
    assert entry.weight_bytes < 0
    assert entry.flops < 0


def test_a_graph_that_cannot_be_retraced_is_said_by_inspect(toy_passes):
    class Mapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, input_ids, use_cache):
            return torch.vmap(lambda row: row * self.weight.sum())(input_ids.float())

    found = effpass.inspect(Mapped(), {"passes": ["touch"]})
    assert "vmap" in found.reports[0].unrewritten


def test_a_pass_without_a_way_in_is_refused_before_anything_happens(model, toy_passes, tiny_adapter, monkeypatch):
    from effpass.core import registry
    from effpass.core.pass_ import RuntimePass

    class Lost(RuntimePass):
        name, exact = "lost", True

    monkeypatch.setitem(registry.BUILTIN, "lost", f"{__name__}:Lost")
    monkeypatch.setattr(registry, "load", lambda name, load=registry.load: Lost if name == "lost" else load(name))
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    planned = [*plan({"passes": [{"merge_lora": {"adapter": str(tiny_adapter)}}]}), Planned(Lost())]
    with pytest.raises(PassRefusedError, match=r"lost rewrites neither models nor graphs of torch\.compile"):
        api._prepare(model, planned)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


def test_save_leaves_nothing_behind_when_it_fails(model, tiny_adapter, tmp_path, monkeypatch):
    recipe = effpass.Recipe.parse({"passes": [{"merge_lora": {"adapter": str(tiny_adapter)}}]})
    prepared = effpass.prepare(model, recipe)

    def full_disk(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepared, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        api.save(prepared, tmp_path / "out", recipe=recipe)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("with_recipe", [True, False])
def test_save_replaces_no_folder_unasked_and_nothing_but_a_checkpoint(model, tmp_path, with_recipe):
    recipe = effpass.Recipe.parse({"passes": ["merge_lora"]}) if with_recipe else None
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(EffpassError, match="thesis exists"):
        api.save(model, tmp_path / "thesis", recipe=recipe)
    with pytest.raises(EffpassError, match="thesis is no checkpoint"):
        api.save(model, tmp_path / "thesis", recipe=recipe, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"


def test_export_refuses_before_it_works(model, tmp_path):
    with pytest.raises(ExportError, match=r"unknown target 'tensorrtx', did you mean 'tensorrt'\?"):
        effpass.export(model, None, tmp_path / "m.onnx", target="tensorrtx")
    (tmp_path / "m.onnx").write_text("mine")
    with pytest.raises(ExportError, match="exists"):
        effpass.export(model, None, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "mine"


def test_generate_hands_on_what_goes_wrong_in_its_thread(model, tiny_model):
    tokenizer = effpass.load_model(tiny_model).tokenizer
    with pytest.raises(ValueError, match="num_beams"):
        list(effpass.generate(model, tokenizer, "hi", num_beams=2, max_new_tokens=2))
    with pytest.raises(EffpassError, match="the prompt is empty"):
        list(effpass.generate(model, tokenizer, ""))


def test_optimize_checks_its_options_before_it_changes_the_model(tiny_model, tiny_adapter):
    peft_model = adapted(tiny_model, tiny_adapter)
    before = {name: value.clone() for name, value in peft_model.state_dict().items()}
    for how, says in (
        ({"mode": "bogus"}, "mode='bogus' is no mode of Inductor"),
        ({"inner": "inductr"}, "no backend 'inductr' is registered, did you mean 'inductor'"),
        ({"inner": "eager", "mode": "max-autotune"}, "is a mode of Inductor, and"),
    ):
        with pytest.raises(EffpassError, match=says):
            effpass.optimize(peft_model, {"passes": ["merge_lora"]}, **how)
    after = peft_model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_passes_that_need_an_option_are_no_part_of_the_default(model, monkeypatch):
    from dataclasses import dataclass

    from effpass.core import registry
    from effpass.core.pass_ import GraphPass

    @dataclass(frozen=True)
    class Options:
        scale: float

    class Scaled(GraphPass):
        """Scales."""

        name, exact = "scaled", True

    Scaled.Options = Options
    monkeypatch.setattr(f"{__name__}.Scaled", Scaled, raising=False)
    monkeypatch.setitem(registry.BUILTIN, "scaled", f"{__name__}:Scaled")
    assert next(info for info in registry.describe() if info.name == "scaled").error is None
    names = [planned.pass_.name for planned in plan(None)]
    assert "scaled" not in names
    assert names[0] == "merge_lora"  # weights first
    effpass.prepare(model)


def test_a_home_folder_that_is_not_there(refused, tiny_model):
    for words in (("recipe", "check", "~nobody-here/r.yaml"), ("generate", "~nobody-here/m", "-p", "a")):
        assert "~nobody-here" in refused(*words)
