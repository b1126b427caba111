"""The first lines people type: each must run the rewritten program, counted by compilations *and* runs."""

from __future__ import annotations

import logging
import sys

import families
import pytest
import torch
from families import batch

import effpass.backend as backend_module
from effpass.backend import BackendOptions, reports
from effpass.core.errors import EffpassError, RecipeError


@pytest.fixture(autouse=True)
def _toys(toy_passes, monkeypatch):
    reports.clear()
    monkeypatch.setattr(backend_module, "_said", set())


@pytest.fixture
def runs(monkeypatch):
    """Counts runs of compiled functions: wraps what the inner backend returns."""
    counted = {"compiled": 0, "ran": 0}
    original = backend_module.inner_backend

    def inner(options, mode):
        compile_ = original(options, mode)

        def counting(gm, inputs):
            compiled = compile_(gm, inputs)
            counted["compiled"] += 1

            def run(*args):
                counted["ran"] += 1
                return compiled(*args)

            return run

        return counting

    monkeypatch.setattr(backend_module, "inner_backend", inner)
    return counted


def small():
    return families.make("llama", num_hidden_layers=1)


OPTIONS = {"passes": ["touch"], "inner": "eager"}


def tokens(model, **kwargs):
    inputs = batch(6, padding=0)
    return model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=4,
        do_sample=False,
        **kwargs,
    )


def test_model_compile(runs):
    model = small()
    expected = tokens(model)
    model.compile(backend="effpass", options=OPTIONS)
    assert torch.equal(tokens(model), expected)
    assert runs["ran"] == 4, "one run per token"
    assert all(r.hits == 1 for r in reports)


def test_model_forward(runs):
    model = small()
    expected = tokens(model)
    model.forward = torch.compile(model.forward, backend="effpass", options=OPTIONS)
    assert torch.equal(tokens(model), expected)
    assert runs["ran"] == 4


def test_torch_compile_then_generate_runs_the_rewritten_program(runs):
    """In plain torch `generate` of a compiled model runs eager, without a word."""
    model = small()
    expected = tokens(model)
    compiled = torch.compile(model, backend="effpass", options=OPTIONS)
    assert torch.equal(tokens(compiled), expected)
    assert runs["ran"] == 4
    assert runs["compiled"] >= 1
    assert model._compiled_call_impl is None, "the original model is as it was"
    torch._dynamo.reset()
    other = torch.compile(model, backend="eager")
    assert torch.equal(tokens(other), expected)
    assert runs["ran"] == 4, "other backends keep their behavior"


def test_peft_model_then_generate(runs):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = tokens(model)
    compiled = torch.compile(model, backend="effpass", options=OPTIONS)
    assert torch.equal(tokens(compiled), expected)
    assert runs["ran"] == 4


def test_compile_on_a_peft_model_says_what_to_compile(runs, caplog):
    """`PeftModel.generate` calls the model inside; compiled there, it runs the rewritten program."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    expected = tokens(model)
    backend_module._say_where_peft_generates()
    model.compile(backend="effpass", options=OPTIONS)
    with caplog.at_level(logging.WARNING, logger="effpass"):
        assert torch.equal(tokens(model), expected)
        assert torch.equal(tokens(model), expected)
    assert runs["ran"] == 0
    (line,) = [r.message for r in caplog.records]
    assert "model.get_base_model().compile(backend='effpass')" in line
    caplog.clear()
    model.get_base_model().compile(backend="effpass", options=OPTIONS)
    assert torch.equal(tokens(model), expected)
    assert runs["ran"] == 4
    assert not [r for r in caplog.records if "PeftModel.generate" in r.message]


def test_generate_with_a_compile_config(runs):
    from transformers import CompileConfig

    model = small()
    expected = tokens(model, cache_implementation="static")
    config = CompileConfig(backend="effpass", options=OPTIONS, mode=None, fullgraph=False, dynamic=False)
    config._compile_all_devices = True
    assert torch.equal(tokens(model, cache_implementation="static", compile_config=config), expected)
    assert runs["ran"] >= 3


def test_no_options_says_what_fired_in_one_line(runs, caplog):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    model.requires_grad_(False)
    inputs = batch(8)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="effpass"):
        expected = model(**inputs, use_cache=False).logits
        compiled = torch.compile(model, backend="effpass", options={"inner": "aot_eager"})
        torch.testing.assert_close(compiled(**inputs, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
        compiled(**inputs, use_cache=False)
    (line,) = [r.message for r in caplog.records]
    assert line.startswith("effpass: merge_lora: 1 rewritten")
    assert "weights read a call" in line
    assert "structured_pruning" in line, "it names what a recipe could add"


def test_no_options_on_a_plain_model_changes_nothing(runs, caplog):
    model = small()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="effpass"):
        torch.compile(model, backend="effpass", options={"inner": "aot_eager"})(**batch(8), use_cache=False)
    assert reports == [], "no pass can act on these weights, so the graph is not even retraced"
    assert runs["compiled"] == 1


def test_empty_passes_turn_everything_off(runs, caplog):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(small(), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="effpass"):
        torch.compile(model, backend="effpass", options={"passes": [], "inner": "aot_eager"})(**batch(8))
    assert reports == []
    assert caplog.records == []


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        ("inductr", r"no backend 'inductr' is registered, did you mean 'inductor'\?"),
        ("torch_tensorrt", r"no backend 'torch_tensorrt' is registered.*\n.*pip install torch-tensorrt"),
    ],
)
def test_an_inner_backend_that_is_not_there(inner, message, monkeypatch):
    monkeypatch.setattr(backend_module, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=message):
        backend_module.inner_backend(BackendOptions.parse({"inner": inner}), None)


def test_torch_tensorrt_is_imported_to_be_found(toy_passes, tmp_path, monkeypatch):
    """A package of that name which registers its backend as the real one does, on import."""
    (tmp_path / "torch_tensorrt.py").write_text(
        "import torch\n"
        "got = []\n"
        "@torch._dynamo.register_backend(name='torch_tensorrt')\n"
        "def torch_tensorrt_backend(gm, inputs, **kwargs):\n"
        "    got.append((gm, kwargs))\n"
        "    return gm.forward\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        options = {
            "passes": [{"scale": {"only": "weight"}}],
            "inner": "torch_tensorrt",
            "inner_options": {"min_block_size": 1},
        }
        x, model = torch.ones(1, 4), torch.nn.Linear(4, 4)
        with torch.no_grad():
            torch.compile(model, backend="effpass", options=options)(x)
        ((gm, kwargs),) = sys.modules["torch_tensorrt"].got
        assert kwargs == {"options": {"min_block_size": 1}}
        assert len(gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)) == 1
    finally:
        sys.modules.pop("torch_tensorrt", None)
        torch._dynamo.backends.registry._BACKENDS.pop("torch_tensorrt", None)
        torch._dynamo.backends.registry._COMPILER_FNS.pop("torch_tensorrt", None)


def test_inner_backend_gets_the_rewritten_graph(toy_passes):
    seen = []

    @torch._dynamo.register_backend(name="effpass_test_inner")
    def inner(gm, inputs):
        seen.append((gm, inputs))
        return gm.forward

    model = torch.nn.Linear(4, 4)
    options = {"passes": [{"scale": {"only": "weight"}}], "inner": "effpass_test_inner"}
    x = torch.randn(2, 4)
    with torch.no_grad():
        out = torch.compile(model, backend="effpass", options=options)(x)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, model.weight * 2, model.bias))
    ((gm, inputs),) = seen
    assert len(inputs) == len(gm.graph.find_nodes(op="placeholder")) == 4
    torch._dynamo.backends.registry._BACKENDS.pop("effpass_test_inner", None)
    torch._dynamo.backends.registry._COMPILER_FNS.pop("effpass_test_inner", None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reciep": "r.yaml"}, "options['reciep']: unknown option, did you mean 'recipe'?"),
        ({"passes": "merge_lora"}, "options['passes']: expected list or tuple, got 'merge_lora'"),
        ({"check_weights": 1}, "options['check_weights']: expected bool, got 1"),
        ({"passes": [], "recipe": "r.yaml"}, "options has both 'recipe' and 'passes'"),
        ({"max_autotune": True}, "options['inner_options']"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(RecipeError) as caught:
        BackendOptions.parse(options)
    assert message in str(caught.value)


def test_an_unknown_pass_is_an_error_before_work_starts():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(torch.nn.Linear(2, 2), backend="effpass", options={"passes": ["merge_loar"]})(torch.ones(1, 2))
    assert isinstance(caught.value.inner_exception, EffpassError)
    assert "did you mean 'merge_lora'?" in str(caught.value.inner_exception)


def test_a_runtime_pass_needs_prepare():
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(torch.nn.Linear(2, 2), backend="effpass", options={"passes": ["needs_cache"]})(torch.ones(1, 2))
    assert "needs_cache needs effpass.prepare(model, recipe) before torch.compile" in str(caught.value.inner_exception)


def test_mode_and_fullgraph_pass_through():
    with pytest.raises(RecipeError, match="is a mode of Inductor, and options\\['inner'\\] is 'eager'"):
        backend_module.inner_backend(BackendOptions.parse(OPTIONS), "max-autotune")
    model, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    compiled = torch.compile(model, backend="effpass", mode="default", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


def test_backend_is_found_by_name_and_takes_the_name_keyword():
    assert "effpass" in torch._dynamo.list_backends()
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    options = {"passes": [], "inner": "eager"}
    assert backend_module.effpass(gm, [torch.ones(1)], options=options, name="region")(torch.ones(1)) == 2
