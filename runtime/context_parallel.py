"""Sequences whose tokens lie on several ranks: context parallelism for attention over blocks that tokens choose.

    part = shard(batch, mesh)        # this rank's tokens of the micro-batch
    model(**part)                    # layers work on these tokens; attention looks at all of them

    [t, h, K]  --all-to-all-->  [T, h / W, K]  --attention-->  [T, h / W, V]  --all-to-all-->  [t, h, V]

Ranks hold parts of the tokens, and in attention parts of the heads (DeepSpeed-Ulysses, arXiv 2309.14509): all tokens of
some key-value heads, with the query heads that share them. So the router sees the blocks and the operator the sequences
that they see on one device, whatever the order of the tokens is, and all ranks attend to equally many keys.

PyTorch's `context_parallel` exchanges keys for `scaled_dot_product_attention`, and for flex_attention by names that are
private; it has no place for another operator. What is taken from PyTorch is all public: device meshes, parts of batches
(by `DTensor`, or by `context_parallel`, with its order of tokens) and the exchange, `DTensor.redistribute`.

Shapes: W ranks, T tokens of a micro-batch, t = T / W, h heads, K key size, V value size.
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

_IGNORED = -100  # transformers' label of a token without a loss


@dataclass(frozen=True)
class Context:
    """How a micro-batch lies on the ranks; a model gets it as `effpass_context`.

    Attributes:
        mesh: of one dimension, the ranks that share the micro-batch.
        tokens: T.
        order: int64 [1, t], which of the T tokens this rank holds; None where ranks hold one part behind the other.
    """

    mesh: DeviceMesh
    tokens: int
    order: Tensor | None = None


def shard(batch: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """This rank's part of a micro-batch, to call the model with. All ranks of the mesh have the same micro-batch.

    Rows become one, side by side; `labels` become those of the next tokens, which transformers takes as they are. A
    length that W does not divide is filled up with a document of padding, which nothing attends to and no label counts.

    Args:
        batch: `input_ids` and `position_ids` [B, T], positions beginning at 0 in each document; `cu_seq_lens_q`, where
            it is known. Other tensors [B, T] are split as well, and all else is left as it is.
        mesh: of one dimension.

    Returns:
        Tensors [1, t], `shift_labels` beside `labels`, `cu_seq_lens_q` of all documents, `effpass_context`.

    Raises:
        EffpassError: there are no positions, or a mask, or a mesh of more dimensions.
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
        # Every rank has the whole: nothing is sent.
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
    """The exchange of one forward pass.

    Attributes:
        mesh: of one dimension.
        order: int64 [T], the tokens as the ranks hold them, one rank behind the other; None where they ascend.
        places: int64 [T], where in `order` each token is.
    """

    mesh: DeviceMesh
    order: Tensor | None = None
    places: Tensor | None = None

    def to_heads(self, x: Tensor) -> Tensor:
        """[T, h / W, ...] of [t, h, ...]: all tokens, in their order, of this rank's heads."""
        whole = _redistributed(x, self.mesh, Shard(0), Shard(1))
        return whole if self.places is None else _Moved.apply(whole, self.places, self.order)

    def to_tokens(self, x: Tensor) -> Tensor:
        """[t, h, ...] of [T, h / W, ...]."""
        if self.order is not None:
            x = _Moved.apply(x, self.order, self.places)
        return _redistributed(x, self.mesh, Shard(1), Shard(0))

    def mean(self, x: Tensor) -> Tensor:
        """Of all ranks' `x`."""
        return _redistributed(x, self.mesh, Partial("sum"), Replicate()) / self.mesh.size()


def check_groups(groups: int, ranks: int) -> None:
    """Raise a :class:`ModelError` where `groups` key-value heads can't be shared out."""
    if groups % ranks:
        raise ModelError(
            f"{groups} key-value heads can't be shared out over {ranks} ranks of context parallelism",
            hint="as many ranks as divide them; more ranks can read other data",
        )


def spread(context: Context, inputs: Tensor, kwargs: Mapping[str, Any]) -> tuple[Spread, Tensor]:
    """What the attention of a forward pass needs; a collective call where the order or the documents are not known.

    Args:
        context: of the micro-batch.
        inputs: [1, t] or [1, t, D], this rank's tokens.
        kwargs: of the model's forward pass.

    Returns:
        The exchange, and int32 [N + 1], where documents begin in the T tokens.

    Raises:
        EffpassError: the parts are not equally long, or something is missing or of another shape.
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
    """Rows in another order; `back` is the inverse. An index by itself would add gradients up atomically."""

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
