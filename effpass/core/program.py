"""`Program`: a traced model as a `torch.fx.GraphModule` in one dialect, whichever front end produced it.

The *dialect* is the set of operators that passes are written against: pre-dispatch ATen (`aten.linear`,
`aten.scaled_dot_product_attention`, not decomposed) plus `effpass::` operators. Both front ends produce it:
:mod:`effpass.core.dynamo` for `torch.compile` and :mod:`effpass.core.exported` for `torch.export`. Weights are
placeholders in either case, so a pass reads ``program.weight_of(node)`` and does not depend on where the graph came
from. The dialect is *not* functional: caches are written in place, and no rewrite may move a read across a write
(:mod:`effpass.core.verify` checks this after every pass).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatefulSymbolicContext
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from effpass.core.derived import Home

__all__ = ["ROOT", "Linear", "Program", "Weight", "op_counts"]

aten = torch.ops.aten

# How Dynamo spells the compiled object in a module path: L['self'].lm_head, G['model'].lm_head.
#: The compiled module at the start of a path in `nn_module_stack`; `args` where its forward is wrapped by a decorator.
ROOT = re.compile(r"^(?:L__self__|L\['args'\]\[0\]|[LG]\['[^']*'\])\.?")


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of the original model, represented by one placeholder of the program.

    Attributes:
        name: fully qualified name in the model, such as `model.layers.0.self_attn.q_proj.weight`. A tied weight is one
            placeholder with one `name`; its other names are in `aliases`.
        node: the placeholder.
        tensor: the model's own tensor (a fake tensor when the program was traced without real weights).
        aliases: other names of the same tensor.
    """

    name: str
    node: Node
    tensor: torch.Tensor = field(repr=False)
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the weight in the model."""
        return (self.name, *self.aliases)


@dataclass(frozen=True)
class Linear:
    """One use of a weight matrix: ``y = x @ Wᵀ + b``.

    Attributes:
        node: node that computes y `[..., out]`.
        x: node of the input `[..., in]` (`[N, in]` for GPT-2's `addmm`).
        weight: node of W; a placeholder for an ordinary layer.
        bias: node of b `[out]`; None without a bias.
        transposed: True when W is stored as `[in, out]` (GPT-2's Conv1D), False for `[out, in]`.
        name: name of the weight *at this use*: `lm_head.weight` for the head of a model whose head is tied to the
            embedding, although the weight itself is `model.embed_tokens.weight`. None when W is not an original
            weight.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool
    name: str | None

    def replace_weight(self, weight: Node, bias: Node | Literal["keep"] | None = "keep") -> None:
        """Read another weight, of the same layout, at this use only; other uses of a tied weight are unaffected.

        Args:
            weight: node of the new W.
            bias: node of the new b; None removes the bias, ``"keep"`` leaves it as it is.

        Raises:
            ValueError: `bias` is not ``"keep"``, and the operator has a fixed bias argument (`addmm`).
        """
        args = list(self.node.args)
        w_at, b_at = _LINEAR_ARGS[self.node.target]
        args[w_at] = weight
        if bias != "keep":
            if b_at is None or self.transposed:
                raise ValueError(f"{self.node.format_node()} has a fixed bias argument")
            args[b_at:] = [bias] if bias is not None else []
        self.node.args = tuple(args)


# operator → (position of the weight, position of the bias or None)
_LINEAR_ARGS: dict[Any, tuple[int, int | None]] = {
    aten.linear.default: (1, 2),
    aten.addmm.default: (2, 0),
}


def op_counts(graph: torch.fx.Graph) -> Counter[str]:
    """Number of nodes per operator, `{"aten.linear.default": 211, ...}`, without inputs, attributes and the output."""
    return Counter(
        str(node.target) if node.op != "call_function" else _op_name(node.target)
        for node in graph.nodes
        if node.op not in ("placeholder", "output", "get_attr")
    )


def _op_name(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))


@dataclass
class Program:
    """A graph in the dialect, together with its weights and inputs.

    Attributes:
        gm: graph module that holds the graph. Rewrites edit `gm.graph` in place.
        front: front end that produced the program: ``"dynamo"`` (the `torch.compile` backend) or ``"export"``.
        weights: placeholder node → :class:`Weight`.
        inputs: one entry per placeholder, in order. From Dynamo, the real tensors, SymInts and ints of this call. Under
            export, the real weights, and the fake example values of the user inputs.
        grad_enabled: whether autograd records when the program runs.
        exported: ExportedProgram that `gm` belongs to; None from Dynamo.
        derived: source of the value of each input that :meth:`add_input` appended, in order (see
            :mod:`effpass.core.derived`).
        derived_nodes: derived weights declared so far, by owner and originals, so that each is declared once.
        bodies: programs of the graphs inside operators that are not decomposed (gradient checkpointing). Passes rewrite
            them too.
        prefix: prefix of every weight name, with the trailing dot, when a submodule was compiled:
            ``"model.layers.0."``.
        parent: program that contains this body; None for a whole program.
        caller: node of the parent that calls this body; None for a whole program.
        replaced_writes: new operator → the operator whose write it performs, and the operators whose reads it performs
            (see :meth:`replace_write`).
    """

    gm: GraphModule
    front: Literal["dynamo", "export"]
    weights: dict[Node, Weight]
    inputs: list[Any]
    grad_enabled: bool = False
    exported: ExportedProgram | None = None
    derived: list[Any] = field(default_factory=list)
    derived_nodes: dict[Any, Node] = field(default_factory=dict)
    bodies: list[Program] = field(default_factory=list)
    prefix: str = ""
    parent: Program | None = None
    caller: Node | None = None
    replaced_writes: dict[Node, tuple[Node, tuple[Node, ...]]] = field(default_factory=dict)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.gm.graph

    @property
    def entrance(self) -> Literal["program", "backend"]:
        """The entrance (see :mod:`effpass.core.pass_`) through which the program reached the passes."""
        return "backend" if self.front == "dynamo" else "program"

    def weight_of(self, node: Any) -> Weight | None:
        """The original weight that `node` is the placeholder of; None for any other node, even one computed from it."""
        return self.weights.get(node) if isinstance(node, Node) else None

    def linears(self) -> Iterator[Linear]:
        """Yield every use of a weight matrix in graph order, both `aten.linear` and GPT-2's `addmm`."""
        for node in list(self.graph.nodes):
            linear = self.linear_at(node)
            if linear is not None:
                yield linear

    def linear_at(self, node: Node) -> Linear | None:
        """`node` as a use of a weight matrix; None for any other node."""
        if node.op != "call_function":
            return None
        if node.target is aten.linear.default:
            x, weight, *rest = node.args
            bias = rest[0] if rest else None
            return Linear(node, x, weight, bias, transposed=False, name=self._name_at(node, weight))  # type: ignore[arg-type]
        if node.target is aten.addmm.default and not node.kwargs:
            bias, x, weight = node.args
            if self.weight_of(weight) is not None:
                return Linear(node, x, weight, bias, transposed=True, name=self._name_at(node, weight))  # type: ignore[arg-type]
        return None

    def _name_at(self, use: Node, node: Any) -> str | None:
        """The name of the weight `node` in the module that `use` was traced in (see :class:`Linear`)."""
        weight = self.weight_of(node)
        if weight is None:
            return None
        stack = use.meta.get("nn_module_stack")
        if not stack:
            return weight.name
        path, cls = list(stack.values())[-1]
        path = ROOT.sub("", path)
        owner = weight.name.rpartition(".")[0]
        if path.endswith(owner) or owner.endswith(path) or "Linear" not in str(getattr(cls, "__name__", cls)):
            return weight.name
        return f"{self.prefix}{path}.weight"

    def op_counts(self) -> Counter[str]:
        return op_counts(self.graph)

    def derive(
        self,
        owner: str,
        originals: Sequence[Node],
        compute: Callable[..., torch.Tensor],
        constants: Mapping[str, torch.Tensor] | None = None,
        *,
        slot: Any = None,
    ) -> Node:
        """Declare a derived weight: a pure function of original weights and artifact tensors.

        Args:
            owner: name of the pass and of the weight, such as
                `merge_lora:model.layers.0.self_attn.q_proj.weight`. Two programs that declare the same owner over the
                same tensors share one derived tensor.
            originals: placeholders of the weights that the derived weight is computed from.
            compute: ``compute(*originals, **constants) -> Tensor``. It must be pure, out of place and traceable.
            constants: artifact tensors, passed to `compute` by keyword.
            slot: an :class:`effpass.core.derived.Slot` in place of `constants`, when the artifact tensors can be
                swapped at run time.

        Returns:
            The node to read in place of the weight. :meth:`home_of` determines where its value lives: computed once
            (export), computed in the graph (training, DTensor, inference tensors), or cached outside the compiled
            function.
        """
        from effpass.core.derived import derive

        return derive(self, owner, originals, compute, dict(constants or {}), slot)

    def home_of(self, originals: Sequence[Node]) -> Home:
        """Where a weight derived from `originals` would live: ``"module"``, ``"graph"`` or ``"cached"``."""
        from effpass.core.derived import home_of

        return home_of(self, originals)

    def first_computation(self, after: Sequence[Node] = ()) -> Node:
        """The first node that is no placeholder and follows all nodes of `after`: an insertion point for new nodes."""
        waiting = set(after)
        for node in self.graph.nodes:
            waiting.discard(node)
            if node.op != "placeholder" and not waiting and node not in after:
                return node
        raise RuntimeError("the graph has no output")

    def add_input(self, name: str, value: torch.Tensor, supply: Any) -> Node:
        """Append an input that the wrapper around the compiled function supplies (backend only).

        Args:
            name: readable name of the input; characters that an identifier can't have are replaced.
            value: value of the input in this call; values of later calls have the same shape, dtype and device.
            supply: object from which :class:`effpass.core.derived.DerivedArguments` obtains the value.
        """
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        identifier = "".join(c if c.isalnum() else "_" for c in name)
        with self.graph.inserting_before(self.first_computation()):
            node = self.graph.placeholder(identifier)
        node.meta["val"] = self.fake_mode().from_tensor(value, static_shapes=True)
        # Without a source, no guard is created for the input. As a static input, CUDA graphs read it at its address
        # instead of copying it at every replay.
        node._dynamo_source = None  # type: ignore[attr-defined]
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
        context = TracingContext.try_get()
        if context is not None:  # the sizes are static: symbols created for them would have no guards
            context.tensor_to_context[value] = StatefulSymbolicContext(
                dynamic_sizes=[DimDynamic.STATIC] * value.dim(), tensor_source=ConstantSource(identifier)
            )
        assert len(placeholders) == len(self.inputs)
        self.inputs.append(value)
        self.derived.append(supply)
        return node

    def replace_write(self, old: Node, new: Node, reads: Sequence[Node] = ()) -> None:
        """Declare that `new` performs the in-place write of `old`, and erase `old`.

        Without such a declaration a pass may neither remove nor add a write. :mod:`effpass.core.verify` checks the
        declaration: `new` must write the storages that `old` wrote, at the same place in the order of their writes, and
        the operators in `reads` must have read these storages as they are after that write.

        Args:
            old: operator that writes to its operands, and whose own value has no readers left.
            new: operator that replaces it; already in the graph.
            reads: operators whose reads of these storages `new` also performs, after its write.
        """
        self.replaced_writes[new] = (old, tuple(reads))
        self.graph.erase_node(old)

    def fake_mode(self) -> FakeTensorMode:
        """The fake tensor mode of the values that this program's nodes have in `meta["val"]`."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            while is_traceable_wrapper_subclass(value):  # a DTensor
                value = getattr(value, value.__tensor_flatten__()[0][0])
            if isinstance(value, FakeTensor):
                return value.fake_mode
        raise RuntimeError("the program has no tensor values")

    def recompile(self) -> None:
        """Eliminate dead code and regenerate the code of `gm` from its graph."""
        self.graph.eliminate_dead_code(is_impure_node=_keep)
        self.gm.recompile()


def _keep(node: Node) -> bool:
    """Whether dead code elimination must keep `node`: mutations, grad-mode switches and higher-order operators."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function":
        return False
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable or node.is_impure()
    return not getattr(target, "__module__", "").startswith("_operator")
