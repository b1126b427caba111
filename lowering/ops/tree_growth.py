"""How a token tree grows: one layer from a draft's most probable tokens, and the best nodes of all layers.

A candidate is a token below a node of the *frontier*. Its *confidence* says how likely the target accepts it:

    P = Π p over its path                                      EAGLE-2 (https://arxiv.org/abs/2406.16858)
    C = σ(w₂ · relu(W₁ (P, H, d) + b₁) + b₂)                   C2T (https://arxiv.org/abs/2502.13652)

with the entropy H (nats) of the distribution that it comes from and the depth d of the layer, 0 below the root. Those
below `least` are dropped, and the K best of a layer are the next frontier. A candidate is *worth* the smallest
confidence on its path, so that the most valuable ones are a tree; -1 marks those that are none.

All candidates of all layers, or those of the frontiers alone, are the *pool*. The draft has a tree of its own, of the
frontiers: node i of layer d stands in its slot d K + i, and its ancestors are bits of those slots.

Shapes: B rows, F nodes of the frontier, K children of each, P pool, N nodes of the tree, W words, h units.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.core.errors import EffpassError
from effpass.lowering.ops.ancestors import WORD, pack, relations, unpack
from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["TOLERANCE", "best_nodes", "confidence", "grow_layer", "positions_at"]

#: What confidences of the kernel may differ from the reference: float32 sums of three and of h products, in other
#: orders, in front of a function that is nowhere steeper than 1/4.
TOLERANCE = 1e-5


def confidence(probability: Tensor, entropy: Tensor, depth: int, classifier: list[Tensor]) -> Tensor:
    """Of candidates: P itself, or C where there are W₁ `[h, 3]`, b₁ `[h]`, w₂ `[1, h]` and b₂ `[1]`."""
    if not classifier:
        return probability
    inner, bias, outer, offset = classifier
    features = torch.stack((probability, entropy, torch.full_like(probability, depth)), -1)
    return ((features @ inner.T + bias).relu() @ outer.T + offset).squeeze(-1).sigmoid()


# -- grow_layer -------------------------------------------------------------------------------------------------------

Layer = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _grow_layer(
    log_p: Tensor, tokens: Tensor, entropy: Tensor, path: Tensor, worth: Tensor, number: Tensor, ancestors: Tensor,
    position: Tensor, names: Tensor | None, classifier: list[Tensor], pool_tokens: Tensor, pool_worth: Tensor,
    pool_parents: Tensor, first: int, depth: int, least: float, keeps_all: bool,
) -> Layer:  # fmt: skip
    batch, _, width = log_p.shape
    if names is not None:
        tokens = tokens + names[tokens]
    probability = path[:, :, None] * log_p.exp()
    sure = confidence(probability, entropy[:, :, None].expand_as(probability), depth, classifier)
    there = (sure >= least) & (worth[:, :, None] >= 0)
    rank = torch.where(there, sure, -1.0).flatten(1)
    valued = torch.where(there, sure.minimum(worth[:, :, None]), -1.0).flatten(1)
    # Of equal ones the first: a stable sort.
    picked = rank.sort(dim=1, descending=True, stable=True).indices[:, :width]
    up = picked // width
    of_all = tokens.flatten(1), valued, number[:, :, None].expand_as(tokens).flatten(1)
    chosen = [x.gather(1, picked) for x in of_all]
    kept = of_all if keeps_all else chosen
    span = slice(first, first + kept[0].shape[1])
    for pool, values in zip((pool_tokens, pool_worth, pool_parents), kept, strict=True):
        pool[:, span] = values
    here = torch.arange(width, device=up.device)
    bits = unpack(ancestors, ancestors.shape[2] * WORD).gather(
        1, up[:, :, None].expand(-1, -1, ancestors.shape[2] * WORD)
    )
    bits.scatter_(
        2, (depth * width + here)[None, :, None].expand(batch, -1, 1), True
    )  # an index would read a host's True
    alive = (chosen[1] >= 0) & (position >= 0)[:, None]
    return (
        chosen[0],
        torch.where(alive, position[:, None] + depth + 1, -1).int(),
        pack(bits & alive[:, :, None]),
        up,
        probability.flatten(1).gather(1, picked),
        chosen[1],
        (first + (picked if keeps_all else here.expand(batch, -1))).long(),
    )


@torch.library.custom_op(
    "effpass::grow_layer",
    mutates_args=("pool_tokens", "pool_worth", "pool_parents"),
    schema="(Tensor log_p, Tensor tokens, Tensor entropy, Tensor path, Tensor worth, Tensor number, Tensor ancestors, "
    "Tensor position, Tensor? names, Tensor[] classifier, Tensor(a!) pool_tokens, Tensor(b!) pool_worth, "
    "Tensor(c!) pool_parents, int first, int depth, float least, bool keeps_all) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def grow_layer(
    log_p: Tensor, tokens: Tensor, entropy: Tensor, path: Tensor, worth: Tensor, number: Tensor, ancestors: Tensor,
    position: Tensor, names: Tensor | None, classifier: list[Tensor], pool_tokens: Tensor, pool_worth: Tensor,
    pool_parents: Tensor, first: int, depth: int, least: float, keeps_all: bool,
) -> Layer:  # fmt: skip
    """Candidates below a frontier, and the frontier that they are next.

    Args:
        log_p: float32 [B, F, K], of the children of each node, best first.
        tokens: int64 [B, F, K], theirs, as the draft names them.
        entropy: float32 [B, F].
        path: float32 [B, F]: P of the frontier's nodes.
        worth: float32 [B, F], -1 for those that are none.
        number: int64 [B, F]: their places in the pool, -1 for the root.
        ancestors: int64 [B, F, W]: slots of the draft's tree.
        position: int32 [B], of the root; -1 in empty rows.
        names: int64 [V] of the draft's vocabulary: what to add for the target's token; None where they are the same.
        classifier: four tensors, see :func:`confidence`; none for EAGLE-2's.
        pool_tokens: int64 [B, P], written from `first` on: F K candidates with `keeps_all`, else K.
        pool_worth: float32 [B, P], likewise.
        pool_parents: int64 [B, P], likewise.
        first: see there.
        depth: of the layer, 0 below the root.
        least: the smallest confidence of a candidate that is one.
        keeps_all: all candidates go to the pool, and not those of the frontier alone.

    Returns:
        Of the K nodes of the next frontier: tokens int64 [B, K]; positions int32 [B, K], -1 where there is none;
        ancestors int64 [B, K, W], themselves among them; the place in the frontier before of their parent, int64
        [B, K]; and `path`, `worth` and `number`.

    Raises:
        EffpassError: the pool or the words have no room.
    """
    _check_layer(log_p, ancestors, pool_tokens, first, depth, keeps_all)
    return _grow_layer(
        log_p, tokens, entropy, path, worth, number, ancestors, position, names, classifier, pool_tokens, pool_worth,
        pool_parents, first, depth, least, keeps_all,
    )  # fmt: skip


def _check_layer(log_p: Tensor, ancestors: Tensor, pool: Tensor, first: int, depth: int, keeps_all: bool) -> None:
    _, frontier, width = log_p.shape
    end, slots = first + (frontier * width if keeps_all else width), (depth + 1) * width
    if end > pool.shape[1] or slots > ancestors.shape[2] * WORD:
        raise EffpassError(
            f"effpass::grow_layer: {end} candidates and {slots} nodes, and there is room for {pool.shape[1]} and"
            f" {ancestors.shape[2] * WORD}"
        )


@grow_layer.register_fake
def _(log_p, tokens, entropy, path, worth, number, ancestors, position, names, classifier, pool_tokens, pool_worth,  # type: ignore[no-untyped-def]
      pool_parents, first, depth, least, keeps_all):  # fmt: skip
    _check_layer(log_p, ancestors, pool_tokens, first, depth, keeps_all)
    batch, _, width = log_p.shape
    long, real = {"dtype": torch.long}, {"dtype": torch.float32}
    size = (batch, width)
    return (
        log_p.new_empty(size, **long),
        log_p.new_empty(size, dtype=torch.int32),
        log_p.new_empty((*size, ancestors.shape[2]), **long),
        log_p.new_empty(size, **long),
        log_p.new_empty(size, **real),
        log_p.new_empty(size, **real),
        log_p.new_empty(size, **long),
    )


@grow_layer.register_kernel("cuda")
def _(log_p, *rest):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("tree_growth")
    _check_layer(log_p, rest[5], rest[9], rest[12], rest[13], rest[15])
    if kernels and kernels.can_grow(log_p, rest[8]):
        return kernels.grow_layer(log_p, *rest)
    return _grow_layer(log_p, *rest)


@register_flop_formula(torch.ops.effpass.grow_layer)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0


# -- best_nodes -------------------------------------------------------------------------------------------------------


def _best_nodes(
    root: Tensor, position: Tensor, pool_tokens: Tensor, pool_worth: Tensor, pool_parents: Tensor, nodes: int,
    depth: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    count, pad = pool_tokens.shape[1], torch.nn.functional.pad
    order = pool_worth.sort(dim=1, descending=True, stable=True).indices[:, : nodes - 1]
    order = torch.where(pool_worth.gather(1, order) >= 0, order, count).sort(1).values  # parents stand before children
    # Where each candidate of the pool comes to stand. Behind them is a place for those that are none, and the root's.
    places = pool_tokens.new_zeros(len(root), count + 2)
    places.scatter_(1, order, torch.arange(1, order.shape[1] + 1, device=root.device).expand_as(order))
    above = pad(pool_parents, (0, 1)).gather(1, order)
    parents = places.gather(1, torch.where(above < 0, count + 1, above))
    parents = torch.where(order < count, parents, -1)
    tokens = torch.where(order < count, pad(pool_tokens, (0, 1)).gather(1, order), 0)
    short = nodes - 1 - order.shape[1]
    tokens, parents = torch.cat((root[:, None], pad(tokens, (0, short))), 1), pad(parents, (1, short), value=-1)
    depths, ancestors = relations(parents, depth)
    return tokens, parents, positions_at(position, depths), ancestors


def positions_at(position: Tensor, depths: Tensor) -> Tensor:
    """int32 `[B, N]` of nodes at `depths` `[B, N]` below `position` `[B]`; -1 where one of both is."""
    there = (depths >= 0) & (position >= 0)[:, None]
    return torch.where(there, position[:, None] + depths, -1).int()


@torch.library.custom_op(
    "effpass::best_nodes",
    mutates_args=(),
    schema="(Tensor root, Tensor position, Tensor pool_tokens, Tensor pool_worth, Tensor pool_parents, int nodes, "
    "int depth) -> (Tensor, Tensor, Tensor, Tensor)",
)
def best_nodes(
    root: Tensor, position: Tensor, pool_tokens: Tensor, pool_worth: Tensor, pool_parents: Tensor, nodes: int,
    depth: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The tree of the root and the N − 1 most valuable nodes of a pool; of equal ones the first.

    Args:
        root: int64 [B], its token.
        position: int32 [B], its position; -1 in empty rows.
        pool_tokens: int64 [B, P].
        pool_worth: float32 [B, P]; below 0 for those that are none. No node is worth more than its parent.
        pool_parents: int64 [B, P]: places in the pool, all before the node's own; -1 for the root.
        nodes: N.
        depth: the largest depth there can be.

    Returns:
        Tokens and parents int64 [B, N], positions int32 [B, N], and ancestors int64 [B, N, W]. Where there are fewer
        nodes than N, what follows them has parents and positions of -1 and no ancestors.
    """
    return _best_nodes(root, position, pool_tokens, pool_worth, pool_parents, nodes, depth)


@best_nodes.register_fake
def _(root, position, pool_tokens, pool_worth, pool_parents, nodes, depth):  # type: ignore[no-untyped-def]
    size = (root.shape[0], nodes)
    return (
        root.new_empty(size),
        root.new_empty(size),
        position.new_empty(size),
        root.new_empty((*size, -(-nodes // WORD))),
    )


@best_nodes.register_kernel("cuda")
def _(root, position, pool_tokens, *rest):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("tree_growth")
    if kernels and kernels.can_choose(pool_tokens, rest[2]):
        return kernels.best_nodes(root, position, pool_tokens, *rest)
    return _best_nodes(root, position, pool_tokens, *rest)


@register_flop_formula(torch.ops.effpass.best_nodes)
def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return 0
