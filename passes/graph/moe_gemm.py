"""`moe_gemm`: replace each layer of experts by one operator that chooses its kernel by the number of tokens.

    out[t] = Σ_j weights[t, j] · W_down h(W_gate_up x[t])            with the weights of expert experts[t, j]

The operator is `effpass::moe_ffn`; weights[t, j] is the routing weight of the j-th expert of token t, and h is the
gate. The pass recognizes layers written as grouped products of sorted rows or as batched products with a copy of an
expert's weights for each row (:mod:`effpass.passes.graph.moe_gemm_layer`), and layers written as a loop over experts
(:mod:`effpass.passes.graph.moe_gemm_loop`). After the rewrite, the cost no longer depends on this form: weights are not
copied, and the host does not wait for the number of rows of each expert unless the chosen kernel needs it. The kernel
is chosen by the number of tokens (EPS-MoE, https://arxiv.org/abs/2410.12247) with a cost model of the device
(:mod:`effpass.lowering.ops.moe_ffn_choice`). With `expert_parallel`, the experts are distributed over several processes
(:mod:`effpass.passes.graph.moe_gemm_ranks`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

import effpass.lowering.ops.moe_ffn  # noqa: F401  (registers the operator)
from effpass.core.errors import PassRefusedError
from effpass.core.inline import program_values
from effpass.core.matching import Surroundings
from effpass.core.pass_ import GraphPass, Match, Pass, Setting
from effpass.core.program import Program
from effpass.core.report import Refusal
from effpass.lowering.ops.moe_ffn_choice import serving
from effpass.passes.graph.moe_gemm_gate import Gate
from effpass.passes.graph.moe_gemm_inside import Miss
from effpass.passes.graph.moe_gemm_layer import Layer, Product, layer_of, product_at
from effpass.passes.graph.moe_gemm_loop import Loop, accumulators, cut_off, loop_of
from effpass.passes.graph.moe_gemm_ranks import check_ranks, ranks, spread

__all__ = ["MoeGemm", "MoeGemmOptions"]

aten = torch.ops.aten

_KEPT_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "custom")


@dataclass(frozen=True)
class MoeGemmOptions:
    """Options of `moe_gemm`.

    Attributes:
        expert_parallel: distribution of the experts over the ranks of a multi-process run, in which with ``"dp"`` every
            rank has its own tokens, and with ``"tp"`` all ranks have the same tokens. None to keep all experts on every
            rank. Has no effect with one process.
    """

    expert_parallel: Literal["dp", "tp"] | None = None


class MoeGemm(GraphPass):
    """Makes each layer of experts one operator, with the kernel that fits its load."""

    name = "moe_gemm"
    exact = True
    entrances = ("model", "program", "backend")  # type: ignore[assignment]  # "model" is for expert_parallel
    Options = MoeGemmOptions
    options: MoeGemmOptions

    @property
    def over_ranks(self) -> bool:
        return self.options.expert_parallel is not None and ranks() > 1

    # -- several processes, on the model ------------------------------------------------------------------------------

    @property
    def rewrites_model(self) -> bool:
        return self.over_ranks

    def check_beside(self, before: Sequence[Pass], behind: Sequence[Pass]) -> None:
        loops = [pass_.name for pass_ in (*before, *behind) if pass_.kind == "runtime"]
        if self.over_ranks and self.options.expert_parallel == "dp" and loops:
            raise PassRefusedError(
                f"moe_gemm: with expert_parallel: dp ranks generate sequences of their own, and {loops[0]} acts in"
                " effpass's loop, which does not wait for other ranks",
                hint=f"leave {loops[0]} out, or give all ranks the same prompts (expert_parallel: tp)",
            )

    def check_model(self, model: torch.nn.Module) -> None:
        if self.over_ranks:
            check_ranks(model, self.options.expert_parallel == "tp")

    def prepare(self, model: torch.nn.Module) -> tuple[int, list[Refusal]]:
        """Keep only this rank's share of the experts of each layer; hits are layers."""
        return spread(model, self.options.expert_parallel == "tp")

    # -- one process, in a program ------------------------------------------------------------------------------------

    def make_ready(self, model: torch.nn.Module) -> Setting | None:
        """Set experts_implementation to grouped_mm where it is eager, a loop that Dynamo does not capture."""
        configs = [getattr(m, "config", None) for m in model.modules() if hasattr(m, "_apply_gate")]
        eager = [config for config in configs if getattr(config, "_experts_implementation", None) == "eager"]
        if not eager or self.over_ranks:
            return None

        def put(implementation: str) -> None:
            for config in eager:
                config._experts_implementation = implementation  # type: ignore[union-attr]

        put("grouped_mm")
        line = f"moe_gemm: experts_implementation set from eager to grouped_mm (layers with experts: {len(eager)})"
        return Setting(line, lambda: put("eager"))

    def could_act(self, weight_names: Sequence[str]) -> bool:
        return any("expert" in name for name in weight_names)

    def could_refuse(self, gm: torch.fx.GraphModule) -> bool:
        return any(node.target is torch.nn.functional.one_hot for node in gm.graph.nodes)

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        if self.over_ranks:
            raise PassRefusedError(
                "moe_gemm: expert_parallel needs effpass.prepare(model, recipe) before torch.compile",
                hint="only there can a process let go of the experts that others hold",
            )
        products = {p.node: p for node in program.graph.nodes if (p := product_at(node)) is not None}
        loops = accumulators(program.graph)
        if not products and not loops:
            yield from _unknown(program)
            hot = cut_off(program.graph)
            if hot is not None:
                looped = "its experts are a loop over values that the device computes, which no graph can contain"
                how = 'model.set_experts_implementation("grouped_mm") before torch.compile; effpass.prepare does it'
                yield Refusal(hot.name, looped, how)
            return
        surroundings = Surroundings.of(program)
        matches: list[Match] = []
        misses: dict[Product, Miss] = {}
        for product in products.values():
            try:
                layer = layer_of(product, products, surroundings)
                weights = (layer.first.weight, layer.first_bias, layer.second.weight, layer.second_bias)
                _check(layer.anchor, layer.inner, layer.x, weights, surroundings)
                matches.append(Match(layer.anchor, {"layer": layer}))
            except Miss as miss:
                misses[product] = miss
        taken = {p.node for match in matches for p in (match.nodes["layer"].first, match.nodes["layer"].second)}
        feeding = {p.node for p in products.values() if any(_feeds(p, other) for other in misses)}
        for product, reason in misses.items():
            if product.node not in taken and product.node not in feeding:
                yield Refusal(reason.node.name, reason.reason)
        for total, additions in loops:
            try:
                loop = loop_of(total, additions, surroundings)
                _check(loop.anchor, loop.inner, loop.x, (*_nodes(loop.gate_up), *_nodes(loop.down)), surroundings)
            except Miss as miss:
                yield Refusal(miss.node.name, miss.reason)
            else:
                own = [n for w in (loop.gate_up, loop.down) if not isinstance(w, Node) for n in _nodes(w)]
                if own and program.home_of(own) != "module":
                    held = "its experts have weights of their own, of which a stacked copy would be held"
                    yield Refusal(loop.anchor.name, held, "export the model, which holds the stacked ones alone")
                    continue
                matches.append(Match(loop.anchor, {"loop": loop}))
        # In reverse graph order: the input of a layer may be the output of an earlier one, which must still exist.
        yield from sorted(matches, key=lambda match: -surroundings.position[match.anchor])

    def note(self, program: Program) -> str:
        """Return which constants choose the kernels on the program's GPU."""
        target = torch.ops.effpass.moe_ffn.default
        nodes = [n for p in (program, *program.bodies) for n in p.graph.nodes if n.target is target]
        values = [n.args[0].meta["val"] for n in nodes]
        return next((serving(x.device, x.dtype) for x in values if x.device.type == "cuda"), "")

    def rewrite(self, program: Program, match: Match) -> None:
        if "loop" in match.nodes:
            _rewrite_loop(program, match.nodes["loop"])
            return
        layer: Layer = match.nodes["layer"]
        with program.graph.inserting_before(layer.anchor):
            gate_up, down = (_stored(program, p, layer.anchor) for p in (layer.first, layer.second))
            tensors = (layer.x, layer.experts, layer.weights, gate_up, layer.first_bias, down, layer.second_bias)
            out = _experts(program, tensors, layer.gate, layer.anchor)
        layer.anchor.replace_all_uses_with(out)
        _erase(program, layer.inner)


def _unknown(program: Program) -> Iterator[Refusal]:
    """Yield a refusal for each weight of experts in a program that has no layer of a known form."""
    for node in program.graph.find_nodes(op="placeholder"):
        weight = program.weight_of(node)
        if weight is not None and "expert" in weight.name and node.meta["val"].ndim == 3 and node.users:
            written = "its experts are written neither as grouped nor as copied products, nor as a loop over them"
            yield Refusal(weight.name, written, "set experts_implementation to grouped_mm, where the model has it")


def _rewrite_loop(program: Program, loop: Loop) -> None:
    gate_up, down = loop.gate_up, loop.down
    if not isinstance(gate_up, Node):
        gate_up = _stack(program, gate_up)
    if not isinstance(down, Node):
        down = _stack(program, down)
    with program.graph.inserting_before(loop.anchor):
        tensors = (loop.x, loop.experts, loop.weights, gate_up, None, down, None)
        out = _experts(program, tensors, loop.gate, loop.anchor)
    for node in (loop.total, *(n for n in loop.inner if n.target is aten.index_add_.default)):
        node.replace_all_uses_with(out, delete_user_cb=lambda user: user not in loop.inner)
    _erase(program, loop.inner)


def _stack(program: Program, weights: tuple[tuple[Node, ...], ...]) -> Node:
    """Derive the stacked weight [E, …] from the weights of each expert, with the rows of gate before those of up."""
    parts, flat = len(weights[0]), [node for each in weights for node in each]

    def stacked(*tensors: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.cat(tensors[at : at + parts]) for at in range(0, len(tensors), parts)])

    weight = program.weight_of(flat[0])
    return program.derive(f"moe_gemm:{weight.name if weight is not None else flat[0].name}", flat, stacked)


def _experts(program: Program, tensors: tuple[Node | None, ...], gate: Gate, old: Node) -> Node:
    """Insert the operator and return its output, which replaces `old`."""
    keep = program.grad_enabled and any(n is not None and n.meta["val"].requires_grad for n in tensors)
    numbers = (gate.activation, gate.alpha, gate.limit, gate.offset, gate.interleaved, keep)
    both = _call(program, torch.ops.effpass.moe_ffn.default, (*tensors, *numbers), old)
    with program_values(program):
        x, experts, gate_up = (n.meta["val"] for n in (tensors[0], tensors[1], tensors[3]))  # type: ignore[union-attr]
        kept = x.new_empty((experts.shape[0] * experts.shape[1], gate_up.shape[1]) if keep else (0,))
    both.meta["val"] = (old.meta["val"], kept)
    out = _call(program, operator.getitem, (both, 0), old)
    out.meta["val"] = old.meta["val"]
    return out


def _erase(program: Program, nodes: frozenset[Node]) -> None:
    for node in reversed(program.graph.nodes):
        if node in nodes:
            program.graph.erase_node(node)


def _nodes(weight: Node | tuple[tuple[Node, ...], ...]) -> list[Node]:
    return [weight] if isinstance(weight, Node) else [node for each in weight for node in each]


def _feeds(product: Product, other: Product) -> bool:
    """Whether the rows of `other` are computed from `product`, so that both belong to the same layer."""
    waiting, seen = [other.rows], set[Node]()
    while waiting:
        node = waiting.pop()
        if node is product.node:
            return True
        if node not in seen and node.op == "call_function" and len(seen) < 32:
            seen.add(node)
            waiting += node.all_input_nodes
    return False


def _check(
    anchor: Node, inner: frozenset[Node], x: Node, weights: Iterable[Node | None], surroundings: Surroundings
) -> None:
    """Raise a :class:`Miss` if the operator can't replace the layer."""
    epochs = {node: surroundings.epochs.get(node, {}) for node in inner}
    # Writes to tensors inside the layer are removed together with it.
    outer = {node: {root: seen for root, seen in of.items() if root not in inner} for node, of in epochs.items()}
    reason = replace(surroundings, epochs=outer).why_not_late(set(inner), anchor)
    if reason is not None:
        raise Miss(anchor, reason)
    dtype = x.meta["val"].dtype
    for node in weights:
        value = None if node is None else node.meta["val"]
        if value is not None and type(value) is not FakeTensor:
            raise Miss(anchor, f"{node} is a {type(value).__name__}")
        if value is not None and value.dtype != dtype:
            raise Miss(anchor, f"{node} is {value.dtype} and {x.name} {dtype}")


def _stored(program: Program, product: Product, old: Node) -> Node:
    """Return the weight of `product` as [E, N, K], a view of the stored tensor."""
    if not product.transposed:
        return product.weight
    node = _call(program, aten.transpose.int, (product.weight, 1, 2), old)
    with program_values(program):
        node.meta["val"] = product.weight.meta["val"].transpose(1, 2)
    return node


def _call(program: Program, target: Any, arguments: tuple[Any, ...], old: Node) -> Node:
    """Insert a call of `target` that takes over the metadata of `old` on its place in the model."""
    new = program.graph.call_function(target, arguments)
    new.meta.update({key: old.meta[key] for key in _KEPT_META if key in old.meta})
    return new
