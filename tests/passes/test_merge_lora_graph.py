"""`merge_lora` in the graph and in exports, against PEFT's own forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, make
from lora_models import (
    CASES,
    LINEARS,
    ROUNDING,
    Linear4bit,
    attached,
    logits,
    merge,
    quantize,
    saved,
    stir,
    unchanged,
)
from torch import nn

import effpass.backend as backend
from effpass.core.errors import ArtifactError, ModelError, PassRefusedError
from effpass.core.exported import program_from_exported, to_exported
from effpass.core.manager import PassManager
from effpass.passes.weights.merge_lora import MergeLora, swap

peft = pytest.importorskip("peft")


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


def test_a_quantized_weight_in_the_graph_is_an_error(tmp_path: Path) -> None:
    folder = saved(attached(make_options=ONE), tmp_path / "adapter")
    with pytest.raises(PassRefusedError, match=r"q_proj\.weight is quantized \(torch\.int8\)") as error:
        exported(quantize(make("llama", **ONE), Linear4bit), merge(folder))
    assert "effpass.prepare(model, recipe) before compiling" in str(error.value)
