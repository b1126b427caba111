"""Translates torch-level calls from Dynamo to pre-dispatch ATen, tracing each distinct call only once.

A transformer repeats the same layer, so a graph of thousands of calls has a few dozen distinct ones. A call is
identified by its function, its constants, the metadata of its tensors, and the state it runs in (grad mode, autocast).
Tracing a distinct call gives a *template*; each recurrence costs a dictionary look-up and a copy of the template's
nodes. :mod:`effpass.core.dynamo` calls :func:`retrace`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.distributed.tensor import DTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _make_graph_module
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_aggregate
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["Retraced", "like", "retrace"]

# Higher-order operators whose body is a part of the model itself, so that passes rewrite it too. The bodies of others
# (a custom autograd.Function, a score function of flex_attention) define an operation and are left unchanged.
_TRANSPARENT = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "invoke_subgraph")

# Metadata that a node of the new graph inherits from the call that it was traced from.
_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass
class Retraced:
    """A graph in the dialect.

    Attributes:
        gm: graph module of the new graph.
        bodies: nodes of transparent higher-order operators, each with the position of the body among its arguments.
    """

    gm: GraphModule
    bodies: list[tuple[Node, int]]


@dataclass(frozen=True)
class _Input:
    """Placeholder, in the arguments of a call, for the tensor or symbol number `index` among its inputs."""

    index: int


@dataclass
class _Template:
    """The trace of one distinct call.

    Attributes:
        graph: traced graph.
        constants: tensor attributes of the graph, by name.
        outputs: return value of the call, as nodes of `graph`.
        values: return value of the call, as fake tensors.
    """

    graph: Graph
    constants: dict[str, Tensor]
    outputs: Any
    values: Any


class _MutatesMetadataError(Exception):
    """The graph changes sizes in place (`unsqueeze_`, `resize_`), so that equal calls can't share fake values."""


def like(fake_mode: FakeTensorMode, value: Tensor) -> Tensor:
    """A fake tensor with the metadata of `value`, which may belong to another fake mode over the same symbols.

    It never requires a gradient, because the translation of a call does not depend on that, and a graph may write to
    any value in place.
    """
    with fake_mode, torch.no_grad():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)


def retrace(gm: GraphModule, fakes: Sequence[Any], fake_mode: FakeTensorMode) -> Retraced:
    """Translate the graph `gm` from Dynamo to the dialect. `gm` itself is not changed.

    Args:
        gm: graph module from Dynamo.
        fakes: fake values of the inputs of `gm`.
        fake_mode: fake mode of these values.
    """
    grad = torch.is_grad_enabled()
    try:
        return _Retrace(gm, fake_mode, {}).run(fakes)
    except _MutatesMetadataError:
        torch.set_grad_enabled(grad)
        return _Retrace(gm, fake_mode, None).run(fakes)
    finally:
        torch.set_grad_enabled(grad)


class _Retrace:
    """The translation of one graph.

    Args:
        gm: graph module from Dynamo.
        fake_mode: fake mode of all values.
        templates: calls traced so far; None traces every call separately, on the current values.
    """

    def __init__(self, gm: GraphModule, fake_mode: FakeTensorMode, templates: dict[Any, _Template] | None) -> None:
        self.old = gm
        self.fake_mode = fake_mode
        self.templates = templates
        self.root = torch.nn.Module()
        self.graph = Graph()
        self.new: dict[Node, Any] = {}  # old node → its value as a structure of new nodes and constants
        self.value: dict[Node, Any] = {}  # new node → its fake tensor, symbol or module
        self.autocasts: dict[Node, torch.autocast] = {}
        self.bodies: list[tuple[Node, int]] = []

    def run(self, fakes: Sequence[Any]) -> Retraced:
        inputs = iter(fakes)
        with ExitStack() as unwind:
            unwind.callback(self._leave_autocasts)
            for node in self.old.graph.nodes:
                if node.op == "placeholder":
                    self.new[node] = self._add(self.graph.placeholder(str(node.target)), next(inputs))
                elif node.op == "get_attr":
                    self.new[node] = self._attribute(node)
                elif node.op == "output":
                    self.graph.output(self._mapped(node.args[0]))
                else:
                    self.new[node] = self._call(node)
        # As in Dynamo, the Python code of the module is generated lazily; the compilers do not need it.
        return Retraced(_make_graph_module(self.root, self.graph), self.bodies)

    def _add(self, new: Node, value: Any) -> Node:
        self.value[new] = value
        new.meta["val"] = value.detach() if type(value) is FakeTensor else value
        return new

    def _mapped(self, arguments: Any) -> Any:
        return torch.fx.node.map_arg(arguments, lambda n: self.new[n])

    # -- nodes ------------------------------------------------------------------------------------------------------

    def _attribute(self, node: Node) -> Node:
        held: Any = self.old
        for atom in str(node.target).split("."):
            held = getattr(held, atom)
        name = str(node.target).replace(".", "_")
        if isinstance(held, torch.nn.Module):
            self.root.add_module(name, held)
            new = self.graph.get_attr(name)
            self.value[new] = held
            return new
        if isinstance(held, torch.nn.Parameter):
            self.root.register_parameter(name, held)
        else:
            self.root.register_buffer(name, held)
        return self._add(self.graph.get_attr(name), self.fake_mode.from_tensor(held, static_shapes=True))

    def _call(self, node: Node) -> Any:
        target: Any = node.target
        recorded = node.meta.get("example_value")
        if target is operator.getitem and not isinstance(node.args[1], Node):
            source = self.new[node.args[0]]  # type: ignore[index]
            if not isinstance(source, Node):
                return source[node.args[1]]
            if isinstance(self.value[source], (list, tuple)):  # the value of an operator that is not decomposed
                return self._emit(node, target, self.value[source][node.args[1]])
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._whole(node, target)
        if node.op == "call_method" and target == "item" and recorded is not None:
            return self._emit(node, torch.ops.aten.item.default, recorded)
        if target is _enter_autocast:
            device, dtype, enabled, cached = node.args
            region = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)  # type: ignore[arg-type]
            region.__enter__()
            new = self._emit(node, target, None)
            self.autocasts[new] = region
            return new
        if target is _exit_autocast:
            self.autocasts.pop(self.new[node.args[0]]).__exit__(None, None, None)  # type: ignore[index]
            return self._emit(node, target, None)
        if target is torch._C._set_grad_enabled:
            torch.set_grad_enabled(bool(node.args[0]))
            return self._emit(node, target, None)
        return self._traced(node)

    def _emit(self, node: Node, target: Any, value: Any) -> Node:
        """Copy `node` to the new graph, calling `target`, with `value` as its value."""
        args, kwargs = self._mapped((node.args, node.kwargs))
        op = node.op if target is node.target else "call_function"
        new = self.graph.create_node(op, target, args, kwargs, name=node.name)
        new.meta.update({key: node.meta[key] for key in _KEPT_META if key in node.meta})
        return self._add(new, value)

    def _whole(self, node: Node, target: torch._ops.HigherOrderOperator) -> Node:
        value = pytree.tree_map_only(Tensor, lambda v: like(self.fake_mode, v), node.meta["example_value"])
        new = self._emit(node, target, value)
        if target.name() in _TRANSPARENT:
            self._retrace_body(new)
        return new

    def _retrace_body(self, new: Node) -> None:
        held: list[Any] = [self.value.get(a) if isinstance(a, Node) else a for a in new.args]
        position = next(i for i, value in enumerate(held) if isinstance(value, GraphModule))
        body = held[position]
        takes = body.graph.find_nodes(op="placeholder")
        operands = held[position + 1 :][-len(takes) :] if takes else []
        if len(operands) < len(takes):
            return  # unknown calling convention: the body stays as Dynamo wrote it
        inner = _Retrace(body, self.fake_mode, self.templates).run(operands)
        if inner.bodies:
            return  # the body of a checkpoint that contains checkpoints stays as Dynamo wrote it
        copy_placeholders(body, inner.gm)
        self.root.add_module(str(new.args[position].target), inner.gm)  # type: ignore[union-attr]
        self.bodies.append((new, position))

    def _traced(self, node: Node) -> Any:
        arguments = self._mapped((node.args, node.kwargs))
        given: dict[Node, int] = {}
        # Inputs are identified by node and never by value, since equal calls share their values.
        call = _with_inputs(arguments, given)
        values = [self.value[n] for n in given]
        if any(map(_is_quantized, values)):
            return self._left_as_it_is(node)
        recorded = pytree.tree_leaves(node.meta.get("example_value"))
        if not any(isinstance(v, Tensor) for v in (*values, *recorded)):
            return self._symbolic(node, call, list(given), values, recorded)
        template = self._template(node, call, values)
        return self._instantiate(node, template, list(given))

    def _left_as_it_is(self, node: Node) -> Node:
        """Copy a call on a quantized weight without tracing, since its inner tensors are not inputs of this graph."""

        def value(x: Tensor) -> Tensor:
            return x if _is_quantized(x) else like(self.fake_mode, x)

        return self._emit(node, node.target, pytree.tree_map_only(Tensor, value, node.meta["example_value"]))

    def _symbolic(self, node: Node, call: Any, given: list[Node], values: list[Any], recorded: list[Any]) -> Any:
        """Translate a call without tensors: arithmetic on sizes is evaluated, and a side effect is only recorded."""
        if all(v is None for v in recorded):
            return self._emit(node, node.target, None)
        if node.target is torch.Size:
            return tuple(self._mapped(node.args[0]))  # type: ignore[arg-type]
        result = _apply(node, call, values)
        if isinstance(result, _SYMBOLS):
            return self._emit(node, node.target, result)
        if any(isinstance(v, _SYMBOLS) for v in pytree.tree_leaves(result)):
            return _apply(node, call, given)  # a tuple of sizes: do the same with their nodes
        return result

    # -- templates --------------------------------------------------------------------------------------------------

    def _template(self, node: Node, call: Any, values: list[Any]) -> _Template:
        if self.templates is None:
            return self._trace(node, call, values)
        key = (node.op, node.target, _frozen(call), *map(_metadata, values), *_state())
        found = self.templates.get(key)
        if found is None:
            # Fresh objects, since one object may be the value of two nodes, which tracing would treat as one input.
            fresh = [like(self.fake_mode, v) if type(v) is FakeTensor else v for v in values]
            found = self._trace(node, call, fresh)
            if any(torch.Tag.inplace_view in getattr(n.target, "tags", ()) for n in found.graph.nodes):
                raise _MutatesMetadataError
            if not _has_unbacked(found.values):
                self.templates[key] = found
        return found

    def _trace(self, node: Node, call: Any, values: list[Any]) -> _Template:
        returned: list[Any] = []

        def function(*given: Any) -> Any:
            returned.append(_apply(node, call, given))
            return returned[-1]

        with self.fake_mode:
            traced = make_fx(function, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
        (output,) = traced.graph.find_nodes(op="output")
        constants = {str(n.target): getattr(traced, str(n.target)) for n in traced.graph.find_nodes(op="get_attr")}
        return _Template(traced.graph, constants, output.args[0], returned[-1])

    def _instantiate(self, node: Node, template: _Template, given: list[Node]) -> Any:
        meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
        mapping: dict[Node, Node] = dict(zip(template.graph.find_nodes(op="placeholder"), given, strict=True))
        for old in template.graph.nodes:
            if old.op == "get_attr":
                name = f"_constant{len(self.root._buffers)}"  # one tensor may have several names
                self.root.register_buffer(name, template.constants[str(old.target)])
                mapping[old] = self.graph.get_attr(name)
                mapping[old].meta["val"] = old.meta.get("val")
            elif old.op == "call_function":
                new = mapping[old] = self.graph.node_copy(old, lambda n: mapping[n])
                new.meta = {**meta, "val": old.meta.get("val")}
        result = torch.fx.node.map_arg(template.outputs, lambda n: mapping[n])
        for new, value in zip(pytree.tree_leaves(result), pytree.tree_leaves(template.values), strict=True):
            if isinstance(new, Node):
                self.value.setdefault(new, value)
        return result

    def _leave_autocasts(self) -> None:
        for region in reversed(self.autocasts.values()):
            region.__exit__(None, None, None)


def _is_quantized(value: Any) -> bool:
    """Whether `value` is a tensor subclass with inner tensors, other than a DTensor, which can be traced through."""
    return is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor)


def _with_inputs(arguments: Any, given: dict[Node, int]) -> Any:
    """Replace each node in `arguments` by its number in `given`, to which new nodes are added."""

    def place(x: Any) -> Any:
        return _Input(given.setdefault(x, len(given))) if isinstance(x, Node) else x

    return map_aggregate(arguments, place)  # type: ignore[arg-type, return-value]


def _apply(node: Node, call: Any, values: Sequence[Any]) -> Any:
    args, kwargs = map_aggregate(call, lambda x: values[x.index] if isinstance(x, _Input) else x)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    raise NotImplementedError(f"{node.op} {node.target}")


def copy_placeholders(old: GraphModule, new: GraphModule) -> None:
    """Give the new placeholders the names and metadata of the old ones."""
    pairs = zip(old.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"), strict=True)
    for before, after in pairs:
        # grapharg, which Dynamo clears from its own graph, holds a weak reference, which swap_tensors refuses.
        after.meta = {**{k: v for k, v in before.meta.items() if k != "grapharg"}, "val": after.meta.get("val")}
        after._rename(before.name)
        after.target = before.target
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source


def _frozen(value: Any) -> Any:
    """A hashable form of nested arguments that tells 1, 1.0 and True apart, and 0.0 and -0.0."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return ("dict", *((k, _frozen(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", _frozen(value.start), _frozen(value.stop), _frozen(value.step))
    return (float, value.hex()) if isinstance(value, float) else (type(value), value)


def _metadata(value: Any) -> Any:
    if isinstance(value, Tensor):
        if type(value) is not FakeTensor:
            return id(value)  # a subclass: its inner tensors matter, so it is never shared
        sizes = (*value.size(), "|", *value.stride(), "|", value.storage_offset())
        return (tuple(map(_symbol, sizes)), value.dtype, value.device, value.layout)
    return _symbol(value)


def _symbol(value: Any) -> Any:
    """A hashable form of a number, in which SymInts with the same expression are equal."""
    return (type(value), value.node.expr) if isinstance(value, _SYMBOLS) else (type(value), value)


def _state() -> tuple[Any, ...]:
    autocast = tuple(
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    )
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast)


def _has_unbacked(values: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return any(free_unbacked_symbols(v) for v in pytree.tree_leaves(values) if isinstance(v, (Tensor, *_SYMBOLS)))
