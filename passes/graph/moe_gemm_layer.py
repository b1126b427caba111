"""Recognize a layer of experts written as two grouped products of sorted rows, or as two batched products.

    sorted:  order = sort(experts);  y = grouped(h(grouped(x[order // k], W_gate_up, ends)), W_down, ends)
             out[t] = Σ_j (weights[order] · y)[order⁻¹][t, j]
    copies:  y = bmm(W_down[experts], h(bmm(W_gate_up[experts], x)));  out[t] = Σ_j weights[t, j] · y[t, j]

These are the experts implementations `grouped_mm` (``sorted``) and `batched_mm` (``copies``) of transformers; for
dtypes that `torch._grouped_mm` does not support, the first uses transformers' fallback operator. h is the gate
(:mod:`effpass.passes.graph.moe_gemm_gate`). In the second form, every row reads its own copy of the weights of its
expert. Ids of E or more denote experts that are not local; both forms mask the rows of these, or give them weight 0.

Shapes: T tokens, k experts per token, P = T·k rows (pairs of a token and an expert), E experts, K and N input and
output size of a product.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effpass.core.matching import Surroundings, writes
from effpass.passes.graph.moe_gemm_gate import Gate, gate_at
from effpass.passes.graph.moe_gemm_inside import Miss, between, readers_of
from effpass.passes.graph.same_value import cast_of, source

__all__ = ["Layer", "Product", "layer_of", "product_at"]

aten = torch.ops.aten

_FLATTENS = (aten.reshape.default, aten.view.default, aten.flatten.using_ints)
_SWAPS = ((-2, -1), (-1, -2), (1, 2), (2, 1))


@dataclass(frozen=True)
class Product:
    """A product of every row with the weight of its expert.

    Attributes:
        node: output [P, N].
        rows: input [P, K].
        weight: stacked weights [E, N, K], or [E, K, N] if `transposed`.
        transposed: whether `weight` is stored as [E, K, N].
        key: assignment of rows to experts: the end of each expert's rows [E] if `is_sorted`, else expert ids [P].
        is_sorted: whether rows are sorted by expert.
    """

    node: Node
    rows: Node
    weight: Node
    transposed: bool
    key: Node
    is_sorted: bool


@dataclass(frozen=True)
class Layer:
    """A layer of experts; its parts are the arguments of `effpass::moe_ffn`.

    Attributes:
        anchor: node that computes the output of the layer.
        x: hidden states, one row for each token.
        experts: expert ids [T, k].
        weights: routing weights [T, k].
        first: product with the weights of gate and up.
        first_bias: bias of `first`, [E, N]; None without a bias.
        second: product with the weights of down.
        second_bias: bias of `second`, [E, N]; None without a bias.
        gate: gate between the two products.
        inner: nodes that belong to the layer alone, `anchor` included.
    """

    anchor: Node
    x: Node
    experts: Node
    weights: Node
    first: Product
    first_bias: Node | None
    second: Product
    second_bias: Node | None
    gate: Gate
    inner: frozenset[Node]


def product_at(node: Node) -> Product | None:
    """Return the product that `node` computes; None if `node` is anything else."""
    name = getattr(node.target, "_opname", "")
    if name in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback"):
        rows, weight, ends = (*node.args, *node.kwargs.values())[:3]
        if len(node.args) + len(node.kwargs) > 3 or not isinstance(ends, Node):
            return None
        found = source(weight)
        swapped = found.target is aten.transpose.int and tuple(found.args[1:]) in _SWAPS
        stored = source(found.args[0]) if swapped else found
        return Product(node, source(rows), stored, not swapped, source(ends), True)
    if node.target is not aten.bmm.default:
        return None
    for place, dims, transposed in ((0, (-1, 2), False), (1, (1,), True)):
        weight, rows = source(node.args[place]), source(node.args[1 - place])
        if (
            weight.target is aten.index.Tensor
            and len(weight.args[1]) == 1
            and weight.args[0].meta["val"].dim() == 3
            and rows.target is aten.unsqueeze.default
            and rows.args[1] in dims
        ):
            value = readers_of(node)
            if len(value) == 1 and value[0].target is aten.squeeze.dim and value[0].args[1] in dims:
                ids = source(weight.args[1][0])
                return Product(value[0], source(rows.args[0]), source(weight.args[0]), transposed, ids, False)
    return None


def layer_of(second: Product, products: dict[Node, Product], surroundings: Surroundings) -> Layer:
    """Return the layer whose second product is `second`.

    Args:
        second: candidate for the second product of a layer.
        products: all products of the program, by their node.
        surroundings: order of the nodes of the program.

    Raises:
        Miss: `second` is not the second product of a layer.
    """
    gate = gate_at(second.rows)
    if gate is None:
        raise Miss(second.node, "what it multiplies is no gate of two halves of one product")
    count = second.weight.meta["val"].shape[0]
    routing = _Routing(second, count, surroundings)
    before, first_bias = routing.biased_before(gate.projected)
    first = products.get(before)
    if first is None or first.key is not second.key or first.weight.meta["val"].shape[0] != count:
        raise Miss(second.node, f"its gate reads {before.name}, which is no product of the same rows")
    if first_bias is not None:
        routing.check_order(before, gate.parts)
    (experts, each), x = routing.experts(), routing.tokens(first.rows)
    if x.meta["val"].dim() != 2 or experts.meta["val"].shape[0] != x.meta["val"].shape[0]:
        raise Miss(second.node, f"{x.name} is not [tokens, width], or {experts.name} is not of the same tokens")
    value, second_bias = routing.biased_after(second.node)
    weights, anchor = routing.combined(value, each, x)
    inputs = {x, experts, weights, first.weight, second.weight, first_bias, second_bias}
    inner = between(anchor, {n for n in inputs if n is not None}, routing.known)
    return Layer(anchor, x, experts, weights, first, first_bias, second, second_bias, gate, inner)


class _Routing:
    """Assignment of a layer's rows to tokens and experts, read from its second product.

    Args:
        product: second product of the layer.
        count: number of experts E.
        surroundings: order of the nodes of the program.

    Attributes:
        known: in-place operators of the layer whose effect is accounted for.
        order: permutation that sorts the rows by expert; None for unsorted rows.
        ids: expert ids [P] before sorting, without a clamp.
    """

    def __init__(self, product: Product, count: int, surroundings: Surroundings) -> None:
        self.product, self.count, self.position = product, count, surroundings.position
        self.known: set[Node] = set()
        self.order: Node | None = None
        if product.is_sorted:
            self._read_ends(product.key)
        else:
            self.ids = self._unclamped(product.key)

    def _miss(self, reason: str, node: Node | None = None) -> Miss:
        return Miss(node or self.product.node, reason)

    def _read_ends(self, ends: Node) -> None:
        """Match ``cumsum(histc(sort(ids)))``, the end of each expert's rows."""
        counts = source(ends.args[0]) if ends.target is aten.cumsum.default else None
        if (
            counts is None
            or counts.target is not aten.histc.default
            or counts.args[1:] != (self.count, 0, self.count - 1)
        ):
            raise self._miss(f"{ends.name} is not the running count of the ids of {self.count} experts")
        ids = source(counts.args[0])
        ids = ids if ids.target is operator.getitem else cast_of(ids)
        sort = ids.args[0] if isinstance(ids, Node) and ids.target is operator.getitem and ids.args[1] == 0 else None
        if not isinstance(sort, Node) or sort.target not in (aten.sort.default, aten.sort.stable) or len(sort.args) > 1:
            raise self._miss(f"{counts.name} does not count sorted ids")
        self.sorted_ids, self.ids = ids, source(sort.args[0])
        self.order = next((u for u in sort.users if u.target is operator.getitem and u.args[1] == 1), None)
        for user in self.sorted_ids.users:
            if user.target is aten.clamp_.default:
                self._unclamped(user)  # for indexing the bias; rows of non-local experts are masked
                self.known.add(user)

    def _unclamped(self, ids: Node) -> Node:
        """Return the ids before a clamp to valid experts, if there is one."""
        if ids.target not in (aten.clamp.default, aten.clamp_.default):
            return ids
        low, high = (*ids.args[1:], *(None, None))[:2]
        low, high = ids.kwargs.get("min", low), ids.kwargs.get("max", high)
        if low not in (None, 0) or high != self.count - 1:
            raise self._miss(f"{ids.name} clamps ids to {low} ... {high}, and there are {self.count} experts")
        return source(ids.args[0])

    def _is_of_sorted(self, node: Any) -> bool:
        """Whether `node` holds the expert id of each row of the product, clamped or not."""
        node = source(node)
        of = self.sorted_ids if self.product.is_sorted else self.product.key
        return node is of or (node.target is aten.clamp_.default and source(node.args[0]) is of)

    def _is_mask(self, mask: Any) -> bool:
        """Whether `mask` selects the rows of experts that are not local."""
        mask = source(mask)
        if mask.target is aten.unsqueeze.default:
            mask = source(mask.args[0])
        ids = self.sorted_ids if self.product.is_sorted else self.ids
        return mask.target is aten.ge.Scalar and source(mask.args[0]) is ids and mask.args[1] == self.count

    def _unmasked(self, node: Node) -> Node:
        """Return `node` before masks on rows of experts that are not local; the operator does not need them."""
        while node.target in (aten.masked_fill.Scalar, aten.masked_fill_.Scalar):
            if not self._is_mask(node.args[1]) or node.args[2] != 0:
                raise self._miss(f"{node.name} masks other rows than those of experts that are not here")
            node = source(node.args[0])
        for user in node.users:
            if user.target is aten.masked_fill_.Scalar and user.args[0] is node and self._is_mask(user.args[1]):
                self.known.add(user)
        return node

    # -- biases -------------------------------------------------------------------------------------------------------

    def _bias(self, node: Node, of: Node) -> Node | None:
        """Return the bias [E, N] if `node` adds to each row of `of` the bias of its expert, else None."""
        if node.target not in (aten.add.Tensor, aten.add_.Tensor) or node.kwargs or of not in node.args:
            return None
        other = source(next(a for a in node.args if a is not of))
        if other.target is not aten.index.Tensor or len(other.args[1]) != 1 or not self._is_of_sorted(other.args[1][0]):
            return None
        return source(other.args[0]) if other.args[0].meta["val"].dim() == 2 else None

    def biased_before(self, node: Node) -> tuple[Node, Node | None]:
        """Return the product from which `node` is computed by an optional bias and optional masks, and the bias."""
        node = self._unmasked(node)
        if node.target in (aten.add.Tensor, aten.add_.Tensor):
            for term in node.args[:2]:
                bias = self._bias(node, term) if isinstance(term, Node) else None
                if bias is not None:
                    self.known.add(node)
                    return source(term), bias
        return node, self._bias_in_place(node)

    def _bias_in_place(self, node: Node) -> Node | None:
        """Return the bias [E, N] that is added to `node` in place; None if nothing is."""
        found = [u for u in node.users if u.target is aten.add_.Tensor and u.args[0] is node]
        if not found:
            return None
        bias = self._bias(found[0], node)
        if len(found) > 1 or bias is None:
            raise self._miss(f"{found[0].name} adds something else to {node.name} than a bias of its expert")
        self.known.add(found[0])
        return bias

    def biased_after(self, node: Node) -> tuple[Node, Node | None]:
        """Return the value of the product `node` after an optional bias and optional masks, and the bias."""
        bias = self._bias_in_place(node)
        if bias is not None:
            self.check_order(node, self._readers(node))
        else:
            (reader,) = self._only_reader(node)
            bias = self._bias(reader, node)
            node = node if bias is None else reader
        self._unmasked(node)
        (reader,) = self._only_reader(node)
        if reader.target is aten.masked_fill.Scalar:
            self._unmasked(reader)
            node = reader
        return node, bias

    def check_order(self, product: Node, parts: Any) -> None:
        """Raise :class:`Miss` if a node of `parts` reads `product` before the bias is added in place."""
        add = next((u for u in product.users if u.target is aten.add_.Tensor), None)
        for part in parts:
            if add is not None and add is not part and self.position[part] < self.position[add]:
                raise self._miss(f"{part.name} reads {product.name} before {add.name} adds the bias")

    def _readers(self, node: Node) -> list[Node]:
        """Return the nodes that read `node`, directly or as the result of an in-place operator on it."""
        found = readers_of(node)
        again = [r for written in found if written in self.known for r in self._readers(written)]
        return [r for r in found if r not in self.known] + again

    def _root(self, node: Any) -> Any:
        """Return the tensor that `node` writes to if it is a known in-place operator, else the source of `node`."""
        node = source(node)
        while node in self.known and writes(node):
            node = source(node.args[0])
        return node

    def _only_reader(self, node: Node) -> list[Node]:
        """Return a list with the only reader of `node`; raises :class:`Miss` if there are none or several."""
        found = self._readers(node)
        if len(found) != 1:
            raise self._miss(f"{node.name} is read by {', '.join(r.name for r in found) or 'nobody'}")
        return found

    # -- rows ---------------------------------------------------------------------------------------------------------

    def experts(self) -> tuple[Node, int]:
        """Return the expert ids [T, k], and k."""
        experts = self._square(self.ids)
        return experts, experts.meta["val"].shape[1]

    def _square(self, flat: Node) -> Node:
        """Return the value [T, k] that `flat` [P] flattens."""
        before = source(flat.args[0]) if flat.target in _FLATTENS else None
        if before is None or before.meta["val"].dim() != 2 or flat.meta["val"].dim() != 1:
            raise self._miss(f"{flat.name} is no [tokens, experts a token] made flat")
        if not isinstance(before.meta["val"].shape[1], int):
            raise self._miss(f"{before.name} has a dynamic number of experts a token")
        return before

    def tokens(self, rows: Node) -> Node:
        """Return x, given the `rows` that hold each token once for each of its experts."""
        rows, each = self._unmasked(rows), self._square(self.ids).meta["val"].shape[1]
        if self.product.is_sorted:
            places: Any = rows.args[1] if rows.target is aten.index.Tensor else ()
            if len(places) == 1:
                place = source(places[0])
                divides = place.target is aten.floor_divide.default or (
                    place.target in (aten.div.Tensor_mode, aten.div.Scalar_mode)
                    and place.kwargs == {"rounding_mode": "floor"}
                )
                if divides and source(place.args[0]) is self.order and place.args[1] == each:
                    return source(rows.args[0])
        elif rows.target is aten.repeat_interleave.self_int and rows.args[1:] == (each, 0):
            return source(rows.args[0])
        raise self._miss(f"{rows.name} is not each token once for each of its experts")

    def combined(self, value: Node, each: int, x: Node) -> tuple[Node, Node]:
        """Return the routing weights [T, k], and the node of the weighted sum over the experts of each token."""
        (product,) = self._only_reader(value)
        factors: Any = product.args if product.target is aten.mul.Tensor else ()
        others = [source(f) for f in factors if self._root(f) is not self._root(value)]
        if len(others) != 1 or others[0].target is not aten.unsqueeze.default:
            raise self._miss(f"{product.name} reads the experts' outputs, and is no product with a weight of each")
        node, scale = product, source(others[0].args[0])
        if self.product.is_sorted:
            if scale.target is not aten.index.Tensor or [source(i) for i in scale.args[1]] != [self.order]:
                raise self._miss(f"{scale.name} is not the weight of each row")
            scale = source(scale.args[0])
            (node,) = self._only_reader(node)
            places: Any = node.args[1] if node.target is aten.index.Tensor else ()
            if len(places) != 1 or not self._undoes(places[0]):
                raise self._miss(f"{node.name} does not put rows back into their order")
        elif scale.target is aten.masked_fill.Scalar and self._is_mask(scale.args[1]) and scale.args[2] == 0:
            scale = source(scale.args[0])
        (view,), weights = self._only_reader(node), self._square(scale)
        shape = view.meta["val"].shape
        if view.target not in (aten.view.default, aten.reshape.default) or len(shape) != 3 or shape[1] != each:
            raise self._miss(f"{view.name} does not put the {each} outputs of a token beside each other")
        (total,) = self._only_reader(view)
        if total.target is not aten.sum.dim_IntList or total.args[1:] != ([1],) or total.kwargs:
            raise self._miss(f"{total.name} does not add the outputs of a token")
        return weights, self._of_type(total, x)

    def _of_type(self, total: Node, x: Node) -> Node:
        """Return `total`, or the cast that follows it, whichever has the dtype of `x`."""
        dtype = x.meta["val"].dtype
        if total.meta["val"].dtype == dtype:
            return total
        (cast,) = self._only_reader(total)
        if cast_of(cast) is not total or cast.meta["val"].dtype != dtype:
            raise self._miss(f"{total.name} is {total.meta['val'].dtype} and {x.name} {dtype}")
        return cast

    def _undoes(self, places: Any) -> bool:
        """Whether `places` is the inverse of the permutation `order`."""
        places = source(places)
        if places.target is aten.empty_like.default:
            found = [u for u in places.users if u.target is aten.index_put_.default]
            self.known.update(found)
            (write,) = found if len(found) == 1 else [None]
        else:
            write = places if places.target in (aten.index_put.default, aten.index_put_.default) else None
            self.known.update([places] if write is not None else [])
        if write is None:
            return places.target is aten.argsort.default and source(places.args[0]) is self.order
        numbers = source(write.args[2])
        counts_up = numbers.target is aten.arange.default or (
            numbers.target is aten.arange.start_step and numbers.args[0] == 0 and (*numbers.args, 1)[2] == 1
        )
        return [source(i) for i in write.args[1]] == [self.order] and counts_up and len(write.args) == 3
