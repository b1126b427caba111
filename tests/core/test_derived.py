"""Derived weights under torch.compile: fresh after every event, one copy, no needless recompilation."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
import types
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from families import make
from torch import nn
from torch.utils.checkpoint import checkpoint

import effpass
from effpass.backend import reports
from effpass.core import registry
from effpass.core.derived_arguments import DerivedArguments
from effpass.core.errors import ArtifactError
from effpass.core.live_weights import Entry, Slot, slots_of
from effpass.core.pass_ import Match, WeightsPass

SCALE = {"scale": {"factor": 2.0}}


@pytest.fixture(autouse=True)
def _clean(toy_passes):
    reports.clear()
    if Entry.live:
        gc.collect()
    assert not Entry.live, "an earlier test left derived weights behind"


class Net(nn.Module):
    """``up(relu(q_proj(x)))``: the toy pass derives 2 W from q_proj's W."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.q_proj = nn.Linear(size, size)
        self.up = nn.Linear(size, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(torch.relu(self.q_proj(x)))


def reference(net: Net, x: torch.Tensor) -> torch.Tensor:
    hidden = torch.relu(nn.functional.linear(x, 2 * net.q_proj.weight, net.q_proj.bias))
    return nn.functional.linear(hidden, net.up.weight, net.up.bias)


def compiled(module: Callable[..., torch.Tensor], *passes: object, **options: object) -> Callable[..., torch.Tensor]:
    return torch.compile(
        module, backend="effpass", options={"passes": list(passes) or [SCALE], "inner": "aot_eager", **options}
    )


def assert_fresh(run: Callable[..., torch.Tensor], net: Net, x: torch.Tensor) -> None:
    torch.testing.assert_close(run(x), reference(net, x), rtol=0, atol=1e-6 if x.dtype == torch.float32 else 1e-12)


def derived_tensors() -> list[torch.Tensor]:
    return [entry.value for entry in Entry.live.values()]


# -- writes that are seen -------------------------------------------------------------------------------------------


def step(make_optimizer: Callable[..., torch.optim.Optimizer], compile_step: bool = False) -> Callable[[Net], None]:
    def event(net: Net) -> None:
        optimizer = make_optimizer([net.q_proj.weight])
        net.q_proj.weight.grad = torch.ones_like(net.q_proj.weight)
        (torch.compile(optimizer.step, backend="eager") if compile_step else optimizer.step)()

    return event


def in_place(net: Net) -> None:
    with torch.no_grad():
        net.q_proj.weight.mul_(3)


def in_place_under_inference_mode(net: Net) -> None:
    with torch.inference_mode():
        net.q_proj.weight.mul_(3)


def foreach(net: Net) -> None:
    with torch.no_grad():
        torch._foreach_add_([net.q_proj.weight, net.up.weight], 1.0)


def through_a_view(net: Net) -> None:
    net.q_proj.weight.detach()[1:3].add_(1)


def load(net: Net, assign: bool) -> None:
    net.load_state_dict({k: v + 1 for k, v in net.state_dict().items()}, assign=assign)


def replace(net: Net) -> None:
    net.q_proj.weight = nn.Parameter(torch.randn(8, 8))


def swap(net: Net) -> None:
    torch.utils.swap_tensors(net.q_proj.weight, nn.Parameter(torch.randn(8, 8)))


def assign_data(net: Net) -> None:
    net.q_proj.weight.data = torch.randn(8, 8)


def assign_data_within_a_storage(net: Net) -> None:
    """`p.data = bank[i]`: same object, version, storage and shape; another address."""
    bank = torch.randn(2, 8, 8)
    net.q_proj.weight.data = bank[0]
    net.run()
    net.q_proj.weight.data = bank[1]


def transpose_data(net: Net) -> None:
    """Same object, version and address; other strides (Dynamo compiles for them)."""
    net.q_proj.weight.data = net.q_proj.weight.data.T


def round_trip(net: Net) -> None:
    """Rounded, in the same object; often at the same address and always with the same version."""
    net.half().float()


def resize(net: Net) -> None:
    weight = net.q_proj.weight
    with torch.no_grad():
        weight.set_(torch.randn(8, 8))


SEEN = {
    "in-place": in_place,
    "in-place, inference_mode": in_place_under_inference_mode,
    "_foreach": foreach,
    "nn.init": lambda net: nn.init.normal_(net.q_proj.weight),
    ".detach().add_": lambda net: net.q_proj.weight.detach().add_(1),
    "view of .detach()": through_a_view,
    "load_state_dict": lambda net: load(net, assign=False),
    "load_state_dict(assign)": lambda net: load(net, assign=True),
    "replaced Parameter": replace,
    "swap_tensors": swap,
    "set_": resize,
    ".data = t": assign_data,
    ".data = bank[i]": assign_data_within_a_storage,
    ".half().float()": round_trip,
    ".double().float()": lambda net: net.double().float(),
    "SGD": step(lambda p: torch.optim.SGD(p, 0.1, foreach=False)),
    "SGD foreach": step(lambda p: torch.optim.SGD(p, 0.1, foreach=True)),
    "SGD fused": step(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "AdamW": step(lambda p: torch.optim.AdamW(p, 0.1, foreach=False)),
    "AdamW foreach": step(lambda p: torch.optim.AdamW(p, 0.1, foreach=True)),
    "AdamW fused": step(lambda p: torch.optim.AdamW(p, 0.1, fused=True)),
    "Adagrad fused": step(lambda p: torch.optim.Adagrad(p, 0.1, fused=True)),
    "Muon": step(lambda p: torch.optim.Muon(p, 0.1)),
    "compiled AdamW": step(lambda p: torch.optim.AdamW(p, 0.1), compile_step=True),
    "compiled AdamW fused": step(lambda p: torch.optim.AdamW(p, 0.1, fused=True), compile_step=True),
}
UNCHANGED = {".double().float()"}
OTHER_OBJECT = {"load_state_dict(assign)", "replaced Parameter"}


@pytest.mark.parametrize("event", SEEN)
def test_a_write_is_seen_at_the_next_call(event):
    net, x = Net(), torch.randn(3, 8)
    run = compiled(net)
    net.run = lambda: run(x)
    with torch.no_grad():
        assert_fresh(run, net, x)
        before = run(x)
        compilations, (buffer,) = len(reports), derived_tensors()
        SEEN[event](net)
        assert_fresh(run, net, x)
        assert torch.equal(run(x), before) == (event in UNCHANGED), "the event changes the weights"
        assert len(reports) == compilations, "recompiled"
        (after,) = derived_tensors()
        if event not in OTHER_OBJECT:
            assert after.data_ptr() == buffer.data_ptr(), "CUDA graphs hold the address of the buffer"


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_fused_steps_move_no_version(kind):
    """Why the step hook exists; when this fails, torch has changed and the hook can go."""
    parameter = nn.Parameter(torch.randn(8, 8))
    optimizer = kind([parameter], 0.1, fused=True)
    parameter.grad = torch.ones(8, 8)
    version, before = parameter._version, parameter.detach().clone()
    optimizer.step()
    assert parameter._version == version
    assert not torch.equal(parameter, before)


def test_dtype_moves_recompute_without_a_second_copy():
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    run = compiled(net)
    assert_fresh(run, net, x)
    net.double()
    assert_fresh(run, net, x.double())
    assert len(reports) == 2
    assert [t.dtype for t in derived_tensors()] == [torch.float64]
    net.float()
    in_place(net)
    assert_fresh(run, net, x)
    assert len(reports) == 2, "the float32 graph is still there"


def test_data_transposed_and_back():
    """Two variants share one buffer: the first must notice that the second used it for other strides."""
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    run = compiled(net)
    for _ in range(2):
        assert_fresh(run, net, x)
        transpose_data(net)
        assert_fresh(run, net, x)
        transpose_data(net)
    assert len(reports) == 2
    assert len(Entry.live) == 1


def test_variants_that_see_data_swapped_and_swapped_back():
    """`p.data = average` for one call of another variant, then back: same address and version as before."""
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    run = compiled(net)
    run(x)
    with torch.enable_grad():  # the second variant
        run(x.clone().requires_grad_())
    assert len(reports) == 2
    own = net.q_proj.weight.data
    run(x)
    net.q_proj.weight.data = torch.randn(8, 8)
    run(x.clone().requires_grad_())
    net.q_proj.weight.data = own
    assert_fresh(run, net, x)
    assert len(reports) == 2


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


# -- writes that can't be seen --------------------------------------------------------------------------------------


def copy_data(net: Net) -> None:
    net.q_proj.weight.data.copy_(torch.randn(8, 8))


def write_numpy(net: Net) -> None:
    net.q_proj.weight.detach().numpy()[0] += 1


def add_to_data(net: Net) -> None:
    """What PEFT's merge and unmerge do."""
    net.q_proj.weight.data += torch.randn(8, 8)


UNSEEN = [copy_data, write_numpy, add_to_data]


@pytest.mark.parametrize("write", UNSEEN, ids=lambda f: f.__name__)
def test_an_unseen_write_waits_for_refresh(write):
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    run = compiled(net)
    stale = run(x)
    write(net)
    assert torch.equal(run(x), stale), "seen after all: then the documentation promises too little"
    assert effpass.refresh(net) == 1
    assert_fresh(run, net, x)
    assert len(reports) == 1


@pytest.mark.parametrize("write", UNSEEN, ids=lambda f: f.__name__)
def test_check_weights_finds_an_unseen_write(write):
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    run = compiled(net, check_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_fresh(run, net, x)
        assert_fresh(run, net, x)
        in_place(net)
        assert_fresh(run, net, x)
    write(net)
    with pytest.warns(UserWarning, match=r"written in a way that can't be seen .* effpass\.refresh\(model\)"):
        assert_fresh(run, net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_fresh(run, net, x)


def test_refresh_of_one_model_leaves_others_alone():
    nets, x = [Net().requires_grad_(False), Net().requires_grad_(False)], torch.randn(3, 8)
    runs = [compiled(net) for net in nets]
    stale = [run(x) for run in runs]
    for net in nets:
        copy_data(net)
    assert effpass.refresh(nets[0]) == 1
    assert_fresh(runs[0], nets[0], x)
    assert torch.equal(runs[1](x), stale[1])
    assert effpass.refresh() == 2
    assert_fresh(runs[1], nets[1], x)


def test_peft_merge_and_unmerge():
    from peft import LoraConfig, get_peft_model

    net, x = Net(), torch.randn(3, 8)
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    run = compiled(model, {"scale": {"factor": 2.0, "only": "base_layer"}})
    base = net.q_proj.base_layer.weight

    def expected() -> torch.Tensor:
        base.data.mul_(2)
        out = model(x)
        base.data.div_(2)
        return out

    with torch.no_grad():
        torch.testing.assert_close(run(x), expected())
        for move in (model.merge_adapter, model.unmerge_adapter):
            move()
            assert not torch.allclose(run(x), expected()), "p.data += d was seen after all"
            effpass.refresh(model)
            torch.testing.assert_close(run(x), expected())


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
    """`max_norm` renormalises the embedding inside the program: a value from outside would be stale."""

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


# -- one copy -------------------------------------------------------------------------------------------------------


def test_five_variants_hold_one_copy():
    class Two(Net):
        def __init__(self):
            super().__init__()
            self.k_proj = nn.Linear(8, 8)

        def forward(self, x):
            return super().forward(self.k_proj(x))

    net = Two().requires_grad_(False)
    run = compiled(net, {"scale": {"only": "_proj"}})

    def check(x):
        hidden = nn.functional.linear(x, 2 * net.k_proj.weight, net.k_proj.bias)
        torch.testing.assert_close(run(x), reference(net, hidden))

    def all_variants():
        for length in (5, 7, 9):  # static, then dynamic
            check(torch.randn(length, 8))
        check(torch.randn(1, 8))
        with torch.no_grad():
            check(torch.randn(5, 8))
        with torch.inference_mode():
            check(torch.randn(5, 8))

    all_variants()
    assert len(reports) == 5
    assert len(Entry.live) == 2
    assert sum(t.nbytes for t in derived_tensors()) == 2 * 8 * 8 * 4
    assert [r.passes[0].derived_bytes for r in reports] == [2 * 8 * 8 * 4] * 5
    assert len({t.data_ptr() for t in derived_tensors()}) == 2
    in_place(net)
    all_variants()
    assert len(reports) == 5


def test_tied_weights_change_per_use():
    """The head reads 2 W, the embedding W: logits are exactly doubled, and nothing else."""
    model = make("llama", tie_word_embeddings=True).eval()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = torch.arange(12).view(2, 6)
    run = compiled(model, {"scale": {"only": "lm_head"}})
    with torch.no_grad():
        assert torch.equal(run(input_ids=ids, use_cache=False).logits, 2 * model(input_ids=ids, use_cache=False).logits)
        model.lm_head.weight.add_(0.1)
        torch.testing.assert_close(
            run(input_ids=ids, use_cache=False).logits, 2 * model(input_ids=ids, use_cache=False).logits
        )
    assert [r.hits for r in reports] == [1]


def test_two_instances_share_code_and_keep_their_weights():
    nets, x = [Net().requires_grad_(False) for _ in range(2)], torch.randn(3, 8)
    runs = [compiled(net) for net in nets]
    for _ in range(2):
        for net, run in zip(nets, runs, strict=True):
            assert_fresh(run, net, x)
        in_place(nets[1])
    assert len(reports) == 1
    assert len(Entry.live) == 2


def test_layers_compiled_apart_share_one_graph():
    layers, x = nn.ModuleList(Net() for _ in range(4)).requires_grad_(False), torch.randn(3, 8)
    for layer in layers:
        layer.compile(backend="effpass", options={"passes": [SCALE], "inner": "aot_eager"})
    for _ in range(3):
        for layer in layers:
            assert_fresh(layer, layer, x)
    assert len(reports) == 1
    assert len(Entry.live) == 4


def test_layers_in_turn_stay_on_the_fast_path(monkeypatch):
    layers, x = [Net().requires_grad_(False) for _ in range(3)], torch.randn(3, 8)
    runs = [compiled(layer) for layer in layers]
    for _ in range(2):
        for run in runs:
            run(x)
    for run in runs:
        run(x)
    slow = []
    renew = DerivedArguments._renew
    monkeypatch.setattr(DerivedArguments, "_renew", lambda self, originals: slow.append(1) or renew(self, originals))
    for _ in range(3):
        for run in runs:
            run(x)
    assert not slow
    in_place(layers[1])
    runs[1](x)
    assert slow == [1]


# -- what is let go -------------------------------------------------------------------------------------------------


def test_replaced_parameters_are_let_go():
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    run = compiled(net)
    run(x)
    replaced = []
    for _ in range(5):
        replaced.append(weakref.ref(net.q_proj.weight))
        net.q_proj.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        assert_fresh(run, net, x)
    assert [r() for r in replaced] == [None] * 5
    assert len(Entry.live) == 1
    assert len(reports) == 1


def test_weights_of_a_dropped_model_go_at_the_next_collection():
    """Its compiled code lives on with its sibling, and must not keep its weights."""
    nets, x = [Net().requires_grad_(False) for _ in range(2)], torch.randn(3, 8)
    runs = [compiled(net) for net in nets]
    for run in runs:
        run(x)
    dropped = [weakref.ref(p) for p in nets[1].parameters()]
    buffers = [weakref.ref(t) for t in derived_tensors()]
    del nets[1], runs[1], run
    gc.collect()
    assert [r() for r in dropped] == [None] * 4
    assert sum(r() is not None for r in buffers) == 1
    assert_fresh(runs[0], nets[0], x)


def test_swap_tensors_works_after_a_compiled_call():
    """It refuses tensors that somebody refers to weakly."""
    net, x = Net().requires_grad_(False), torch.randn(3, 8)
    compiled(net)(x)
    other = nn.Parameter(torch.zeros(8, 8), requires_grad=False)
    torch.utils.swap_tensors(net.q_proj.weight, other)
    assert torch.equal(net.q_proj.weight, torch.zeros(8, 8))


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


# -- threads --------------------------------------------------------------------------------------------------------


def test_two_threads_at_once():
    """After a write no thread may run on the old value, although only one of them recomputes it."""
    net, x = Net(64).requires_grad_(False), torch.randn(3, 64)
    run = compiled(net)
    run(x)
    rounds, wrong = 40, []
    gate = threading.Barrier(3)

    def work():
        for _ in range(rounds):
            gate.wait()
            got = run(x)
            if not torch.allclose(got, expected[0], atol=1e-5):
                wrong.append(got)
            gate.wait()

    expected = [None]
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(rounds):
        net.q_proj.weight.fill_(0.01 * (i + 1))
        expected[0] = reference(net, x)
        gate.wait()
        gate.wait()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(reports) == 1


# -- CUDA graphs, as far as the CPU shows ---------------------------------------------------------------------------


@pytest.fixture
def static_inputs(monkeypatch):
    """Records what Inductor is told: (number of inputs, static input indices, sizes of the last input) per graph."""
    import torch._inductor.compile_fx as inductor
    from functorch.compile import make_boxed_func

    recorded = []
    original = inductor.compile_fx

    def pretend(gm, inputs, **kwargs):
        last = gm.graph.find_nodes(op="placeholder")[-1]
        recorded.append((len(inputs), list(kwargs["static_input_idxs"]), tuple(last.meta["val"].shape)))
        return make_boxed_func(gm.forward)

    monkeypatch.setattr(
        inductor, "compile_fx", lambda gm, inputs, **kwargs: original(gm, inputs, inner_compile=pretend, **kwargs)
    )
    return recorded


def test_derived_weights_are_static_inputs(static_inputs):
    net, x = Net().requires_grad_(False), torch.randn(3, 8)

    def record(backend, **options):
        torch._dynamo.reset()
        static_inputs.clear()
        run = torch.compile(net, backend=backend, dynamic=True, options=options or None)
        got = run(x)
        (graph,) = static_inputs[-1:]
        return got, graph

    _, plain = record("inductor")
    assert len(plain[1]) == 4, "the four weights of the net"
    assert record("effpass", passes=[{"scale": {"only": "nothing"}}])[1] == plain
    assert record("effpass", passes=["touch"])[1] == plain
    got, (count, static, sizes) = record("effpass", passes=[SCALE])
    assert (count, static) == (plain[0] + 1, [*plain[1], plain[0]]), "and the derived weight, appended"
    assert sizes == (8, 8), "its sizes are numbers, not symbols"
    assert all(type(size) is int for size in sizes)
    torch.testing.assert_close(got, reference(net, x))
