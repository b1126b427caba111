"""Random programs keep their meaning under every exact pass, alone and together, for sizes fixed and dynamic."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from random_programs import BATCHED, function, inputs, steps
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from effpass.core import registry
from effpass.core.manager import PassManager
from effpass.core.program import Program
from effpass.lowering.ops import cached_attention, fused_linear, moe_router, rotary_table
from effpass.lowering.ops.moe_ffn import TOLERANCE

GRAPH_PASSES = sorted(
    (name for name, place in registry.BUILTIN.items() if ".graph." in place and registry.load(name).exact),
    key=lambda name: (bool(registry.load(name).follows), name),
)
# In CI the same programs every time; the slow tests draw new ones.
FUZZ = settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
LONG = settings(FUZZ, max_examples=300, derandomize=False)


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """As on a GPU: the operators' plain bodies compute."""
    import transformers.integrations.moe  # noqa: F401  (registers grouped_mm_fallback)

    for operators in (cached_attention, fused_linear, moe_router, rotary_table):
        monkeypatch.setattr(operators, "has_kernel", lambda device, dtype, rows: True)


def traced(fn, given_: dict[str, torch.Tensor], dynamic: bool) -> Program:
    """The batch is dynamic, or nothing is; other sizes are numbers, as a model's are."""
    names, tensors = list(given_), [t.clone() for t in given_.values()]
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = []
    for name, tensor in zip(names, tensors, strict=True):
        sizes = [DimDynamic.STATIC] * tensor.dim()
        if dynamic and name in BATCHED:
            sizes[0] = DimDynamic.DYNAMIC
        context = StatelessSymbolicContext(dynamic_sizes=sizes)
        fakes.append(mode.from_tensor(tensor, source=ConstantSource(name), symbolic_context=context))
    with torch.no_grad():
        gm = make_fx(fn, tracing_mode="symbolic", pre_dispatch=True)(*fakes)
    for node, name in zip(gm.graph.find_nodes(op="placeholder"), names, strict=True):
        node._rename(name)
    return Program(gm, "dynamo", {}, tensors)


def check(drawn, names: list[str], dynamic: bool) -> Counter[str]:
    """Compare the program with what the passes make of it, outputs and everything written; returns the hits."""
    sizes = (5, 2) if dynamic else (2,)
    given_ = [inputs(drawn, batch) for batch in sizes]
    keys = list(given_[0])
    fn = function(drawn, keys)
    with torch.no_grad():
        expected = [(fn(*(copy := [t.clone() for t in g.values()])), copy) for g in given_]
    assume(all(t.isfinite().all() and t.abs().max() < 1e3 for outputs, _ in expected for t in outputs))
    program = traced(fn, given_[0], dynamic)
    guards = len(program.fake_mode().shape_env.guards)
    report = PassManager([registry.load(name)() for name in names]).run(program)
    assert len(program.fake_mode().shape_env.guards) == guards, "a pass decided by a size"
    for g, (outputs, written) in zip(given_, expected, strict=True):
        actual = [t.clone() for t in g.values()]
        with torch.no_grad():
            ours = program.gm(*actual)
        for one, other in zip((*ours, *actual), (*outputs, *written), strict=True):
            scale = other.abs().max().clamp(min=1).item() if other.is_floating_point() else 1
            # Each step sums in another order, and the next one carries it on.
            torch.testing.assert_close(one, other, rtol=0, atol=10 * TOLERANCE[torch.float32] * scale)
    return Counter({entry.name: entry.hits for entry in report.passes})


def all_of(names: list[str], dynamic: bool, how: settings = FUZZ) -> Counter[str]:
    total: Counter[str] = Counter()

    @how
    @given(steps())
    def run(drawn):
        total.update(check(drawn, names, dynamic))

    run()
    return total


def test_all_passes_together():
    hits = all_of(GRAPH_PASSES, dynamic=False)
    assert {name for name, count in hits.items() if count} == set(GRAPH_PASSES)


def test_all_passes_together_with_a_dynamic_batch():
    """Kernels for few rows stay away where the batch makes the rows; it makes none of the table of angles.

    That of routers is for any number.
    """
    hits = all_of(GRAPH_PASSES, dynamic=True)
    assert {name for name, count in hits.items() if count} == {"fuse_rotary_table", "fuse_routing", "moe_gemm"}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("names", [*([name] for name in GRAPH_PASSES), GRAPH_PASSES], ids="+".join)
def test_many_programs(names, dynamic):
    all_of(names, dynamic, LONG)
