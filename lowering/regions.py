"""The inner backend ``"effpass_regions"``: Inductor for the small operators of a graph, everything else as it is.

The fusions of a decoder layer leave few operators in most models. Those of others (routers, latent attention, rotations
of their own) leave dozens, each a launch of about a microsecond in a CUDA graph. Inductor would fuse them, but takes
minutes for a whole model. A *region* is a run of small operators between larger ones. Equal regions, such as those of
equal layers, are compiled once, which takes seconds for any number of layers. A matrix product, attention, and any
operator that is not ATen's end a region, and run as they would without this backend. Two regions that are too small to
be compiled are joined if the second does not depend on what lies between.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.registry import register_backend
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from effpass.core.retrace import like

__all__ = ["compile_regions"]

aten = torch.ops.aten

_FEWEST = 4  # launches that a region must have to be worth the seconds that Inductor takes for it
_PRODUCTS = {aten.linear, aten.matmul, aten.einsum, aten.mv, aten.dot, aten.scaled_dot_product_attention}
_PRODUCTS |= flop_registry.keys()  # those of matrices, convolutions and attention


@register_backend(name="effpass_regions")
def compile_regions(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile the regions of a graph in inference; `gm` is changed in place.

    Args:
        gm: graph of pre-dispatch ATen operators whose nodes have their fake values in `meta["val"]`.
        example_inputs: inputs of the graph.

    Returns:
        The graph's function, in which each region with at least four launches is a call of compiled code.
    """
    compiled: dict[Any, _Compiled] = {}
    for number, region in enumerate(_regions(gm.graph)):
        _replace(gm, region, f"region_{number}", compiled)
    gm.graph.lint()
    gm.recompile()
    return gm.forward


# -- which operators --------------------------------------------------------------------------------------------------


def _regions(graph: Graph) -> list[list[Node]]:
    """The regions with enough launches, in the order of the graph; each consists of consecutive nodes.

    Nodes of the graph are moved where two regions are joined.
    """
    regions: list[list[Node]] = [[]]
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if _is_small(node, regions[-1]):
            regions[-1].append(node)
        elif regions[-1]:
            regions.append([])
    joined: list[list[Node]] = []
    for region in filter(_count, regions):
        if joined and max(_count(joined[-1]), _count(region)) < _FEWEST and _can_move(region, joined[-1][-1]):
            for node in region:
                joined[-1][-1].append(node)  # in the graph, behind it
                joined[-1].append(node)
        else:
            joined.append(region)
    return [region for region in joined if _count(region) >= _FEWEST]


def _count(region: list[Node]) -> int:
    return sum(map(_launches, region))


def _can_move(region: list[Node], before: Node) -> bool:
    """Whether `region` can directly follow the node `before`: it reads nothing that is computed or written between.

    Its own writes are to memory that it has allocated.
    """
    between, node = set(), before.next
    while node is not region[0]:
        target = node.target
        writes = target._schema.is_mutable if isinstance(target, torch._ops.OpOverload) else None
        if writes is not False and target is not operator.getitem and node.op != "get_attr":
            return False
        between.add(node)
        node = node.next
    return not any(between.intersection(node.all_input_nodes) for node in region)


def _is_small(node: Node, region: list[Node]) -> bool:
    """Whether `node` can be the next operator of `region`."""
    if node.target is operator.getitem:
        return node.args[0] in region
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return False
    if target.overloadpacket in _PRODUCTS or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    values = [node, *node.all_input_nodes]
    if not all(_is_static(value) for value in values):
        return False
    return all(_is_computed_in(written, region) for written in _written(node, target))


def _is_static(node: Node) -> bool:
    values = node.meta.get("val")
    return all(
        isinstance(value, Tensor) and all(isinstance(size, int) for size in (*value.shape, *value.stride()))
        for value in (values if isinstance(values, (list, tuple)) else [values])
    )


def _written(node: Node, target: torch._ops.OpOverload) -> list[Any]:
    """The arguments that the operator writes in place."""
    arguments = target._schema.arguments
    given = dict(zip((argument.name for argument in arguments), node.args, strict=False)) | node.kwargs
    return [given[argument.name] for argument in arguments if argument.is_write and argument.name in given]


def _is_computed_in(node: Node, region: list[Node]) -> bool:
    """Whether the memory of `node` was allocated within `region`, so that a write to it is seen by the region alone."""
    while node in region:
        if not _may_alias(node):
            return True
        node = node.all_input_nodes[0]
    return False


def _may_alias(node: Node) -> bool:
    """Whether the result of `node` may be a view of its first argument, or that argument itself."""
    target: Any = node.target
    if target is operator.getitem:
        return True
    return target.overloadpacket in (aten.reshape, aten.contiguous) or any(
        returned.alias_info is not None for returned in target._schema.returns
    )


def _launches(node: Node) -> int:
    """Number of kernels that the operator launches: 0 for views."""
    target: Any = node.target
    if target is operator.getitem:
        return 0
    if not _may_alias(node) or any(argument.is_write for argument in target._schema.arguments):
        return 1
    before, after = node.all_input_nodes[0].meta["val"], node.meta["val"]
    return int(isinstance(after, Tensor) and before.dtype != after.dtype)


# -- their compilation ------------------------------------------------------------------------------------------------


def _replace(gm: GraphModule, region: list[Node], name: str, compiled: dict[Any, _Compiled]) -> None:
    """Replace a region by one call of compiled code, which equal regions share through `compiled`."""
    inside = set(region)
    takes = list(dict.fromkeys(x for node in region for x in node.all_input_nodes if x not in inside))
    gives = [node for node in region if node.users.keys() - inside]
    key = _key(region, takes, gives)
    if key not in compiled:
        compiled[key] = _Compiled(_compile(region, takes, gives))
    gm.add_module(name, compiled[key])
    with gm.graph.inserting_after(region[-1]):
        call = gm.graph.call_module(name, tuple(takes))
    call.meta["val"] = [node.meta["val"] for node in gives]
    after = call
    for index, node in enumerate(gives):
        with gm.graph.inserting_after(after):
            after = gm.graph.call_function(operator.getitem, (call, index))
        after.meta.update(node.meta)
        node.replace_all_uses_with(after, delete_user_cb=lambda user: user not in inside)
    for node in reversed(region):
        gm.graph.erase_node(node)


def _key(region: list[Node], takes: list[Node], gives: list[Node]) -> Any:
    """A value that is equal for regions with the same operators on inputs of the same layout."""
    number: dict[Node, int] = {node: index for index, node in enumerate((*takes, *region))}
    calls = [(n.target, repr(map_arg((n.args, n.kwargs), lambda arg: f"%{number[arg]}"))) for n in region]
    layouts = [(v.dtype, v.device, tuple(v.shape), v.stride()) for v in (node.meta["val"] for node in takes)]
    return tuple(calls), tuple(layouts), tuple(number[node] for node in gives)


class _Compiled(torch.nn.Module):
    """Compiled code as a module, which a graph can call."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self.run(*inputs)


def _compile(region: list[Node], takes: list[Node], gives: list[Node]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    graph, new = Graph(), {}
    for node in takes:
        new[node] = graph.placeholder(node.name)
    for node in region:
        new[node] = graph.node_copy(node, new.__getitem__)
    graph.output([new[node] for node in gives])
    fake_mode = FakeTensorMode()
    fakes = [like(fake_mode, node.meta["val"]) for node in takes]
    with tracing(TracingContext(fake_mode)):  # that of the caller belongs to the whole graph
        return compile_fx(GraphModule({}, graph), fakes)  # type: ignore[return-value]
