"""What must survive the retrace of a Dynamo graph; each of these was once a failure."""

from __future__ import annotations

import pytest
import torch
from families import Count, batch, make
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed

from effpass.backend import effpass, reports
from effpass.core.dynamo import program_from_dynamo, source_name
from effpass.core.errors import RewriteError
from effpass.core.exported import program_from_exported, to_exported


@pytest.fixture(autouse=True)
def _toys(toy_passes):
    reports.clear()


def through(inner="aot_eager", **options):
    return lambda gm, inputs: effpass(gm, inputs, options={"passes": ["touch"], "inner": inner, **options})


def collect(into):
    def backend(gm, inputs):
        into.append(program_from_dynamo(gm, inputs))
        return gm.forward

    return backend


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        ctx.factor = factor
        return x * x * factor

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * grad * x * ctx.factor, None  # not the true derivative, so that a lost backward shows


class HoldsFunction(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(8, 8)
        self.second = torch.nn.Linear(8, 8)
        self.scaling = 0.5

    def forward(self, x):
        return (self.second(Square.apply(self.first(x).relu(), 3.0)) * self.scaling).sum()


@pytest.mark.parametrize("dynamic", [None, True], ids=["auto", "dynamic"])
def test_autograd_function_keeps_its_own_backward(dynamic):
    model, x = HoldsFunction(), torch.randn(4, 8)
    model(x).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compile(model, backend=through(), dynamic=dynamic, fullgraph=True)(x).backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0)


def test_higher_order_operators_stay_whole_and_leave_no_stray_nodes():
    found = []
    torch.compile(HoldsFunction(), backend=collect(found))(torch.randn(4, 8))
    (program,) = found
    targets = [getattr(n.target, "_name", str(n.target)) for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count("autograd_function_apply") == 1
    assert not [t for t in targets if "grad_enabled" in t]


def test_checkpointed_body_is_a_program_of_its_own():
    model = make("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = []
    torch.compile(model, backend=collect(found))(**batch(8), use_cache=False)
    (program,) = found
    assert len(program.bodies) == 2
    names = [[linear.name for linear in body.linears()] for body in program.bodies]
    assert [len(n) for n in names] == [7, 7]
    assert names[1][0] == "model.layers.1.self_attn.q_proj.weight"
    assert [linear.name for linear in program.linears()] == ["lm_head.weight"]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_lifted_floats_make_no_graph_break(inner):
    """dynamic=True lifts Python floats to tensors; the retrace must keep the SymFloat of each `.item()`."""
    model = make("llama", num_hidden_layers=1)
    compiled = torch.compile(model, backend=through(inner), dynamic=True, fullgraph=True)
    with torch.no_grad():
        for length in (9, 17):
            expected = model(**batch(length), use_cache=False).logits
            torch.testing.assert_close(
                compiled(**batch(length), use_cache=False).logits, expected, rtol=1e-5, atol=2e-6
            )
    assert len(reports) == 1, "one graph serves both lengths, and the restarted compilation is not counted"


def test_metadata_of_weights_is_carried_over():
    """Without it CUDA graphs copy every weight at each replay."""
    from torch._functorch._aot_autograd import frontend_utils

    model = make("llama", num_hidden_layers=1)
    seen = []
    original = frontend_utils._try_get_metadata_from_dynamo

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        seen.append(result)
        return result

    import torch._functorch.aot_autograd as aot

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(frontend_utils, "_try_get_metadata_from_dynamo", spy)
        if hasattr(aot, "_try_get_metadata_from_dynamo"):
            patch.setattr(aot, "_try_get_metadata_from_dynamo", spy)
        torch.compile(model, backend="aot_eager")(**batch(8), use_cache=False)
        torch._dynamo.reset()
        torch.compile(model, backend=through())(**batch(8), use_cache=False)
    (plain_sources, plain_static), (our_sources, our_static) = seen
    assert len(plain_static) > 10
    assert our_static == plain_static
    assert our_sources == plain_sources


def test_a_graph_that_cannot_be_retraced_runs_unrewritten_and_says_why():
    def model(x):
        return torch.vmap(lambda row: row * row.sum())(x) + 1

    x = torch.randn(3, 4)
    compiled = torch.compile(model, backend=through())
    torch.testing.assert_close(compiled(x), model(x))
    (report,) = reports
    assert report.hits == 0
    assert "vmap" in report.unrewritten
    assert report.lines()[0].startswith("graph left as it was: it uses")


def test_our_own_failure_is_an_error_of_its_own(monkeypatch):
    import toy_passes

    def broken(self, program, match):
        raise KeyError("node_7")

    monkeypatch.setattr(toy_passes.Touch, "rewrite", broken)
    with pytest.raises(BackendCompilerFailed) as caught:
        torch.compile(lambda x: x + 1, backend=through())(torch.ones(2))
    assert isinstance(caught.value.inner_exception, RewriteError)
    assert "pass touch failed: KeyError: 'node_7'" in str(caught.value.inner_exception)


def test_writes_stay_in_order_with_a_static_cache():
    from transformers import StaticCache

    model = make("llama", num_hidden_layers=1)
    found = []
    with torch.no_grad():
        cache = StaticCache(model.config, max_cache_len=16)
        torch.compile(model, backend=collect(found))(**batch(6), past_key_values=cache)
    (program,) = found
    writes = [n for n in program.graph.nodes if n.op == "call_function" and "index_copy_" in str(n.target)]
    assert len(writes) == 2, "the cache is written in place: the dialect is not functional"


class Custom(torch.nn.Module):
    """Autocast, no_grad, an in-place write to an input, a custom complex rotation: what models do between layers."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 8)

    def forward(self, x, buffer):
        buffer.add_(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.linear(x)
        with torch.no_grad():
            scale = y.float().abs().max()
        rotated = torch.view_as_complex(y.float().reshape(-1, 4, 2)) * torch.polar(torch.ones(4), torch.arange(4.0))
        return (torch.view_as_real(rotated).flatten(1) / (scale + 1) + buffer).sum()


def test_regions_and_input_mutation():
    model, x = Custom(), torch.randn(5, 8)
    left, right = torch.zeros(8), torch.zeros(8)
    model(x, left).backward()
    expected = model.linear.weight.grad.clone()
    model.zero_grad()
    torch.compile(model, backend=through())(x, right).backward()
    torch.testing.assert_close(model.linear.weight.grad, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(right, left, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_around_a_model(where):
    model = make("llama", num_hidden_layers=1)

    def forward(**inputs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "inside"):
            return model(**inputs, use_cache=False).logits

    compiled = torch.compile(forward, backend=through())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "outside"):
        torch.testing.assert_close(compiled(**batch(8)), forward(**batch(8)), rtol=0, atol=0)
    assert reports[-1].hits == 1


def test_dropout_under_one_seed():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Dropout(0.5)).train()
    x = torch.randn(4, 8)
    results = []
    for backend in (lookup_backend("aot_eager"), through()):
        torch._dynamo.reset()
        torch.manual_seed(1)
        results.append(torch.compile(model, backend=backend)(x))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_peft_lora_model():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.train()
    inputs = batch(8)

    def gradients(forward):
        model.zero_grad()
        forward(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    actual = gradients(torch.compile(model, backend=through()))
    assert expected.keys() == actual.keys()
    assert len(expected) == 8
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)


# -- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['model']._modules['norm']._parameters['weight']", "model.norm.weight"),
        ("L['self']._modules['layers']._modules['0']._buffers['inv_freq']", "layers.0.inv_freq"),
        ("G['model']._modules['lm_head']._parameters['weight']", "lm_head.weight"),
        ("L['self']._parameters['weight']", "weight"),
        ("L['x']", None),
        ("L['self'].scaling", None),
    ],
)
def test_source_name(source, name):
    assert source_name(source) == name


def test_a_tied_head_is_named_at_its_use():
    model = make("llama", num_hidden_layers=1, tie_word_embeddings=True)
    found = []
    with torch.no_grad():
        torch.compile(model, backend=collect(found))(**batch(8), use_cache=False)
    (program,) = found
    head = list(program.linears())[-1]
    assert head.name == "lm_head.weight"
    assert program.weight_of(head.weight).name == "model.embed_tokens.weight"


def test_a_compiled_submodule_takes_its_prefix():
    model = make("llama", num_hidden_layers=1)
    mlp = model.model.layers[0].mlp
    for prefix, expected in (("", "gate_proj.weight"), ("model.layers.0.mlp.", "model.layers.0.mlp.gate_proj.weight")):
        torch._dynamo.reset()
        found = []

        def backend(gm, inputs, found=found, prefix=prefix):
            found.append(program_from_dynamo(gm, inputs, prefix))
            return gm.forward

        torch.compile(mlp.forward, backend=backend)(torch.randn(2, 64))
        assert next(found[0].linears()).name == expected


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_both_fronts_name_the_same_linears(family):
    model = make(family)
    found = []
    ids = torch.randint(3, 90, (2, 8))
    with torch.no_grad():
        torch.compile(model, backend=collect(found))(input_ids=ids, use_cache=False)
        exported = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
    program = program_from_exported(exported)
    names = [linear.name for linear in program.linears()]
    assert names == [linear.name for linear in found[0].linears()]
    assert len(names) == (15 if family == "llama" else 9)
    assert not [n for n in program.graph.nodes if "_assert_tensor_metadata" in str(n.target)]
    with torch.no_grad():
        logits = to_exported(program).module()(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-5, atol=2e-6)


def test_repeated_layers_compile_once():
    model = make("llama", num_hidden_layers=4)
    count = Count(through())
    for layer in model.model.layers:
        layer.compile(backend=count)
    with torch.no_grad():
        expected = make("llama", num_hidden_layers=4)(**batch(8), use_cache=False).logits
        actual = model(**batch(8), use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)
    assert count.compiled == 1
    assert count.ran == 4


def test_constants_of_equal_calls_do_not_replace_others():
    ones, twos = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])

    def scaled(x):
        return x * ones

    def shifted(x):
        return x + twos

    graph = torch.fx.Graph()
    value = graph.placeholder("x")
    for function in (scaled, scaled, scaled, shifted):
        value = graph.call_function(function, (value,))
    graph.output((value,))
    gm = torch.fx.GraphModule(torch.nn.Module(), graph)
    given = torch.randn(3, 2)
    program = program_from_dynamo(gm, [given])
    torch.testing.assert_close(program.gm(given), (shifted(given * ones**3),))


def test_zeros_of_either_sign_are_two_constants():
    class Signs(torch.nn.Module):
        def forward(self, x):
            return torch.copysign(x.sin().abs(), 0.0), torch.copysign(x.sin().abs(), -0.0)

    x = torch.rand(4) + 0.5
    plus, minus = torch.compile(Signs(), backend=through())(x)
    assert (plus > 0).all()
    assert (minus < 0).all()
