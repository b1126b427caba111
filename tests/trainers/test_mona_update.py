"""The two forms of the acceleration, Muon as a special case, and what the acceleration is for."""

from __future__ import annotations

import math

import pytest
import torch

from effpass.trainers import MONA
from effpass.trainers.mona import NewtonSchulz
from effpass.trainers.mona.coefficients import band, polar_express
from effpass.trainers.mona.update import default_alpha


def gradients(count: int, *shape: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(1)
    drift = torch.randn(*shape, dtype=torch.float64)
    return [(drift + torch.randn(*shape, dtype=torch.float64)).to(dtype) for _ in range(count)]


def run(grads: list[torch.Tensor], **options) -> tuple[torch.Tensor, MONA]:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn_like(grads[0]))
    optimizer = MONA([parameter], **{"lr": 0.02, **options})
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach(), optimizer


def test_the_paper_equation_by_equation():
    """Algorithm 1 as it is written: the class against a page of algebra."""
    grads = gradients(6, 5, 8)
    beta, mu, lr, decay = 0.975, 0.95, 0.02, 0.1
    torch.manual_seed(0)
    w = torch.randn(5, 8, dtype=torch.float64)
    a, g_old, m = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for g in grads:
        a = beta * a + (1 - beta) * (g - g_old)
        g_old = g
        m = mu * m + (g - 20 * a)
        o = NewtonSchulz()(m[None])[0]
        w = (1 - lr * decay) * w - lr * 0.2 * math.sqrt(8) * o
    found, _ = run(grads, beta_a=beta, form="paper", lr=lr)
    torch.testing.assert_close(found, w, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("beta_a", "alpha"), [(0.975, None), (0.99, None), (0.975, -10.0), (0.9, -5.0)])
def test_one_buffer_equals_two(beta_a, alpha):
    grads = gradients(40, 6, 9)
    one, optimizer = run(grads, beta_a=beta_a, alpha=alpha)
    two, _ = run(grads, beta_a=beta_a, alpha=alpha, form="paper")
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    assert set(next(iter(optimizer.state.values()))) == {"momentum", "average"}


def test_default_alpha():
    assert default_alpha(0.99) == pytest.approx(-50)
    assert MONA([torch.nn.Parameter(torch.ones(2, 2))], beta_a=0.975).param_groups[0]["alpha"] == pytest.approx(-20)


@pytest.mark.parametrize("nesterov", [False, True])
def test_without_acceleration_it_is_our_muon_bit_for_bit(nesterov, monkeypatch):
    """α = 0 keeps no buffer; with the buffer and α = 0 in the formula, the bits are the same."""
    grads = gradients(8, 6, 9, dtype=torch.float32)
    muon, optimizer = run(grads, alpha=0, nesterov=nesterov)
    assert set(next(iter(optimizer.state.values()))) == {"momentum"}
    monkeypatch.setattr("effpass.trainers.mona.optimizer.extra_buffers", lambda group: ("average",))
    monkeypatch.setattr("effpass.trainers.mona.plain.extra_buffers", lambda group: ("average",))
    general, optimizer = run(grads, alpha=0, nesterov=nesterov)
    assert set(next(iter(optimizer.state.values()))) == {"momentum", "average"}
    assert torch.equal(muon, general)


@pytest.mark.parametrize(("scale", "theirs"), [("spectral", "original"), ("rms_matched", "match_rms_adamw")])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_update_of_torchs_muon(scale, theirs, shape):
    grads = gradients(5, *shape, dtype=torch.float32)
    reference = NewtonSchulz("muon", form="torch", dtype=torch.bfloat16)
    ours, _ = run(grads, alpha=0, nesterov=True, scale=scale, newton_schulz=reference)
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(shape))
    start = parameter.detach().clone()
    muon = torch.optim.Muon([parameter], lr=0.02, adjust_lr_fn=theirs)
    for grad in grads:
        parameter.grad = grad.clone()
        muon.step()
    assert (ours - parameter).norm() / (parameter - start).norm() < 1e-3


def test_the_bfloat16_buffer_stays_close():
    grads = gradients(60, 6, 9, dtype=torch.float32)
    exact, _ = run(grads, acceleration_dtype=torch.float32)
    short, optimizer = run(grads)
    assert next(iter(optimizer.state.values()))["average"].dtype == torch.bfloat16
    torch.manual_seed(0)
    moved = (exact - torch.randn(6, 9)).norm()
    assert (short - exact).norm() / moved < 0.01  # the average's rounding is 2⁻⁹ of it, and half of it enters


def test_every_update_lies_in_the_band():
    grads = gradients(10, 12, 20)
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(12, 20, dtype=torch.float64))
    optimizer = MONA([parameter], lr=1.0, weight_decay=0, scale="spectral")
    low, high = band(polar_express(5))
    for grad in grads:
        before = parameter.detach().clone()
        parameter.grad = grad
        optimizer.step()
        values = torch.linalg.svdvals(before - parameter.detach())
        assert low - 1e-9 < values.min()
        assert values.max() < high + 1e-9


# A flat valley at s = −3 and a sharp one at s = 0 on the way to it: f(s) = c/2 (s + 3)² − d exp(−s² / 2w²), for
# W = s·Q with Q orthogonal. (depth d, width w, curvature c of the flat valley, learning rate)
VALLEYS = [(0.2, 0.1, 0.05, 0.02), (0.2, 0.2, 0.05, 0.02), (0.8, 0.2, 0.2, 0.02)]


def descend(depth: float, width: float, curvature: float, lr: float, **options) -> tuple[float, float]:
    """Where it ends, and the second derivative there."""
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]

    def loss(s: torch.Tensor) -> torch.Tensor:
        return curvature / 2 * (s + 3) ** 2 - depth * torch.exp(-((s / width) ** 2) / 2)

    weight = torch.nn.Parameter(3 * q)
    optimizer = MONA([weight], lr=lr, weight_decay=0, scale="spectral", newton_schulz=NewtonSchulz(steps=8), **options)
    steps = 900
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss((weight * q).sum() / 4).backward()
        optimizer.step()
    s = ((weight.detach() * q).sum() / 4).requires_grad_()
    (slope,) = torch.autograd.grad(loss(s), s, create_graph=True)
    return s.item(), torch.autograd.grad(slope, s)[0].item()


@pytest.mark.parametrize("valleys", VALLEYS)
def test_mona_leaves_the_sharp_valley_in_which_muon_stays(valleys):
    depth, width, curvature, _ = valleys
    muon, sharp = descend(*valleys, alpha=0)
    mona, flat = descend(*valleys)
    assert abs(muon) < width
    assert sharp > 0.5 * depth / width**2
    assert mona == pytest.approx(-3, abs=0.05)
    assert flat == pytest.approx(curvature, rel=1e-3)
