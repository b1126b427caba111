"""Joint learning of masks, sizes and weights: a minimax problem over masks, sizes and Lagrange multipliers.

    min over θ, m, s   max over y, z ≥ 0     L(θ, m) + Σ_l y_l ‖m_l‖²_{s} + z (R(s) − budget)

L is the loss, θ are the weights, and m the masks of the units, in [0, 1]. s is the number of units to remove: one
number for each family of units, the same in every layer. ‖m_l‖²_{s} is the sum of m² over the s least important units
of layer l, the last of them in proportion if s is not an integer; it is 0 when their masks are 0. y_l is its
multiplier. R is the cost of the units that remain, and z the multiplier of the budget.

MaskPrune (arXiv 2502.14008) proposes the ingredients: masks and sizes learned together, proximal steps, the
straight-through estimator. The problem above is that of UVC (arXiv 2203.08243, same author) with masks instead of
weights and one s for all layers. The update rules are a choice of this module. A step is:

    order   units by a m², where a is the running mean of (∂L/∂m)²; this estimates, to second order and up to a factor
            common to all units, by how much removing a unit increases the loss
    masks   m ← m − η ∂L/∂m / rms, then m ← m / (1 + 2 η y w) (proximal step), where w in [0, 1] is 1 for a unit that is
            to be removed
    sizes   s ← s + η_s (Z − p) / (Z + p), where the price p is a / cost of the unit on the border between removed and
            kept ones
    y       y ← y + η_y (mean of m² over the units to be removed)
    z       z ← z exp(η_z (R − budget)), unchanged while s can't follow (anti-windup);  Z = z exp(g (R − budget))

z starts at the price at which the units, as first measured, would meet the budget. In the last phase of a run the model
*closes*: s is rounded to a valid shape, and the masks move gradually to 0 and 1.

Shapes: L layers, R sets of units per layer, N units per set (:mod:`effpass.trainers.pruning.units`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.trainers.pruning.cost import Cost
from effpass.trainers.pruning.masks import Masks
from effpass.trainers.pruning.shapes import Shapes

__all__ = ["Minimax", "Rates"]


# Initial y. With it, the mask of a unit to be removed has fallen to 0.1 after some 12 % of the steps.
_FIRST = 10.0
# Lower bound of m in the order of units. With it, a removed unit returns if it is a hundred times as important as a
# kept one.
_LEAST = 0.1
# Magnitude of (Z − p) / (Z + p), which is at most 1, from which the sizes count as moving; z waits until they settle.
_FAST = 0.5


@dataclass(frozen=True)
class Rates:
    """Rates of the update rules. Rates refer to the whole run; a step uses the rate divided by the number of steps.

    Attributes:
        warmup: share of the steps in which importance is measured, and masks, sizes and multipliers are not updated.
        closing: share of the steps after which the model closes.
        frozen: share of the steps after which the kept units are fixed and the masks are 0 and 1.
        masks: rate η of the masks.
        sizes: rate η_s of the sizes, as a share of the units of a family.
        multipliers: rate η_y of the multipliers y.
        budget: rate η_z of the multiplier z.
        gain: gain g of the proportional term in Z.
        memory: time constant of the running mean of squared gradients, as a share of the steps.
    """

    warmup: float = 0.1
    closing: float = 0.65
    frozen: float = 0.9
    masks: float = 1.0
    sizes: float = 2.0
    multipliers: float = 1000.0
    budget: float = 140.0
    gain: float = 20.0
    memory: float = 0.15

    def __post_init__(self) -> None:
        if not 0 < self.warmup < self.closing < self.frozen < 1:
            raise EffpassError(
                f"warmup {self.warmup}, closing {self.closing}, frozen {self.frozen}: expected 0 < warmup < closing <"
                " frozen < 1"
            )


class Minimax:
    """Learner of masks, sizes and multipliers; see the module docstring for the problem and its symbols.

    The training loop calls :meth:`step` after each backward pass, and :meth:`kept` at the end of the run.

    Args:
        masks: masks that are attached to the model.
        cost: cost R.
        shapes: possible sizes of the pruned model.
        keep: budget, as a share of the cost of the whole model.
        steps: number of steps of the run.
        keep_of: budgets of single families, as shares of their units; None for no such budgets.
        rates: rates of the update rules; None for the defaults.

    Attributes:
        removed: s / N of each family.
        multipliers: y of each family, `[L]`.
        pressure: z of the whole budget (under the name ``""``), and of each family with a budget of its own.
        importance: a of each family, `[L, R, N]`.
        sizes: number of kept units per set of each family; empty until the model closes.
    """

    def __init__(
        self,
        masks: Masks,
        cost: Cost,
        shapes: Shapes,
        keep: float,
        steps: int,
        keep_of: Mapping[str, float] | None = None,
        rates: Rates | None = None,
    ) -> None:
        self.masks, self.cost, self.shapes, self.keep, self.steps = masks, cost, shapes, keep, steps
        self.keep_of, self.rates = dict(keep_of or {}), rates or Rates()
        self.step_count = 0
        names = list(dict.fromkeys(units.size for units in masks.units.values()))
        self.removed = dict.fromkeys(names, 0.0)
        self.pressure: dict[str, float] = {}
        self.multipliers = {f: torch.full((len(s),), _FIRST, device=s.device) for f, s in masks.soft.items()}
        self.importance = {f: torch.zeros_like(s, requires_grad=False) for f, s in masks.soft.items()}
        self.sizes: dict[str, int] = {}

    # -- a step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self) -> None:
        """Update masks, sizes and multipliers once, from the gradients of the last backward pass."""
        self.step_count += 1
        done = self.step_count / self.steps
        self._measure()
        if done > self.rates.warmup:
            if done <= self.rates.closing:
                self._move_sizes()
            elif not self.sizes:
                self._choose_sizes()
            self._move_masks()
            self._move_multipliers()
        if self.sizes and done <= self.rates.frozen:
            begin, end = self.rates.closing, self.rates.frozen
            self.masks.softness = (1 + math.cos(math.pi * min(1.0, (done - begin) / (end - begin)))) / 2
            self._harden()
        elif self.sizes:
            self.masks.softness = 0.0
        for soft in self.masks.soft.values():
            soft.grad = None

    def _measure(self) -> None:
        """Update the running mean of squared gradients."""
        decay = 1 - 1 / max(2.0, min(self.step_count, self.rates.memory * self.steps))
        for family, soft in self.masks.soft.items():
            if soft.grad is None:
                raise EffpassError(f"no gradient reaches the masks of {family}", hint="refresh the masks before a step")
            squared = soft.grad.float().square()
            self.importance[family].lerp_(squared, 1 if self.step_count == 1 else 1 - decay)

    def _move_masks(self) -> None:
        rate = self.rates.masks / self.steps
        for family, soft in self.masks.soft.items():
            assert soft.grad is not None
            rms = self.importance[family].mean().sqrt().clamp(min=1e-30)
            soft.sub_(rate * soft.grad / rms)
            pull = self._going(family) * self.multipliers[family][:, None, None]
            soft.div_(1 + 2 * rate * pull).clamp_(0, 1)

    def _move_multipliers(self) -> None:
        rate = self.rates.multipliers / self.steps
        for family in self.masks.soft:
            self.multipliers[family] += rate * self.residual(family)

    def _move_sizes(self) -> None:
        kept = {size: 1 - gone for size, gone in self.removed.items()}
        excess = {"": self.cost.share(kept) - self.keep}
        excess |= {size: kept[size] - budget for size, budget in self.keep_of.items()}
        if not self.pressure:
            self.pressure = dict.fromkeys(excess, self._level())
        pushes = []  # of the sizes that are not at a bound
        for size in self.removed:
            price = self._price(size, kept)
            pressure = self._pressed("", excess) + (self._pressed(size, excess) if size in self.keep_of else 0.0)
            push = (pressure - price) / max(pressure + price, 1e-30)
            before = self.removed[size]
            wanted = before + self.rates.sizes / self.steps * push
            self.removed[size] = min(max(wanted, 0.0), self.shapes.most(size))
            if self.removed[size] != before:
                pushes.append(abs(push))
        if pushes and max(pushes) < _FAST:
            self._raise_pressure(excess)

    def _raise_pressure(self, excess: Mapping[str, float]) -> None:
        for name, over in excess.items():
            self.pressure[name] *= math.exp(self.rates.budget / self.steps * over)

    def _price(self, size: str, kept: Mapping[str, float]) -> float:
        """Return the price p on the border between removed and kept units, as a mean over a fiftieth of all units."""
        prices = self.prices(size, kept)
        around, at = len(prices) // 100, min(int(self.gone(size)), len(prices) - 1)
        return float(prices[max(0, at - around) : at + around + 1].mean())

    def _level(self) -> float:
        """Return the price for which removing all cheaper units would meet the budget."""
        kept = dict.fromkeys(self.removed, 1.0)
        prices = {size: self.prices(size, kept) for size in self.removed}
        low, high = -70.0, 70.0  # logarithms
        for _ in range(60):
            middle = (low + high) / 2
            gone = {size: float((p < math.exp(middle)).float().mean()) for size, p in prices.items()}
            share = self.cost.share({size: 1 - min(gone[size], self.shapes.most(size)) for size in gone})
            low, high = (middle, high) if share > self.keep else (low, middle)
        return math.exp(high)

    def _pressed(self, name: str, excess: Mapping[str, float]) -> float:
        """Return Z."""
        return self.pressure[name] * math.exp(self.rates.gain * excess[name])

    # -- measures of the units --------------------------------------------------------------------------------------

    def order(self, family: str) -> Tensor:
        """Return the indices of the units of each set in ascending order of a m², `[L, R, N]`."""
        key = self.importance[family] * self.masks.soft[family].clamp(min=_LEAST).square()
        return self.sets(key).argsort(-1)

    def sets(self, values: Tensor) -> Tensor:
        """Group values `[L, R, N]` so that each set along the last dimension loses the same number of units."""
        return values

    def gone(self, family: str) -> float:
        """Return the number of units of each set to remove."""
        units = self.masks.units[family]
        if self.sizes:
            return units.count - self.shapes.count(units, self.sizes)
        return self.removed[units.size] * units.count

    def _going(self, family: str) -> Tensor:
        """Return w, the share of each unit that is to be removed: 1 for the least important ones, `[L, R, N]`."""
        order, shape = self.order(family), self.importance[family].shape
        ranks = torch.arange(order.shape[-1], dtype=torch.float32, device=order.device)
        share = (self.gone(family) * order.shape[-1] / shape[-1] - ranks).clamp(0, 1)
        return torch.zeros_like(order, dtype=torch.float32).scatter_(-1, order, share.expand(order.shape)).view(shape)

    def residual(self, family: str) -> Tensor:
        """Return the mean of m² over the units to be removed, `[L]`."""
        share = self._going(family)
        total = share.sum((1, 2))
        return (share * self.masks.soft[family].square()).sum((1, 2)) / total.clamp(min=1e-9)

    def prices(self, size: str, kept: Mapping[str, float]) -> Tensor:
        """Return the importance of units divided by their share of the cost, in the order of removal, `[N]`.

        Entry n is for the n-th units of all sets in all layers together, since sizes are the same in every layer.
        """
        worth = torch.zeros(self.masks.units[size].count)
        for family, units in self.masks.units.items():
            if units.size == size:
                sorted_ = self.sets(self.importance[family]).gather(-1, self.order(family)).sum((0, 1)).cpu()
                worth += sorted_.view(len(worth), -1).sum(-1) * len(worth)
        return worth / max(self.cost.slope(kept, size), 1e-12)

    # -- the end ----------------------------------------------------------------------------------------------------

    def _choose_sizes(self) -> None:
        wanted = {size: 1 - gone for size, gone in self.removed.items()}
        self.sizes = self.shapes.nearest(self.cost, self.keep, wanted, self.keep_of)

    def _harden(self) -> None:
        for family in self.masks.hard:
            self.masks.hard[family] = 1 - self._going(family)

    def kept(self) -> dict[str, dict[int, Tensor]]:
        """Return the kept units by family and layer, at the end of the run.

        Raises:
            EffpassError: the run has not ended, or the mask of a removed unit is not 0.
        """
        if self.step_count < self.steps or not self.sizes:
            raise EffpassError(f"the masks are learned for {self.step_count} of {self.steps} steps")
        found: dict[str, dict[int, Tensor]] = {}
        for family, units in self.masks.units.items():
            hard, effective = self.masks.hard[family], self.masks.effective(family).detach()
            left = float((effective * (1 - hard)).abs().max())
            if left > 1e-3:
                raise EffpassError(f"masks of {family} that are to be 0 are {left:.3g}", hint="report this")
            indices = hard.bool().flatten(0, 1).nonzero()[:, 1].view(*units.shape[:2], -1).cpu()
            found[family] = dict(zip(units.readers, indices.unbind(), strict=True))
        return found

    # -- metrics and checkpoints ------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return the values to log: sizes, cost, multipliers, and by how much the constraints are violated."""
        kept = {u.size: 1 - self.gone(f) / u.count for f, u in self.masks.units.items() if u.size == f}
        found = {f"kept_{size}": share for size, share in kept.items()}
        found |= {"cost": self.cost.share(kept), "softness": self.masks.softness}
        found |= {f"z_{name or 'all'}": value for name, value in self.pressure.items()}
        for family, soft in self.masks.soft.items():
            values = soft.detach()
            found[f"y_{family}"] = float(self.multipliers[family].mean())
            found[f"residual_{family}"] = float(self.residual(family).mean())
            found[f"undecided_{family}"] = float(((values > 0.05) & (values < 0.95)).float().mean())
        return found

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and the plain values from which a run can be resumed."""
        tensors = {}
        for family in self.masks.units:
            tensors[f"soft.{family}"] = self.masks.soft[family].detach()
            tensors[f"hard.{family}"] = self.masks.hard[family]
            tensors[f"importance.{family}"] = self.importance[family]
            tensors[f"multipliers.{family}"] = self.multipliers[family]
        plain = {name: getattr(self, name) for name in ("step_count", "removed", "pressure", "sizes")}
        return tensors, {**plain, "softness": self.masks.softness}

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], plain: Mapping[str, Any]) -> None:
        for family, soft in self.masks.soft.items():
            soft.copy_(tensors[f"soft.{family}"])
            self.masks.hard[family].copy_(tensors[f"hard.{family}"])
            self.importance[family].copy_(tensors[f"importance.{family}"])
            self.multipliers[family].copy_(tensors[f"multipliers.{family}"])
        for name in ("step_count", "removed", "pressure", "sizes"):
            setattr(self, name, plain[name])
        self.masks.softness = plain["softness"]
