"""Recognizes the router of a layer of experts, in the ways in which transformers writes it.

    experts = topk(c, k);  weights = s[experts] / (Σ s[experts] + eps) · scale, cast

c is s, or s + bias, or one of these with the experts of all groups but the best masked; s is the softmax or the sigmoid
of the logits. The weights may also be the values that `topk` returns, or their softmax. :func:`router_of` starts from
the experts and the weights, and returns the arguments of `effpass::moe_router`.
"""

from __future__ import annotations

import operator
from collections.abc import Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effpass.core.matching import Surroundings, writes
from effpass.passes.graph.few_rows import why_not_here
from effpass.passes.graph.moe_gemm_inside import Miss
from effpass.passes.graph.same_value import cast_of, dtype_of, source

__all__ = ["Router", "router_of"]

aten = torch.ops.aten

_HALF = (torch.bfloat16, torch.float16)
_MULTIPLIES = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar)
_DIVIDES = (aten.div.Tensor, aten.div_.Tensor)
_SCATTERS = (aten.scatter.value, aten.scatter_.value)
_CASTS_LIKE = (aten.type_as.default, aten.to.other)  # of their second operand only the dtype is read
_IN_PLACE = (aten.div_.Tensor, aten.mul_.Tensor)
_ZEROS = (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default)


@dataclass(frozen=True)
class Router:
    """A matched router; attributes that are not described here are arguments of `effpass::moe_router`.

    Attributes:
        scale: factor of the weights, a float or the node of one.
        experts: node of the experts' ids [N, k].
        weights: node of their weights [N, k].
        inner: all nodes between the logits and `experts` and `weights`, these two included.
    """

    logits: Node
    bias: Node | None
    top_k: int
    scoring_func: str
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    eps: float
    scale: Any
    experts: Node
    weights: Node
    inner: frozenset[Node] = frozenset()

    @property
    def last(self) -> tuple[Node, Node]:
        return self.experts, self.weights


def router_of(experts: Node, weights: Node, surroundings: Surroundings) -> tuple[Router, Node]:
    """Match the router that computes `experts` and `weights`.

    Returns:
        The router, and the node at whose position the operator can be inserted.

    Raises:
        Miss: they are computed in another way, or the operator can't replace their computation.
    """
    router = _match(source(experts), source(weights))
    inputs = {router.logits, *([] if router.bias is None else [router.bias])}
    inner = _inner(router, inputs, surroundings)
    anchor = max(router.last, key=lambda node: surroundings.position[node])
    for node in router.last:
        for user in node.users:
            if user not in inner and surroundings.position[user] < surroundings.position[anchor]:
                raise Miss(node, f"{user.name} reads it before {anchor.name} is computed")
    # Writes to tensors of the router are removed together with it.
    epochs = {node: surroundings.epochs.get(node, {}) for node in inner}
    outer = {node: {root: seen for root, seen in of.items() if root not in inner} for node, of in epochs.items()}
    if reason := why_not_here(replace(surroundings, epochs=outer), inner, anchor):
        raise Miss(anchor, reason)
    return replace(router, inner=inner), anchor


# -- the computation --------------------------------------------------------------------------------------------------


def _match(experts: Node, weights: Node) -> Router:
    topk = _item_of(experts, 1)
    if topk is None or topk.target is not aten.topk.default:
        raise Miss(experts, "its experts are not those that a topk returns")
    compared, top_k = _topk(topk)

    node = cast_of(weights) or weights
    node, scale = _scaled(node)
    node, eps = _normalized(node)
    chosen, gathered = node, _operand(node, aten.gather.default)
    if node.target is aten.softmax.int and eps is None and scale == 1.0 and _item_of(_softmax(node), 0) is topk:
        # The softmax of the largest logits is the normalized softmax of all. A shorter dtype must not be cast again.
        if dtype_of(node) != torch.float32 and node is not weights:
            raise Miss(node, f"its weights are rounded to {_short(node)} and then computed with")
        return Router(_wide(compared), None, top_k, "softmax", 1, 1, True, 0.0, 1.0, experts, weights)
    _require_float32(node)
    ungrouped, grouping = _grouping(compared)
    if _item_of(chosen, 0) is topk:
        scores, bias = ungrouped, None
    elif gathered is not None and source(chosen.args[2]) is experts and chosen.args[1] in (1, -1):
        scores = gathered
        bias = None if ungrouped is scores else _bias(ungrouped, scores)
    else:
        raise Miss(weights, f"its weights come from {chosen.name}, which neither topk nor a gather of scores computes")
    scoring_func, logits = _scored(scores)
    n_group, topk_group = _groups(grouping, bias, scores, top_k)
    numbers = (n_group, topk_group, eps is not None, eps or 0.0, scale)
    return Router(logits, bias, top_k, scoring_func, *numbers, experts, weights)


def _scaled(node: Node) -> tuple[Node, Any]:
    """What `node` multiplies, and the number by which it does; 1 if it does not."""
    if node.target in _MULTIPLIES and len(node.args) == 2 and _is_number(node.args[1]):
        _require_float32(node)
        scale = node.args[1]
        return source(node.args[0]), scale if isinstance(scale, Node) else float(scale)  # type: ignore[arg-type]
    return node, 1.0


def _normalized(node: Node) -> tuple[Node, float | None]:
    """What `node` divides by its sum, and what is added to the sum; None if it does not."""
    if node.target not in _DIVIDES or len(node.args) != 2 or node.kwargs:
        return node, None
    _require_float32(node)
    values, total, eps = source(node.args[0]), source(node.args[1]), 0.0
    if not isinstance(total, Node):
        raise Miss(node, f"its weights are divided by {total}")
    if total.target is aten.add.Tensor and isinstance(total.args[1], float) and not total.kwargs:
        total, eps = source(total.args[0]), total.args[1]
    total_of = _operand(total, aten.sum.dim_IntList)
    if total_of is None or total_of is not values or total.args[1:] != ([-1], True) or total.kwargs:
        raise Miss(node, "its weights are divided by something else than their sum")
    return values, eps


def _scored(scores: Node) -> tuple[str, Node]:
    """Name of the function that computes the scores, and the logits."""
    if scores.target is aten.softmax.int:
        name, logits = "softmax", _softmax(scores)
    elif scores.target is aten.sigmoid.default:
        name, logits = "sigmoid", source(scores.args[0])
    else:
        raise Miss(scores, "its scores are neither a softmax nor a sigmoid")
    _require_float32(scores)
    return name, _wide(logits)


def _wide(logits: Node) -> Node:
    """The logits as the linear layer computes them: without a cast to float32, which the operator makes itself."""
    cast = cast_of(logits)
    logits = cast if cast is not None and dtype_of(cast) in _HALF and dtype_of(logits) == torch.float32 else logits
    if len(_shape(logits)) != 2:
        raise Miss(logits, f"its logits have {len(_shape(logits))} dimensions, and the operator takes [N, E]")
    return logits


def _softmax(node: Node) -> Node:
    """The operand of a softmax over the last dimension."""
    if node.args[1] not in (-1, len(_shape(node)) - 1):
        raise Miss(node, f"it is a softmax over dimension {node.args[1]}")
    return source(node.args[0])


def _bias(node: Node, scores: Node) -> Node:
    """What `node` adds to the scores: one number for each expert."""
    parts = [source(arg) for arg in node.args] if node.target is aten.add.Tensor and not node.kwargs else []
    for one, bias in (parts, parts[::-1]) if len(parts) == 2 else ():
        if one is scores and isinstance(bias, Node) and isinstance(bias.meta["val"], torch.Tensor):
            _require_float32(node)
            if _shape(bias) != _shape(scores)[1:]:
                raise Miss(node, f"{bias.name} is no bias of one number for each expert")
            return bias
    raise Miss(node, "its experts are chosen by something else than scores with a bias")


# -- groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Grouping:
    """All experts of `masked` but those of the best groups are masked by `fill`.

    Attributes:
        masked: node of the values that are masked.
        fill: what masks them.
        scores: node of the groups' scores [N, n_group].
        n_group: number of groups.
        topk_group: number of groups that are kept.
    """

    masked: Node
    fill: float
    scores: Node
    n_group: int
    topk_group: int


def _grouping(compared: Node) -> tuple[Node, _Grouping | None]:
    """The values before the masking of groups, and how they are masked."""
    if compared.target is not aten.masked_fill.Scalar:
        return compared, None
    masked, mask, fill = (source(arg) for arg in _args(compared))
    # The mask is ~flags.bool(); flags are ones scattered to zeros, each repeated for the experts of its group.
    flags = cast_of(_operand(mask, aten.bitwise_not.default, aten.logical_not.default))
    repeated = _operand(flags, aten.reshape.default, aten.view.default)
    single = _operand(repeated, aten.expand.default)
    of_groups = _operand(single, aten.unsqueeze.default)
    if not isinstance(fill, (int, float)) or flags is None or None in (repeated, single, of_groups):
        raise Miss(compared, "its mask is not one of groups of experts")
    (_, *of_one), (_, n_group, size) = (_shape(node) for node in (single, repeated))
    known = isinstance(n_group, int) and isinstance(size, int)
    if not known or of_one != [n_group, 1] or n_group * size != _shape(masked)[1]:
        raise Miss(compared, "its mask is not one of groups of experts")
    best = _item_of(_scattered(of_groups, flags), 1)
    if best is None or best.target is not aten.topk.default:
        raise Miss(compared, "its groups are not those that a topk returns")
    scores, topk_group = _topk(best)
    return masked, _Grouping(masked, float(fill), scores, n_group, topk_group)


def _scattered(flags: Any, before: Node) -> Any:
    """The index at which ones are scattered to zeros to make `flags`, in place at the latest in front of `before`."""
    scatters = [node for node in (flags, *flags.users) if node.target in _SCATTERS]
    if len(scatters) == 1:
        (scatter,) = scatters
        zeros, *how = _args(scatter)
        fits = scatter is flags or (writes(scatter) and zeros is flags and scatter < before)
        if fits and zeros.target in _ZEROS and how[0] in (1, -1) and how[2] == 1 and not scatter.kwargs:
            return source(how[1])
    raise Miss(flags, "its mask is not made of ones that are scattered to zeros")


def _groups(grouping: _Grouping | None, bias: Node | None, scores: Node, top_k: int) -> tuple[int, int]:
    """n_group and topk_group as `effpass::moe_router` takes them."""
    if grouping is None or grouping.topk_group == grouping.n_group:
        return 1, 1  # nothing is masked
    size = _shape(scores)[1] // grouping.n_group
    if top_k > grouping.topk_group * size:
        raise Miss(grouping.masked, f"{top_k} experts are more than the {grouping.topk_group} best groups have")
    if grouping.fill != -torch.inf and (bias is not None or grouping.fill != 0):
        raise Miss(grouping.masked, f"its other groups are masked by {grouping.fill}, which can be a largest value")
    summed = 1 if bias is None else 2
    if not _is_group_score(grouping.scores, grouping.masked, (grouping.n_group, size), summed):
        rule = "sum of the two largest values" if summed == 2 else "largest value"
        raise Miss(grouping.scores, f"the score of a group is not the {rule} in it")
    return grouping.n_group, grouping.topk_group


def _is_group_score(node: Node, values: Node, groups: tuple[int, int], summed: int) -> bool:
    """Whether `node` is the sum of the `summed` largest of each group's values; `groups`: number and size."""
    if summed == 1:
        top = _item_of(node, 0)
        by_group = _operand(top, aten.max.dim)
        if top is None or top.args[1:] != (-1,):
            return False
    else:
        top = _item_of(_operand(node, aten.sum.dim_IntList), 0)
        if top is None or top.target is not aten.topk.default or node.args[1:] != ([-1],) or node.kwargs:
            return False
        by_group, count = _topk(top)
        if count != summed:
            return False
    return _operand(by_group, aten.view.default, aten.reshape.default) is values and _shape(by_group)[1:] == groups


# -- nodes ------------------------------------------------------------------------------------------------------------


def _inner(router: Router, inputs: Set[Node], surroundings: Surroundings) -> frozenset[Node]:
    """The nodes of the router, none of which is read or written from outside, except for reads of its two results."""
    found: set[Node] = set()
    waiting = list(router.last)
    while waiting:
        node = waiting.pop()
        if node in found or node in inputs or node is router.scale or node.op != "call_function":
            continue
        found.add(node)
        waiting += node.all_input_nodes[: 1 if node.target in _CASTS_LIKE else None]
        waiting += [user for user in node.users if not user.users and (writes(user) or user.target is operator.getitem)]
    for node in found:
        for user in node.users:
            if user not in found and node not in router.last:
                raise Miss(node, f"its value is also read by {user.name}")
        # Of divisions and products in place, those that were matched are read, or are the weights.
        read = node.target in _IN_PLACE and (node.users or node in router.last)
        if writes(node) and node.target is not aten.scatter_.value and not read:
            raise Miss(node, "it writes in place inside the router")
    order = list(surroundings.position)
    for root, places in surroundings.writes.items():
        for place in places:
            if root in found and order[place] not in found:
                raise Miss(root, f"its value is also written by {order[place].name}")
    return frozenset(found)


def _topk(node: Node) -> tuple[Node, int]:
    """The operand and the count of a `topk` of the largest values along the last dimension."""
    values, count, *others = _args(node)
    dim, largest = (*others, *(-1, True)[len(others) :])[:2]
    if node.kwargs or dim not in (-1, len(_shape(values)) - 1) or largest is not True:
        raise Miss(node, "its topk is not one of the largest values along the last dimension")
    if not isinstance(count, int):
        raise Miss(node, f"the number {count} of a topk is not known when compiling")
    return source(values), count


def _item_of(node: Any, place: int) -> Node | None:
    """The operator whose result number `place` is `node`."""
    if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == place:
        return node.args[0]  # type: ignore[return-value]
    return None


def _operand(node: Any, *targets: Any) -> Node | None:
    """The first operand of `node` if it is one of these operators."""
    return source(node.args[0]) if isinstance(node, Node) and node.target in targets else None


def _args(node: Node) -> tuple[Any, ...]:
    return node.args


def _shape(node: Any) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def _is_number(value: Any) -> bool:
    return isinstance(value.meta["val"] if isinstance(value, Node) else value, (int, float, torch.SymFloat))


def _require_float32(node: Node) -> None:
    if dtype_of(node) != torch.float32:
        raise Miss(node, f"{node.name} is {_short(node)}, and the operator computes in float32")


def _short(node: Node) -> str:
    return str(dtype_of(node)).removeprefix("torch.")
