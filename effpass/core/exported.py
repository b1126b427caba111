"""Front end for `torch.export`: turns an ExportedProgram into a program, and back.

`torch.export.export` already produces pre-dispatch ATen with the weights as placeholders. This module names the weights
and removes the extra checks of export; on the way back it keeps graph signature, state dict and graph consistent.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from effpass.core.normalize import normalize
from effpass.core.program import Program, Weight

__all__ = ["program_from_exported", "to_exported"]


def program_from_exported(exported: ExportedProgram) -> Program:
    """View `exported` as a :class:`Program`, which owns it from here on and edits it in place.

    Args:
        exported: result of ``torch.export.export``. It must not be decomposed, because passes look for `aten.linear`
            and `aten.scaled_dot_product_attention`.
    """
    signature = exported.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    aliases = _aliases(exported)
    weights: dict[torch.fx.Node, Weight] = {}
    inputs: list[Any] = []
    for node in exported.graph.nodes:
        if node.op != "placeholder":
            break
        name = targets.get(node.name)
        tensor = None if name is None else _tensor(exported, name)
        inputs.append(node.meta.get("val") if tensor is None else tensor)
        if tensor is not None:
            assert name is not None
            weights[node] = Weight(name, node, tensor, tuple(a for a in aliases[name] if a != name))
    program = Program(exported.graph_module, "export", weights, inputs, grad_enabled=False, exported=exported)
    normalize(program)
    return program


def to_exported(program: Program) -> ExportedProgram:
    """The rewritten ExportedProgram: derived weights are in its state dict, and unread parameters are removed."""
    exported = program.exported
    assert exported is not None, "only a program that came from torch.export goes back"
    program.recompile()
    unread = {
        node.name
        for node in program.weights
        if not node.users and node.name in exported.graph_signature.inputs_to_parameters
    }
    specs = exported.graph_signature.input_specs
    for spec in [s for s in specs if s.kind is InputKind.PARAMETER and s.arg.name in unread]:
        specs.remove(spec)
        exported.state_dict.pop(str(spec.target), None)
    for node in [n for n in program.weights if n.name in unread]:
        del program.weights[node]
        program.graph.erase_node(node)
    program.gm.recompile()
    return exported


def add_parameter(program: Program, name: str, tensor: torch.Tensor, before: torch.fx.Node) -> torch.fx.Node:
    """Add a parameter `name` to the exported program, and return its placeholder, which is inserted before `before`."""
    exported = program.exported
    assert exported is not None
    with program.graph.inserting_before(before):
        node = program.graph.placeholder("p_" + name.replace(".", "_"))
    position = [n for n in program.graph.nodes if n.op == "placeholder"].index(node)
    node.meta["val"] = _fake_of(program, tensor)
    specs = exported.graph_signature.input_specs
    specs.insert(position, InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name))
    exported.state_dict[name] = torch.nn.Parameter(tensor, requires_grad=False)
    program.inputs.insert(position, tensor)
    program.weights[node] = Weight(name, node, tensor)
    return node


def _fake_of(program: Program, tensor: torch.Tensor) -> torch.Tensor:
    from torch._guards import detect_fake_mode

    values = [n.meta["val"] for n in program.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    mode = detect_fake_mode(values)
    return tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)


def _tensor(exported: ExportedProgram, name: str) -> torch.Tensor:
    return exported.state_dict[name] if name in exported.state_dict else exported.constants[name]


def _aliases(exported: ExportedProgram) -> dict[str, list[str]]:
    """For each weight, all names with the same storage, offset and shape, which are those of a tied weight."""
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, tensor in exported.state_dict.items():
        groups[(tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)].append(name)
    return {name: names for names in groups.values() for name in names} | {
        name: [name] for name in exported.constants if isinstance(name, str)
    }
