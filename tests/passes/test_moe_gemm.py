"""`moe_gemm`: every family's layers in every way they are written, forward and backward; and where it stays away."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from decode_step import enliven
from families import CONFIGS, batch, make
from moe_families import LAYERS, MORE
from moe_reference import layer
from product_programs import program_of
from torch._dynamo.utils import counters

import effpass
from effpass.backend import DECODE_PASSES, DecodeBackend, reports
from effpass.core.exported import program_from_exported, to_exported
from effpass.core.manager import PassManager
from effpass.core.plan import default_passes
from effpass.core.report import Report
from effpass.lowering.ops.moe_ffn import TOLERANCE
from effpass.passes.graph.moe_gemm import MoeGemm


@pytest.fixture(autouse=True)
def _families(monkeypatch):
    for name, config in MORE.items():
        monkeypatch.setitem(CONFIGS, name, config)
    reports.clear()


def compiled(model, dynamic, inner="eager", **how):
    options = {"passes": ["moe_gemm"], "inner": inner}
    return torch.compile(model, backend="effpass", dynamic=dynamic, options=options, **how)


# Prompts with a dynamic length are sorted, decode steps of fixed size copy; the other two combinations are slow tests.
@pytest.mark.parametrize(
    ("family", "implementation", "dynamic"),
    [
        *((family, "grouped_mm", True) for family in LAYERS),
        ("mixtral", "batched_mm", False),
        ("gpt_oss", "batched_mm", False),
        *(pytest.param(f, "batched_mm", True, marks=pytest.mark.slow) for f in LAYERS),
        *(pytest.param(f, "grouped_mm", False, marks=pytest.mark.slow) for f in LAYERS),
    ],
)
def test_families(family, implementation, dynamic):
    """Once in each layer, and nothing of the layer is left."""
    model = enliven(make(family, experts_implementation=implementation))
    with torch.no_grad():
        expected = model(**batch(9)).logits
        run = compiled(model, dynamic, fullgraph=True)
        torch.testing.assert_close(run(**batch(9)).logits, expected, rtol=1e-5, atol=1e-5)
        if dynamic:
            torch.testing.assert_close(run(**batch(13)).logits, model(**batch(13)).logits, rtol=1e-5, atol=1e-5)
    (report,) = reports
    (entry,) = report.passes
    assert (entry.hits, entry.refusals) == (LAYERS[family], [])
    gone = {
        "grouped_mm": {"transformers.grouped_mm_fallback.default": 2, "aten.histc.default": 1, "aten.sort.default": 1},
        "batched_mm": {"aten.bmm.default": 2, "aten.repeat_interleave.self_int": 1},
    }[implementation]
    counts = {"effpass.moe_ffn.default": 1, **{op: -n for op, n in gone.items()}}
    assert {op: entry.ops.get(op) for op in counts} == {op: n * entry.hits for op, n in counts.items()}


def test_bfloat16_and_the_library_operator():
    """In bfloat16 the layer is `aten._grouped_mm`; Mixtral's routing weights are float32 there."""
    model = enliven(make("mixtral")).bfloat16()
    with torch.no_grad():
        expected = model(**batch(9)).logits
        actual = compiled(model, True)(**batch(9)).logits
    assert reports[0].passes[0].hits == 2
    difference = (actual - expected).float().abs().max() / expected.float().abs().max()
    assert difference <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [
        ("mixtral", False),
        ("gpt_oss", True),
        *(pytest.param(f, c, marks=pytest.mark.slow) for f in LAYERS for c in (False, True)),
    ],
)
def test_training(family, checkpointing):
    """Losses and gradients of all weights, the router's among them, through AOT autograd."""
    one = (
        {"num_hidden_layers": 1, "layer_types": ["full_attention"]} if family == "gpt_oss" else {"num_hidden_layers": 1}
    )
    model = enliven(make(family, **({} if "deepseek" in family else one))).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = {**batch(9), "labels": batch(9)["input_ids"], "use_cache": False}

    def gradients(run):
        model.zero_grad()
        loss = run(**inputs).loss
        loss.backward()
        return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    loss, expected = gradients(model)
    actual_loss, actual = gradients(compiled(model, False, inner="aot_eager"))
    assert sum(p.hits for r in reports for p in r.passes) == 1
    assert set(actual) == set(expected)
    torch.testing.assert_close(actual_loss, loss, rtol=1e-6, atol=1e-6)
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(actual[name] / scale, gradient / scale, rtol=1e-4, atol=1e-5, msg=name)


def test_frozen_experts_keep_nothing():
    """Where no operand asks for a gradient the layer keeps no projection, though gradients are recorded."""
    model = enliven(make("mixtral")).requires_grad_(False)
    seen = []

    def backend(gm, inputs):
        from effpass.core.dynamo import program_from_dynamo

        program = program_from_dynamo(gm, inputs)
        PassManager([MoeGemm()]).run(program)
        seen.extend(n.args[-1] for n in program.graph.nodes if n.target is torch.ops.effpass.moe_ffn.default)
        return program.gm

    torch.compile(model, backend=backend, dynamic=False)(**batch(9))
    assert seen == [False, False]


@pytest.mark.parametrize(("family", "implementation"), [("mixtral", "batched_mm"), ("gpt_oss", "grouped_mm")])
def test_exported_programs(family, implementation):
    model = enliven(make(family, experts_implementation=implementation))

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    ids = batch(9, padding=0)["input_ids"]
    sizes = ({1: torch.export.Dim("tokens", min=2, max=64)},)
    program = program_from_exported(torch.export.export(Logits(), (ids,), dynamic_shapes=sizes))
    (entry,) = PassManager([MoeGemm()]).run(program).passes
    assert (entry.hits, entry.refusals) == (2, [])
    rewritten = to_exported(program).module()
    for length in (9, 20):
        ids = batch(length, padding=0)["input_ids"]
        torch.testing.assert_close(rewritten(ids), Logits()(ids), rtol=1e-5, atol=1e-5)


def test_it_is_on_by_default_and_in_decode_steps():
    assert "moe_gemm" in [planned.pass_.name for planned in default_passes()]
    assert "moe_gemm" in DECODE_PASSES
    model = enliven(make("qwen3_moe", experts_implementation="batched_mm"))
    with torch.no_grad():
        torch.compile(model, backend=DecodeBackend(), dynamic=False)(**batch(9))
    hits = {entry.name: entry.hits for report in reports for entry in report.passes}
    assert hits["moe_gemm"] == 2


def test_models_without_experts_are_not_retraced_for_it():
    assert not MoeGemm().could_act(["model.layers.0.mlp.up_proj.weight"])
    assert MoeGemm().could_act(["model.layers.0.mlp.experts.gate_up_proj"])


# -- eager experts ----------------------------------------------------------------------------------------------------

RECIPE = {"version": 1, "passes": ["moe_gemm"]}
SET = "moe_gemm: experts_implementation set from eager to grouped_mm (layers with experts: {})"


@pytest.mark.parametrize("enter", [effpass.prepare, effpass.optimize])
def test_eager_experts_are_set_to_what_the_pass_matches(enter):
    model = enter(make("mixtral", experts_implementation="eager"), RECIPE)
    assert model.config._experts_implementation == "grouped_mm"
    assert model.effpass_report.changed == [SET.format(2)]
    assert SET.format(2) in model.effpass_report.lines()
    again = enter(make("mixtral"), RECIPE)
    assert again.effpass_report.changed == []
    other = enter(make("mixtral", experts_implementation="eager"), {"version": 1, "passes": ["fuse_linears"]})
    assert other.config._experts_implementation == "eager"


def test_inspecting_eager_experts_leaves_them_eager():
    model = make("mixtral", experts_implementation="eager", num_hidden_layers=1)
    found = effpass.inspect(model, RECIPE, tokens=0, predict_for="h100")
    assert [entry.hits for report in found.decode_reports for entry in report.passes] == [1]
    assert found.changed == [SET.format(1)]
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("options", [{"passes": ["moe_gemm"]}, {}])
def test_eager_experts_are_refused_by_torch_compile(options):
    """Without `prepare`, Dynamo cuts the loop out of every graph; the pass says so, though the graph has no weight."""
    model = enliven(make("mixtral", experts_implementation="eager", num_hidden_layers=1))
    torch._dynamo.reset()
    with torch.no_grad():
        expected = model(**batch(9)).logits
        run = torch.compile(model, backend="effpass", options={"inner": "eager", **options})
        torch.testing.assert_close(run(**batch(9)).logits, expected, rtol=1e-5, atol=1e-5)
    entries = [entry for report in reports for entry in report.passes if entry.name == "moe_gemm"]
    (refusal,) = [refusal for entry in entries for refusal in entry.refusals]
    assert sum(entry.hits for entry in entries) == 0
    assert "a loop over values that the device computes" in refusal.reason
    assert 'model.set_experts_implementation("grouped_mm") before torch.compile' in refusal.hint


def test_reports_name_the_constants_that_choose_kernels(monkeypatch):
    """On a GPU alone: a CPU has no kernels to choose from."""
    program = program_of(lambda *tensors: sorted_layer(*tensors), *inputs())
    (entry,) = PassManager([MoeGemm()]).run(program).passes
    assert entry.note == ""
    (node,) = (n for n in program.graph.nodes if n.target is torch.ops.effpass.moe_ffn.default)
    node.args[0].meta["val"] = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr("effpass.passes.graph.moe_gemm.serving", lambda device, dtype: f"{device}, {dtype}")
    entry.note = MoeGemm().note(program)
    assert Report("backend", [entry]).lines()[1:] == ["moe_gemm: cuda, torch.bfloat16"]


# -- one layer, as programs of a few lines ----------------------------------------------------------------------------

T, K, E, D, INNER = 6, 2, 4, 16, 24


def sorted_layer(x, ids, weights, gate_up, down, gate=None, masked=False, finish=None):
    """Products of sorted rows; `masked` also for ids of experts that are not here, in place and out of place."""
    flat_ids, order = torch.sort(ids.reshape(-1))
    rows = x[order // K]
    counts = torch.histc(flat_ids.float(), bins=E, min=0, max=E - 1)
    ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
    if masked:
        absent = (flat_ids >= E).unsqueeze(-1)
        flat_ids.clamp_(max=E - 1)
        rows.masked_fill_(absent, 0.0)
    projected = torch.ops.transformers.grouped_mm_fallback(rows, gate_up.transpose(-2, -1), ends)
    if masked:
        projected = projected.masked_fill(absent, 0.0)
    first, second = projected.chunk(2, dim=-1)
    hidden = F.silu(first) * second if gate is None else gate(first, second)
    out = torch.ops.transformers.grouped_mm_fallback(hidden, down.transpose(-2, -1), ends)
    if masked:
        out = out.masked_fill(absent, 0.0)
    out = out * weights.reshape(-1)[order].unsqueeze(-1)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.shape[0])
    out = out[places].view(T, K, D) if finish is None else finish(out, places)
    return out.sum(dim=1)


def inputs():
    x, ids, weights, gate_up, _, down, _ = layer(T, K, E, D, INNER)
    return [x, ids, weights, gate_up, down]


def rewritten(fn, *tensors):
    import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)

    with torch.no_grad():
        program = program_of(fn, *tensors)
        (entry,) = PassManager([MoeGemm()]).run(program).passes
        return program, entry


def test_masks_of_experts_that_are_not_here():
    x, ids, weights, gate_up, down = inputs()
    ids[1], ids[3, 0] = E, E + 2
    program, entry = rewritten(lambda *t: sorted_layer(*t, masked=True), x, ids, weights, gate_up, down)
    assert (entry.hits, entry.refusals) == (1, [])
    assert not [n for n in program.graph.nodes if "masked_fill" in str(n.target) or "clamp" in str(n.target)]
    expected = sorted_layer(x, ids, weights, gate_up, down, masked=True)
    torch.testing.assert_close(program.gm(x, ids, weights, gate_up, down), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("gate", "numbers"),
    [
        (lambda g, u: u * F.gelu(g, approximate="tanh"), ("gelu_tanh", 1.0, 0.0, 0.0, False)),
        (lambda g, u: F.relu(g) * u, ("relu", 1.0, 0.0, 0.0, False)),
        (lambda g, u: g * torch.sigmoid(g) * u, ("silu", 1.0, 0.0, 0.0, False)),
        (lambda g, u: (u.clamp(-2.0, 2.0) + 1) * F.silu(g.clamp(max=2.0)), ("silu", 1.0, 2.0, 1, False)),
    ],
)
def test_gates(gate, numbers):
    program, entry = rewritten(lambda *t: sorted_layer(*t, gate=gate), *inputs())
    assert entry.hits == 1
    (node,) = [n for n in program.graph.nodes if n.target is torch.ops.effpass.moe_ffn.default]
    assert node.args[7:12] == numbers
    expected = sorted_layer(*inputs(), gate=gate)
    torch.testing.assert_close(program.gm(*inputs()), expected, rtol=1e-5, atol=1e-5)


def read_elsewhere(*tensors):
    kept = []

    def gate(g, u):
        kept.append(F.silu(g) * u)
        return kept[0]

    return sorted_layer(*tensors, gate=gate), kept[0]


def not_undone(*tensors):
    return sorted_layer(*tensors, finish=lambda out, places: out[places.flip(0)].view(T, K, D))


def other_k(*tensors):
    return sorted_layer(*tensors, finish=lambda out, places: out[places].view(K, T, D).transpose(0, 1))


GATE = "what it multiplies is no gate of two halves of one product"


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda *t: sorted_layer(*t, gate=lambda g, u: g + u), GATE),
        (lambda *t: sorted_layer(*t, gate=lambda g, u: F.silu(u) * g), GATE),
        (lambda *t: sorted_layer(*t, gate=lambda g, u: F.silu(g.clamp(max=2.0)) * u.clamp(-3.0, 3.0)), GATE),
        (read_elsewhere, "its value is also read by output"),
        (not_undone, "does not put rows back into their order"),
        (other_k, f"does not put the {K} outputs of a token beside each other"),
    ],
)
def test_it_stays_away(fn, reason):
    program, entry = rewritten(fn, *inputs())
    assert entry.hits == 0
    assert [reason in refusal.reason for refusal in entry.refusals] == [True]
    assert not [n for n in program.graph.nodes if n.target is torch.ops.effpass.moe_ffn.default]


def test_a_single_grouped_product_is_no_layer():
    def one(x, ends, weight):
        return torch.ops.transformers.grouped_mm_fallback(x, weight.transpose(-2, -1), ends)

    _, entry = rewritten(one, torch.randn(6, D), torch.tensor([2, 6], dtype=torch.int32), torch.randn(2, 8, D))
    assert (entry.hits, [r.reason for r in entry.refusals]) == (0, [GATE])


# -- the loop, unrolled -----------------------------------------------------------------------------------------------


class Expert(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = (torch.nn.Linear(D, INNER, bias=False) for _ in range(2))
        self.w2 = torch.nn.Linear(INNER, D, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Loop(torch.nn.Module):
    """A layer that asks every expert in turn, of stacked weights or of experts with weights of their own."""

    def __init__(self, separate, skip=()):
        super().__init__()
        self.skip = skip
        self.experts = torch.nn.ModuleList([Expert() for _ in range(E)]) if separate else None
        if not separate:
            self.gate_up = torch.nn.Parameter(torch.randn(E, 2 * INNER, D) * 0.3)
            self.down = torch.nn.Parameter(torch.randn(E, D, INNER) * 0.3)

    def forward(self, x, ids, weights):
        out = torch.zeros_like(x)
        mask = F.one_hot(ids, num_classes=E).permute(2, 1, 0)
        for e in range(E):
            if e in self.skip:
                continue
            place, token = torch.where(mask[e])
            rows = x[None, token].reshape(-1, D)
            if self.experts is not None:
                y = self.experts[e](rows)
            else:
                gate, up = F.linear(rows, self.gate_up[e]).chunk(2, dim=-1)
                y = F.linear(F.silu(gate) * up, self.down[e])
            out.index_add_(0, token, (y * weights[token, place, None]).to(x.dtype))
        return out


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_loop_over_stacked_experts(inner):
    model, (x, ids, weights, *_) = Loop(separate=False), inputs()
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        expected = model(x, ids, weights)
        actual = compiled(model, None, inner=inner, fullgraph=True)(x, ids, weights)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    (entry,) = reports[0].passes
    assert (entry.hits, entry.ops["effpass.moe_ffn.default"], entry.ops["aten.where.default"]) == (1, 1, -E)
    assert entry.ops["aten.linear.default"] == -2 * E


def test_a_loop_over_experts_with_weights_of_their_own():
    """An exported program holds the stacked weights alone; beside a live model they would be a second copy."""
    model, (x, ids, weights, *_) = Loop(separate=True), inputs()
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        expected = model(x, ids, weights)
        torch.testing.assert_close(compiled(model, None, fullgraph=True)(x, ids, weights), expected)
        program = program_from_exported(torch.export.export(model, (x, ids, weights)))
    (entry,) = reports[0].passes
    assert entry.hits == 0
    (refusal,) = entry.refusals
    assert refusal.reason == "its experts have weights of their own, of which a stacked copy would be held"
    (entry,) = PassManager([MoeGemm()]).run(program).passes
    assert entry.hits == 1
    exported = to_exported(program)
    torch.testing.assert_close(exported.module()(x, ids, weights), expected, rtol=1e-5, atol=1e-5)
    assert sum(t.numel() for t in exported.state_dict.values()) == sum(p.numel() for p in model.parameters())


def test_a_loop_that_leaves_an_expert_out():
    model, (x, ids, weights, *_) = Loop(separate=False, skip=(1,)), inputs()
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch.testing.assert_close(compiled(model, None)(x, ids, weights), model(x, ids, weights))
    (refusal,) = reports[0].passes[0].refusals
    assert refusal.reason == "its loop goes over experts [0, 2, 3]"


def test_prompts_of_any_length_share_the_graphs_of_a_prepared_model(monkeypatch):
    """The engine reads a prompt through the compiled model: a graph of the first length, one of a step, one of all."""
    monkeypatch.setattr("effpass.backend.inner_backend", lambda options, mode: lambda gm, inputs: gm)
    torch._dynamo.reset()
    counters.clear()
    model = effpass.prepare(make("qwen3_moe"), {"version": 1, "passes": ["moe_gemm"]})
    assert model.effpass_report.lines() == ["moe_gemm: acts on the model's graphs, when it is called"]
    for length in (10, 17, 33, 6, 50):
        model.generate(torch.randint(5, 60, (1, length)), max_new_tokens=2, do_sample=False)
    assert counters["stats"]["unique_graphs"] == 3
    assert not counters["graph_break"]
