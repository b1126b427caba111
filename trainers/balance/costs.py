"""Predicted seconds of samples and micro-batches, computed from a latency table."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from effpass.trainers.balance.shares import Shares
from effpass.trainers.balance.table import LatencyTable

__all__ = ["micro_batches", "sample_seconds"]

Floats = NDArray[np.float64]


def sample_seconds(table: LatencyTable, lengths: ArrayLike, budgets: ArrayLike, micro_batch: float) -> Floats:
    """Return the predicted seconds that each sample adds to a micro-batch, over all layers.

    Args:
        table: latency table of the device.
        lengths: length of each sample in tokens.
        budgets: budget of each sample in keys.
        micro_batch: expected number of tokens of a micro-batch, whose time outside of attention is divided among its
            samples in proportion to their lengths.
    """
    sizes = np.asarray(lengths, float)
    attention = table.attention_seconds(sizes, np.asarray(budgets, float)[:, None])[:, 0]
    return table.layers * attention + table.rest_seconds(micro_batch) * (sizes / micro_batch)


def micro_batches(
    table: LatencyTable, shares: Shares, lengths: ArrayLike, budgets: tuple[int, ...]
) -> tuple[Floats, Floats, Floats]:
    """Return the predicted seconds of the micro-batches of a step, with each budget.

    Args:
        table: latency table of the device.
        shares: indices of the samples, by rank and micro-step.
        lengths: length in tokens of each sample that `shares` refers to.
        budgets: budgets in keys.

    Returns:
        `attention` `[R, M, K]`, seconds of the attention of one layer with each budget; `rest` `[R, M]`, seconds of
        everything else; `longest` `[R, M]`, length of the longest sample.
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
