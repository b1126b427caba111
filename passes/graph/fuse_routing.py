"""`fuse_routing`: compute the experts of each token and their weights, from a router's logits, with one kernel.

    experts = top k of (s + bias) in the best groups;  weights = scale · s[experts] / (Σ s[experts] + eps)

s is the softmax or the sigmoid of the logits. The operator is `effpass::moe_router`. It replaces the small operators of
a router, each of which is a kernel launch in a decode step: from two in GPT-OSS to 17 in DeepSeek-V3. The pass starts
from the operators `effpass::moe_ffn` that `moe_gemm` inserts, and matches backwards from their experts and weights
(:mod:`effpass.passes.graph.fuse_routing_form`).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence

import torch
from torch.fx import Node

import effpass.lowering.ops.moe_ffn  # noqa: F401  (registers the operator)
from effpass.core.matching import Surroundings
from effpass.core.pass_ import GraphPass, Match
from effpass.core.program import Program
from effpass.core.report import Refusal
from effpass.lowering.ops import moe_router as operators
from effpass.passes.graph.few_rows import why_no_kernel, why_not_program
from effpass.passes.graph.fuse_routing_form import Router, router_of
from effpass.passes.graph.moe_gemm_inside import Miss
from effpass.passes.graph.same_value import source

__all__ = ["FuseRouting"]

aten = torch.ops.aten


class FuseRouting(GraphPass):
    """Computes the experts and weights of a router from its logits with one kernel, behind `moe_gemm`."""

    name = "fuse_routing"
    exact = True
    follows = ("moe_gemm",)

    def could_act(self, weight_names: Sequence[str]) -> bool:
        return torch.cuda.is_available() and any("expert" in name for name in weight_names)

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        layers = program.graph.find_nodes(op="call_function", target=torch.ops.effpass.moe_ffn.default)
        ends = dict.fromkeys((source(layer.args[1]), source(layer.args[2])) for layer in layers)
        if ends and (refusal := why_not_program(program)):
            yield refusal
            return
        if not ends and (topk := _topk_beside_experts(program)) is not None:
            yield Refusal(topk.name, "no effpass::moe_ffn reads what it chooses", "name moe_gemm before fuse_routing")
            return
        surroundings = Surroundings.of(program)
        for experts, weights in ends:
            try:
                router, anchor = router_of(experts, weights, surroundings)
            except Miss as miss:
                yield Refusal(miss.node.name, miss.reason)
                continue
            if why := _why_not(router):
                yield Refusal(anchor.name, *why)
            else:
                yield Match(anchor, {"router": router})

    def rewrite(self, program: Program, match: Match) -> None:
        router: Router = match.nodes["router"]
        arguments = (
            router.logits, router.bias, router.top_k, router.scoring_func, router.n_group, router.topk_group,
            router.norm_topk_prob, router.eps, router.scale, router.weights.meta["val"].dtype,
        )  # fmt: skip
        with program.graph.inserting_before(match.anchor):
            route = program.graph.call_function(torch.ops.effpass.moe_router.default, arguments)
            route.meta.update(match.anchor.meta)
            route.meta["val"] = tuple(node.meta["val"] for node in router.last)
            new = [program.graph.call_function(operator.getitem, (route, place)) for place in range(2)]
        for before, after in zip(router.last, new, strict=True):
            after.meta.update(before.meta)
            before.replace_all_uses_with(after, delete_user_cb=lambda user: user not in router.inner)
        for node in reversed(program.graph.nodes):
            if node in router.inner:
                program.graph.erase_node(node)


def _topk_beside_experts(program: Program) -> Node | None:
    """The first `topk` of a program with weights of experts."""
    weights = map(program.weight_of, program.graph.find_nodes(op="placeholder"))
    if not any(weight is not None and "expert" in weight.name for weight in weights):
        return None
    return next(iter(program.graph.find_nodes(op="call_function", target=aten.topk.default)), None)


def _why_not(router: Router) -> tuple[str, str] | None:
    """Why no kernel can compute a router, with a hint; None if one can."""
    most, experts = operators.MAX_EXPERTS, router.logits.meta["val"].shape[1]
    if not isinstance(experts, int) or experts > most:
        return f"{experts} experts, and the kernel is for up to {most}", ""
    if router.top_k > operators.MAX_TOP_K:
        return f"{router.top_k} experts of a token, and the kernel is for up to {operators.MAX_TOP_K}", ""
    if router.bias is not None and router.bias.meta["val"].device != router.logits.meta["val"].device:
        return f"{router.bias.name} is on another device than {router.logits.name}", ""
    # The number of tokens, dynamic or not, does not matter: each is a program of its own.
    return why_no_kernel(router.logits, sizes=(), others=(), has_kernel=operators.has_kernel)
