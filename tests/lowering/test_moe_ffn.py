"""`effpass::moe_ffn` against float64, pair by pair: values, gradients, what it counts, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from moe_reference import GATES, error, layer, moe_ffn
from torch.utils.flop_counter import FlopCounterMode

import effpass.lowering.ops.moe_ffn_backward  # noqa: F401  (registers the operator)
from effpass.core.errors import EffpassError
from effpass.lowering.ops.moe_ffn import TOLERANCE

op = torch.ops.effpass.moe_ffn

LOADS = {
    "one token": ((1, 2, 5, 24, 16), {}),
    "experts without tokens": ((3, 1, 16, 24, 16), {"biases": True}),
    "experts that are not here": ((17, 3, 4, 24, 16), {"absent": 4, "biases": True}),
    "all to one expert": ((9, 2, 4, 24, 16), {"skewed": True}),
    "transposed weights": ((9, 2, 4, 24, 16), {"transposed": True, "biases": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize("gate", GATES)
def test_against_float64(gate, load, dtype):
    sizes, how = LOADS[load]
    made = [*layer(*sizes, **how, dtype=dtype), *GATES[gate]]
    out, kept = op(*made, False)
    assert out.dtype == dtype
    assert kept.shape == (0,)
    assert error(out, moe_ffn(*made)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_routing_weights_of_either_type(weights_dtype):
    """Mixtral's are float32 beside a model in bfloat16, Qwen's bfloat16: the sum over experts is float32 for both."""
    made = [*layer(12, 4, 8, 64, 32, dtype=torch.bfloat16, weights_dtype=weights_dtype), *GATES["SwiGLU"]]
    out, _ = op(*made, False)
    assert out.dtype == torch.bfloat16
    assert error(out, moe_ffn(*made)) <= TOLERANCE[torch.bfloat16]


def test_no_tokens_and_no_local_expert():
    made = layer(0, 2, 4, 24, 16)
    assert op(*made, *GATES["SwiGLU"], False)[0].shape == (0, 24)
    made = layer(5, 2, 4, 24, 16)
    made[1].add_(4)
    made[2].fill_(torch.inf)  # 0 · ∞ would be NaN
    assert torch.equal(op(*made, *GATES["SwiGLU"], False)[0], torch.zeros(5, 24))


def test_equal_bits_and_order_of_the_sum():
    made = layer(40, 4, 8, 64, 32, dtype=torch.bfloat16)
    out, _ = op(*made, *GATES["SwiGLU"], False)
    assert torch.equal(op(*made, *GATES["SwiGLU"], False)[0], out)
    made[1], made[2] = made[1].to(torch.int32), made[2]
    assert torch.equal(op(*made, *GATES["SwiGLU"], False)[0], out)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_gradients(gate, keep):
    made = layer(5, 2, 3, 6, 4, biases=True, absent=1, transposed=gate == "GPT-OSS", dtype=torch.float64)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in made]
    assert torch.autograd.gradcheck(lambda *t: op(*t, *GATES[gate], keep)[0], leaves)


def test_gradients_that_nobody_asks_for_are_not_computed():
    """An adapter trains beside frozen experts: only the products that lead to x remain, one for each weight."""
    x, *rest = layer(6, 2, 4, 24, 16)
    x.requires_grad_()
    with FlopCounterMode(display=False) as counter:
        op(x, *rest, *GATES["SwiGLU"], True)[0].sum().backward()
    layer_flops = 2 * 6 * 2 * 24 * (2 * 16 + 16)
    assert counter.get_total_flops() == 2 * layer_flops  # forward, and back to x
    assert all(t is None or t.grad is None for t in rest)


@pytest.mark.parametrize(("keep", "products"), [(True, 9), (False, 11)])
def test_flops(keep, products):
    """In units of the second product: forward 2 + 1, backward twice that, and 2 more where it projects again."""
    made = layer(6, 2, 4, 24, 16)
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in made]
    with FlopCounterMode(display=False) as counter:
        op(*leaves, *GATES["SwiGLU"], keep)[0].sum().backward()
    assert counter.get_total_flops() == products * 2 * 6 * 2 * 24 * 16


@pytest.mark.parametrize("keep", [True, False])
def test_opcheck(keep):
    made = layer(7, 2, 4, 24, 16, biases=True)
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in made]
    torch.library.opcheck(op.default, (*leaves, *GATES["GPT-OSS"], keep))


def test_opcheck_of_the_gradients():
    made = layer(7, 2, 4, 24, 16, biases=True)
    needed = [True, True, True, False, True, False]
    torch.library.opcheck(
        torch.ops.effpass.moe_ffn_backward.default, (torch.randn(7, 24), *made, None, *GATES["GPT-OSS"], needed)
    )


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (0, torch.zeros(5, 25), r"x is \(5, 25\), gate_up \(4, 32, 24\) and down \(4, 24, 16\)"),
        (1, torch.zeros(6, 2, dtype=torch.int64), r"x is \(5, 24\), experts \(6, 2\), weights \(5, 2\)"),
        (1, torch.full((5, 2), -1), "expert id -1"),
        (3, torch.zeros(4, 30, 24), r"gate_up \(4, 30, 24\) and down \(4, 24, 16\)"),
        (3, torch.zeros(32, 24), r"gate_up is \(32, 24\)"),
        (4, torch.zeros(4, 16), r"a bias is \(4, 16\), expected \(4, 32\)"),
        (5, torch.zeros(4, 24, 16, dtype=torch.bfloat16), "x is float32 and the experts bfloat16, float32"),
        (7, "swish", "activation 'swish'; known: gelu, gelu_tanh, relu, silu"),
    ],
)
def test_refusals(place, value, message):
    made = [*layer(5, 2, 4, 24, 16), *GATES["SwiGLU"], False]
    made[place] = value
    with pytest.raises(EffpassError, match=message):
        op(*made)


def test_alpha_belongs_to_silu():
    with pytest.raises(EffpassError, match=re.escape("alpha is 2.0 and the activation 'relu'")):
        op(*layer(5, 2, 4, 24, 16), "relu", 2.0, 0.0, 0.0, False, False)


# -- ONNX -------------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, made, gate):
        super().__init__()
        self.gate = gate
        for name, value in zip(("gate_up", "gate_up_bias", "down", "down_bias"), made[3:], strict=True):
            self.register_buffer(name, value)

    def forward(self, x, ids, weights):
        tensors = (x, ids, weights, self.gate_up, self.gate_up_bias, self.down, self.down_bias)
        return op(*tensors, *self.gate, False)[0]


@pytest.mark.parametrize("gate", GATES)
def test_its_onnx_body(gate):
    runtime = pytest.importorskip("onnxruntime")
    onnx_ir = pytest.importorskip("onnx_ir")
    from effpass.lowering.targets.onnx_translate import translate

    made = layer(7, 2, 4, 24, 16, biases=gate == "GPT-OSS", transposed=gate == "GPT-OSS", absent=1)
    model, tokens = Layer(made, GATES[gate]), torch.export.Dim("T", min=1, max=64)
    program = torch.export.export(model, tuple(made[:3]), dynamic_shapes=({0: tokens},) * 3)
    proto = onnx_ir.to_proto(translate(program, None, None, {}))
    session = runtime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    for count in (7, 1):
        inputs = [t[:count] for t in made[:3]]
        (out,) = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
        torch.testing.assert_close(torch.from_numpy(out), model(*inputs), rtol=1e-5, atol=1e-5)
