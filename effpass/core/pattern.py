"""Patterns written as plain PyTorch: trace a pattern, find it in a program, and inline its replacement.

A pass that overrides `pattern`, `replacement` and `example_inputs` needs no `find` and `rewrite`: the default
implementations in :class:`~effpass.core.pass_.Pass` call :func:`find_pattern` and :func:`inline_replacement`. Where the
pattern almost matches, the reason is reported as a refusal. The matching itself is in :mod:`effpass.core.matching`. A
pattern is interpreted as follows:

* The arguments of the function stand for any tensor, and for any number where a tensor could be written (`x + eps`).
* Sizes are compared by value: ``x.shape[0]`` matches a literal 4, a SymInt, and ``s0 * 1``. Every other literal (a
  dimension, a dtype, ``2`` in ``x.pow(2)``) must be equal.
* If all floating-point `example_inputs` have one dtype, they stand for tensors of any one floating-point dtype, and
  ``x.dtype`` is that dtype. If their dtypes differ, they stand for tensors of exactly those dtypes. A cast to the dtype
  that a tensor already has is ignored.
* The operands of `add` and `mul` match in either order.
* A match must preserve the meaning of the program. It is refused when an inner value is also read elsewhere, and when
  computing the inner values as late as the last node would move a read across a write or across the boundary of a
  no-grad or autocast region.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Set
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch._guards import tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
    statically_known_true,
)

from effpass.core.errors import RewriteError
from effpass.core.inline import inline
from effpass.core.matching import Attempt, Miss, Pattern, Surroundings, is_noop_cast, is_size, writes
from effpass.core.pass_ import Match
from effpass.core.report import Refusal

if TYPE_CHECKING:
    from effpass.core.pass_ import Pass
    from effpass.core.program import Program

__all__ = ["erase_unread", "find_pattern", "inline_replacement"]


def find_pattern(pass_: Pass, program: Program) -> Iterator[Match | Refusal]:
    """Yield a :class:`Match` for every place that computes ``pass_.pattern``, and a :class:`Refusal` for near misses.

    ``match.nodes`` holds the arguments of the pattern by name. A place that has all operators of the pattern but can't
    be rewritten always yields a refusal with the reason. If there is no such place and no match, the place where most
    operators fit, two at least, yields one.

    Matches are yielded in reverse graph order, because an input of a match may be the value of a match before it in the
    graph, which must still exist when the later one is rewritten.

    Raises:
        RewriteError: the pattern can't be traced, or is not a functional computation with one tensor as its result.
    """
    surroundings = Surroundings.of(program)
    matches: list[Match] = []
    refusals: list[Refusal] = []
    closest: Miss | None = None
    taken: dict[Node, Node] = {}
    patterns = _patterns(pass_, program)
    ends = {pattern.anchor.target for pattern in patterns}
    for anchor in reversed(program.graph.nodes):
        if anchor.target not in ends:
            continue
        misses = []
        for pattern in patterns:
            attempt = Attempt(pattern, anchor, surroundings, taken)
            if attempt.bound is not None:
                taken.update(dict.fromkeys(attempt.bound.inner, anchor))
                matches.append(Match(anchor, {name: attempt.bound.nodes[n] for name, n in pattern.arguments.items()}))
                break
            misses.append(attempt.miss)
        else:
            miss = max(misses, key=lambda m: m.fitting)
            if miss.is_complete:
                refusals.append(Refusal(anchor.name, miss.reason))
            elif closest is None or miss.fitting > closest.fitting:
                closest = miss
    if not matches and not refusals and closest is not None and closest.fitting > 1:
        refusals.append(Refusal(closest.anchor.name, closest.reason))
    yield from matches
    yield from refusals


def inline_replacement(pass_: Pass, program: Program, match: Match) -> None:
    """Replace a match of :func:`find_pattern` by ``pass_.replacement``.

    The replacement is traced on the fake values of the match's arguments, so it may depend on their shapes and dtypes.
    Nodes that only the match needed are removed.

    Raises:
        RewriteError: the replacement does not return one tensor of the same shape, dtype and device.
    """
    anchor, given = match.anchor, match.nodes
    names = [name for name, value in given.items() if isinstance(value, Node)]

    def replacement(*tensors: torch.Tensor) -> Any:
        values = {**given, **dict(zip(names, tensors, strict=True))}
        return pass_.replacement(*values.values())

    before = anchor.prev
    with program.graph.inserting_before(anchor):
        new = inline(program, replacement, [given[name] for name in names])
    old_value, new_value = anchor.meta["val"], new.meta.get("val") if isinstance(new, Node) else new
    if not isinstance(new_value, torch.Tensor) or not _same_kind(old_value, new_value):
        raise RewriteError(
            f"pass {pass_.name}: its replacement gives {_describe(new_value)}, its pattern {_describe(old_value)}",
            hint="correct replacement(), or refuse such matches in check()",
        )
    node = before.next
    while node is not anchor:
        node.meta.update({key: anchor.meta[key] for key in ("stack_trace", "nn_module_stack") if key in anchor.meta})
        node = node.next
    anchor.replace_all_uses_with(new)
    erase_unread(program, anchor, keep={value for value in given.values() if isinstance(value, Node)})


def erase_unread(program: Program, anchor: Node, keep: Set[Node] = frozenset()) -> None:
    """Erase `anchor` and the nodes that only it needed.

    This includes random operators, which dead code elimination would keep. Nodes that have readers, that write in
    place, or that are in `keep` are not erased.
    """
    erased: set[Node] = set()
    waiting = [anchor]
    while waiting:
        node = waiting.pop()
        if node in erased or node in keep or node.users or node.op != "call_function" or writes(node):
            continue
        waiting += node.all_input_nodes
        program.graph.erase_node(node)
        erased.add(node)


# -- tracing --------------------------------------------------------------------------------------------------------


_traced: WeakKeyDictionary[Pass, dict[Any, Pattern]] = WeakKeyDictionary()


def _patterns(pass_: Pass, program: Program) -> list[Pattern]:
    """The pattern, traced once per floating-point dtype of the program, since ``x.dtype`` becomes a literal in it."""
    values = [v for n in program.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
    if not values:
        return []
    # Where all values are integers, the dtype does not matter: examples of other dtypes keep theirs.
    dtypes = sorted({v.dtype for v in values if v.is_floating_point()}, key=str) or [torch.float32]
    device, _ = Counter(v.device for v in values).most_common(1)[0]  # a sequence length may be on another one
    known = _traced.setdefault(pass_, {})
    for dtype in dtypes:
        if (dtype, device) not in known:
            known[dtype, device] = _trace(pass_, dtype, device)
    return [known[dtype, device] for dtype in dtypes]


def _trace(pass_: Pass, dtype: torch.dtype, device: torch.device) -> Pattern:
    given = pass_.example_inputs()
    if isinstance(given, torch.Tensor):  # would be iterated over its first dimension
        raise _invalid(pass_, "is traced on the tensors of example_inputs(), which gives a single one and no list")
    examples = list(given)
    names = list(inspect.signature(pass_.pattern).parameters)
    if len(names) != len(examples):
        raise _invalid(pass_, f"takes {len(names)} arguments and example_inputs() gives {len(examples)}")
    if odd := [example for example in examples if not isinstance(example, torch.Tensor)]:
        raise _invalid(pass_, f"is traced on tensors, and example_inputs() gives {odd[0]!r}")
    own = {e.dtype for e in examples if e.is_floating_point()}
    fake_mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False), allow_non_fake_inputs=True)
    try:
        with tracing(None), torch.no_grad():
            fakes = [_fake(fake_mode, e, dtype if len(own) == 1 else e.dtype, device) for e in examples]
            gm = make_fx(lambda *args: pass_.pattern(*args), pre_dispatch=True)(*fakes)
    except Exception as error:
        raise _invalid(pass_, f"can't be traced: {type(error).__name__}: {error}") from error
    gm.graph.eliminate_dead_code()
    for node in list(gm.graph.nodes):
        if is_noop_cast(node):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            raise _invalid(
                pass_, f"holds a constant or a control-flow operator ({node.target}); make tensors arguments"
            )
        if writes(node):
            raise _invalid(pass_, f"writes in place ({node.target}); write it out of place")
    placeholders = gm.graph.find_nodes(op="placeholder")
    (output,) = gm.graph.find_nodes(op="output")
    anchor = output.args[0]
    if not isinstance(anchor, Node) or anchor.op != "call_function":
        raise _invalid(pass_, f"returns {anchor!r}; it must return one computed tensor")
    reached = _reach(anchor)
    for name, placeholder in zip(names, placeholders, strict=True):
        if placeholder not in reached:
            raise _invalid(pass_, f"does not compute with its argument {name!r}")
    return Pattern(dict(zip(names, placeholders, strict=True)), anchor, sum(n.op != "placeholder" for n in reached))


def _fake(mode: FakeTensorMode, example: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A fake tensor like `example`, in which every size other than 1 (which broadcasts) is a symbol of its own."""
    symbolic: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * example.dim())
    fake = mode.from_tensor(example, symbolic_context=symbolic)
    with mode:
        return torch.empty(fake.shape, dtype=dtype if example.is_floating_point() else example.dtype, device=device)


def _reach(node: Node) -> set[Node]:
    """`node` and all nodes that it is computed from, apart from sizes."""
    reached, waiting = set(), [node]
    while waiting:
        node = waiting.pop()
        if node not in reached and not is_size(node):
            reached.add(node)
            waiting += node.all_input_nodes
    return reached


def _invalid(pass_: Pass, problem: str) -> RewriteError:
    return RewriteError(
        f"pass {pass_.name}: its pattern {problem}", hint="this is a fault of the pass, not of the model"
    )


def _same_kind(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.device, a.dim()) == (b.dtype, b.device, b.dim()) and all(
        statically_known_true(m == n) for m, n in zip(a.shape, b.shape, strict=True)
    )


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
