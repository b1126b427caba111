"""The inner backend that compiles runs of small operators: which ones, how often, and equal results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decode_step import decode, enliven
from families import make
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import effpass.lowering.ops.cached_attention
import effpass.lowering.ops.fused_linear
import effpass.lowering.ops.rotary_table
from effpass.backend import DECODE_PASSES, DecodeBackend
from effpass.lowering import regions


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """Five launches: x², its mean, the root, and two products."""
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def graph(run: Any, *given: Tensor, mode: str = "fake") -> GraphModule:
    return make_fx(run, tracing_mode=mode, pre_dispatch=True)(*given)


def calls(gm: GraphModule) -> list[str]:
    """Names of the compiled modules and of the operators left, without the reading of a module's results."""
    return [str(n.target) for n in gm.graph.nodes if n.op.startswith("call") and "getitem" not in str(n.target)]


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Regions run as graphs, without Inductor; returns the operators of those that would be compiled."""
    found: list[list[str]] = []

    def compile_fx(gm: GraphModule, fakes: list[Tensor]) -> Any:
        found.append([str(node.target) for node in gm.graph.nodes if node.op == "call_function"])
        with torch.no_grad():
            gm(*fakes)  # the metadata suits the operators
        return gm

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    return found


def test_equal_regions_are_compiled_once(interpreted: list[list[str]]) -> None:
    def run(x: Tensor, *weights: Tensor) -> Tensor:
        for at in range(0, 6, 2):
            x = x + torch.nn.functional.linear(norm(x, weights[at]), weights[at + 1])
        return x

    given = [torch.randn(3, 8), *(torch.randn(*sizes) for _ in range(3) for sizes in ((8,), (8, 8)))]
    gm = graph(run, *given)
    compiled = regions.compile_regions(gm, given)
    # The first norm, two of a sum and a norm, and a last sum that is not worth it.
    assert [len(region) for region in interpreted] == [6, 7]
    product = "aten.linear.default"
    assert calls(gm) == ["region_0", product, "region_1", product, "region_2", product, "aten.add.Tensor"]
    torch.testing.assert_close(compiled(*given), run(*given), rtol=0, atol=0)
    other = [torch.randn_like(x) for x in given]
    torch.testing.assert_close(compiled(*other), run(*other), rtol=0, atol=0)


def test_regions_of_other_layouts_or_constants_are_not_equal(interpreted: list[list[str]]) -> None:
    def run(x: Tensor, weight: Tensor, half: Tensor) -> tuple[Tensor, ...]:
        a = norm(x, weight) @ x.T
        b = norm(x[:, ::2], half) @ x[:, ::2].T
        c = (norm(x, weight) * 2) @ x.T
        d = (norm(x, weight) * 3) @ x.T
        return a, b, c, d

    given = [torch.randn(3, 8), torch.randn(8), torch.randn(4)]
    compiled = regions.compile_regions(graph(run, *given), given)
    assert len(interpreted) == 4
    torch.testing.assert_close(compiled(*given), run(*given), rtol=0, atol=0)


def test_a_write_to_memory_from_outside_stays_where_it_is(interpreted: list[list[str]]) -> None:
    """Reads before it see the old values, and reads after it the new ones."""

    def run(x: Tensor, weight: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        before = norm(x, weight) + cache
        cache.view(-1)[:8].add_(before.sum())
        return before, norm(cache, weight)

    given = [torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)]
    gm = graph(run, *given)
    compiled = regions.compile_regions(gm, given)
    assert calls(gm) == ["region_0", "aten.add_.Tensor", "region_1"]
    assert not any("add_." in name for region in interpreted for name in region)
    ours, plain = ([x.clone() for x in given] for _ in range(2))
    torch.testing.assert_close(compiled(*ours), run(*plain), rtol=0, atol=0)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_a_write_to_own_memory_is_compiled(interpreted: list[list[str]]) -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        y = norm(x, weight)
        y.view(-1)[:8].mul_(2)
        chosen = torch.zeros_like(y).scatter_(1, y.argmax(1, keepdim=True), 1.0)
        return y.clamp_(min=-1) + chosen

    given = [torch.randn(3, 8), torch.randn(8)]
    gm = graph(run, *given)
    compiled = regions.compile_regions(gm, given)
    assert calls(gm) == ["region_0"]
    torch.testing.assert_close(compiled(*given), run(*given), rtol=0, atol=0)


def test_small_regions_are_joined(interpreted: list[list[str]]) -> None:
    """Past a product that reads the first one, an operator of our own, and views of their results."""

    def run(x: Tensor, weight: Tensor, other: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        a = (x + 1) * 2
        product = a @ x.T
        view = product.view(-1)
        low, high = torch.ops.effpass.rotary_table(positions, a.view(-1), 1.0, torch.float32)
        b = torch.zeros_like(other)
        b.copy_(other * weight)
        return product, view, low, high, b, b.view(-1)[3:]

    given = [torch.randn(3, 8), torch.randn(8), torch.randn(3, 8), torch.ones(1, 2).int()]
    gm = graph(run, *given)
    compiled = regions.compile_regions(gm, given)
    products = ["region_0", "aten.matmul.default", "effpass.rotary_table.default"]
    assert [name for name in calls(gm) if name not in ("aten.view.default", "aten.unsqueeze.default")] == products
    assert len(interpreted) == 1
    torch.testing.assert_close(compiled(*given), run(*given), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("between", "joins"),
    [
        pytest.param(lambda a, x, other: other, True, id="nothing is read"),
        pytest.param(lambda a, x, other: (a @ x.T) @ other, False, id="a product is read"),
        pytest.param(lambda a, x, other: other.add_(a), False, id="memory is written"),
    ],
)
def test_what_regions_are_joined_past(between: Any, joins: bool, interpreted: list[list[str]]) -> None:
    def run(x: Tensor, weight: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        a = (x + 1) * 2
        product, read = a @ x.T, between(a, x, other)
        return product, (read - 1) * weight

    given = [torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)]
    compiled = regions.compile_regions(graph(run, *given), given)
    assert len(interpreted) == joins
    ours, plain = ([x.clone() for x in given] for _ in range(2))
    torch.testing.assert_close(compiled(*ours), run(*plain), rtol=0, atol=0)
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(lambda x, w: x + x * 2 - 1, id="few launches"),
        pytest.param(lambda x, w: (x.t()[1:].unsqueeze(0), x.view(-1), w.expand(3, 8), x[:2], x[0], w[1:]), id="views"),
        pytest.param(lambda x, w: x.to(torch.float32).contiguous().to(x.device).reshape(3, 8), id="nothing to cast"),
        pytest.param(lambda x, w: torch.rand_like(x) + torch.randn_like(x) + torch.rand_like(w) + x + w, id="random"),
    ],
)  # fmt: skip
def test_nothing_to_compile(run: Any, interpreted: list[list[str]]) -> None:
    given = [torch.randn(3, 8), torch.randn(8)]
    gm = graph(run, *given)
    before = calls(gm)
    regions.compile_regions(gm, given)
    assert not interpreted
    assert calls(gm) == before


def test_sizes_that_vary_are_left_alone(interpreted: list[list[str]]) -> None:
    given = [torch.randn(3, 8), torch.randn(8)]
    gm = graph(norm, *given, mode="symbolic")
    compiled = regions.compile_regions(gm, given)
    assert not interpreted
    longer = [torch.randn(5, 8), given[1]]
    torch.testing.assert_close(compiled(*longer), norm(*longer), rtol=0, atol=0)


def test_a_graph_without_fake_values_is_left_alone(interpreted: list[list[str]]) -> None:
    """Dynamo's own graph, which a decode step is where no pass could act."""
    given = [torch.randn(3, 8), torch.randn(8)]
    compiled = torch.compile(norm, backend="effpass_regions")
    torch.testing.assert_close(compiled(*given), norm(*given), rtol=0, atol=0)
    assert not interpreted


def test_outputs_that_are_views(interpreted: list[list[str]]) -> None:
    """A region may return views of its inputs and of its results, and several of them."""

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y = norm(x, weight)
        return x.view(-1), y, y.T, y[1:]

    given = [torch.randn(3, 8), torch.randn(8)]
    results = regions.compile_regions(graph(run, *given), given)(*given)
    torch.testing.assert_close(results, run(*given), rtol=0, atol=0)
    assert len(interpreted) == 1


def test_an_input_at_an_odd_address() -> None:
    """Code is compiled for aligned inputs, and run on a slice that is not."""

    def run(x: Tensor, y: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return norm(x, weight) @ weight, norm(y, weight) @ weight

    base = torch.randn(3 * 8 + 1)
    given = [base[:24].view(3, 8), base[1:].view(3, 8), torch.randn(8)]
    gm = graph(run, *given)
    compiled = regions.compile_regions(gm, given)
    assert gm.region_0 is gm.region_1
    torch.testing.assert_close(compiled(*given), run(*given))


# Launches that are left in the regions of a decode step of two layers, beside products, attention and the experts:
# DeepSeek's latents and rotation in both layers, one norm and a router; Qwen's norms in front of its routers.
@pytest.mark.parametrize(("family", "total", "distinct"), [("llama", 0, 0), ("qwen3_moe", 2, 1), ("deepseek_v3", 4, 3)])
def test_a_decode_step(family: str, total: int, distinct: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cached_attention", "fused_linear", "rotary_table"):
        operators = getattr(effpass.lowering.ops, module)
        monkeypatch.setattr(operators, "has_kernel", lambda device, dtype, rows: True)
    counts, compile_region, replace = [0, 0], regions._compile, regions._replace
    assert DecodeBackend().inner == "effpass_regions"

    def counted(*args: Any) -> Any:
        counts[1] += 1
        return compile_region(*args)

    def replaced(*args: Any) -> None:
        counts[0] += 1
        replace(*args)

    monkeypatch.setattr(regions, "_compile", counted)
    monkeypatch.setattr(regions, "_replace", replaced)
    model = enliven(make(family))
    expected = decode(model, model, 2)
    options = {"passes": list(DECODE_PASSES), "inner": "effpass_regions"}
    run = torch.compile(model, backend="effpass", dynamic=False, fullgraph=True, options=options)
    # Inductor's sums are in another order.
    torch.testing.assert_close(decode(model, run, 2), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()
    assert counts == [total, distinct]
