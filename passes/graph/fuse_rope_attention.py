"""`fuse_rope_attention`: fuse rotary embedding, cache write and attention into one kernel launch.

    q, k = rotate(n_q(q)), rotate(n_k(k));  cache[start:] = k, v;  out = attention(q, cache)

n_q and n_k are the norms over each head that some models have. The pass acts at few tokens on graphs of the decode
engine, whose KV caches are written by `effpass::cache_write` and read by `effpass::cached_attention`. Before
`effpass::two_level_attention` and `effpass::tree_attention`, which launch kernels of their own, everything except
attention is fused into one launch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from effpass.core.inline import program_values
from effpass.core.matching import Surroundings
from effpass.core.pass_ import GraphPass, Match
from effpass.core.pattern import erase_unread
from effpass.core.program import Program
from effpass.core.report import Refusal
from effpass.lowering.ops import cached_attention as operators
from effpass.lowering.ops import rope_cache_write, rope_page_write, tree_attention, two_level_attention  # noqa: F401
from effpass.passes.graph.few_rows import MAX_ROWS, why_no_kernel, why_not_here, why_not_program
from effpass.passes.graph.rms_norm import RMSNorm, rms_norm_at
from effpass.passes.graph.rotary import Rotation, rotation_at
from effpass.passes.graph.same_value import source

__all__ = ["FuseRopeAttention"]

aten = torch.ops.aten
ops = torch.ops.effpass

# Attention operators that remain separate from the fused launch.
_APART = (ops.two_level_attention.default, ops.tree_attention.default)


@dataclass(frozen=True)
class _Heads:
    """Query, key or value heads, before transposition and norm.

    Attributes:
        value: heads of shape `[B, T, H, K]`, or `[B, H, T, K]` if `heads_first`.
        heads_first: whether the head dimension of `value` precedes the token dimension.
        norm: norm over each head; None if there is none.
    """

    value: Node
    heads_first: bool
    norm: RMSNorm | None

    @classmethod
    def of(cls, node: Node, with_norm: bool = True) -> _Heads:
        """Return the heads that become `node` `[B, H, T, K]`; the norm may precede or follow the transposition."""
        value = source(node)
        norm = rms_norm_at(value) if with_norm else None
        value = value if norm is None else norm.x
        heads_first = not (value.target is aten.transpose.int and tuple(value.args[1:]) == (1, 2))
        if not heads_first:
            value = source(value.args[0])
            if norm is None and with_norm and (norm := rms_norm_at(value)) is not None:
                value = norm.x
        return cls(value, heads_first, norm)

    @property
    def norm_weight(self) -> Node | None:
        return None if self.norm is None else self.norm.weight


@dataclass(frozen=True)
class _Site:
    """One attention and the cache write that precedes it.

    Attributes:
        attention: node of the attention.
        write: node of the cache write.
        query: heads of the query.
        key: heads of the new keys.
        value: heads of the new values.
        rotation: rotary embedding of the query; the key is rotated with the same cosines and sines.
        inner: nodes, other than the attention, whose computation the new operator takes over.
    """

    attention: Node
    write: Node
    query: _Heads
    key: _Heads
    value: _Heads
    rotation: Rotation
    inner: tuple[Node, ...]


class FuseRopeAttention(GraphPass):
    """Makes rotary embedding, the norms of heads, the cache's write and attention one launch, at few tokens."""

    name = "fuse_rope_attention"
    exact = True

    def could_act(self, weight_names: Sequence[str]) -> bool:
        return torch.cuda.is_available()

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        attentions = [
            node
            for target in (ops.cached_attention.default, *_APART)
            for node in program.graph.find_nodes(op="call_function", target=target)
        ]
        if not attentions:
            return
        if refusal := why_not_program(program):
            yield refusal
            return
        surroundings = Surroundings.of(program)
        reads: dict[Node, list[Node]] = defaultdict(list)
        for node, seen in surroundings.epochs.items():
            for root in seen:
                reads[root].append(node)
        for attention in attentions:
            found = _site(attention, surroundings)
            refusal = found if isinstance(found, Refusal) else _why_not(found, surroundings, reads)
            if refusal is not None:
                yield refusal
            else:
                yield Match(attention, {"site": found})

    def rewrite(self, program: Program, match: Match) -> None:
        site: _Site = match.nodes["site"]
        norm = site.query.norm or site.key.norm
        with program.graph.inserting_before(site.attention):
            arguments = (
                *(_tokens_first(program, heads) for heads in (site.query, site.key, site.value)),
                *(site.rotation.cos, site.rotation.sin, site.query.norm_weight, site.key.norm_weight),
                *((0.0, 0.0) if norm is None else (norm.eps, norm.offset)),
            )
            cached, start = site.attention.args[1:3], _written(site.write)[2]
            if site.attention.target in _APART:
                if site.write.target is ops.page_write.default:
                    written = (ops.rope_page_write.default, (*arguments, start, *site.write.args[3:]))
                else:
                    written = (ops.rope_cache_write.default, (*arguments, *cached, start))
                new = program.graph.call_function(*written)
                query = site.attention.args[0]
                assert isinstance(query, Node)
                with program_values(program):
                    new.meta["val"] = query.meta["val"].contiguous()
                site.attention.update_arg(0, new)
                program.replace_write(site.write, new)
                erase_unread(program, query)
                return
            _, _, _, key_positions, query_positions, _, *how = site.attention.args
            whole = (*arguments, *cached, key_positions, query_positions, start, *how)
            new = program.graph.call_function(ops.rope_cached_attention.default, whole)
        new.meta.update(site.attention.meta)
        site.attention.replace_all_uses_with(new)
        program.replace_write(site.write, new, reads=[site.attention])
        erase_unread(program, site.attention)


def _tokens_first(program: Program, heads: _Heads) -> Node:
    """Return `heads` as `[B, T, H, K]`, transposed if necessary."""
    if not heads.heads_first:
        return heads.value
    node = program.graph.call_function(aten.transpose.int, (heads.value, 1, 2))
    with program_values(program):
        node.meta["val"] = heads.value.meta["val"].transpose(1, 2)
    return node


# -- finding ----------------------------------------------------------------------------------------------------------


def _site(attention: Node, surroundings: Surroundings) -> _Site | Refusal:
    query, keys, _ = attention.args[:3]
    position = surroundings.position
    before = [write for write in _writes(attention) if position[write] < position[attention]]
    if not before:
        return Refusal(attention.name, f"{keys} is no buffer that a cache_write in front of it filled")
    write = max(before, key=position.__getitem__)
    new_key, new_value, _ = _written(write)
    rotations = []
    for what, node in (("query", query), ("key", new_key)):
        rotation = rotation_at(node)
        if rotation is None:
            reason = f"its {what}, {source(node)}, is not rotated, or not by halves from the first feature on"
            return Refusal(attention.name, reason)
        rotations.append(rotation)
    of_query, of_key = rotations
    if of_query.cos is not of_key.cos or of_query.sin is not of_key.sin:
        return Refusal(attention.name, "its query and its key are rotated by different angles")
    heads = [_Heads.of(rotation.x) for rotation in rotations]
    norms = [h.norm for h in heads if h.norm is not None]
    if len({(norm.eps, norm.offset) for norm in norms}) > 1:  # the operator has only one ε and one offset
        heads, norms = [_Heads.of(rotation.x, with_norm=False) for rotation in rotations], []
    inner = (write, *of_query.inner, *of_key.inner, *(node for norm in norms for node in norm.inner))
    value = _Heads.of(new_value, with_norm=False)  # type: ignore[arg-type]
    return _Site(attention, write, heads[0], heads[1], value, of_query, inner)


def _writes(attention: Node) -> list[Node]:
    """Return the writes to the cache that `attention` reads."""
    keys, values = attention.args[1:3]
    if attention.target is ops.two_level_attention.default and attention.args[4] is not None:
        table, host = attention.args[3:5]
        return [user for user in table.users if user.target is ops.page_write.default and user.args[3] is host]  # type: ignore[union-attr]
    assert isinstance(keys, Node)
    return [user for user in keys.users if user.target is ops.cache_write.default and user.args[:2] == (keys, values)]


def _written(write: Node) -> tuple[Any, Any, Any]:
    """Return the new keys, the new values, and the cache slot at which they are written."""
    return write.args[:3] if write.target is ops.page_write.default else write.args[2:5]  # type: ignore[return-value]


def _why_not(site: _Site, surroundings: Surroundings, reads: Mapping[Node, list[Node]]) -> Refusal | None:
    """Return a refusal if the site can't be replaced by one operator, else None."""
    name, position = site.attention.name, surroundings.position
    batch, _, tokens, _ = site.rotation.x.meta["val"].shape
    new = (site.key.value, site.value.value, site.query.norm_weight, site.key.norm_weight)
    others = [node for node in (*site.attention.args[1:3], *new) if isinstance(node, Node)]
    is_apart = site.attention.target in _APART
    has_kernel, most = (rope_cache_write.has_kernel, math.inf) if is_apart else (operators.has_kernel, MAX_ROWS)
    if refusal := why_no_kernel(site.query.value, (batch, tokens), others, has_kernel, most):
        return Refusal(name, *refusal)
    if reason := why_not_here(surroundings, site.inner, site.attention):
        return Refusal(name, reason)
    first, last = position[site.write], position[site.attention]
    for root, seen in surroundings.epochs[site.attention].items():
        if first in surroundings.writes[root]:
            between = [node for node in reads[root] if first < position[node] < last]
            if between or surroundings.writes[root][seen - 1] != first:
                return Refusal(name, f"{root.name} is read or written between {site.write.name} and {name}")
    return None
