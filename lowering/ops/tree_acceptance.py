"""Bookkeeping of speculative decoding: accept a path of a verified token tree, and move its keys and values.

The target model has chosen a token at every node of the tree. Starting at the root, the child whose token was chosen at
its parent is accepted, and the token chosen at the last accepted node follows. A path of m nodes, including the root,
therefore emits m tokens. Among siblings with equal tokens the first is accepted. :func:`accept_tokens` walks the tree,
:func:`take_tokens` gives a draft the emitted tokens it has not seen, and :func:`move_slots` moves accepted nodes to the
prefix of the KV cache.

Shapes: B sequences, N nodes, J nodes of the longest path, C columns of the output, E end tokens, L layers, G KV heads,
S slots, K key size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from effpass.lowering.ops.kernel_choice import triton_kernels

__all__ = ["accept_tokens", "move_slots", "take_tokens"]


# -- accept_tokens ----------------------------------------------------------------------------------------------------


def _accept_tokens(
    choices: Tensor, tokens: Tensor, parents: Tensor, ends: Tensor, limit: Tensor, ids: Tensor, count: Tensor,
    position: Tensor, root: Tensor, goes_on: Tensor, totals: Tensor, steps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    nodes = tokens.shape[1]
    number = torch.arange(nodes, device=tokens.device)
    goes, node, paths = position >= 0, torch.zeros_like(count), []
    before, walks = count.clone(), goes
    for _ in range(steps):
        paths.append(torch.where(walks, node, 0))
        token = choices.gather(1, node[:, None])
        column = count.clamp(max=ids.shape[1] - 1)[:, None]
        ids.scatter_(1, column, torch.where(walks[:, None], token, ids.gather(1, column)))
        count.add_(walks)
        root.copy_(torch.where(walks, token[:, 0], root))
        ended = (token == ends).any(1) | (count >= limit)
        goes = goes & ~(walks & ended)
        child = torch.where((parents == node[:, None]) & (tokens == token), number, nodes).amin(1)
        walks = walks & ~ended & (child < nodes)
        node = torch.where(walks, child, 0)
    gained = count - before
    totals.add_(torch.stack(((gained > 0).sum(), ((parents >= 0) & (gained > 0)[:, None]).sum())))
    position.copy_(torch.where(goes, position + gained, -1))
    goes_on.copy_(goes.any())
    return torch.stack(paths, 1), torch.where(goes, gained, 0)


@torch.library.custom_op(
    "effpass::accept_tokens",
    mutates_args=("ids", "count", "position", "root", "goes_on", "totals"),
    schema="(Tensor choices, Tensor tokens, Tensor parents, Tensor ends, Tensor limit, Tensor(a!) ids, "
    "Tensor(b!) count, Tensor(c!) position, Tensor(d!) root, Tensor(e!) goes_on, Tensor(f!) totals, int steps) "
    "-> (Tensor, Tensor)",
)
def accept_tokens(
    choices: Tensor, tokens: Tensor, parents: Tensor, ends: Tensor, limit: Tensor, ids: Tensor, count: Tensor,
    position: Tensor, root: Tensor, goes_on: Tensor, totals: Tensor, steps: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Accept a path of each sequence's tree, up to a token that ends the sequence. The host does not wait.

    Args:
        choices: int64 [B, N], token that the target has chosen at each node.
        tokens: int64 [B, N], token of each node.
        parents: int64 [B, N], parent of each node; -1 for the root and padding.
        ends: int64 [E], tokens that end a sequence; -1 is ignored.
        limit: int64 [], number of columns at which a sequence ends.
        ids: int64 [B, C], output; emitted tokens are written after the first `count` columns.
        count: int64 [B], number of columns in use; increased by the number of emitted tokens.
        position: int32 [B], position of the last token; increased likewise, and set to -1 when a sequence ends.
            Sequences with -1 are empty or finished and emit nothing.
        root: int64 [B], last token; written.
        goes_on: bool [], whether any sequence is unfinished; written.
        totals: int64 [2], running totals, to which are added the number of sequences that emitted tokens and the number
            of verified nodes of these sequences, without roots.
        steps: J.

    Returns:
        The accepted nodes int64 [B, J], root first, followed by zeros; and the number int64 [B] of them that become
        part of the prefix, 0 for finished sequences.
    """
    return _accept_tokens(choices, tokens, parents, ends, limit, ids, count, position, root, goes_on, totals, steps)


@accept_tokens.register_fake
def _(choices, tokens, parents, ends, limit, ids, count, position, root, goes_on, totals, steps):  # type: ignore[no-untyped-def]
    return tokens.new_empty((tokens.shape[0], steps)), tokens.new_empty((tokens.shape[0],))


@accept_tokens.register_kernel("cuda")
def _(choices, tokens, *rest):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("tree_acceptance")
    if kernels and kernels.can_accept(tokens, rest[1]):
        return kernels.accept_tokens(choices, tokens, *rest)
    return _accept_tokens(choices, tokens, *rest)


# -- take_tokens ------------------------------------------------------------------------------------------------------


def _take_tokens(
    ids: Tensor, count: Tensor, position: Tensor, entered: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    step = torch.arange(width, device=ids.device)
    columns = entered[:, None] + step
    there = (columns < count[:, None]) & (position >= 0)[:, None]
    tokens = torch.where(there, ids.gather(1, columns.clamp(max=ids.shape[1] - 1)), 0)
    positions = torch.where(there, position[:, None] - (count[:, None] - 1 - columns), -1).int()
    chain = torch.where(there, (1 << (step + 1)) - 1, 0)[:, :, None]
    taken = there.sum(1)
    entered.add_(taken)
    return tokens, positions, chain, taken


@torch.library.custom_op(
    "effpass::take_tokens",
    mutates_args=("entered",),
    schema="(Tensor ids, Tensor count, Tensor position, Tensor(a!) entered, int width) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def take_tokens(
    ids: Tensor, count: Tensor, position: Tensor, entered: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the next emitted tokens that a draft has not seen, as a chain for each sequence.

    Args:
        ids: int64 [B, C], emitted tokens.
        count: int64 [B], number of columns in use.
        position: int32 [B], position of the token in the last column in use; -1 for sequences of which nothing is
            taken.
        entered: int64 [B], number of columns that the draft has seen; increased by the number of tokens taken.
        width: maximum number of tokens per sequence, up to 62.

    Returns:
        Tokens int64 [B, width], positions int32 [B, width] followed by -1, ancestors int64 [B, width, 1]
        (:mod:`effpass.lowering.ops.ancestors`), and the number of tokens int64 [B].
    """
    return _take_tokens(ids, count, position, entered, width)


@take_tokens.register_fake
def _(ids, count, position, entered, width):  # type: ignore[no-untyped-def]
    rows = count.shape[0]
    tokens = ids.new_empty((rows, width))
    return tokens, position.new_empty((rows, width)), ids.new_empty((rows, width, 1)), ids.new_empty((rows,))


@take_tokens.register_kernel("cuda")
def _(ids, *rest):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("tree_acceptance")
    return (kernels.take_tokens if kernels else _take_tokens)(ids, *rest)


# -- move_slots -------------------------------------------------------------------------------------------------------


def _move_slots(
    keys: Tensor, values: Tensor, positions: Tensor, lengths: Tensor, path: Tensor, taken: Tensor, first: int,
    moves_on: bool,
) -> None:  # fmt: skip
    step = torch.arange(path.shape[1], device=path.device)
    there = step < taken[:, None]
    source = path + first
    target = torch.where(there, lengths[:, None].long() + step, source)  # nodes that are not taken stay in place
    for buffer in (keys, values):
        layers, _, groups, _, size = buffer.shape
        where = (1, len(path), 1, path.shape[1], 1)
        moved = buffer.gather(3, source.view(where).expand(layers, -1, groups, -1, size))
        buffer.scatter_(3, target.view(where).expand(layers, -1, groups, -1, size), moved)
    if moves_on:
        positions.scatter_(1, target, positions.gather(1, source))
        lengths.add_(taken)


@torch.library.custom_op(
    "effpass::move_slots",
    mutates_args=("keys", "values", "positions", "lengths"),
    schema="(Tensor(a!) keys, Tensor(b!) values, Tensor(c!) positions, Tensor(d!) lengths, Tensor path, Tensor taken, "
    "int first, bool moves_on) -> ()",
)
def move_slots(
    keys: Tensor, values: Tensor, positions: Tensor, lengths: Tensor, path: Tensor, taken: Tensor, first: int,
    moves_on: bool,
) -> None:  # fmt: skip
    """Move nodes of a tree to the end of each sequence's prefix.

    Args:
        keys: [L, B, G, S, K], written.
        values: [L, B, G, S, V], written.
        positions: int32 [B, S], position of the token in each slot; written.
        lengths: int32 [B], number of slots in each sequence's prefix; increased by `taken`. The caller must ensure that
            there is room.
        path: int64 [B, J], nodes in order.
        taken: int64 [B], number of nodes of `path` to move.
        first: first slot of the tree.
        moves_on: whether to update positions and lengths. If a cache's layers are moved by several calls, only the last
            call does.
    """
    _move_slots(keys, values, positions, lengths, path, taken, first, moves_on)


@move_slots.register_fake
def _(keys, values, positions, lengths, path, taken, first, moves_on):  # type: ignore[no-untyped-def]
    return None


@move_slots.register_kernel("cuda")
def _(keys, values, *rest):  # type: ignore[no-untyped-def]
    kernels = triton_kernels("tree_acceptance")
    if kernels and keys.stride(-1) == values.stride(-1) == 1:
        kernels.move_slots(keys, values, *rest)
    else:
        _move_slots(keys, values, *rest)


for _op in (torch.ops.effpass.accept_tokens, torch.ops.effpass.take_tokens, torch.ops.effpass.move_slots):

    @register_flop_formula(_op)
    def _(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return 0
