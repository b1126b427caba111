"""Derived weights: weights that a pass computes from original weights and artifact tensors, never silently stale.

A pass that prunes, merges or absorbs weights calls ``program.derive(owner, originals, compute)``, where `compute` is a
pure function of both, and reads the returned node in place of the weight. The originals may change after compilation,
for instance in training. The *home* of a derived weight, which :func:`home_of` chooses, determines where its value is
kept and when it is computed:

``module``
    For `torch.export` programs. The value is computed once and added to the state dict; the original is removed when
    nothing else reads it.
``graph``
    The value is computed inside the program at every call. This is used where a gradient must flow to an original, and
    where a write to an original can't be detected from outside (DTensor, inference tensors, an initialized process
    group, writes by the program itself).
``cached``
    Otherwise, under `torch.compile`. Weights reach the compiled function as run-time arguments, so a wrapper around it
    computes the derived tensor from them and passes it as one more argument (:mod:`effpass.core.derived_arguments`).
    All compiled variants share one copy. When an original has changed (:mod:`effpass.core.live_weights`), the value is
    recomputed into the same buffer, because CUDA graphs hold its address.

Writes through `.data`, NumPy or a foreign kernel can't be detected. Call ``effpass.refresh(model)`` after them, or
compile with ``check_weights: true``, which compares checksums at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Node

from effpass.core.checksum import digest
from effpass.core.derived_arguments import DerivedArguments, Spec, derived_bytes, process_group_is_up
from effpass.core.inline import inline
from effpass.core.live_weights import Slot, compute_exactly, refresh
from effpass.core.verify import aliased_operands, returns_alias

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["DerivedArguments", "Home", "Slot", "derive", "derived_bytes", "home_of", "refresh"]

Home = Literal["module", "graph", "cached"]


def home_of(program: Program, originals: Sequence[Node]) -> Home:
    """The home of a weight that is derived from `originals`; see the module's docstring.

    An original that is not a weight of the program, such as a computed value, also leads to ``"graph"``.
    """
    if program.front == "export":
        return "module"
    tensors = [weight.tensor for node in originals if (weight := program.weight_of(node)) is not None]
    if len(tensors) < len(originals) or any(_is_written(node) for node in originals):
        return "graph"
    if any(t.requires_grad for t in tensors) and (program.grad_enabled or _enables_grad(program)):
        return "graph"
    if any(t.is_inference() or type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return "graph"
    return "graph" if process_group_is_up() else "cached"


def _is_written(node: Node) -> bool:
    """Whether the program writes to the storage of `node` (an embedding with `max_norm`, running statistics)."""
    for user in node.users:
        operands = dict(aliased_operands(user))
        if operands.get(node) or (node in operands and returns_alias(user) and _is_written(user)):
            return True
    return False


def _enables_grad(program: Program) -> bool:
    switches = program.graph.find_nodes(op="call_function", target=torch._C._set_grad_enabled)
    return any(node.args == (True,) for node in switches)


def derive(
    program: Program,
    owner: str,
    originals: Sequence[Node],
    compute: Callable[..., Tensor],
    constants: Mapping[str, Tensor],
    slot: Slot | None,
) -> Node:
    """Implement :meth:`effpass.core.program.Program.derive`. A repeated declaration returns the node of the first."""
    known = program.derived_nodes.get((owner, tuple(originals)))
    if known is not None:
        return known
    if slot is None and constants:
        slot = Slot.shared((owner, digest(constants)), lambda: constants)
    if program.parent is not None:
        into = _derive_in_body
    else:
        into = {"module": _derive_in_module, "graph": _derive_in_graph, "cached": _derive_cached}[
            home_of(program, originals)
        ]
    node = program.derived_nodes[(owner, tuple(originals))] = into(program, owner, originals, compute, slot)
    return node


def _derive_in_module(
    program: Program, owner: str, originals: Sequence[Node], compute: Callable[..., Tensor], slot: Slot | None
) -> Node:
    from effpass.core.exported import add_parameter

    tensors = [program.weights[n].tensor.detach() for n in originals]
    with torch.inference_mode(False), torch.no_grad(), compute_exactly(tensors[0].device):
        value = compute(*tensors, **(slot.tensors if slot else {}))
    return add_parameter(program, owner.replace(":", "."), value.contiguous(), before=program.first_computation())


def _derive_cached(
    program: Program, owner: str, originals: Sequence[Node], compute: Callable[..., Tensor], slot: Slot | None
) -> Node:
    placeholders = program.graph.find_nodes(op="placeholder")
    positions = [placeholders.index(n) for n in originals]
    spec = Spec(owner, positions, [program.inputs[p] for p in positions], compute, slot)
    assert spec.first is not None
    assert spec.first.value is not None
    return program.add_input("derived_" + owner, spec.first.value, spec)


def _derive_in_graph(
    program: Program, owner: str, originals: Sequence[Node], compute: Callable[..., Tensor], slot: Slot | None
) -> Node:
    inputs: list[Node] = list(originals)
    names: list[str] = []
    if slot is not None:
        slot.in_graph = True
        names = list(slot.tensors)
        inputs += [program.add_input(f"{owner}_{name}", slot.tensors[name], (slot, name)) for name in names]
    split = len(originals)

    def computed(*tensors: Tensor) -> Tensor:
        return compute(*tensors[:split], **dict(zip(names, tensors[split:], strict=True)))

    with program.graph.inserting_before(program.first_computation(after=inputs)), _plainly(program, originals):
        return inline(program, computed, inputs)


@contextmanager
def _plainly(program: Program, originals: Sequence[Node]) -> Iterator[None]:
    """Make the nodes inserted in this context compute without autocast, and with gradients if the program uses them.

    Gradients are enabled only when they are off around the program and a region of it enables them.
    """
    graph, device = program.graph, originals[0].meta["val"].device
    entered = None
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        entered = graph.call_function(_enter_autocast, (device.type, None, False, False))
    enables_grad = not program.grad_enabled and _enables_grad(program)
    if enables_grad:
        graph.call_function(torch._C._set_grad_enabled, (True,))
    with compute_exactly(device):
        yield
    if enables_grad:
        graph.call_function(torch._C._set_grad_enabled, (False,))
    if entered is not None:
        graph.call_function(_exit_autocast, (entered,))


def _derive_in_body(
    program: Program, owner: str, originals: Sequence[Node], compute: Callable[..., Tensor], slot: Slot | None
) -> Node:
    """Derive a weight of a checkpointed body: compute it in the parent, and pass it to the body as one more operand."""
    parent, caller = program.parent, program.caller
    assert parent is not None
    assert caller is not None
    takes = program.graph.find_nodes(op="placeholder")
    operands = list(caller.args)[-len(takes) :]
    outer_originals: list[Any] = [operands[takes.index(n)] for n in originals]
    outer = derive(parent, owner, outer_originals, compute, {}, slot)
    caller.args = (*caller.args, outer)
    with program.graph.inserting_after(takes[-1]):
        inner = program.graph.placeholder("derived_" + "".join(c if c.isalnum() else "_" for c in owner))
    inner.meta["val"] = outer.meta["val"]
    return inner
