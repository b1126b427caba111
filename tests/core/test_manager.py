"""The pass manager: counting, refusing, requiring, verifying, dumping; on programs from `torch.export`."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed, TensorifyScalarRestartAnalysis

from effpass.backend import reports
from effpass.core.errors import PassRefusedError, RewriteError
from effpass.core.exported import program_from_exported
from effpass.core.manager import PassManager, Planned
from effpass.core.outputs import output_difference
from effpass.core.pass_ import GraphPass, Match
from effpass.core.program import Program
from effpass.core.report import Refusal

aten = torch.ops.aten


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.up = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(torch.relu(self.up(torch.relu(self.q_proj(x)))))


def program(module: nn.Module | None = None) -> Program:
    exported = torch.export.export((module or Net()).eval(), (torch.randn(2, 4),))
    made = program_from_exported(exported)
    made.inputs = [torch.randn(2, 4) if isinstance(x, torch._subclasses.FakeTensor) else x for x in made.inputs]
    return made


class Relu(GraphPass):
    """Replaces the relus after chosen linears by `op`."""

    name = "relu"
    exact = True
    refuse = ("none",)
    op = aten.relu6.default

    def find(self, program):
        for node in program.graph.find_nodes(op="call_function", target=aten.relu.default):
            linear = node.args[0].args[1].name
            if any(part in linear for part in self.refuse):
                yield Refusal(linear, "refused by find", "choose another")
            else:
                yield Match(node, {"linear": linear})

    def check(self, program, match):
        return Refusal(match.nodes["linear"], "refused by check") if "check" in self.refuse else None

    def rewrite(self, program, match):
        node = match.anchor
        with program.graph.inserting_before(node):
            new = program.graph.call_function(self.op, node.args)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        program.graph.erase_node(node)


def variant(**attributes: object) -> GraphPass:
    return type("Variant", (Relu,), attributes)()


# -- counting -------------------------------------------------------------------------------------------------------


def test_hits_and_operators_are_counted():
    made = program()
    report = PassManager([Relu()]).run(made)
    (entry,) = report.passes
    assert (entry.name, entry.hits, entry.refusals, entry.max_difference) == ("relu", 2, [], None)
    assert entry.ops == {"aten.relu6.default": 2, "aten.relu.default": -2}
    assert (entry.flops, entry.weight_bytes) == (0, 0)
    assert 0 < entry.seconds < 5
    assert report.entrance == "program"
    assert "aten.relu.default" not in made.op_counts()


def test_refusals_carry_node_reason_and_hint():
    report = PassManager([variant(refuse=("q_proj",))]).run(program())
    (entry,) = report.passes
    assert entry.hits == 1
    assert [str(r) for r in entry.refusals] == ["p_q_proj_weight: refused by find → choose another"]


def test_a_match_can_be_refused_by_check():
    made = program()
    report = PassManager([variant(refuse=("check",))]).run(made)
    assert report.hits == 0
    assert [r.reason for r in report.passes[0].refusals] == ["refused by check"] * 2
    assert report.lines() == ["relu: nothing rewritten; 2 x refused by check (first: p_q_proj_weight)"]
    assert made.op_counts()["aten.relu.default"] == 2


def test_passes_run_in_order_and_see_each_other():
    report = PassManager([Relu(), Relu()]).run(program())
    assert [p.hits for p in report.passes] == [2, 0]


def test_required_and_nothing_rewritten():
    planned = Planned(variant(refuse=("proj", "up")), require=True)
    with pytest.raises(PassRefusedError, match=r"relu is required .* nothing: .*2 x refused by find") as caught:
        PassManager([planned]).run(program())
    assert caught.value.hint == "set require: false to go on without it"
    assert PassManager([Planned(Relu(), require=True)]).run(program()).hits == 2


# -- entrances ------------------------------------------------------------------------------------------------------


def test_a_runtime_pass_on_a_program(toy_passes):
    with pytest.raises(PassRefusedError, match="needs_cache can't act on a program; it acts on: model"):
        PassManager([toy_passes.NeedsCache()]).run(program())


def test_a_runtime_pass_in_the_backend(toy_passes):
    """Refused, and nothing is rewritten by the passes before it."""
    run = torch.compile(Net(), backend="effpass", options={"passes": ["touch", "needs_cache"], "inner": "aot_eager"})
    reports.clear()
    with pytest.raises(
        BackendCompilerFailed, match=r"needs_cache needs effpass\.prepare\(model, recipe\) before torch\.compile"
    ):
        run(torch.randn(2, 4))
    assert not reports


def test_a_graph_pass_on_a_model():
    with pytest.raises(PassRefusedError, match="relu can't act on a model; it acts on: program, backend"):
        PassManager([Relu()]).prepare(Net())


def test_all_models_are_checked_before_the_first_is_changed(toy_passes):
    class Picky(toy_passes.NeedsCache):
        def check_model(self, model):
            raise PassRefusedError("not this one")

    net = Net()
    net.config = type("Config", (), {})()
    with pytest.raises(PassRefusedError, match="not this one"):
        PassManager([toy_passes.NeedsCache(), Picky()]).prepare(net)
    assert not hasattr(net.config, "touched")
    assert PassManager([toy_passes.NeedsCache()]).prepare(net).hits == 1
    assert net.config.touched


# -- failures -------------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> GraphPass:
    def rewrite(self, program, match):
        raise error

    return variant(rewrite=rewrite)


def test_a_failure_names_the_pass():
    with pytest.raises(RewriteError, match="pass relu failed: ZeroDivisionError: by zero") as caught:
        PassManager([failing(ZeroDivisionError("by zero"))]).run(program())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "TORCH_LOGS" in caught.value.hint


@pytest.mark.parametrize("error", [PassRefusedError("so it is"), TensorifyScalarRestartAnalysis(restart_reason="r")])
def test_some_failures_pass_through(error):
    with pytest.raises(type(error)) as caught:
        PassManager([failing(error)]).run(program())
    assert caught.value is error


def test_a_result_that_is_not_valid_names_the_pass():
    def rewrite(self, program, match):
        with program.graph.inserting_before(match.anchor):
            new = program.graph.call_function(aten.relu6.default, match.anchor.args)
        match.anchor.replace_all_uses_with(new)

    with pytest.raises(RewriteError, match=r"pass relu: new node %relu6.* has no value"):
        PassManager([variant(rewrite=rewrite)]).run(program())

    def cycle(self, program, match):
        match.anchor.append(match.anchor.args[0])

    with pytest.raises(RewriteError, match="pass relu left a malformed graph"):
        PassManager([variant(rewrite=cycle)]).run(program())


# -- comparing numbers ----------------------------------------------------------------------------------------------


def test_verify_measures_the_difference():
    made = program()
    made.inputs[-1] = torch.full((2, 4), 30.0)  # so that relu6 cuts off
    for weight in made.weights.values():
        nn.init.eye_(weight.tensor) if weight.tensor.dim() == 2 else nn.init.zeros_(weight.tensor)
    (entry,) = PassManager([Planned(variant(exact=False), verify=True)]).run(made).passes
    assert entry.max_difference == 24.0
    assert entry.line().endswith("outputs differ by at most 24")
    (entry,) = PassManager([Planned(variant(op=aten.relu.default), verify=True)]).run(program()).passes
    assert entry.max_difference == 0.0


def test_a_pass_that_says_it_is_exact_and_is_not():
    made = program()
    made.inputs[-1] = torch.full((2, 4), 30.0)
    for weight in made.weights.values():
        nn.init.eye_(weight.tensor) if weight.tensor.dim() == 2 else nn.init.zeros_(weight.tensor)
    with pytest.raises(RewriteError, match="pass relu says that it is exact, and an output differs by 24"):
        PassManager([Planned(Relu(), verify=True)]).run(made)


def test_verify_looks_at_whole_numbers_too():
    class Count(nn.Module):
        def forward(self, x):
            return (torch.relu(x) > 0).sum(), torch.relu(x).argmax() > 1

    class Wrong(Relu):
        def rewrite(self, program, match):
            match.anchor.target = aten.neg.default

    for exact in (False, True):
        made = program_from_exported(torch.export.export(Count(), (torch.randn(4),)))
        made.inputs = [torch.tensor([-1.0, 2.0, 3.0, 4.0])]
        pass_ = type("Counted", (Wrong,), {"exact": exact, "find": _relus})()
        if exact:
            with pytest.raises(RewriteError, match="says that it is exact, and an output differs by 2"):
                PassManager([Planned(pass_, verify=True)]).run(made)
        else:
            (entry,) = PassManager([Planned(pass_, verify=True)]).run(made).passes
            assert (entry.hits, entry.max_difference) == (2, 2.0)


def _relus(self, program):
    yield from (Match(n, {}) for n in program.graph.find_nodes(op="call_function", target=aten.relu.default))


def test_verify_draws_the_same_dropout():
    net = Net()
    exported = torch.export.export(net.train(), (torch.randn(2, 4),))
    made = program_from_exported(exported)
    made.inputs[-1] = torch.randn(2, 4)
    state = torch.random.get_rng_state()
    (entry,) = PassManager([Planned(variant(op=aten.relu.default), verify=True)]).run(made).passes
    assert entry.hits == 2
    assert entry.max_difference == 0.0
    assert torch.equal(torch.random.get_rng_state(), state), "the user's random numbers are not used up"


def test_verify_leaves_the_inputs_alone():
    class Cached(nn.Module):
        def forward(self, cache, x):
            cache.add_(x)
            return torch.relu(cache * 2)

    class Positive(Relu):
        def find(self, program):
            yield from (Match(n, {}) for n in program.graph.find_nodes(op="call_function", target=aten.relu.default))

    exported = torch.export.export(Cached(), (torch.zeros(2), torch.ones(2)))
    made = program_from_exported(exported)
    made.inputs = [torch.zeros(2), torch.ones(2)]
    (entry,) = PassManager([Planned(Positive(), verify=True)]).run(made).passes
    assert (entry.hits, entry.max_difference) == (1, 0.0)
    assert torch.equal(made.inputs[0], torch.zeros(2))


def test_verify_needs_real_inputs():
    made = program()
    made.inputs[-1] = made.graph.find_nodes(op="placeholder")[-1].meta["val"]
    with pytest.raises(PassRefusedError, match="verify: true needs real inputs"):
        PassManager([Planned(Relu(), verify=True)]).run(made)


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.5),
        ([math.inf, math.nan, 1.0], [math.inf, math.nan, 1.25], 0.25),
        ([math.nan, 1.0], [0.0, 1.0], math.inf),
        ([1.0, 1.0], [1.0, math.nan], math.inf),
        ([math.inf], [-math.inf], math.inf),
        ([], [], 0.0),
    ],
)
def test_difference(before, after, difference):
    assert output_difference(torch.tensor(before), torch.tensor(after)) == difference


# -- under torch.compile --------------------------------------------------------------------------------------------


def test_a_restarted_compilation_counts_once(toy_passes, monkeypatch):
    """dynamic=True with Inductor calls the backend twice per compilation; the first call ends in Dynamo's restart."""
    import torch._inductor.compile_fx as inductor
    from functorch.compile import make_boxed_func

    import effpass.backend as backend

    calls, original, entry = [], inductor.compile_fx, backend.program_from_dynamo
    monkeypatch.setattr(
        inductor,
        "compile_fx",
        lambda gm, inputs, **k: original(gm, inputs, inner_compile=lambda g, i, **_: make_boxed_func(g.forward), **k),
    )
    monkeypatch.setattr(backend, "program_from_dynamo", lambda *a: calls.append(1) or entry(*a))

    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.factor = 0.3

        def forward(self, x):
            return super().forward(x) * self.factor

    net = Scaled().eval()
    run = torch.compile(net, backend="effpass", dynamic=True, options={"passes": ["touch", "scale"]})
    reports.clear()
    with torch.no_grad():
        x = torch.randn(3, 4)
        got = run(x)
        net.q_proj.weight.mul_(2)
        torch.testing.assert_close(got, net(x))
    assert len(calls) == 2, "the restart that this test is about"
    assert [r.hits for r in reports] == [2]


LOGGED = """
import sys
sys.path[:0] = {path!r}
import torch, toy_passes
toy_passes.register()
net = torch.nn.Sequential()
net.q_proj = torch.nn.Linear(4, 4)
options = {{"passes": ["scale"], "inner": "eager"}}
with torch.no_grad():
    torch.compile(net, backend="effpass", options=options)(torch.randn(2, 4))
"""


def test_dumps_go_where_torch_tools_look(tmp_path: Path, toy_passes):
    """TORCH_LOGS="+effpass" prints the graph before and after each pass; TORCH_TRACE has the same for tlparse."""
    code = textwrap.dedent(LOGGED).format(path=[p for p in sys.path if p])
    environment = {"TORCH_LOGS": "+effpass", "TORCH_TRACE": str(tmp_path), "PATH": "", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("before the pass scale")[1].split("after the pass scale")
    assert "torch.ops.aten.linear.default" in before
    assert "derived_scale" not in before
    assert "derived_scale_2_0_q_proj_weight" in after
    assert "scale: 1 rewritten" in done.stderr
    (trace,) = tmp_path.glob("dedicated_log_torch_trace_*")
    text = trace.read_text()
    for when in ("before", "after"):
        assert f'"name": "effpass_scale_{when}"' in text
    assert "derived_scale_2_0_q_proj_weight" in text


@pytest.mark.parametrize(
    ("hook", "missing"),
    [
        ("pattern", "Unfinished has neither find nor pattern"),
        ("example_inputs", "Unfinished has a pattern, and no example_inputs to trace it with"),
        ("replacement", "Unfinished has neither rewrite nor replacement"),
    ],
)
def test_an_unfinished_pass_says_what_it_lacks(hook, missing):
    from effpass.core.pass_ import GraphPass

    pass_ = type("Unfinished", (GraphPass,), {"name": "unfinished", "exact": True})()
    with pytest.raises(TypeError, match=missing):
        getattr(pass_, hook)()
