"""Coefficients, forms and precision of the orthogonalization."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from effpass.core.errors import EffpassError
from effpass.lowering.ops.symmetric_product import symmetric_product
from effpass.trainers.mona.coefficients import MUON, band, coefficients, polar_express
from effpass.trainers.mona.newton_schulz import NewtonSchulz

# arXiv 2505.16932's algorithm for σ ≥ 1e-3 with cushion 0.02 and safety 1.02, as the paper's authors print it.
PUBLISHED = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def matrices(*shape: int) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64)


def spectrum(m: int, n: int, sigma: torch.Tensor) -> torch.Tensor:
    """[1, m, n] with these singular values."""
    u, _, vh = torch.linalg.svd(matrices(m, n), full_matrices=False)
    return (u * sigma) @ vh[None]


def test_polar_express_is_the_published_one():
    torch.testing.assert_close(torch.tensor(polar_express(5)), torch.tensor(PUBLISHED), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("triples", "low", "high"),
    [
        (polar_express(5), 0.858, 1.142),
        (polar_express(6), 0.997, 1.003),
        (polar_express(8), 1, 1),
        ((MUON,) * 5, 0.47, 1.203),
    ],
)
def test_band(triples, low, high):
    assert band(triples) == pytest.approx((low, high), abs=2e-3)


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("polar", 5, "unknown Newton-Schulz coefficients 'polar'"),
        ("muon", 0, "steps=0"),
        ([(1, 2)], 1, "not a list of"),
    ],
)
def test_bad_coefficients(name, steps, message):
    with pytest.raises(EffpassError, match=message):
        coefficients(name, steps)


def test_bad_form():
    with pytest.raises(EffpassError, match="unknown Newton-Schulz form 'gramm', did you mean 'gram'"):
        NewtonSchulz(form="gramm")


@pytest.mark.parametrize("shape", [(24, 24), (16, 64), (64, 16), (5, 3), (1, 7)])
@pytest.mark.parametrize("form", ["standard", "gram", "torch"])
@pytest.mark.parametrize("name", ["muon", "polar_express"])
def test_all_forms_act_on_singular_values_alone(shape, form, name):
    x = matrices(3, *shape) * torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None]
    found = NewtonSchulz(name, form=form)(x)
    u, sigma, vh = torch.linalg.svd(x / torch.linalg.matrix_norm(x)[:, None, None], full_matrices=False)
    for a, b, c in coefficients(name, 5):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    # float64 through five quintics whose slopes multiply to about 1e3.
    torch.testing.assert_close(found, (u * sigma[:, None]) @ vh, rtol=0, atol=1e-10)


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_singular_values_of_half_precision_lie_in_the_band(form):
    sigma = torch.logspace(0, -2, 32, dtype=torch.float64)
    x = spectrum(32, 96, sigma / sigma.norm())
    assert (sigma / sigma.norm()).min() > 1e-3
    low, high = band(polar_express(5))
    values = torch.linalg.svdvals(NewtonSchulz(form=form, dtype=torch.float16)(x.float()).double())
    # float16 has 11 bits, and the first quintics enlarge rounding errors of small σ about thirtyfold.
    assert low - 0.03 < values.min()
    assert values.max() < high + 0.03


@pytest.mark.parametrize("form", ["standard", "gram", "torch"])
def test_zero_matrices_stay_zero(form):
    assert not NewtonSchulz(form=form)(torch.zeros(2, 4, 6)).any()


def test_no_matrices():
    assert NewtonSchulz()(torch.zeros(0, 4, 6)).shape == (0, 4, 6)


def test_the_squared_norm_may_be_given():
    x = matrices(2, 4, 6)
    given = NewtonSchulz()(x, x.square().sum((1, 2)))
    torch.testing.assert_close(given, NewtonSchulz()(x), rtol=1e-12, atol=1e-12)


def test_chunks_do_not_matter(monkeypatch):
    x = matrices(5, 4, 6)
    whole = NewtonSchulz()(x)
    monkeypatch.setattr("effpass.trainers.mona.newton_schulz.CHUNK", 2 * 24)
    torch.testing.assert_close(NewtonSchulz()(x), whole, rtol=1e-12, atol=1e-12)


def test_auto_takes_gram_where_matrices_are_elongated():
    assert NewtonSchulz().is_gram(96, 64)
    assert not NewtonSchulz().is_gram(95, 64)
    assert not NewtonSchulz(form="standard").is_gram(960, 64)
    assert not NewtonSchulz(steps=2).is_gram(960, 64)


def test_torchs_own_rounding():
    from torch.optim._muon import _zeropower_via_newtonschulz

    ours = NewtonSchulz("muon", form="torch", dtype=torch.bfloat16)
    for shape in ((24, 40), (40, 24), (32, 32)):
        x = matrices(1, *shape).float()
        theirs = _zeropower_via_newtonschulz(x[0], MUON, 5, 1e-7)
        assert (ours(x)[0] - theirs).norm() / theirs.norm() < 1e-3


@pytest.mark.parametrize("tall", [False, True])
def test_symmetric_product(tall):
    x = matrices(2, 5, 7)
    d = matrices(2, 7, 7) if tall else matrices(2, 5, 5)
    product = x.mT @ x if tall else x @ x.mT
    eye = torch.eye(product.shape[-1], dtype=torch.float64)
    found = symmetric_product(x, x, d, alpha=0.5, beta=2.0, gamma=3.0, tall=tall)
    torch.testing.assert_close(found, 0.5 * product + 2 * d + 3 * eye)
    torch.testing.assert_close(symmetric_product(x, x, tall=tall), product)


def test_symmetric_product_is_an_operator():
    x = matrices(2, 5, 7)
    d = x @ x.mT
    torch.library.opcheck(torch.ops.effpass.symmetric_product, (x, x, d, 0.5, 2.0, 3.0, False, torch.float64))
    torch.library.opcheck(torch.ops.effpass.symmetric_product, (x, x, None, 1.0, 0.0, 0.0, True, torch.float64))
    for tall in (False, True):
        with FlopCounterMode(display=False) as counter:
            torch.ops.effpass.symmetric_product(x, x, None, 1.0, 0.0, 0.0, tall, torch.float64)
        product = x.mT @ x if tall else x @ x.mT
        inner = x.shape[1] if tall else x.shape[2]
        assert counter.get_total_flops() == 2 * product.numel() * inner
