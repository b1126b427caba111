"""Long-context training with sparse attention whose ranks do not wait for each other (arXiv 2604.13847).

Three objects: the attention, which reads its budget from a tensor (:mod:`effpass.runtime.routed_attention`); the tuner,
which gives each micro-batch the budgets that its group's pace allows; the batch sampler, which shares a step's samples
out so that micro-batches cost alike. They plan by a latency table (:mod:`.measure`), and so does the simulator.
"""

from effpass.trainers.balance.batches import BalancedBatches
from effpass.trainers.balance.tuner import SparsityTuner, documents_of
from effpass.trainers.balance.tuning import Tuning, budgets_around

__all__ = ["BalancedBatches", "SparsityTuner", "Tuning", "budgets_around", "documents_of"]
