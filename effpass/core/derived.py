"""Derived weights: pure functions of original weights and artifact tensors, never silently stale.

A pass that prunes, merges or absorbs declares ``program.derive(owner, originals, compute)`` and reads the returned node
in place of the weight. The value has one of three homes:

``module``
    `torch.export` programs: computed once into the state dict; the original goes when nothing else reads it.
``graph``
    inside the program, recomputed at every call: where a gradient must flow to an original, or where a write to it
    can't be seen from outside (DTensor, inference tensors, a process group).
``cached``
    under `torch.compile`: weights reach the compiled function as run-time arguments, so a wrapper around it computes
    the derived tensor from them and passes it as one more argument. One copy serves all compiled variants. It is
    recomputed, into the same buffer (CUDA graphs hold its address), when an original changed: another tensor object,
    another storage, a moved version counter, an optimiser step anywhere in the process (fused steps move no version),
    or :func:`refresh`.

Writes through `.data`, NumPy or a collective move nothing that can be seen: call ``effpass.refresh(model)`` after them,
or compile with ``check_weights: true``, which compares checksums at every call.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from torch.fx import Node

from effpass.core.live_weights import DerivedArguments, Slot, Spec, derived_bytes, refresh

if TYPE_CHECKING:
    from effpass.core.program import Program

__all__ = ["DerivedArguments", "Home", "Slot", "derive", "derived_bytes", "home_of", "refresh"]

Home = Literal["module", "graph", "cached"]


def home_of(program: Program, originals: Sequence[Node]) -> Home:
    """Where a weight derived from `originals` lives; see the module's docstring."""
    if program.front == "export":
        return "module"
    weights = [program.weight_of(node) for node in originals]
    if any(w is None for w in weights):
        return "graph"
    tensors = [w.tensor for w in weights if w is not None]
    if program.grad_enabled and any(t.requires_grad for t in tensors):
        return "graph"
    if any(t.is_inference() or type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return "graph"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return "graph"
    return "cached"


def derive(
    program: Program,
    owner: str,
    originals: Sequence[Node],
    compute: Callable[..., Tensor],
    constants: Mapping[str, Tensor],
    slot: Slot | None,
) -> Node:
    """Implements :meth:`effpass.core.program.Program.derive`."""
    if slot is None and constants:
        slot = Slot.shared((owner, _digest(constants)), lambda: constants)
    known = program.derived_nodes.get((owner, tuple(originals)))
    if known is not None:
        return known
    if program.parent is not None:
        node = _derive_in_body(program, owner, originals, compute, slot)
    else:
        home = home_of(program, originals)
        if home == "module":
            node = _derive_in_module(program, owner, originals, compute, slot)
        elif home == "graph":
            node = _derive_in_graph(program, owner, originals, compute, slot)
        else:
            node = _derive_cached(program, owner, originals, compute, slot)
    program.derived_nodes[(owner, tuple(originals))] = node
    return node


def _derive_in_module(
    program: Program, owner: str, originals: Sequence[Node], compute: Callable[..., Tensor], slot: Slot | None
) -> Node:
    from effpass.core.exported import add_parameter

    with torch.no_grad():
        value = compute(*(program.weights[n].tensor.detach() for n in originals), **(slot.tensors if slot else {}))
    return add_parameter(program, owner.replace(":", "."), value.contiguous(), before=program.first_computation())


def _derive_cached(
    program: Program, owner: str, originals: Sequence[Node], compute: Callable[..., Tensor], slot: Slot | None
) -> Node:
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    positions = tuple(placeholders.index(n) for n in originals)
    spec = Spec(owner, positions, compute, slot)
    value = spec.entry(program.inputs)
    program.holds.append(value)  # the first value is computed now; it must outlive the compilation
    return program.add_input("derived_" + owner, value.current(), spec)


def _derive_in_graph(
    program: Program, owner: str, originals: Sequence[Node], compute: Callable[..., Tensor], slot: Slot | None
) -> Node:
    from effpass.core.inline import inline

    inputs = list(originals)
    names = []
    if slot is not None:
        slot.in_graph = True
        for name, tensor in slot.tensors.items():
            inputs.append(program.add_input(f"{owner}_{name}", tensor, (slot, name)))
            names.append(name)
    split = len(originals)
    with program.graph.inserting_before(program.first_computation(after=inputs)):
        return inline(program, lambda *a: compute(*a[:split], **dict(zip(names, a[split:], strict=True))), inputs)


def _derive_in_body(
    program: Program, owner: str, originals: Sequence[Node], compute: Callable[..., Tensor], slot: Slot | None
) -> Node:
    """Inside a checkpointed body: derive in the parent, and hand the value in as one more operand."""
    parent, caller = program.parent, program.caller
    assert parent is not None
    assert caller is not None
    takes = [n for n in program.graph.nodes if n.op == "placeholder"]
    operands = list(caller.args)[-len(takes) :]
    outer_originals = [operands[takes.index(n)] for n in originals]
    outer = derive(parent, owner, outer_originals, compute, {}, slot)
    if parent.graph.nodes and list(parent.graph.nodes).index(outer) > list(parent.graph.nodes).index(caller):
        caller.prepend(outer)
    caller.args = (*caller.args, outer)
    with program.graph.inserting_after(takes[-1]):
        inner = program.graph.placeholder("derived_" + "".join(c if c.isalnum() else "_" for c in owner))
    inner.meta["val"] = outer.meta["val"]
    return inner


def _digest(constants: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(constants):
        tensor = constants[name].detach().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
