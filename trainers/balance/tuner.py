"""The tuner of a training loop: before each step it gives every micro-batch and layer a budget, on all ranks alike.

    tuner.begin_step(documents)      lengths of the documents of this rank's micro-batches, in their order
    for batch in micro_batches:
        loss(model(batch)).backward()      the model's forward pass takes the budgets of its micro-batch

Ranks tell each other their lengths, once a step. From these numbers each makes the plan of all (:mod:`.tuning`), so
nothing else is exchanged. What the guard goes by is measured on the side: now and then one micro-batch of each rank
counts how its router's weight is covered, and tells it in the next step's message.
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
    """What the tuner moves: see :mod:`effpass.runtime.routed_attention`.

    Attributes:
        layers: that attend sparsely.
        budgets: int32 `[layers]`, keys; another tensor for each micro-batch.
        curves: float32 `[layers, K]`, what the last forward pass covered; None unless it was watched.
    """

    layers: int
    budgets: Tensor
    curves: Tensor | None

    def watch(self, budgets: Tensor | None) -> None:
        """Let forward passes measure the coverage of these budgets, or of none."""


@dataclass(frozen=True)
class Plan:
    """A step of all ranks.

    Attributes:
        budgets: keys `[R, M, L]`.
        seconds: of each micro-batch by the table `[R, M]`.
        fixed: likewise, had all budgets stayed at the default.
        longest: document of each micro-batch `[R, M]`.
        planning: seconds that the message and the plan took.
    """

    budgets: NDArray[np.int64]
    seconds: NDArray[np.float64]
    fixed: NDArray[np.float64]
    longest: NDArray[np.float64]
    planning: float


class SparsityTuner:
    """
    Args:
        model: that trains; its forward passes take their budgets in turn.
        attention: of the model, whose budgets are moved.
        table: of the device; the same on all ranks, as :func:`.measure.latency_table` gives it.
        tuning: how budgets may move.
        group: ranks that read other data; None for all processes. With tensor or context parallelism the data-parallel
            group of this rank: those that share its micro-batches have groups of their own, are told the same and make
            the same plan.
        every: steps from one measurement of coverage to the next.

    Attributes:
        expected: what the steps showed; a :class:`~effpass.trainers.balance.batches.BalancedBatches` plans by it.
        plan: of the step that runs; None before the first.

    Raises:
        EffpassError: the table is of another number of layers.
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
            model.register_forward_pre_hook(
                self._before_forward, prepend=True
            ),  # the attention reads budgets in its own
            model.register_forward_hook(self._after_forward),
        )

    def close(self) -> None:
        """Leave the model, with the default budget."""
        for hook in self._hooks:
            hook.remove()
        self.attention.budgets = self._default
        self.attention.watch(None)

    def begin_step(self, documents: Sequence[Sequence[int]]) -> Plan:
        """Plan a step; a collective call of the group.

        Args:
            documents: lengths in tokens of the documents of each micro-batch of this rank.

        Raises:
            EffpassError: a rank has no micro-batch, or another number of them than the others.
        """
        started = time.perf_counter()
        every = self._exchange(Told([list(map(int, micro)) for micro in documents], *self._covered()))
        for told in every:
            if told.longest:
                self.expected.cover(told.longest, told.coverage)
        lengths, shares = _numbered([told.documents for told in every])
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
        """Of the step that runs, by the table: imbalance and bubbles as they are and as a fixed budget had left them,
        budgets, what is known of their coverage, and seconds."""
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
        """Numbers and lists alone; the same on all ranks, up to what was measured and not told yet."""
        curves = self._covered(keep=True)
        return {"expected": self.expected.state_dict(), "longest": curves[0], "curves": curves[1].tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            EffpassError: the state is of other budgets or layers.
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
                hint="call tuner.begin_step(documents) before each optimiser step",
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
        """What was measured since the last message; waits for the device once in `every` steps."""
        if self._curves is None:
            return 0, np.zeros((self.attention.layers, len(self.tuning.budgets)))
        found = self._longest, self._curves.double().cpu().numpy()
        if not keep:
            self._longest, self._curves = 0, None
        return found


def documents_of(batch: dict[str, Tensor]) -> list[int]:
    """Lengths of the documents of a packed micro-batch: positions begin at 0 in each, in every row `[B, T]`."""
    positions = batch["position_ids"]
    starts = (positions == 0).flatten().nonzero().flatten().tolist()
    return np.diff([*starts, positions.numel()]).tolist()


def _numbered(documents: list[list[list[int]]]) -> tuple[list[int], list[list[list[int]]]]:
    """All lengths in a row, and their numbers in the documents' places."""
    lengths: list[int] = []
    shares: list[list[list[int]]] = []
    for rank in documents:
        shares.append([])
        for micro in rank:
            shares[-1].append(list(range(len(lengths), len(lengths) + len(micro))))
            lengths += micro
    return lengths, shares
