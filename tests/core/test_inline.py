"""Plain PyTorch put into a program."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.core.inline import inline
from effpass.core.program import Program

aten = torch.ops.aten


def program_of(fn, *inputs) -> Program:
    gm = make_fx(fn, tracing_mode="symbolic", pre_dispatch=True)(*inputs)
    return Program(gm, "dynamo", {}, list(inputs))


def replace_output(program: Program, fn, inputs) -> None:
    with program.graph.inserting_before(program.graph.output_node()):
        new = inline(program, fn, inputs)
    program.graph.output_node().args = (new,)
    program.recompile()


def test_nodes_values_and_sizes():
    program = program_of(lambda x, y: x @ y, torch.randn(3, 4), torch.randn(4, 5))
    x, y = program.graph.find_nodes(op="placeholder")
    guards = len(program.fake_mode().shape_env.guards)
    replace_output(program, lambda x, y: {"sum": torch.relu(x) @ y, "scale": 2}, [x, y])
    assert program.op_counts() == {"aten.relu.default": 1, "aten.matmul.default": 1}
    (product,) = program.graph.find_nodes(op="call_function", target=aten.matmul.default)
    assert [str(s) for s in product.meta["val"].shape] == [str(x.meta["val"].shape[0]), str(y.meta["val"].shape[1])]
    assert len(program.fake_mode().shape_env.guards) == guards
    a, b = torch.randn(6, 4), torch.randn(4, 2)
    out = program.gm(a, b)
    torch.testing.assert_close(out["sum"], torch.relu(a) @ b)
    assert out["scale"] == 2


def test_two_nodes_with_one_value_stay_two():
    program = program_of(lambda x, y: x - y, torch.randn(3), torch.randn(3))
    x, y = program.graph.find_nodes(op="placeholder")
    y.meta["val"] = x.meta["val"]
    replace_output(program, lambda x, y: 2 * x - y, [x, y])
    assert torch.equal(program.gm(torch.ones(3), torch.zeros(3)), torch.full((3,), 2.0))


def test_a_node_given_twice():
    program = program_of(lambda x: x + 1, torch.randn(3))
    (x,) = program.graph.find_nodes(op="placeholder")
    replace_output(program, lambda a, b: a * b, [x, x])
    assert torch.equal(program.gm(torch.full((3,), 3.0)), torch.full((3,), 9.0))


def test_a_size_as_an_input():
    program = program_of(lambda x: x.new_zeros(x.shape[0] + 1), torch.randn(3))
    (x,) = program.graph.find_nodes(op="placeholder")
    size = next(n for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt))
    replace_output(program, lambda x, n: x * n, [x, size])
    assert torch.equal(program.gm(torch.ones(5)), torch.full((5,), 5.0))


def test_gradients_go_through():
    program = program_of(lambda x: x + 1, torch.randn(3, requires_grad=True))
    program.grad_enabled = True
    (x,) = program.graph.find_nodes(op="placeholder")
    replace_output(program, lambda x: (x * x).sum(), [x])
    given = torch.randn(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(program.gm(given), given)
    torch.testing.assert_close(gradient, 2 * given)


def test_a_tensor_constant_is_refused():
    program = program_of(lambda x: x + 1, torch.randn(3))
    (x,) = program.graph.find_nodes(op="placeholder")
    constant = torch.arange(3.0)
    program.fake_mode().allow_non_fake_inputs = True  # as in both front ends
    with pytest.raises(ValueError, match=r"holds a tensor constant .*; pass tensors as inputs"):
        replace_output(program, lambda x: x * constant, [x])
