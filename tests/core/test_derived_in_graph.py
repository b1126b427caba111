"""Derived weights inside the program: gradients, checkpointing, and originals whose writes can't be seen."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from derived_net import Net, assert_fresh, compiled, in_place, reference
from torch import nn
from torch.utils.checkpoint import checkpoint

from effpass.backend import reports
from effpass.core.live_weights import Entry

pytestmark = pytest.mark.usefixtures("no_derived_weights")


# -- the home in the graph ------------------------------------------------------------------------------------------


def test_gradients_reach_the_original():
    net, x = Net(), torch.randn(3, 8)
    run, optimizer = compiled(net), torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(3):
        expected = torch.autograd.grad(reference(net, x).square().sum(), list(net.parameters()))
        optimizer.zero_grad()
        run(x).square().sum().backward()
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=1e-5)
        optimizer.step()
    assert len(reports) == 1
    assert not Entry.live
    with torch.no_grad():  # another home, so another graph
        for _ in range(2):
            assert_fresh(run, net, x)
            optimizer.step()
    assert len(reports) == 2
    assert len(Entry.live) == 1


def test_a_region_that_enables_grad_keeps_its_gradients():
    class Adapting(Net):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)

    net, x = Adapting(), torch.randn(3, 8)
    with torch.no_grad():
        out = compiled(net)(x)
    (gradient,) = torch.autograd.grad(out.sum(), net.q_proj.weight)
    (expected,) = torch.autograd.grad(reference(net, x).sum(), net.q_proj.weight)
    torch.testing.assert_close(gradient, expected)


def test_a_frozen_base_is_cached_until_it_is_unfrozen():
    net, x = Net(), torch.randn(3, 8)
    net.q_proj.weight.requires_grad_(False)
    run = compiled(net)
    for _ in range(2):
        run(x).sum().backward()
        expected = torch.autograd.grad(reference(net, x).sum(), net.up.weight)[0]
        torch.testing.assert_close(net.up.weight.grad, expected)
        net.up.weight.grad = None
        in_place(net)
    assert len(reports) == 1
    assert len(Entry.live) == 1
    net.q_proj.weight.requires_grad_(True)
    run(x).sum().backward()
    expected = torch.autograd.grad(reference(net, x).sum(), net.q_proj.weight)[0]
    torch.testing.assert_close(net.q_proj.weight.grad, expected)
    assert len(reports) == 2


def test_a_step_of_another_model_does_not_disturb_a_pending_backward():
    """The step recomputes every derived weight; autograd must not take that for a change of this one."""
    net, x = Net(), torch.randn(3, 8, requires_grad=True)
    net.q_proj.weight.requires_grad_(False)
    run, other = compiled(net), nn.Parameter(torch.randn(2))
    out = run(x)
    other.grad = torch.ones(2)
    torch.optim.SGD([other], 0.1, fused=True).step()
    run(x)
    out.sum().backward()
    torch.testing.assert_close(x.grad, torch.autograd.grad(reference(net, x).sum(), x)[0])


def test_a_changed_weight_does_disturb_a_pending_backward():
    net, x = Net(), torch.randn(3, 8, requires_grad=True)
    net.q_proj.weight.requires_grad_(False)
    run = compiled(net)
    out = run(x)
    in_place(net)
    run(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing(frozen):
    class Checkpointed(Net):
        def forward(self, x):
            return self.up(checkpoint(self.hidden, x, use_reentrant=False))

        def hidden(self, x):
            return torch.relu(self.q_proj(x))

    net, x = Checkpointed(), torch.randn(3, 8, requires_grad=True)
    net.q_proj.weight.requires_grad_(not frozen)
    run = compiled(net)
    inputs = [x, *(p for p in net.parameters() if p.requires_grad)]
    for _ in range(2):
        got = torch.autograd.grad(run(x).square().sum(), inputs)
        expected = torch.autograd.grad(reference(net, x).square().sum(), inputs)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        in_place(net)
    assert [r.hits for r in reports] == [1]
    assert len(Entry.live) == frozen


def test_a_model_made_under_inference_mode():
    """Its tensors track no version, so the value is computed in the graph."""
    with torch.inference_mode():
        net, x = Net(), torch.randn(3, 8)
        run = compiled(net)
        for _ in range(2):
            assert_fresh(run, net, x)
            net.q_proj.weight.add_(1)
    assert len(reports) == 1
    assert not Entry.live


def test_a_model_converted_under_inference_mode():
    """Its parameters keep their identity and become inference tensors: another graph, with another home."""
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    run = compiled(net)
    assert_fresh(run, net, x)
    with torch.inference_mode():
        net.double().float()
        for _ in range(2):
            net.q_proj.weight.add_(1)
            assert_fresh(run, net, x)
    assert len(reports) == 2


def test_a_weight_that_the_program_writes_is_read_in_place():
    """`max_norm` renormalizes the embedding inside the program: a value from outside would be stale."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 8, max_norm=0.5)
            self.q_proj = nn.Linear(8, 6, bias=False)
            self.q_proj.weight = self.embed.weight

        def forward(self, ids):
            return self.q_proj(self.embed(ids))

    net = Tied().requires_grad_(False)
    with pytest.raises(Exception, match="across a write"):
        compiled(net, {"scale": {"only": ""}})(torch.arange(3))


DISTRIBUTED = """
import os, sys, warnings
import torch
from torch import nn
sys.path[:0] = {path!r}
import toy_passes
toy_passes.register()
from effpass.core.live_weights import Entry
from effpass.backend import reports

os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
torch.set_num_threads(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 8, bias=False)
    def forward(self, x):
        return self.q_proj(x)

def check(run, net, x):
    got, weight = run(x), net.q_proj.weight
    expected = x @ (2 * weight).T
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (got, expected)]
    torch.testing.assert_close(*whole)

net, x = Net().requires_grad_(False), torch.randn(3, 8)
run = torch.compile(net, backend="effpass", options={{"passes": ["scale"], "inner": "aot_eager"}})
check(run, net, x)
assert len(Entry.live) == 1

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        net.q_proj.weight.data.copy_(torch.randn(8, 8))  # as a collective does
        check(run, net, x)
assert "a process group came up after compilation" in str(caught[0].message), caught
assert len(reports) == 1

torch._dynamo.reset()
run = torch.compile(net, backend="effpass", options={{"passes": ["scale"], "inner": "aot_eager"}})
for _ in range(2):
    net.q_proj.weight.data.copy_(torch.randn(8, 8))
    check(run, net, x)
assert [r.hits for r in reports] == [1, 1]
del caught

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
mesh = init_device_mesh("cpu", (1,))
sharded = Net().requires_grad_(False)
sharded.q_proj.weight = nn.Parameter(distribute_tensor(sharded.q_proj.weight, mesh), requires_grad=False)
xd = distribute_tensor(x, mesh)
run = torch.compile(sharded, backend="effpass", options={{"passes": ["scale"], "inner": "aot_eager"}})
for _ in range(2):
    sharded.q_proj.weight.to_local().mul_(3)  # moves no version of the DTensor
    check(run, sharded, xd)
assert [r.hits for r in reports] == [1, 1, 1], reports
assert not Entry.live, list(Entry.live)
torch.distributed.destroy_process_group()
print("fine")
"""


def test_process_group_and_dtensor():
    """In a process of its own: a process group changes the home of every derived weight after it."""
    code = textwrap.dedent(DISTRIBUTED).format(path=[p for p in sys.path if p])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith("fine"), done.stderr
    assert "Exception ignored" not in done.stderr
