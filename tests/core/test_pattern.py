"""Patterns in plain PyTorch: what matches, what is refused and why, and what stands there afterwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effpass.core.dynamo import program_from_dynamo
from effpass.core.errors import RewriteError
from effpass.core.exported import program_from_exported
from effpass.core.manager import PassManager
from effpass.core.pass_ import GraphPass, Match
from effpass.core.pattern import find_pattern
from effpass.core.report import Refusal

aten = torch.ops.aten


def make(pattern, replacement, *examples):
    """A pass from two functions."""

    class Made(GraphPass):
        name = "made"
        exact = True

        def example_inputs(self):
            return examples

    Made.pattern = staticmethod(pattern)
    Made.replacement = staticmethod(replacement)
    return Made()


class Function(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def exported(fn, *args, dynamic=None):
    return program_from_exported(torch.export.export(Function(fn), args, dynamic_shapes=dynamic))


def compiled(fn, *args, dynamic=None):
    """The program that Dynamo's graph gives."""
    programs = []

    def backend(gm, inputs):
        programs.append(program_from_dynamo(gm, inputs))
        return gm.forward

    torch.compile(fn, backend=backend, dynamic=dynamic)(*args)
    (program,) = programs
    return program


def found(pass_, program):
    matches = [m for m in pass_.find(program) if isinstance(m, Match)]
    refusals = [m for m in pass_.find(program) if isinstance(m, Refusal)]
    return matches, refusals


def rms_norm(x, weight, eps):
    hidden = x.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)
    return weight * hidden.to(x.dtype)


class RMSNorm(GraphPass):
    """As a person would write it."""

    name = "rms_norm"
    exact = True

    def pattern(self, x, weight, eps):
        return rms_norm(x, weight, eps)

    def replacement(self, x, weight, eps):
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def example_inputs(self):
        return torch.ones(2, 3), torch.ones(3), torch.ones(())


RMS = RMSNorm()
SQUARE = make(lambda x: x * x, lambda x: x.square(), torch.ones(3))
SUM3 = make(lambda a, b, c: a + b + c, lambda a, b, c: torch.add(a, torch.add(b, c)), *[torch.ones(3)] * 3)


def norms(x, v, w):
    x = x * 2
    return x + rms_norm(rms_norm(x, v, 1e-5) + 1, w, 1e-6)


@pytest.mark.parametrize("front", [exported, compiled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_place_is_rewritten_and_the_numbers_stay(front, dtype):
    x, v, w = torch.randn(5, 7, 8).to(dtype), torch.rand(8).to(dtype), torch.rand(8).to(dtype)
    program = front(norms, x, v, w)
    report = PassManager([RMS]).run(program)
    assert report.hits == 2
    expected = {"aten.rms_norm.default": 2, "aten.add.Tensor": 2, "aten.mul.Tensor": 1}
    # A cast of float32 to float32 is x itself, and the residual reads it under either name.
    assert {op: n for op, n in program.op_counts().items() if op != "aten.to.dtype"} == expected
    literals = [n.args[3] for n in program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)]
    assert literals == [1e-5, 1e-6], "a number where a tensor could stand reaches the replacement as it is"
    (result,) = torch.utils._pytree.tree_leaves(program.gm(x, v, w))
    # bfloat16 keeps 8 bits: the two forms round once more or once less, on two norms in a row.
    tolerance = 1e-6 if dtype is torch.float32 else 2 * 2**-7
    torch.testing.assert_close(result, norms(x, v, w), rtol=tolerance, atol=tolerance)


def test_new_nodes_have_values_and_the_provenance_of_the_old():
    program = compiled(norms, torch.randn(4, 8), torch.rand(8), torch.rand(8), dynamic=True)
    old = next(m.anchor for m in RMS.find(program))
    trace, shape = old.meta["stack_trace"], old.meta["val"].shape
    PassManager([RMS]).run(program)
    new = program.graph.find_nodes(op="call_function", target=aten.rms_norm.default)[1]
    assert new.meta["val"].shape == shape
    assert isinstance(new.meta["val"].shape[0], torch.SymInt)
    assert new.meta["stack_trace"] == trace


@pytest.mark.parametrize("front", [exported, compiled])
def test_a_match_may_read_another_match(front):
    x = torch.rand(3)
    program = front(lambda x: ((x * x) * (x * x)) * 3, x)
    assert program.op_counts() == {"aten.mul.Tensor": 4}
    # The two inner squares are two values, so their product is no square.
    assert PassManager([SQUARE]).run(program).hits == 2
    chain = front(lambda x: (lambda y: (lambda z: z * z)(y * y))(x * x), x)
    assert PassManager([SQUARE]).run(chain).hits == 3
    assert chain.op_counts() == {"aten.square.default": 3}
    torch.testing.assert_close(torch.utils._pytree.tree_leaves(chain.gm(x))[0], x**8)


def test_matches_do_not_overlap():
    args = [torch.rand(3) for _ in range(4)]
    program = exported(lambda a, b, c, d: a + b + c + d, *args)
    matches, refusals = found(SUM3, program)
    assert [m.anchor.name for m in matches] == ["add_2"]
    assert [str(r) for r in refusals] == ["add_1: overlaps the match at add_2"]
    assert PassManager([SUM3]).run(program).hits == 1
    torch.testing.assert_close(program.gm(*args)[0], sum(args))


def test_both_orders_of_a_product_and_of_a_sum():
    swish = make(lambda x, y: F.silu(x) * y + 1, lambda x, y: F.silu(x) * y + 1, torch.ones(2, 3), torch.ones(2, 3))
    program = exported(lambda x, y: y * F.silu(x) + 1, torch.ones(2), torch.ones(2))
    (match,) = swish.find(program)
    assert {k: n.name for k, n in match.nodes.items()} == {"x": "args_0", "y": "args_1"}
    difference = make(lambda x, y: F.silu(x) - y, lambda x, y: F.silu(x) - y, torch.ones(3), torch.ones(3))
    matches, _ = found(difference, exported(lambda x, y: y - F.silu(x), torch.ones(2), torch.ones(2)))
    assert matches == []


def test_an_argument_used_twice_must_be_one_value():
    matches, refusals = found(SQUARE, exported(lambda x, y: x * y, torch.ones(2), torch.ones(2)))
    assert matches == []
    assert [r.reason for r in refusals] == ["args_1 where the pattern reads args_0 again"]


def test_an_inner_value_that_is_read_elsewhere_is_a_refusal():
    def fn(x, v):
        hidden = x.to(torch.float32)
        scale = torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        return v * (hidden * scale).to(x.dtype), scale

    program = exported(fn, torch.ones(2, 4), torch.ones(4))
    before = program.op_counts()
    matches, refusals = found(RMS, program)
    assert matches == []
    assert [str(r) for r in refusals] == ["mul_1: its inner value rsqrt is also read by output"]
    report = PassManager([RMS]).run(program)
    assert report.hits == 0
    assert program.op_counts() == before
    assert "its inner value rsqrt is also read by output" in report.lines()[0]


def test_another_literal_is_a_refusal_with_both():
    cube = make(lambda x: x.pow(3).sum(-1), lambda x: x.pow(3).sum(-1), torch.ones(2, 3))
    _, refusals = found(cube, exported(lambda x: x.pow(2).sum(-1), torch.ones(2, 3)))
    assert [str(r) for r in refusals] == ["sum_1: 2 where the pattern has 3"]


def test_the_closest_place_is_named_when_nothing_matches():
    def mean_of_magnitudes(x, v, w):
        hidden = x.to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.abs().mean(-1, keepdim=True) + 1e-6)
        return v * hidden.to(x.dtype) + x * w

    x, w = torch.ones(2, 4).bfloat16(), torch.ones(4).bfloat16()
    _, refusals = found(RMS, exported(mean_of_magnitudes, x, w, w))
    (refusal,) = refusals
    assert refusal.node == "mul_1"
    assert refusal.reason.startswith(
        "7 of the pattern's 8 operators fit; abs_1 = aten.abs.default where the pattern has "
    )
    _, refusals = found(RMS, exported(lambda x, w: x * w, torch.ones(2, 4), torch.ones(4)))
    assert refusals == [], "one operator of eight is no near miss"


def heads(x):
    return x.view(x.shape[0], -1, 2, x.shape[2] // 2).sum(-1) * x.shape[2] ** -0.5


@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_are_compared_by_value(dynamic):
    split = make(heads, heads, torch.ones(2, 3, 4))
    program = compiled(heads, torch.ones(5, 6, 8), dynamic=dynamic)
    matches, refusals = found(split, program)
    assert (len(matches), refusals) == (1, [])
    assert PassManager([split]).run(program).hits == 1

    def other(x):  # three parts of the last size instead of two
        return x.view(x.shape[0], -1, 2, x.shape[2] // 4).sum(-1) * x.shape[2] ** -0.5

    matches, refusals = found(split, compiled(other, torch.ones(5, 6, 8), dynamic=dynamic))
    assert matches == []
    assert "where the pattern has" in refusals[0].reason


def test_arguments_have_one_dtype_unless_the_examples_differ():
    """A pattern traced for float32 must not fit bfloat16, where the same operators round elsewhere."""

    def bare(x, w, eps):
        return w * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))

    x, w = torch.ones(2, 4), torch.ones(4)
    mixed = exported(lambda x, w, y: (bare(x, w, 1e-6), y + 1), x.bfloat16(), w.bfloat16(), x)
    assert found(RMS, mixed)[0] == []
    assert len(found(RMS, exported(lambda x, w: bare(x, w, 1e-6), x, w))[0]) == 1, "in float32 the casts are nothing"
    scale = make(lambda x, s: torch.relu(x).float() * s, lambda x, s: torch.relu(x).float() * s, w.half(), w)
    relu = exported(lambda x, s: torch.relu(x).float() * s, w.half(), w)
    assert len(found(scale, relu)[0]) == 1
    assert found(scale, exported(lambda x, s: torch.relu(x).float() * s, w.bfloat16(), w))[0] == []


def test_a_program_of_static_sizes_has_literals():
    scaled = make(
        lambda q, k: (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5,
        lambda q, k: (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5,
        torch.ones(2, 3),
        torch.ones(4, 3),
    )
    assert len(found(scaled, exported(lambda q, k: (q @ k.mT) * 0.25, torch.ones(2, 16), torch.ones(4, 16)))[0]) == 0
    same = exported(lambda q, k: (q @ k.transpose(-1, -2)) * 0.25, torch.ones(2, 16), torch.ones(4, 16))
    assert len(found(scaled, same)[0]) == 1
    wrong = exported(lambda q, k: (q @ k.transpose(-1, -2)) * 0.25, torch.ones(2, 8), torch.ones(4, 8))
    _, refusals = found(scaled, wrong)
    assert refusals[0].reason.startswith("0.25 where the pattern has 0.353553")


def test_no_read_moves_across_a_write():
    double = make(lambda x: torch.relu(x) * 2, lambda x: torch.relu(x * 2), torch.ones(3))

    def between(x):
        first = torch.relu(x)
        x.add_(1)
        return first * 2

    def after(x):
        x.add_(1)
        return torch.relu(x) * 2

    program = compiled(between, torch.ones(3))
    matches, refusals = found(double, program)
    assert matches == []
    assert "is written between its read by relu and" in refusals[0].reason
    assert PassManager([double]).run(compiled(after, torch.ones(3))).hits == 1


def test_no_match_across_the_border_of_no_grad():
    double = make(lambda x: torch.relu(x) * 2, lambda x: torch.relu(x * 2), torch.ones(3))

    def across(x):
        with torch.no_grad():
            first = torch.relu(x)
        return first * 2

    def inside(x):
        with torch.no_grad():
            first = torch.relu(x) * 2
        return first + x

    _, refusals = found(double, compiled(across, torch.ones(3, requires_grad=True)))
    assert refusals[0].reason.endswith("lies inside: a border of no_grad or autocast")
    assert PassManager([double]).run(compiled(inside, torch.ones(3, requires_grad=True))).hits == 1


def test_what_only_the_match_needed_is_gone_random_operators_too():
    dropped = make(lambda x: F.dropout(x, 0.5, True) * 2, lambda x: F.dropout(x * 2, 0.5, True), torch.ones(3))
    program = compiled(lambda x: F.dropout(x, 0.5, True) * 2, torch.ones(3))
    assert PassManager([dropped]).run(program).hits == 1
    assert program.op_counts() == {"aten.mul.Tensor": 1, "aten.dropout.default": 1}


def test_a_replacement_that_is_another_kind_of_tensor_is_our_error():
    halved = make(lambda x: torch.relu(x) * 2, lambda x: (torch.relu(x) * 2).half(), torch.ones(3))
    with pytest.raises(
        RewriteError, match=r"made: its replacement gives float16 \[3\] on cpu, its pattern float32 \[3\]"
    ):
        PassManager([halved]).run(compiled(lambda x: torch.relu(x) * 2, torch.ones(3)))
    pair = make(lambda x: torch.relu(x) * 2, lambda x: (x, x), torch.ones(3))
    with pytest.raises(RewriteError, match="its replacement gives"):
        PassManager([pair]).run(compiled(lambda x: torch.relu(x) * 2, torch.ones(3)))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (lambda x, y: x + y, r"takes 2 arguments and example_inputs\(\) gives 1"),
        (lambda x: x, "it must return one computed tensor"),
        (lambda x: (x + 1, x + 2), "it must return one computed tensor"),
        (lambda x: x.add_(1), "writes in place"),
        (lambda x: torch.ones(3) * x.shape[0], "does not compute with its argument 'x'"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0]), "holds a constant"),
        (lambda x: x.reshape(-1, 7), "can't be traced"),
    ],
)
def test_a_pattern_that_is_none(pattern, message):
    pass_ = make(pattern, pattern, torch.ones(3))
    with pytest.raises(RewriteError, match=f"pass made: its pattern .*{message}") as caught:
        list(pass_.find(compiled(lambda x: x + 1, torch.ones(3))))
    assert caught.value.hint == "this is a fault of the pass, not of the model"


def test_operands_trade_places_unless_a_factor_is_one_s_own():
    plain = make(lambda x, y: x + y.exp(), lambda x, y: x.exp() + y, torch.ones(3), torch.ones(3))
    scaled = make(lambda x, y: torch.add(x, y.exp(), alpha=2), lambda x, y: x + y, torch.ones(3), torch.ones(3))
    one, other = torch.ones(3), torch.ones(3)
    for pass_, fn, hits in (
        (plain, lambda x, y: y.exp() + x, 1),
        (scaled, lambda x, y: torch.add(x, y.exp(), alpha=2), 1),
        (scaled, lambda x, y: torch.add(y.exp(), x, alpha=2), 0),
    ):
        assert len(found(pass_, exported(fn, one, other))[0]) == hits


def test_whole_numbers_alone():
    twice = make(lambda x: (x + x) // 2, lambda x: x * 1, torch.ones(3, dtype=torch.int64))
    program = exported(lambda x: (x + x) // 2, torch.arange(4))
    assert PassManager([twice]).run(program).hits == 1
    assert torch.equal(program.gm(torch.arange(4))[0], torch.arange(4))


def test_a_pattern_is_of_the_device_that_most_values_are_on():
    """A length on the CPU is the first value of many a program on a GPU."""
    seen = []

    def pattern(x):
        seen.append(x.device.type)
        return torch.relu(x) + 1

    program = exported(lambda n, x: (torch.relu(x * 2) + 1, n + 1), torch.tensor(3), torch.randn(4))
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() == 1:
            node.meta["val"] = value.to("meta")
    list(find_pattern(make(pattern, lambda x: x, torch.randn(3)), program))
    assert seen == ["meta"]
