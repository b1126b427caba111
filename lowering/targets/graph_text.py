"""Serialization of a captured graph as JSON that can be loaded without executing anything from the file.

The Inductor target (:mod:`effpass.lowering.targets.inductor`) stores its graph in this form. ``torch.export.save`` is
not suitable: loading its files unpickles, and evaluates strings as Python. Here an operator is a name, which is looked
up among the tensor operators of a few known libraries, and an argument is a number, a string or a list::

    {"inputs": [name, ...], "weights": {name: name of its tensor, ...}, "outputs": [name, ...],
     "nodes": [[name, operator, [argument, ...], {keyword: argument, ...}], ...]}

An argument that refers to a node is ``{"node": name}``, a dtype is ``{"dtype": "float32"}``; layouts, memory formats,
devices and non-finite floats are written in the same way.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from effpass.core.errors import ExportError

__all__ = ["graph_from_text", "graph_to_text"]

# Functions for arithmetic on sizes, by name.
_ON_SIZES: dict[str, Callable[..., Any]] = {
    f"{module.__name__.strip('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, "add sub mul floordiv truediv mod neg pow eq ne lt le gt ge and_ or_ getitem"),
        (math, "ceil floor trunc"),
        (torch, "sym_int sym_float sym_max sym_min sym_not sym_ite"),
    )
    for name in names.split()
}
_NAME_OF = {function: name for name, function in _ON_SIZES.items()}

_LIBRARIES = ("aten", "effpass", "transformers")

# String arguments that operators may have. Other string arguments may name files, so operators with them are refused.
_WORDS = ("approximate", "rounding_mode", "indexing", "equation", "message", "assert_msg", "path")

_CONSTANTS = {"dtype": torch.dtype, "layout": torch.layout, "memory_format": torch.memory_format}


def graph_to_text(program: ExportedProgram) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the graph as JSON data, and its weights by name; weights that share memory appear once.

    Raises:
        ExportError: if the format can't represent part of the graph; the message names the part and its node.
    """
    inputs: list[str] = []
    weights: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    seen: dict[Any, str] = {}
    for spec in program.graph_signature.input_specs:
        name = str(spec.arg.name)  # type: ignore[union-attr]
        if spec.kind is InputKind.USER_INPUT:
            inputs.append(name)
            continue
        target = str(spec.target)
        tensor = program.state_dict.get(target, program.constants.get(target))
        if not isinstance(tensor, Tensor):
            raise _cant_hold(name, f"a constant of type {type(tensor).__name__}")
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else target
        weights[name] = seen.setdefault(key, target)
        tensors.setdefault(weights[name], tensor.detach())
    for output in program.graph_signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            raise _cant_hold(str(output.target), "a change of the model's own state")
    nodes, outputs = [], []
    for node in program.graph.nodes:
        if node.op == "call_function":
            arguments = [_to_json(node, argument) for argument in node.args]
            keywords = {key: _to_json(node, argument) for key, argument in node.kwargs.items()}
            nodes.append([node.name, _operator_name(node), arguments, keywords])
        elif node.op == "output":
            outputs = [_to_json(node, value) for value in node.args[0]]
        elif node.op != "placeholder":
            raise _cant_hold(node.name, "a graph inside the graph")
    return {"inputs": inputs, "weights": weights, "outputs": outputs, "nodes": nodes}, tensors


def graph_from_text(text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """Build a module from the output of :func:`graph_to_text`.

    Args:
        text: the graph as JSON data.
        tensors: weights by name.

    Raises:
        ValueError, KeyError, TypeError: if the text does not have this form, or names an operator that is not allowed.
    """
    root, graph = torch.nn.Module(), fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for name in text["inputs"]:
        nodes[str(name)] = graph.placeholder(_identifier(name))
    for index, (name, target) in enumerate(text["weights"].items()):
        root.register_buffer(f"weight_{index}", tensors[target], persistent=False)
        nodes[name] = graph.get_attr(f"weight_{index}")
    for name, function, arguments, keywords in text["nodes"]:
        called = _operator(function)
        args = tuple(_from_json(argument, nodes) for argument in arguments)
        kwargs = {_keyword(called, function, key): _from_json(value, nodes) for key, value in keywords.items()}
        nodes[str(name)] = graph.call_function(called, args, kwargs)
    graph.output(tuple(_from_json(value, nodes) for value in text["outputs"]))
    return fx.GraphModule(root, graph)


def _operator_name(node: fx.Node) -> str:
    target = node.target
    if target in _NAME_OF:
        return _NAME_OF[target]  # type: ignore[index]
    name = str(target)
    if not isinstance(target, torch._ops.OpOverload):
        raise _cant_hold(node.name, f"the operator {name}, which is none on tensors")
    try:
        _operator(name)
    except ValueError as error:
        raise _cant_hold(node.name, str(error)) from error
    return name


def _operator(name: Any) -> Callable[..., Any]:
    """Return the operator of this name; raise a ValueError unless it is known to only compute on tensors and sizes."""
    if name in _ON_SIZES:
        return _ON_SIZES[name]
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) != 3 or parts[0] not in _LIBRARIES or not all(part.isidentifier() for part in parts):
        raise ValueError(f"the operator {name!r} of no known library")
    try:
        found = getattr(getattr(getattr(torch.ops, parts[0]), parts[1]), parts[2])
    except AttributeError as error:
        raise ValueError(f"the operator {name}, which is not there") from error
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"the operator {name}, which is none on tensors")
    for argument in found._schema.arguments:
        kind = str(argument.type)
        if ("str" in kind and argument.name not in _WORDS) or "Storage" in kind or "__torch__" in kind:
            raise ValueError(f"the operator {name}, which does more than compute")
    return found


def _keyword(called: Callable[..., Any], name: str, key: Any) -> str:
    """Return `key` if `called` has an argument of this name; the key becomes part of the module's generated code."""
    known = [a.name for a in called._schema.arguments] if isinstance(called, torch._ops.OpOverload) else []
    if key not in known:
        raise ValueError(f"the operator {name} has no argument {key!r}")
    return str(key)


def _to_json(node: fx.Node, value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_to_json(node, item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.device):
        return {"device": value.type}  # without index: the file runs on the GPU that is current when it is loaded
    for kind, cls in _CONSTANTS.items():
        if isinstance(value, cls):
            return {kind: str(value).removeprefix("torch.")}
    raise _cant_hold(node.name, f"an argument of type {type(value).__name__}")


def _from_json(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device(content)
    found = getattr(torch, content) if kind in _CONSTANTS and str(content).isidentifier() else None
    if found is None or not isinstance(found, _CONSTANTS[kind]):
        raise ValueError(f"{value} is no argument")
    return found


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{name!r} is no name")
    return name


def _cant_hold(node: str, what: str) -> ExportError:
    return ExportError(
        f"a file for Inductor can't hold {what} (node {node})",
        hint="leave out the pass that brings it in, or use torch.compile(backend='effpass')",
    )
