"""Experts on several ranks as other libraries have them, for area `moe`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from effpass.lowering.ops.expert_parallel_exchange import Ranks

__all__ = ["exchange_pairs", "grouped_experts"]

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, experts, weights


def grouped_experts(gate_up: Tensor, down: Tensor) -> Call:
    """transformers' `grouped_mm` experts on these weights."""
    from benchmarks.moe import _transformers

    return _transformers("grouped_mm", gate_up, down)


def exchange_pairs(x: Tensor, ids: Tensor, weights: Tensor, experts: Call, every: int, ranks: Ranks) -> Tensor:
    """A layer of experts: counts, one host wait, each pair to its expert's rank and back, weights at home.

    The order of transformers' `AllToAllEP` and of torchtitan: no stages, a row for each pair of token and expert.

    Args:
        x: [T, D].
        ids: [T, k].
        weights: [T, k].
        experts: this rank's, called with local ids.
        every: E.
        ranks: that share them.
    """
    local, flat, width = every // ranks.size, ids.reshape(-1), x.shape[1]
    order = flat.argsort(stable=True)
    counts = flat.new_zeros(every).scatter_add_(0, flat, torch.ones_like(flat))
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts, group=ranks.group)
    sent, got = torch.stack([n.view(ranks.size, local).sum(1) for n in (counts, arriving)]).tolist()
    rows = x.new_empty(sum(got), width)
    dist.all_to_all_single(rows, x[order // ids.shape[1]], got, sent, group=ranks.group)
    own = torch.arange(local, device=x.device).repeat(ranks.size).repeat_interleave(arriving, output_size=sum(got))
    outputs = experts(rows, own.unsqueeze(1), rows.new_ones(sum(got), 1))
    back = x.new_empty(flat.numel(), width)
    dist.all_to_all_single(back, outputs.contiguous(), sent, got, group=ranks.group)
    restored = torch.empty_like(back)
    restored[order] = back
    return (restored.view(*ids.shape, width) * weights.unsqueeze(-1)).sum(1).to(x.dtype)
