"""Growth of a token tree: expansion of one layer by a draft's most probable tokens, and choice of the best nodes.

A candidate is a token below a node of the *frontier*, the nodes of the last layer that are expanded. Its *confidence*
estimates how likely the target model accepts it:

    P = Π p over its path                                      EAGLE-2 (https://arxiv.org/abs/2406.16858)
    C = σ(w₂ · relu(W₁ (P, H, d) + b₁) + b₂)                   C2T (https://arxiv.org/abs/2502.13652)

p is the draft's probability of a token, H the entropy (nats) of the distribution that the candidate comes from, and d
the depth of its layer, 0 below the root. Candidates with a confidence below `least` are dropped, and the K best of a
layer are the next frontier. The *worth* of a candidate is the smallest confidence on its path, so that the most
valuable candidates form a tree; -1 marks dropped and empty ones.

The *pool* collects the candidates of all layers, or only those that became part of a frontier; the tree to verify
consists of its most valuable nodes. The draft itself runs on a tree of the frontiers, in which slot d K + i holds node
i of layer d; ancestors are bits of these slots (:mod:`effpass.lowering.ops.ancestors`).

Shapes: B sequences, F nodes of the frontier, K children of each, P capacity of the pool, N nodes of the tree, V
vocabulary of the draft, W words, h hidden units of the classifier.
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

#: Maximum deviation of the kernel's confidences from the reference: float32 sums of three and of h products in other
#: orders, followed by a function whose slope is at most 1/4.
TOLERANCE = 1e-5


def confidence(probability: Tensor, entropy: Tensor, depth: int, classifier: list[Tensor]) -> Tensor:
    """Confidence of candidates: P, or C if `classifier` holds W₁ `[h, 3]`, b₁ `[h]`, w₂ `[1, h]` and b₂ `[1]`."""
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
    # A stable sort, so that the first of equal candidates is picked.
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
    )  # assignment by index would copy True from the host
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
    """Evaluate the candidates below a frontier, add them to the pool, and return the next frontier.

    Args:
        log_p: float32 [B, F, K], log-probabilities of the children of each node, best first.
        tokens: int64 [B, F, K], tokens of the children, in the draft's vocabulary.
        entropy: float32 [B, F], entropy of each node's distribution.
        path: float32 [B, F], P of the frontier's nodes.
        worth: float32 [B, F], worth of the frontier's nodes; -1 for empty ones.
        number: int64 [B, F], indices of the frontier's nodes in the pool; -1 for the root.
        ancestors: int64 [B, F, W], ancestor bits in the draft's tree.
        position: int32 [B], position of the root; -1 for empty or finished sequences.
        names: int64 [V], offset from each token of the draft's vocabulary to the target's; None if they are the same.
        classifier: the four tensors of :func:`confidence`; empty for EAGLE-2.
        pool_tokens: int64 [B, P], tokens; written from `first` on, F K candidates with `keeps_all`, otherwise K.
        pool_worth: float32 [B, P], worth; the same entries are written.
        pool_parents: int64 [B, P], parents' indices in the pool; the same entries are written.
        first: first pool entry to write.
        depth: depth of the layer, 0 below the root.
        least: smallest confidence of a candidate that is not dropped.
        keeps_all: whether all candidates enter the pool, instead of those of the next frontier only.

    Returns:
        For the K nodes of the next frontier: tokens int64 [B, K]; positions int32 [B, K], -1 for empty nodes; ancestors
        int64 [B, K, W], including the nodes themselves; their parents' indices in the previous frontier, int64 [B, K];
        and `path`, `worth` and `number`.

    Raises:
        EffpassError: if the pool or the ancestor words have no room.
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
    order = torch.where(pool_worth.gather(1, order) >= 0, order, count).sort(1).values  # parents precede children
    # Node of each pool entry in the tree. Two more entries follow: `count` for missing nodes, `count + 1` for the root.
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
    """Positions int32 `[B, N]` of nodes at `depths` `[B, N]` below `position` `[B]`; -1 if either is negative."""
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
    """Build the tree of the root and the N − 1 most valuable nodes of the pool; among equals the first.

    Args:
        root: int64 [B], token of the root.
        position: int32 [B], position of the root; -1 for empty or finished sequences.
        pool_tokens: int64 [B, P], tokens.
        pool_worth: float32 [B, P], worth; negative for empty entries. No node is worth more than its parent.
        pool_parents: int64 [B, P], parents' indices in the pool, less than the node's own; -1 for the root.
        nodes: number of nodes N.
        depth: maximum depth of a node.

    Returns:
        Tokens and parents int64 [B, N], positions int32 [B, N], and ancestors int64 [B, N, W]. If there are fewer than
        N nodes, the remaining ones have parents and positions of -1 and no ancestors.
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
