"""What `fuse_linears` recognizes, on programs of a few lines."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from product_programs import SCALE, WIDE, D, X, fused, llama_norm, reasons, weight

from effpass.lowering.ops import fused_linear as operators


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(operators, "has_kernel", lambda device, dtype, rows: True)


# -- the norm ---------------------------------------------------------------------------------------------------------


def olmo(x, w):
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (w * wide).to(x.dtype)


def gemma(x, w):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (wide * (1.0 + w.float())).type_as(x)


def gemma4(x, w):
    wide = x.float()
    return (wide * torch.pow(wide.pow(2).mean(-1, keepdim=True) + 1e-5, -0.5) * w.float()).type_as(x)


def idefics(x, w):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return w * (x * torch.rsqrt(variance + 1e-5)).to(w.dtype)


def square(x, w):
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(dim=2, keepdim=True) + 1e-5)).type_as(x) * w


def whole(x, w):
    return F.rms_norm(x, (D,), w, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("norm", [llama_norm, olmo, gemma, gemma4, idefics, square, whole])
def test_every_spelling_of_the_norm(norm, dtype):
    inputs = [t.to(dtype) for t in (X, SCALE, weight(WIDE, D), weight(8, D), torch.randn(8))]

    def attention(x, s, q, k, b):
        n = norm(x, s)
        return F.linear(n, q), F.linear(n, k, b)

    entry, (call,) = fused(attention, *inputs)
    assert (call["norm_eps"], call["norm_offset"]) == (1e-5, 1.0 if norm is gemma else 0.0)
    assert (call["x"].name, call["norm_weight"].name) == ("x_1", "s_1")
    assert [b and b.name for b in call["biases"]] == [None, "b_1"]
    assert entry.ops == {**entry.ops, "aten.linear.default": -2, "effpass.fused_linear.default": 1}
    assert entry.refusals == []


def layer_norm(x, w):
    return F.layer_norm(x, (D,), w)


def own_epsilon(x, w):
    """The machine's: of which type, depends on the version of torch."""
    return F.rms_norm(x, (D,), w)


def other_dimension(x, w):
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-5) * w


def cubed(x, w):
    return x * torch.rsqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-5) * w


def of_another(x, w):
    return (x + 1) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * w


@pytest.mark.parametrize("norm", [layer_norm, own_epsilon, other_dimension, cubed, of_another])
def test_what_is_no_such_norm(norm):
    entry, calls = fused(lambda x, s, w: F.linear(norm(x, s), w), X, SCALE, weight(WIDE, D))
    assert calls == []
    assert entry.refusals == []


def test_a_norm_that_is_read_elsewhere_stays():
    def layer(x, s, q, k):
        n = llama_norm(x, s)
        return F.linear(n, q), F.linear(n, k), n.sum()

    entry, (call,) = fused(layer, X, SCALE, weight(WIDE, D), weight(8, D))
    assert call["norm_weight"] is None
    assert str(call["x"].target) == "aten.mul.Tensor"
    assert reasons(entry) == ["the norm stays: its value is also read by sum_1"]


def test_a_norm_that_is_read_elsewhere_by_one_product_only():
    entry, calls = fused(lambda x, s, q: (F.linear(n := llama_norm(x, s), q), n.sum()), X, SCALE, weight(WIDE, D))
    assert calls == []
    assert reasons(entry) == ["the norm stays: its value is also read by sum_1"]


def test_a_norm_before_two_operators_goes_into_both():
    def parallel(x, s, q, k, gate, up):
        n = llama_norm(x, s)
        return F.linear(n, q), F.linear(n, k), F.silu(F.linear(n, gate)) * F.linear(n, up)

    entry, calls = fused(parallel, X, SCALE, *(weight(WIDE, D) for _ in range(4)))
    assert [call["norm_weight"].name for call in calls] == ["s_1", "s_1"]
    assert entry.ops["aten.rsqrt.default"] == -1


def test_the_last_position_is_chosen_before_the_norm():
    def head(x, s, w):
        return F.linear(llama_norm(x, s)[:, -1:], w)

    entry, (call,) = fused(head, X, SCALE, weight(WIDE, D))
    assert "aten.slice.Tensor" not in entry.ops, "one goes, one comes"
    assert call["x"].args[0].name == "x_1"
    assert call["norm_weight"].name == "s_1"
    assert call["x"].meta["val"].shape == (2, 1, D)


def test_features_are_not_chosen_before_the_norm():
    _, calls = fused(lambda x, s, w: F.linear(llama_norm(x, s)[..., :8], w), X, SCALE, weight(WIDE, 8))
    assert calls == []


# -- products ---------------------------------------------------------------------------------------------------------


def test_products_of_one_value_without_a_norm():
    _, (call,) = fused(lambda x, q, k: (F.linear(x, q), F.linear(x, k)), X, weight(WIDE, D), weight(8, D))
    assert call["norm_weight"] is None
    assert len(call["weights"]) == 2


def test_one_launch_reads_up_to_three_weights():
    weights = [weight(WIDE, D) for _ in range(5)]
    entry, calls = fused(lambda x, *w: [F.linear(x, each) for each in w], X, *weights)
    assert [len(call["weights"]) for call in calls] == [3, 2]
    assert entry.hits == 2


def test_a_tied_weight_is_read_at_each_use():
    _, (call,) = fused(lambda x, w: (F.linear(x, w), F.linear(x, w)), X, weight(WIDE, D))
    assert [w.name for w in call["weights"]] == ["w_1", "w_1"]


def test_a_product_by_itself_is_no_candidate():
    entry, calls = fused(lambda x, w: F.linear(x, w) * 2, X, weight(WIDE, D))
    assert (calls, entry.refusals) == ([], [])


def test_an_embedding_is_no_product():
    entry, calls = fused(lambda w, i: F.embedding(i, w), weight(WIDE, D), torch.tensor([[1, 2]]))
    assert (calls, entry.refusals) == ([], [])


# -- residuals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [True, False])
def test_a_residual(first):
    def layer(x, r, w, b):
        y = F.dropout(F.linear(x, w, b), 0.1, training=False)
        return r + y if first else y + r

    entry, (call,) = fused(layer, X, torch.randn(2, 3, WIDE), weight(WIDE, D), torch.randn(WIDE))
    assert call["residual"].name == "r_1"
    assert {**entry.ops, "getitem": 0} == {
        "aten.linear.default": -1,
        "aten.add.Tensor": -1,
        "aten.dropout.default": -1,
        "effpass.fused_linear.default": 1,
        "getitem": 0,
    }


def test_a_residual_and_a_norm_are_one_operator():
    _, (call,) = fused(lambda x, s, w: x + F.linear(llama_norm(x, s), w), X, SCALE, weight(D, D))
    assert (call["x"].name, call["residual"].name, call["norm_weight"].name) == ("x_1", "x_1", "s_1")


@pytest.mark.parametrize(
    "tail",
    [
        lambda y, r: y + r[:, :1],  # broadcast
        lambda y, r: y + 1.0,
        lambda y, r: y + y,
        lambda y, r: torch.add(y, r, alpha=2),
        lambda y, r: (y + r, y.sum()),
        lambda y, r: y + r.double(),
    ],
)
def test_what_is_no_residual(tail):
    _, calls = fused(lambda x, r, w: tail(F.linear(x, w), r), X, torch.randn(2, 3, WIDE), weight(WIDE, D))
    assert calls == []


def test_of_two_products_the_earlier_one_is_the_residual():
    def parallel(x, z, v, w):
        return z + (F.linear(x, v) + F.linear(z, w))

    _, (call,) = fused(parallel, X, X.roll(1), weight(D, D), weight(D, D))
    assert str(call["residual"].target) == "aten.linear.default"
    assert call["x"].name == "z_1"


def test_a_chain_of_layers():
    """Each operator's input is what the one before it computes; they are rewritten last first."""

    def stack(x, s, *weights):
        for q, k, o in zip(*[iter(weights)] * 3, strict=True):
            n = llama_norm(x, s)
            x = x + F.linear(F.linear(n, q) * F.linear(n, k), o)
        return x

    entry, calls = fused(stack, X, SCALE, *(weight(D, D) for _ in range(12)))
    assert entry.hits == 8
    assert [call["residual"] is None for call in calls] == [True, False] * 4
    assert entry.ops["aten.linear.default"] == -12


# -- gates ------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("up_first", [True, False])
@pytest.mark.parametrize("name", operators.ACTIVATIONS)
def test_a_gate(name, up_first):
    def layer(x, s, gate, up):
        n = llama_norm(x, s)
        if up_first:
            return F.linear(n, up) * ACTIVATIONS[name](F.linear(n, gate))
        return ACTIVATIONS[name](F.linear(n, gate)) * F.linear(n, up)

    _, (call,) = fused(layer, X, SCALE, weight(WIDE, D), weight(WIDE, D))
    assert (call["gate"].name, call["up"].name) == ("gate_1", "up_1")
    assert (call["activation"], call["norm_weight"].name) == (name, "s_1")


@pytest.mark.parametrize("gate_first", [True, False])
def test_a_gate_in_one_weight(gate_first):
    """Phi-3's: the halves are views of the weight."""

    def layer(x, w):
        gate, up = F.linear(x, w).chunk(2, dim=-1)
        return up * F.silu(gate) if gate_first else gate * F.silu(up)

    entry, (call,) = fused(layer, X, weight(2 * WIDE, D))
    bounds = [call[which].args[2:] for which in ("gate", "up")]
    assert bounds == [(0, WIDE), (WIDE, 2 * WIDE)][:: 1 if gate_first else -1]
    assert entry.flops == 0


@pytest.mark.parametrize(
    "tail",
    [
        lambda g, u: torch.tanh(g) * u,
        lambda g, u: F.silu(g) + u,
        lambda g, u: (F.silu(g) * u, g.sum()),
        lambda g, u: (F.silu(g) * u, u.sum()),
        lambda g, u: F.silu(g).square() * u,
        lambda g, u: F.silu(g) * F.silu(u),
    ],
)
def test_other_gates_are_two_products(tail):
    _, (call,) = fused(lambda x, g, u: tail(F.linear(x, g), F.linear(x, u)), X, weight(WIDE, D), weight(WIDE, D))
    assert len(call["weights"]) == 2


def test_a_gate_with_a_bias_is_two_products():
    _, (call,) = fused(
        lambda x, g, u, b: F.silu(F.linear(x, g, b)) * F.linear(x, u), X, weight(8, D), weight(8, D), torch.randn(8)
    )
    assert [b and b.name for b in call["biases"]] == ["b_1", None]


def test_gate_and_up_of_different_values_stay():
    _, calls = fused(
        lambda x, z, g, u: F.silu(F.linear(x, g)) * F.linear(z, u), X, X.roll(1), weight(WIDE, D), weight(WIDE, D)
    )
    assert calls == []
