"""What samples and micro-batches cost by a latency table."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from effpass.trainers.balance.shares import Shares
from effpass.trainers.balance.table import LatencyTable

__all__ = ["micro_batches", "sample_seconds"]

Floats = NDArray[np.float64]


def sample_seconds(table: LatencyTable, lengths: ArrayLike, budgets: ArrayLike, micro_batch: float) -> Floats:
    """What each sample adds to a micro-batch of so many tokens: all layers, each sample with its budget."""
    sizes = np.asarray(lengths, float)
    attention = table.attention_seconds(sizes, np.asarray(budgets, float)[:, None])[:, 0]
    return table.layers * attention + table.rest_seconds(micro_batch) * (sizes / micro_batch)


def micro_batches(
    table: LatencyTable, shares: Shares, lengths: ArrayLike, budgets: tuple[int, ...]
) -> tuple[Floats, Floats, Floats]:
    """What a step's micro-batches cost: `attention` `[R, M, K]` of a layer, `rest` `[R, M]`, `longest` `[R, M]`.

    Args:
        shares: numbers of samples, by rank and micro-step.
        lengths: of the samples that they name.
    """
    flat = [samples for rank in shares for samples in rank]
    owner = np.repeat(np.arange(len(flat)), [len(samples) for samples in flat])
    sizes = np.asarray(lengths, float)[np.concatenate([np.asarray(samples, int) for samples in flat])]
    each = table.attention_seconds(sizes, budgets)
    shape = len(shares), len(shares[0])
    attention: Floats = np.stack([np.bincount(owner, column, len(flat)) for column in each.T], -1)
    longest = np.zeros(len(flat))
    np.maximum.at(longest, owner, sizes)
    rest = table.rest_seconds(np.bincount(owner, sizes, len(flat)))
    return attention.reshape(*shape, len(budgets)), rest.reshape(shape), longest.reshape(shape)
