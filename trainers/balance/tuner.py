"""Tuner of a training loop: chooses the budgets of all micro-batches and layers before each step, equally on all ranks.

    tuner.begin_step(documents)            # lengths of the documents of this rank's micro-batches, in their order
    for batch in micro_batches:
        loss(model(batch)).backward()      # the forward pass uses the budgets of its micro-batch

The ranks exchange the lengths of their documents once per step. From these, each rank computes the plan of all ranks
(:mod:`.tuning`), so that no other communication is needed. The guard of the tuning depends on the coverage of the
router's weight, which is measured during training: at intervals, one micro-batch of each rank measures it, and the
result is part of the message of the next step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from effpass.core.errors import EffpassError
from effpass.trainers.balance.costs import micro_batches
from effpass.trainers.balance.exchange import Exchange, Told
from effpass.trainers.balance.expected import Expected
from effpass.trainers.balance.table import LatencyTable
from effpass.trainers.balance.tuning import Tuning, imbalance, micro_batch_seconds, slowest, tune

__all__ = ["Plan", "SparsityTuner", "TunedAttention", "documents_of"]


class TunedAttention(Protocol):
    """Interface of the attention that the tuner controls; see :mod:`effpass.runtime.routed_attention`.

    Attributes:
        layers: number of layers with sparse attention.
        budgets: int32 `[layers]`, budget of each layer in keys; replaced by another tensor for each micro-batch.
        curves: float32 `[layers, K]`, coverage that the last forward pass measured; None if it did not measure any.
    """

    layers: int
    budgets: Tensor
    curves: Tensor | None

    def watch(self, budgets: Tensor | None) -> None:
        """Measure the coverage with these budgets in the following forward passes; None stops the measurement."""


@dataclass(frozen=True)
class Plan:
    """Plan of a step for all ranks.

    Attributes:
        budgets: budgets in keys `[R, M, L]`.
        seconds: predicted seconds of each micro-batch `[R, M]`.
        fixed: predicted seconds of each micro-batch `[R, M]` if all budgets were the default.
        longest: length of the longest document of each micro-batch `[R, M]`.
        planning: seconds spent on exchanging the lengths and planning.
    """

    budgets: NDArray[np.int64]
    seconds: NDArray[np.float64]
    fixed: NDArray[np.float64]
    longest: NDArray[np.float64]
    planning: float


class SparsityTuner:
    """Chooses budgets of sparse attention with which the ranks of a step finish together.

    Args:
        model: model that is trained; its forward passes in a step use the budgets of the micro-batches in order.
        attention: sparse attention of the model.
        table: latency table of the device; the same on all ranks, as :func:`.measure.latency_table` returns it.
        tuning: how budgets may change.
        group: process group of the ranks that read different data; None for all processes. With tensor or context
            parallelism it is the data-parallel group of this rank. Ranks that share micro-batches are in different
            data-parallel groups, which exchange the same lengths and compute the same plan.
        every: number of steps between two measurements of the coverage.

    Attributes:
        expected: averages over the past steps, from which a :class:`~effpass.trainers.balance.batches.BalancedBatches`
            plans.
        plan: plan of the current step; None before the first step.

    Raises:
        EffpassError: if the table is for another number of layers.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: TunedAttention,
        table: LatencyTable,
        tuning: Tuning,
        *,
        group: Any = None,
        every: int = 8,
    ) -> None:
        if table.layers != attention.layers:
            raise EffpassError(
                f"the latency table is of {table.layers} layers, and the model attends in {attention.layers}"
            )
        self.attention, self.table, self.tuning, self.every = attention, table, tuning, every
        self.expected = Expected(tuning, attention.layers)
        self.plan: Plan | None = None
        self._exchange = Exchange(group, (attention.layers, len(tuning.budgets)))
        self._device = attention.budgets.device
        self._default = torch.full((attention.layers,), tuning.default, dtype=torch.int32, device=self._device)
        self._watched = torch.tensor(tuning.budgets, dtype=torch.int32, device=self._device)
        self._mine: Tensor | None = None
        self._next, self._measures, self._longest = 0, -1, 0
        self._curves: Tensor | None = None
        self._hooks = (
            # First of the hooks, since the attention reads the budgets in a hook of its own.
            model.register_forward_pre_hook(self._before_forward, prepend=True),
            model.register_forward_hook(self._after_forward),
        )

    def close(self) -> None:
        """Remove the tuner's hooks from the model and reset the budgets to the default."""
        for hook in self._hooks:
            hook.remove()
        self.attention.budgets = self._default
        self.attention.watch(None)

    def begin_step(self, documents: Sequence[Sequence[int]]) -> Plan:
        """Plan a step; a collective call of the group.

        Args:
            documents: lengths in tokens of the documents, for each micro-batch of this rank.

        Raises:
            EffpassError: if a rank has no micro-batch or an empty one, or if the ranks have different numbers of
                micro-batches.
        """
        started = time.perf_counter()
        messages = self._exchange(Told([list(map(int, micro)) for micro in documents], *self._covered()))
        for message in messages:
            if message.longest:
                self.expected.cover(message.longest, message.coverage)
        lengths, shares = _numbered([message.documents for message in messages])
        attention, rest, longest = micro_batches(self.table, shares, lengths, self.tuning.budgets)
        chosen = tune(attention, rest, *self.expected.guard(longest), self.tuning)
        budgets = np.asarray(self.tuning.budgets)[chosen]
        owners = [budgets[r, m].mean() for r, rank in enumerate(shares) for m, micro in enumerate(rank) for _ in micro]
        self.expected.end_step(lengths, owners)
        own = torch.from_numpy(budgets[self._exchange.rank].astype(np.int32))
        if self._device.type == "cuda":
            own = own.pin_memory()
        self._mine = own.to(self._device, non_blocking=True)
        step = self.expected.steps - 1
        self._measures = step // self.every % len(documents) if step % self.every == 0 else -1
        self._next = 0
        fixed = rest + self.table.layers * attention[..., self.tuning.index]
        seconds = micro_batch_seconds(attention, rest, chosen)
        self.plan = Plan(budgets, seconds, fixed, longest, time.perf_counter() - started)
        return self.plan

    def metrics(self) -> dict[str, float]:
        """Return predicted metrics of the current step; empty before the first step.

        They are imbalance and waiting time, with the plan and with fixed budgets, the budgets, their coverage as far as
        it is known, and seconds.
        """
        plan = self.plan
        if plan is None:
            return {}
        ratio, bubble = imbalance(plan.seconds, self.tuning.waits)
        before, bubble_before = imbalance(plan.fixed, self.tuning.waits)
        known = self.expected.coverage(plan.longest)
        where = np.searchsorted(np.asarray(self.tuning.budgets), plan.budgets)
        covered = np.take_along_axis(known, where[..., None], -1)
        seen = ~np.isnan(covered)
        return {
            "balance_imbalance": ratio,
            "balance_imbalance_fixed": before,
            "balance_bubble": bubble,
            "balance_bubble_fixed": bubble_before,
            "balance_budget": float(plan.budgets.mean()),
            "balance_budget_least": float(plan.budgets.min()),
            "balance_budget_most": float(plan.budgets.max()),
            "balance_changed": float((plan.budgets != self.tuning.default).mean()),
            "balance_planned_s": slowest(plan.seconds, self.tuning.waits),
            "balance_planning_ms": plan.planning * 1e3,
        } | ({"balance_coverage": float(covered[seen].mean())} if seen.any() else {})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers and lists.

        It is the same on all ranks, except for a measurement that was not exchanged yet.
        """
        curves = self._covered(keep=True)
        return {"expected": self.expected.state_dict(), "longest": curves[0], "curves": curves[1].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned.

        Raises:
            EffpassError: if the state is for other budgets or another number of layers.
        """
        self.expected.load_state_dict(state["expected"])
        self._longest = int(state["longest"])
        self._curves = torch.tensor(state["curves"]) if self._longest else None

    # -- forward passes -----------------------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            self.attention.budgets = self._default
            return
        if self._mine is None or self._next >= len(self._mine):
            raise EffpassError(
                f"forward pass {self._next + 1} of a step for which {0 if self._mine is None else len(self._mine)}"
                " micro-batches were announced",
                hint="call tuner.begin_step(documents) before each optimizer step",
            )
        self.attention.budgets = self._mine[self._next]
        if self._next == self._measures:
            self.attention.watch(self._watched)

    def _after_forward(self, module: nn.Module, *_: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        if self._next == self._measures and self.attention.curves is not None:
            assert self.plan is not None
            self._longest = int(self.plan.longest[self._exchange.rank, self._next])
            self._curves = self.attention.curves.detach()
            self.attention.watch(None)
        self._next += 1

    def _covered(self, *, keep: bool = False) -> tuple[int, NDArray[np.float64]]:
        """Return the measurement since the last message: longest document of the micro-batch, and coverage `[L, K]`.

        Without a measurement both are zero. Copying a measurement, once in `every` steps, waits for the device.

        Args:
            keep: whether the measurement stays to be exchanged.
        """
        if self._curves is None:
            return 0, np.zeros((self.attention.layers, len(self.tuning.budgets)))
        found = self._longest, self._curves.double().cpu().numpy()
        if not keep:
            self._longest, self._curves = 0, None
        return found


def documents_of(batch: dict[str, Tensor]) -> list[int]:
    """Return the document lengths of a packed micro-batch; position ids `[B, T]` restart at 0 in each document."""
    positions = batch["position_ids"]
    starts = (positions == 0).flatten().nonzero().flatten().tolist()
    return np.diff([*starts, positions.numel()]).tolist()


def _numbered(documents: list[list[list[int]]]) -> tuple[list[int], list[list[list[int]]]]:
    """Return all lengths in one list, and for each rank and micro-batch the indices of its documents in that list."""
    lengths: list[int] = []
    shares: list[list[list[int]]] = []
    for rank in documents:
        shares.append([])
        for micro in rank:
            shares[-1].append(list(range(len(lengths), len(lengths) + len(micro))))
            lengths += micro
    return lengths, shares
