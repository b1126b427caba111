"""The checks on a pass's result: what they catch, and what they leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import effpass.lowering.ops.cached_attention  # noqa: F401  (registers effpass::cache_write)
from effpass.backend import reports
from effpass.core.errors import RewriteError
from effpass.core.inline import inline
from effpass.core.program import Program
from effpass.core.verify import snapshot, verify

aten = torch.ops.aten


def program_of(fn: Callable[..., object], *inputs: torch.Tensor, symbolic: bool = False) -> Program:
    gm = make_fx(fn, tracing_mode="symbolic" if symbolic else "fake", pre_dispatch=True)(*inputs)
    return Program(gm, "dynamo", {}, list(inputs))


def attend(cache: torch.Tensor, at: torch.Tensor, key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A static cache: write the new key in place, then read all of them."""
    all_keys = cache.detach()
    cache.index_copy_(1, at, key)
    return query @ all_keys.transpose(1, 2)


INPUTS = (torch.zeros(2, 8, 4), torch.tensor([3]), torch.randn(2, 1, 4), torch.randn(2, 1, 4))


def node(program: Program, target: object, index: int = 0) -> torch.fx.Node:
    return program.graph.find_nodes(op="call_function", target=target)[index]


def checked(program: Program, edit: Callable[[Program], object]) -> None:
    before = snapshot(program)
    edit(program)
    verify(program, before, "toy")


# -- the interface --------------------------------------------------------------------------------------------------


def test_a_removed_input():
    program = program_of(lambda x, y: x + 1, torch.ones(2), torch.ones(2))
    unused = program.graph.find_nodes(op="placeholder")[1]
    with pytest.raises(RewriteError, match=rf"pass toy removed inputs of the graph: \['{unused.name}'\]"):
        checked(program, lambda p: p.graph.erase_node(unused))


def test_reordered_inputs():
    program = program_of(lambda x, y: x + y, torch.ones(2), torch.ones(2))
    first, second = program.graph.find_nodes(op="placeholder")
    with pytest.raises(RewriteError, match="pass toy reordered the inputs"):
        checked(program, lambda p: second.append(first))


def test_an_input_in_front_of_the_others():
    """The wrapper appends derived weights, so they come last."""

    def edit(program):
        with program.graph.inserting_before(next(iter(program.graph.nodes))):
            program.graph.placeholder("new")

    program = program_of(lambda x: x + 1, torch.ones(2))
    with pytest.raises(RewriteError, match="reordered the inputs"):
        checked(program, edit)


def test_an_appended_input_is_fine():
    program = program_of(lambda x: x + 1, torch.ones(2))
    checked(program, lambda p: p.add_input("derived", torch.ones(2), None))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: (n, n), "changed the number of outputs from 1 to 2"),
        (lambda n: (), "changed the number of outputs from 1 to 0"),
        (lambda n: (n.args[0],), r"changed output 0 from \(\(3, 2\), torch.float32\) to \(\(2, 3\), torch.float32\)"),
        (lambda n: (None,), "changed output 0 from .* to None"),
    ],
)
def test_other_outputs(returned, message):
    program = program_of(lambda x: (x.t().contiguous(),), torch.ones(2, 3))
    (output,) = program.graph.find_nodes(op="output")
    transposed = node(program, aten.t.default)

    def edit(program):
        output.args = (returned(transposed),)

    with pytest.raises(RewriteError, match=message):
        checked(program, edit)


def test_another_dtype():
    program = program_of(lambda x: x + 1, torch.ones(2))
    add = node(program, aten.add.Tensor)

    def edit(program):
        with program.graph.inserting_before(program.graph.output_node()):
            half = inline(program, lambda x: x.half(), [add])
        program.graph.output_node().args = (half,)

    with pytest.raises(RewriteError, match=r"changed output 0 from \(\(2,\), torch.float32\) to .*float16"):
        checked(program, edit)


def test_a_node_without_a_value():
    program = program_of(lambda x: x + 1, torch.ones(2))
    add = node(program, aten.add.Tensor)

    def edit(program):
        with program.graph.inserting_after(add):
            new = program.graph.call_function(aten.relu.default, (add,))
        add.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        with program.graph.inserting_before(new):
            program.graph.call_function(aten.neg.default, (add,))
        new.meta["val"] = add.meta["val"]

    with pytest.raises(RewriteError, match=r"new node %neg.* has no value in meta\['val'\]"):
        checked(program, edit)


def test_a_malformed_graph():
    program = program_of(lambda x: (x + 1) * 2, torch.ones(2))
    with pytest.raises(RewriteError, match="pass toy left a malformed graph"):
        checked(program, lambda p: node(p, aten.mul.Tensor).append(node(p, aten.add.Tensor)))


# -- reads and writes -----------------------------------------------------------------------------------------------


def test_a_read_moved_before_the_write():
    program = program_of(attend, *INPUTS)

    def edit(program):
        write, view, read = (
            node(program, t) for t in (aten.index_copy_.default, aten.transpose.int, aten.matmul.default)
        )
        write.prepend(view)
        write.prepend(read)

    with pytest.raises(RewriteError, match=r"pass toy moved the read of \w+ by matmul across a write: it came after 1"):
        checked(program, edit)


def test_a_view_may_move():
    """It reads nothing; what reads through it stays."""
    program = program_of(attend, *INPUTS)
    checked(program, lambda p: node(p, aten.index_copy_.default).prepend(node(p, aten.transpose.int)))


def test_a_new_read_before_the_write():
    program = program_of(attend, *INPUTS)
    cache, _, _, query = program.graph.find_nodes(op="placeholder")
    write, old = node(program, aten.index_copy_.default), node(program, aten.matmul.default)

    def replace(program, at):
        with program.graph.inserting_before(at):
            new = inline(program, lambda c, q: torch.bmm(q, c.transpose(1, 2)), [cache, query])
        old.replace_all_uses_with(new)
        program.graph.erase_node(old)

    with pytest.raises(RewriteError, match=r"reads \w+ across a write: new node bmm comes after 0 of its writes"):
        checked(program, lambda p: replace(p, write))


def test_a_new_read_in_the_old_place_is_fine():
    program = program_of(attend, *INPUTS)
    cache, _, _, query = program.graph.find_nodes(op="placeholder")
    old = node(program, aten.matmul.default)

    def edit(program):
        with program.graph.inserting_before(old):
            new = inline(program, lambda c, q: torch.bmm(q, c.transpose(1, 2)), [cache, query])
        old.replace_all_uses_with(new)
        program.graph.erase_node(old)

    checked(program, edit)


def test_reordered_writes():
    def twice(x, y):
        x.add_(y)
        x.mul_(2)
        return x + 0

    program = program_of(twice, torch.ones(2), torch.ones(2))
    add, multiply = node(program, aten.add_.Tensor), node(program, aten.mul_.Tensor)
    multiply.replace_input_with(add, add.args[0])
    multiply.replace_all_uses_with(add.args[0])
    with pytest.raises(RewriteError, match=r"reordered writes to \w+: \['add_', 'mul_'\] became \['mul_', 'add_'\]"):
        checked(program, lambda p: add.prepend(multiply))


def test_a_removed_write():
    program = program_of(attend, *INPUTS)
    write = node(program, aten.index_copy_.default)
    write.replace_all_uses_with(write.args[0])
    with pytest.raises(RewriteError, match=r"removed or reordered writes to \w+: \['index_copy_'\] became \[\]"):
        checked(program, lambda p: p.graph.erase_node(write))


def test_an_added_write():
    program = program_of(lambda x: x + 1, torch.ones(2))
    x, add = next(iter(program.graph.nodes)), node(program, aten.add.Tensor)

    def edit(program):
        with program.graph.inserting_after(add):
            program.graph.call_function(aten.zero_.default, (x,)).meta["val"] = x.meta["val"]

    with pytest.raises(RewriteError, match=r"added writes to \w+: \['zero__default'\]"):
        checked(program, edit)


def test_a_write_through_a_piece_counts():
    def pieces(x):
        first, second = x.split(1)
        first.add_(1)
        return x.sum() + second.sum()

    program = program_of(pieces, torch.ones(2, 2))
    whole = node(program, aten.sum.default)
    with pytest.raises(RewriteError, match="moved the read of x_1 by sum_1 across a write"):
        checked(program, lambda p: node(p, aten.add_.Tensor).prepend(whole))


def test_a_copy_that_may_be_a_view_reads_where_it_is():
    def reshaped(x, y):
        x.add_(y)
        return x.t().reshape(-1) * 2

    program = program_of(reshaped, torch.ones(2, 3), torch.ones(2, 3))

    def edit(program):
        write = node(program, aten.add_.Tensor)
        for target in (aten.t.default, aten.reshape.default):
            moved = node(program, target)
            moved.replace_input_with(write, write.args[0])
            write.prepend(moved)

    with pytest.raises(RewriteError, match="moved the read of x_1 by reshape across a write"):
        checked(program, edit)


def test_a_buffer_of_the_program_may_go_with_its_writes():
    """An expert loop that accumulates into zeros becomes one operator."""

    def loop(x, at):
        total = torch.zeros(4, 2)
        total.index_add_(0, at, x)
        return total * 1

    program = program_of(loop, torch.ones(2, 2), torch.tensor([0, 2]))
    x, at = program.graph.find_nodes(op="placeholder")
    zeros, write, read = (node(program, t) for t in (aten.zeros.default, aten.index_add_.default, aten.mul.Tensor))

    def edit(program):
        with program.graph.inserting_before(read):
            new = inline(program, lambda x, i: torch.nn.functional.one_hot(i, 4).t().float() @ x, [x, at])
        read.replace_all_uses_with(new)
        for old in (read, write, zeros):
            program.graph.erase_node(old)

    checked(program, edit)


# -- declared writes --------------------------------------------------------------------------------------------------


def rewrite_write(program: Program, at: torch.fx.Node, cache: torch.fx.Node | None = None) -> torch.fx.Node:
    """The program's write, done by another operator that stands before `at`; the old one is left without readers."""
    old = node(program, aten.index_copy_.default)
    into, _, where, source = old.args
    with program.graph.inserting_before(at):
        new = program.graph.call_function(aten.index_put_.default, (cache or into, [None, where], source))
    new.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(into)
    return new


def test_a_declared_write_stands_for_the_old_one():
    def edit(program):
        old = node(program, aten.index_copy_.default)
        program.replace_write(old, rewrite_write(program, old))

    program = program_of(attend, *INPUTS)
    checked(program, edit)
    assert not program.graph.find_nodes(op="call_function", target=aten.index_copy_.default)
    program.recompile()
    cache = torch.zeros(2, 8, 4)
    torch.testing.assert_close(program.gm(cache, *INPUTS[1:]), attend(torch.zeros(2, 8, 4), *INPUTS[1:]))


def test_an_undeclared_one_does_not():
    def edit(program):
        old = node(program, aten.index_copy_.default)
        rewrite_write(program, old)
        program.graph.erase_node(old)

    with pytest.raises(RewriteError, match=r"removed or reordered writes to \w+: \['index_copy_'\] became \[\]"):
        checked(program_of(attend, *INPUTS), edit)


def test_a_declared_write_behind_a_read_of_the_old_one():
    def edit(program):
        program.replace_write(
            node(program, aten.index_copy_.default), rewrite_write(program, program.graph.output_node())
        )

    with pytest.raises(
        RewriteError, match=r"moved the read of \w+ by matmul across a write: it came after 1 .* after 0"
    ):
        checked(program_of(attend, *INPUTS), edit)


def test_a_declared_write_into_another_storage():
    def edit(program):
        old, query = node(program, aten.index_copy_.default), program.graph.find_nodes(op="placeholder")[3]
        program.replace_write(old, rewrite_write(program, old, cache=query))

    with pytest.raises(RewriteError, match=r"removed or reordered writes to cache_1: \['index_copy_'\] became \[\]"):
        checked(program_of(attend, *INPUTS), edit)


def test_a_declared_write_into_a_further_storage():
    """It writes what the old one wrote, and a key that nobody wrote before."""

    def edit(program):
        old, key = node(program, aten.index_copy_.default), program.graph.find_nodes(op="placeholder")[2]
        start = program.graph.find_nodes(op="placeholder")[1]
        old.replace_all_uses_with(old.args[0])
        with program.graph.inserting_before(old):
            arguments = (old.args[0], key, old.args[3], old.args[3], start)
            program.replace_write(old, program.graph.call_function(torch.ops.effpass.cache_write.default, arguments))

    with pytest.raises(RewriteError, match=r"added writes to key_1: \['cache_write_default'\]"):
        checked(program_of(attend, *INPUTS), edit)


def write_twice(cache, at, key, query):
    cache.index_copy_(1, at, key)
    cache.mul_(2)
    return query @ cache.transpose(1, 2)


@pytest.mark.parametrize("first", [True, False])
def test_a_declared_write_keeps_its_place_among_the_writes(first):
    """Before the second write it is in its place; what it reads there is not what the program read behind that one."""

    def edit(program):
        old, multiply = node(program, aten.index_copy_.default), node(program, aten.mul_.Tensor)
        read = node(program, aten.matmul.default)
        new = rewrite_write(program, old if first else read)
        multiply.replace_input_with(old, old.args[0])
        program.replace_write(old, new, reads=[read])

    message = (
        r"read of cache_1 by matmul .* it came after 2 .* after 1, where \w+ does it" if first else "reordered writes"
    )
    with pytest.raises(RewriteError, match=message):
        checked(program_of(write_twice, *INPUTS), edit)


# -- symbolic sizes -------------------------------------------------------------------------------------------------


def test_symbolic_outputs_are_compared_without_a_guard():
    program = program_of(lambda x: x.flatten() * 2, torch.ones(3, 5), symbolic=True)
    shape_env = program.fake_mode().shape_env
    guards = len(shape_env.guards)
    multiply = node(program, aten.mul.Tensor)

    def edit(program):
        with program.graph.inserting_before(program.graph.output_node()):
            new = inline(program, lambda y: (y.view(-1, 1) + 0).squeeze(1), [multiply])
        program.graph.output_node().args = (new,)

    checked(program, edit)
    assert len(shape_env.guards) == guards

    def shorten(program):
        with program.graph.inserting_before(program.graph.output_node()):
            new = inline(program, lambda y: y[1:], [multiply])
        program.graph.output_node().args = (new,)

    with pytest.raises(RewriteError, match="changed output 0"):
        checked(program, shorten)


def test_five_lengths_are_two_graphs(toy_passes):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(4, 4)

        def forward(self, x, cache):
            cache.narrow(1, 0, x.shape[1]).copy_(self.q_proj(x))
            return cache[:, : x.shape[1]].softmax(-1)

    net = Net().requires_grad_(False)
    passes = ["touch", {"scale": {"factor": 3.0, "verify": True}}]
    run = torch.compile(net, backend="effpass", options={"passes": passes, "inner": "aot_eager"})
    reports.clear()
    for length in (5, 9, 17, 6, 30):
        x = torch.randn(2, length, 4)
        expected = torch.nn.functional.linear(x, 3 * net.q_proj.weight, net.q_proj.bias).softmax(-1)
        torch.testing.assert_close(run(x, torch.zeros(2, 32, 4)), expected)
    assert [r.hits for r in reports] == [2, 2]


def _without_copy(program: Program) -> None:
    copy = node(program, aten.mul.Tensor)
    copy.replace_all_uses_with(copy.args[0])
    program.graph.erase_node(copy)


def test_a_write_that_reaches_the_value_it_was_to_leave_alone():
    def in_place(x):
        return (x * 1.0).add_(1).sum()

    with pytest.raises(RewriteError, match=r"pass toy made add_ write to x_1, where it wrote to a value of its own"):
        checked(program_of(in_place, torch.ones(3)), _without_copy)

    def of_a_value_that_is_read(x):
        y = x.exp()
        return (y * 1.0).add_(1) + y

    with pytest.raises(RewriteError, match="pass toy made add_ write to exp"):
        checked(program_of(of_a_value_that_is_read, torch.ones(3)), _without_copy)


def test_an_output_that_becomes_the_input():
    with pytest.raises(RewriteError, match="pass toy made output 0 share the storage of the input x_1"):
        checked(program_of(lambda x: (x * 1.0).view(-1), torch.ones(2, 3)), _without_copy)
    checked(program_of(lambda x: (x.exp() * 1.0).view(-1), torch.ones(2, 3)), _without_copy)
