"""Context parallelism for trainable block-sparse attention: the tokens of a micro-batch are distributed over ranks.

    part = shard(batch, mesh)        # this rank's tokens of the micro-batch
    model(**part)                    # layers process these tokens; attention sees the tokens of all ranks

    [t, h, K]  --all-to-all-->  [T, h / W, K]  --attention-->  [T, h / W, V]  --all-to-all-->  [t, h, V]

Outside of attention each rank holds part of the tokens. In attention it holds part of the heads (DeepSpeed-Ulysses,
arXiv 2309.14509): all tokens of some KV heads, with the query heads that share them. The router that chooses blocks
(:mod:`effpass.lowering.ops.routed_blocks`) and the attention operator therefore see the same blocks and sequences as on
a single device, for any order of the tokens, and all ranks attend to equally many keys.
:mod:`effpass.runtime.routed_attention` uses this module.

PyTorch's `context_parallel` exchanges keys for `scaled_dot_product_attention`, and for flex_attention through private
names, but does not support other operators. This module uses public interfaces of PyTorch only: device meshes, sharded
batches (from `DTensor`, or from `context_parallel` with its order of tokens), and `DTensor.redistribute` for the
exchange.

Shapes: W ranks, T tokens of a micro-batch, t = T / W tokens of a rank, N documents, h heads, D hidden size, K key size,
V value size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn.functional import pad

from effpass.core.errors import EffpassError, ModelError

__all__ = ["Context", "Spread", "check_groups", "shard", "spread"]

_IGNORED = -100  # label that transformers excludes from the loss


@dataclass(frozen=True)
class Context:
    """Distribution of a micro-batch over ranks, passed to the model's forward as `effpass_context`.

    Attributes:
        mesh: one-dimensional mesh of the ranks that share the micro-batch.
        tokens: number of tokens T of the micro-batch.
        order: int64 [1, t], indices of this rank's tokens among the T tokens; None if the ranks hold consecutive parts.
    """

    mesh: DeviceMesh
    tokens: int
    order: Tensor | None = None


def shard(batch: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Return this rank's part of a micro-batch, as keyword arguments of the model.

    All ranks of the mesh pass the same micro-batch. Its sequences are concatenated, and `labels` are shifted to the
    next tokens, in the form that transformers expects of `shift_labels`. If W does not divide the number of tokens, a
    document of padding is appended, which no other token attends to and whose labels are ignored.

    Args:
        batch: the micro-batch: `input_ids` and `position_ids` [batch, length], where positions begin at 0 in each
            document, and optionally `cu_seq_lens_q`. Other tensors of this shape are split too, and all other values
            are passed on unchanged.
        mesh: one-dimensional mesh of the ranks that share the micro-batch.

    Returns:
        The split tensors [1, t], `shift_labels` in addition to `labels`, `cu_seq_lens_q` of all documents, and
        `effpass_context`.

    Raises:
        EffpassError: if there are no positions, if there is an attention mask, or if the mesh has more dimensions.
    """
    positions = batch.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape != batch["input_ids"].shape:
        raise EffpassError(
            "context parallelism: the batch has no position_ids [B, T]",
            hint="DataCollatorWithFlattening makes them: 0, 1, 2, ... in each document",
        )
    if mesh.ndim != 1:
        raise EffpassError(
            f"context parallelism: a mesh of {mesh.ndim} dimensions", hint='one of them: mesh["context"], by its name'
        )
    _check_mask(batch)
    tokens, world = positions.numel(), mesh.size()
    padding = -tokens % world
    part: dict[str, Any] = {}
    for name, value in batch.items():
        if not isinstance(value, Tensor) or value.shape != positions.shape:
            part[name] = value
            continue
        row = value.reshape(1, -1)
        if name == "labels":
            row = pad(row[:, 1:], (0, 1), value=_IGNORED)
        if padding:
            tail = torch.arange(padding, device=row.device) if name == "position_ids" else row.new_full(
                (padding,), _IGNORED if name == "labels" else 0
            )  # fmt: skip
            row = torch.cat((row, tail[None].to(row.dtype)), 1)
        # Every rank has the whole tensor, so nothing is communicated.
        part[name] = distribute_tensor(row, mesh, [Shard(1)], src_data_rank=None).to_local()
    if "labels" in part:
        part["shift_labels"] = part["labels"]
    ends = batch.get("cu_seq_lens_q")
    if ends is None:
        starts = (positions.reshape(-1) == 0).nonzero()[:, 0].to(torch.int32)
        ends = pad(starts, (0, 1), value=tokens)
    if padding:
        ends = pad(ends, (0, 1), value=tokens + padding)
    return part | {"cu_seq_lens_q": ends, "effpass_context": Context(mesh, tokens + padding)}


class Spread(NamedTuple):
    """The all-to-all exchange between tokens and heads in one forward pass.

    Attributes:
        mesh: one-dimensional mesh of the ranks that share the micro-batch.
        order: int64 [T], indices of the tokens in the order in which the ranks hold them, rank by rank; None if they
            are ascending.
        places: int64 [T], index of each token in `order`; None if `order` is.
    """

    mesh: DeviceMesh
    order: Tensor | None = None
    places: Tensor | None = None

    def to_heads(self, x: Tensor) -> Tensor:
        """Exchange [t, h, ...] for [T, h / W, ...]: all tokens, in ascending order, of this rank's heads."""
        whole = _redistributed(x, self.mesh, Shard(0), Shard(1))
        return whole if self.places is None else _Moved.apply(whole, self.places, self.order)

    def to_tokens(self, x: Tensor) -> Tensor:
        """Exchange [T, h / W, ...] for [t, h, ...]: this rank's tokens of all heads."""
        if self.order is not None:
            x = _Moved.apply(x, self.order, self.places)
        return _redistributed(x, self.mesh, Shard(1), Shard(0))

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over all ranks."""
        return _redistributed(x, self.mesh, Partial("sum"), Replicate()) / self.mesh.size()


def check_groups(groups: int, ranks: int) -> None:
    """Raise a :class:`ModelError` if the number of ranks does not divide the number of KV heads `groups`."""
    if groups % ranks:
        raise ModelError(
            f"{groups} key-value heads can't be shared out over {ranks} ranks of context parallelism",
            hint="as many ranks as divide them; more ranks can read other data",
        )


def spread(context: Context, inputs: Tensor, kwargs: Mapping[str, Any]) -> tuple[Spread, Tensor]:
    """Prepare the attention of a forward pass: the exchange between ranks, and the boundaries of documents.

    The call is collective if `context` has an order, or if `kwargs` has no `cu_seq_lens_q`.

    Args:
        context: distribution of the micro-batch.
        inputs: [1, t] or [1, t, D], this rank's token ids or embeddings.
        kwargs: keyword arguments of the model's forward pass.

    Returns:
        The exchange, and int32 [N + 1], the offsets of the N documents in the T tokens, followed by T.

    Raises:
        EffpassError: if the ranks' parts differ in length, or an argument is missing or has another shape.
    """
    mesh, order = context.mesh, context.order
    rows, length = inputs.shape[:2]
    positions = kwargs.get("position_ids")
    if rows != 1 or context.tokens != length * mesh.size():
        raise EffpassError(
            f"context parallelism: {mesh.size()} ranks share {context.tokens} tokens, and this one has"
            f" {rows} x {length} of them",
            hint="one row that the ranks divide; effpass.runtime.context_parallel.shard puts rows side by side, and"
            " fills up with a document of padding",
        )
    if positions is None or positions.shape != (1, length):
        raise EffpassError(
            "context parallelism: the model was called without position_ids [1, t]",
            hint="those of this rank's tokens in their documents: positions that the model counts itself begin anew on"
            " each rank",
        )
    _check_mask(kwargs)
    if order is not None and (order.numel() != length or order.dtype != torch.int64):
        raise EffpassError(
            f"context parallelism: order is {order.dtype} {tuple(order.shape)}",
            hint=f"int64 [1, {length}], the numbers of this rank's tokens among {context.tokens}",
        )
    found = Spread(mesh)
    if order is not None:
        every = _redistributed(order.reshape(-1).to(inputs.device), mesh, Shard(0), Replicate())
        found = Spread(mesh, every, every.argsort())
    ends = kwargs.get("cu_seq_lens_q")
    if ends is None:
        whole = _redistributed(positions.reshape(-1), mesh, Shard(0), Replicate())
        is_first = (whole if found.places is None else whole[found.places]) == 0
        ends = pad(is_first.nonzero()[:, 0].to(torch.int32), (0, 1), value=context.tokens)
    return found, ends


def _redistributed(x: Tensor, mesh: DeviceMesh, now: Placement, wanted: Placement) -> Tensor:
    return DTensor.from_local(x, mesh, [now], run_check=False).redistribute(placements=[wanted]).to_local()


class _Moved(torch.autograd.Function):
    """Reorder tokens by `to`, with the inverse `back` in the backward pass.

    The backward pass of plain indexing would accumulate gradients with atomic additions.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, to)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient.index_select(0, *ctx.saved_tensors), None, None


def _check_mask(given: Mapping[str, Any]) -> None:
    if given.get("attention_mask") is not None:
        raise EffpassError(
            "context parallelism: there is an attention_mask",
            hint="pack documents in rows without padding, or let its positions begin at 0, as those of a document",
        )
