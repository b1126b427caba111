"""Derived weights from artifact tensors, which can be swapped at run time."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from derived_net import Net, compiled, derived_tensors
from torch import nn

from effpass.backend import reports
from effpass.core import registry
from effpass.core.errors import ArtifactError
from effpass.core.live_weights import Slot, slots_of
from effpass.core.pass_ import Match, WeightsPass

pytestmark = pytest.mark.usefixtures("no_derived_weights")


# -- artifact tensors -----------------------------------------------------------------------------------------------


class LowRank(WeightsPass):
    """``W + B A``, its tensors in a slot."""

    name = "low_rank"
    exact = False
    a: torch.Tensor
    b: torch.Tensor

    def find(self, program):
        yield from (Match(x.node, {"linear": x}) for x in program.linears() if "q_proj" in x.name)

    def rewrite(self, program, match):
        linear = match.nodes["linear"]
        slot = Slot.shared("low_rank", lambda: {"a": self.a, "b": self.b})
        linear.replace_weight(program.derive("low_rank", [linear.weight], lambda w, a, b: w + b @ a, slot=slot))


@pytest.fixture
def low_rank(toy_passes, monkeypatch):
    module = types.ModuleType("low_rank_pass")
    module.LowRank = LowRank
    monkeypatch.setitem(sys.modules, "low_rank_pass", module)
    monkeypatch.setitem(registry.BUILTIN, "low_rank", "low_rank_pass:LowRank")
    return LowRank


def low_rank_reference(net: Net, x: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    merged = net.q_proj.weight + tensors["b"] @ tensors["a"]
    return net.up(torch.relu(nn.functional.linear(x, merged, net.q_proj.bias)))


def adapter(rank: int, size: int = 8) -> dict[str, torch.Tensor]:
    return {"a": torch.randn(rank, size), "b": torch.randn(size, rank)}


def test_swap_to_another_rank_without_recompiling(low_rank):
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    first = adapter(2)
    low_rank.a, low_rank.b = first["a"], first["b"]
    run = compiled(net, "low_rank")
    torch.testing.assert_close(run(x), low_rank_reference(net, x, first))
    (slot,) = slots_of(net)
    (buffer,) = derived_tensors()
    for tensors in (adapter(5), adapter(1)):
        slot.swap(tensors)
        torch.testing.assert_close(run(x), low_rank_reference(net, x, tensors))
    assert len(reports) == 1
    assert derived_tensors()[0].data_ptr() == buffer.data_ptr()
    for wrong, message in (
        ({"a": torch.zeros(2, 8)}, r"expected the tensors \['a', 'b'\], got \['a'\]"),
        (adapter(2, size=9), "do not fit the weight"),
        ({"a": torch.zeros(2, 7), "b": torch.zeros(8, 2)}, "do not fit the weight"),
    ):
        with pytest.raises(ArtifactError, match=message):
            slot.swap(wrong)
    torch.testing.assert_close(run(x), low_rank_reference(net, x, tensors), msg="a refused swap changed something")


def test_swap_under_a_training_graph(low_rank):
    net, x = Net(), torch.randn(3, 8)
    first = adapter(2)
    low_rank.a, low_rank.b = first["a"], first["b"]
    run = compiled(net, "low_rank")
    torch.testing.assert_close(run(x), low_rank_reference(net, x, first))
    slot = Slot._shared["low_rank"]
    second = adapter(2)
    addresses = [t.data_ptr() for t in slot.tensors.values()]
    slot.swap(second)
    assert [t.data_ptr() for t in slot.tensors.values()] == addresses
    got = torch.autograd.grad(run(x).sum(), net.q_proj.weight)[0]
    torch.testing.assert_close(got, torch.autograd.grad(low_rank_reference(net, x, second).sum(), net.q_proj.weight)[0])
    with pytest.raises(ArtifactError, match=r"takes a as an input of \(2, 8\) torch.float32, got \(3, 8\)"):
        slot.swap(adapter(3))
    torch.testing.assert_close(run(x), low_rank_reference(net, x, second))
    assert len(reports) == 1


def test_the_meaning_of_autocast_does_not_reach_the_derivation(low_rank):
    """W + B A is computed in W's precision in both homes, although the call runs under autocast."""
    for grad in (False, True):
        torch._dynamo.reset()
        net, x = Net().requires_grad_(grad), torch.randn(3, 8)
        low_rank.a, low_rank.b = torch.randn(2, 8), torch.randn(8, 2)
        run = compiled(net, "low_rank")
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(x)
        merged = net.q_proj.weight + low_rank.b @ low_rank.a
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = net.up(torch.relu(nn.functional.linear(x, merged, net.q_proj.bias)))
        assert torch.equal(got, expected)
