"""Where the time of a program goes: its kernels by the module they belong to, with equal layers folded into one.

`model.layers.0.mlp.up_proj` to `model.layers.29.mlp.up_proj` become ``model.layers.*.mlp.up_proj``, 30 times. The
reports of :func:`effpass.inspect` are made of this.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effpass.core.flops import Size, evaluate
from effpass.core.kernels import Kernel, kernels
from effpass.core.program import ROOT
from effpass.core.roofline import Ceilings, predict

if TYPE_CHECKING:
    from torch.fx import Node

    from effpass.core.program import Program

__all__ = ["LayerView", "Part", "Row", "breakdown", "layer_view", "outline", "parts"]

# How Dynamo spells the compiled object, and a module in a dict: L['self'].__dict__['_modules']['base_model'].
_ITEM = re.compile(r"(?:\.?__dict__)?(?:\.?_modules|\['_modules'\])?\['(?P<name>[^']*)'\]")
_LAYER = re.compile(r"^(?P<stack>.*?)\.(?P<index>\d+)(?:\.(?P<rest>.*))?$")


@dataclass(frozen=True)
class Part:
    """One kernel with its costs at given sizes.

    Attributes:
        name: module that the kernel belongs to, with layer numbers replaced: ``model.layers.*.mlp.up_proj``.
        layer: stack and index of the layer that the kernel belongs to, (``model.layers``, 3); None outside of layers.
        kind: as in :class:`effpass.core.kernels.Kernel`.
        operators: names of its operators, in order.
        flops: number of floating-point operations.
        weight_bytes: bytes of weights read.
        cache_bytes: bytes of caches read.
        activation_bytes: bytes of everything else, read and written.
        seconds: predicted time.
        kernel: the kernel itself, with its costs as formulas.
    """

    name: str
    layer: tuple[str, int] | None
    kind: str
    operators: tuple[str, ...]
    flops: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    seconds: float
    kernel: Kernel

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.activation_bytes


@dataclass(frozen=True)
class Row:
    """Kernels that are equal in all layers, with the sums of their costs.

    Attributes:
        name: module that they belong to, as in :class:`Part`.
        kind: as in :class:`effpass.core.kernels.Kernel`.
        operators: names of the operators of one kernel, in order.
        count: number of kernels.
        flops: number of floating-point operations of all of them.
        bytes: bytes read and written by all of them.
        seconds: predicted time of all of them.
    """

    name: str
    kind: str
    operators: list[str]
    count: int
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class LayerView:
    """One layer of a stack, before and after the passes.

    Attributes:
        stack: name of the stack of layers, ``model.layers``.
        index: index of the layer shown. Layers that the passes change are preferred; among them, it is the first layer
            of the most common kind.
        alike: number of layers with exactly these kernels before and after.
        count: number of layers in the stack.
        before: kernels of the layer as loaded, in order: name relative to the layer, kind, and operators.
        after: kernels of the layer after the last pass, in order.
    """

    stack: str
    index: int
    alike: int
    count: int
    before: list[dict[str, Any]]
    after: list[dict[str, Any]]


def parts(program: Program, at: Ceilings, sizes: Mapping[Any, int]) -> list[Part]:
    """The kernels of `program` with their costs at `sizes` and their predicted times on `at`."""

    def number(size: Size) -> int:
        return evaluate(size, sizes)

    result = []
    for kernel in kernels(program):
        path = _path(kernel.nodes)
        found = _LAYER.match(path)
        name = path if found is None else ".".join(filter(None, (found["stack"], "*", found["rest"])))
        result.append(
            Part(
                name,
                None if found is None else (found["stack"], int(found["index"])),
                kernel.kind,
                tuple(_operator(node) for node in kernel.nodes),
                number(kernel.flops),
                number(kernel.weights),
                number(kernel.cache),
                number(kernel.read + kernel.written),
                predict(kernel, at, sizes),
                kernel,
            )
        )
    return result


def _path(nodes: Sequence[Node]) -> str:
    """The module of a kernel. If operators of several modules are fused, it is the module of most of them."""
    paths = Counter(path for node in nodes if (path := _module_path(node)))
    return paths.most_common(1)[0][0] if paths else ""


def _module_path(node: Node) -> str:
    """Name of the module that `node` was traced in, as in `named_modules` but without the wrappers of PEFT."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = _ITEM.sub(r".\g<name>", ROOT.sub("", list(stack.values())[-1][0])).lstrip(".")
    return path.removeprefix("base_model.model.").removesuffix(".base_layer")


def _operator(node: Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0] if "." in str(node.target) else node.name


def breakdown(found: Sequence[Part]) -> list[Row]:
    """Sum up the equal kernels of all layers; the row with the longest time comes first."""
    rows: dict[tuple[str, str, tuple[str, ...]], list[Part]] = {}
    for part in found:
        rows.setdefault((part.name, part.kind, part.operators), []).append(part)
    summed = [
        Row(
            name,
            kind,
            list(operators),
            len(same),
            sum(p.flops for p in same),
            sum(p.bytes for p in same),
            sum(p.seconds for p in same),
        )
        for (name, kind, operators), same in rows.items()
    ]
    return sorted(summed, key=lambda row: -row.seconds)


def layer_view(before: Sequence[Part], after: Sequence[Part]) -> LayerView | None:
    """The most representative layer (see :class:`LayerView`); None for a program without a stack of layers."""
    first, last = _layers(before), _layers(after)
    pairs: dict[str, list[tuple[str, int]]] = {}
    for layer in first:
        pairs.setdefault(repr((layer[0], first[layer], last.get(layer, []))), []).append(layer)
    if not pairs:
        return None
    same = max(pairs.values(), key=lambda layers: (first[layers[0]] != last.get(layers[0], []), len(layers)))
    stack, index = same[0]
    count = sum(layer[0] == stack for layer in first)
    return LayerView(stack, index, len(same), count, first[same[0]], last.get(same[0], []))


def _layers(found: Sequence[Part]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    layers: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for part in found:
        if part.layer is not None:
            name = part.name.removeprefix(f"{part.layer[0]}.*").lstrip(".")
            kernel = {"name": name, "kind": part.kind, "operators": list(part.operators)}
            layers.setdefault(part.layer, []).append(kernel)
    return layers


def outline(found: Sequence[Part]) -> list[str]:
    """The names of the program's modules in order, with each stack of layers once."""
    sizes = Counter(stack for stack, _ in {p.layer for p in found if p.layer is not None})
    names = []
    for part in found:
        stack = None if part.layer is None else part.layer[0]
        name = (part.name or "the model") if stack is None else f"{sizes[stack]} x {stack}.*"
        if name not in names:
            names.append(name)
    return names
