"""MONA as an optimizer: state, checkpoints, schedules, accumulation, missing and broken gradients, compilation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from effpass.core.errors import ArtifactError, EffpassError, ModelError
from effpass.trainers import MONA


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(self.embed(ids)))).float().square().mean()


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, scheduler=None) -> None:
    for step in steps:
        ids = torch.randint(0, 12, (6,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(ids).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def values(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["exact", "paper"])
def test_a_run_that_is_resumed_goes_on_bit_for_bit(dtype, form):
    model = net(dtype)
    optimizer = MONA(model, lr=1e-2, form=form)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    train(model, optimizer, range(3), schedule)
    file = io.BytesIO()
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict(), "s": schedule.state_dict()}, file)
    train(model, optimizer, range(3, 6), schedule)

    again = net(dtype)
    resumed = MONA(again, lr=123.0, form=form)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.load_state_dict(saved["m"])
    resumed.load_state_dict(saved["o"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 8)
    schedule.load_state_dict(saved["s"])
    assert all(s["momentum"].dtype == torch.float32 for s in resumed.state.values() if "momentum" in s)
    train(again, resumed, range(3, 6), schedule)
    assert equal(values(model), values(again))


def test_a_copy_and_a_pickle_go_on_alike():
    model = net()
    optimizer = MONA(model, lr=1e-2)
    train(model, optimizer, range(2))
    twin, twins = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(twin, twins, range(2, 4))
    assert equal(values(model), values(twin))


def test_checkpoints_of_others_are_refused_before_anything_changes():
    model = net()
    optimizer = MONA(model)
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    adam = torch.optim.AdamW(model.parameters())
    train(model, adam, range(1))
    with pytest.raises(ArtifactError, match="the checkpoint is another optimizer's"):
        optimizer.load_state_dict(adam.state_dict())
    with pytest.raises(ArtifactError, match=r"groups \(algorithm, parameters\) are .*'mona', 2"):
        MONA(model, overrides={"up.weight": "adamw"}).load_state_dict(before)
    narrow = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 4), nn.Linear(4, 8))
    with pytest.raises(ArtifactError, match=r"momentum of parameter 0 is \(16, 8\), the parameter \(4, 8\)"):
        MONA(narrow).load_state_dict(before)
    with pytest.raises(ArtifactError, match="no state of an optimizer"):
        optimizer.load_state_dict({"model": {}})
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        assert all(torch.equal(value, after["state"][key][name]) for name, value in state.items())


def test_parameters_without_a_gradient_stay_with_their_buffers():
    model = net()
    optimizer = MONA(model, lr=1e-2)
    train(model, optimizer, range(2))
    weight, momentum = model.up.weight.detach().clone(), optimizer.state[model.up.weight]["momentum"].clone()
    moved = model.down.weight.detach().clone()
    model(torch.arange(6)).backward()
    model.up.weight.grad = None
    optimizer.step()
    assert torch.equal(weight, model.up.weight)
    assert torch.equal(momentum, optimizer.state[model.up.weight]["momentum"])
    assert not torch.equal(moved, model.down.weight)


def test_a_step_without_any_gradient():
    model = net()
    before = values(model)
    MONA(model).step()
    assert equal(before, values(model))


def test_accumulated_gradients_are_one_gradient():
    whole, parts = net(torch.float64), net(torch.float64)
    one, two = MONA(whole, lr=1e-2), MONA(parts, lr=1e-2)
    for step in range(3):
        ids = torch.randint(0, 12, (8,), generator=torch.Generator().manual_seed(step))
        for optimizer in (one, two):
            optimizer.zero_grad()
        whole.double()
        whole_loss = whole.down(torch.tanh(whole.up(whole.embed(ids)))).square().mean()
        whole_loss.backward()
        for half in ids.chunk(2):
            (parts.down(torch.tanh(parts.up(parts.embed(half)))).square().mean() / 2).backward()
        one.step()
        two.step()
    for a, b in zip(values(whole), values(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_difference_is_of_clipped_gradients():
    """Clipping comes before the step: the average holds what was stepped with."""
    model = net()
    optimizer = MONA(model, lr=1e-2, acceleration_dtype=torch.float32)
    (1000 * model(torch.arange(6))).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    average = optimizer.state[model.up.weight]["average"]
    torch.testing.assert_close(average, 0.01 * model.up.weight.grad)
    assert model.up.weight.grad.norm() <= 1


@pytest.mark.parametrize("where", ["up.weight", "embed.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_gradients_that_are_not_finite(where, value):
    for policy in ("raise", "skip"):
        model = net()
        optimizer = MONA(model, lr=1e-2, nan_policy=policy)
        train(model, optimizer, range(2))
        model(torch.arange(6)).backward()
        dict(model.named_parameters())[where].grad[1, 2] = value
        before, state = values(model), copy.deepcopy(optimizer.state_dict()["state"])
        if policy == "raise":
            with pytest.raises(EffpassError, match=f"the gradient of {where} is not finite; nothing was written"):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped == 1
        assert equal(before, values(model))
        after = optimizer.state_dict()["state"]
        assert all(torch.equal(v, after[key][name]) for key, s in state.items() for name, v in s.items())
        train(model, optimizer, range(3, 5))  # and it goes on
        assert all(v.isfinite().all() for v in values(model))


def test_large_gradients_of_half_precision_are_finite():
    parameter = nn.Parameter(torch.zeros(300, 300, dtype=torch.float16))
    parameter.grad = torch.full((300, 300), 6e4, dtype=torch.float16)
    MONA([parameter], lr=1e-2).step()
    assert parameter.isfinite().all()
    assert parameter.any()


def test_a_sparse_gradient_is_refused():
    model = nn.Embedding(5, 3, sparse=True)
    model(torch.arange(2)).sum().backward()
    with pytest.raises(ModelError, match="the gradient of weight is sparse"):
        MONA(model).step()


def test_mixed_dtypes_each_step_in_their_own():
    parameters = [nn.Parameter(torch.randn(6, 4).to(dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)]
    optimizer = MONA(parameters, lr=1e-2)
    start = [p.detach().clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter) + torch.arange(4).to(parameter.dtype)
    optimizer.step()
    moves = [(p.detach().double() - s.double()) for p, s in zip(parameters, start, strict=True)]
    assert [optimizer.state[p]["momentum"].dtype for p in parameters] == [torch.float64, torch.float32, torch.float32]
    # The same gradient, so the same update, but for decay (1e-3 of the weights) and bfloat16's 8 bits.
    torch.testing.assert_close(moves[0], moves[1], rtol=0, atol=5e-3)
    torch.testing.assert_close(moves[0], moves[2], rtol=0, atol=2e-2)


def test_empty_parameters_are_carried_along():
    empty, full = nn.Parameter(torch.zeros(0, 4)), nn.Parameter(torch.ones(4, 4))
    optimizer = MONA([empty, full], lr=1e-2)
    empty.grad, full.grad = torch.zeros(0, 4), torch.eye(4)
    optimizer.step()
    assert not torch.equal(full, torch.ones(4, 4))


@pytest.mark.parametrize("cautious", [False, True])
def test_decoupled_and_cautious_decay(cautious):
    torch.manual_seed(0)
    start = torch.randn(5, 7, dtype=torch.float64)
    grad = torch.randn(5, 7, dtype=torch.float64)
    moved = {}
    for decay in (0.0, 0.5):
        parameter = nn.Parameter(start.clone())
        parameter.grad = grad
        MONA([parameter], lr=0.1, weight_decay=decay, cautious=cautious).step()
        moved[decay] = parameter.detach() - start
    shrink = moved[0.5] - moved[0.0]
    touched = (moved[0.0] * start < 0) if cautious else torch.ones_like(start, dtype=torch.bool)
    torch.testing.assert_close(shrink, -0.05 * start * touched)


def test_vectors_of_a_model_do_not_decay():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    optimizer = MONA(model, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(model[1].weight, torch.ones(4))


def test_adamw_is_torchs():
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 6)) for _ in range(2))
    mona = MONA([ours], lr=1e-2, weight_decay=0.1)
    adam = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(4):
        ours.grad = theirs.grad = torch.cos(torch.arange(6.0) + step)
        mona.step()
        adam.step()
    assert torch.equal(ours, theirs)


def test_the_update_has_adamws_size():
    """Root mean square about 0.2 · lr whatever the shape."""
    torch.manual_seed(0)
    for shape in ((64, 64), (32, 128), (128, 32)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape)
        MONA([parameter], lr=1.0).step()
        assert parameter.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.1)


def test_closure_and_learning_rate_tensor():
    model, other = net(), net()
    optimizer, twin = MONA(model, lr=torch.tensor(1e-2)), MONA(other, lr=1e-2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.arange(6))
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    other(torch.arange(6)).backward()
    twin.step()
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b)


def test_grad_scaler():
    model, other = net(), net()
    optimizer, twin = MONA(model, lr=1e-2), MONA(other, lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(torch.arange(6))).backward()
    scaler.step(optimizer)
    scaler.update()
    other(torch.arange(6)).backward()
    twin.step()
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend):
    torch._dynamo.reset()
    model, other = net(), net()
    optimizer, twin = MONA(model, lr=torch.tensor(1e-2)), MONA(other, lr=torch.tensor(1e-2))
    compiled = torch.compile(twin.step, backend=backend)
    for step in range(3):
        ids = torch.randint(0, 12, (6,), generator=torch.Generator().manual_seed(step))
        for each in (model, other):
            each.zero_grad()
            each(ids).backward()
        optimizer.step()
        compiled()
    for a, b in zip(values(model), values(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
