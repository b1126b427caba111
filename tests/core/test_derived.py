"""Derived weights under torch.compile: every write is seen at the next call, or documented and found otherwise."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from derived_net import Net, assert_fresh, compiled, derived_tensors, in_place
from torch import nn

import effpass
from effpass.backend import reports
from effpass.core.live_weights import Entry

pytestmark = pytest.mark.usefixtures("no_derived_weights")


# -- writes that are seen -------------------------------------------------------------------------------------------


def step(make_optimizer: Callable[..., torch.optim.Optimizer], compile_step: bool = False) -> Callable[[Net], None]:
    def event(net: Net) -> None:
        optimizer = make_optimizer([net.q_proj.weight])
        net.q_proj.weight.grad = torch.ones_like(net.q_proj.weight)
        (torch.compile(optimizer.step, backend="eager") if compile_step else optimizer.step)()

    return event


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
    net.run()  # the first look after a recomputation is a thorough one
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
