"""Balanced training on long contexts with sparse attention, whose ranks do not wait for each other (arXiv 2604.13847).

With sparse attention, the time of a micro-batch depends on the lengths of its documents and on the *budget*, the number
of keys that a query attends to. Three objects choose both: sparse attention that reads its budget from a tensor
(:mod:`effpass.runtime.routed_attention`), a tuner that gives each micro-batch budgets with which the ranks finish
together (:class:`SparsityTuner`), and a batch sampler that distributes the samples of a step such that micro-batches
take about equal time (:class:`BalancedBatches`). Tuner, sampler and the simulator predict times from a latency table
(:mod:`.table`), which is measured on the device (:mod:`.measure`).
"""

from effpass.trainers.balance.batches import BalancedBatches
from effpass.trainers.balance.tuner import SparsityTuner, documents_of
from effpass.trainers.balance.tuning import Tuning, budgets_around

__all__ = ["BalancedBatches", "SparsityTuner", "Tuning", "budgets_around", "documents_of"]
