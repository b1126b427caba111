"""Masks and sizes learned together: a minimax problem over masks, kept sizes and multipliers.

    min over θ, m, s   max over y, z ≥ 0     L(θ, m) + Σ_l y_l ‖m_l‖²_{s} + z (R(s) − budget)

θ are the weights, m the masks, and s the number of units that go, one number for each family and the same in every
layer. ‖m_l‖²_{s} adds up the squares of the s units of layer l that matter least, the last of them in part where s is
no whole number: it is 0 when their masks are. R is the cost of what is left.

MaskPrune (arXiv 2502.14008) states the ingredients: masks and sizes learned together, proximal steps, the straight-
through estimator. The problem above is UVC's (arXiv 2203.08243, same author) with masks in the place of weights and one
s for all layers. How the players move is a choice made here; a step is

    order   units by a m², a being the running mean of (∂L/∂m)²; to second order and up to a factor common to all units,
            what dropping one adds to the loss
    masks   m ← m − η ∂L/∂m / rms, then m / (1 + 2 η y w), w being the share of the unit that goes (proximal step)
    sizes   s ← s + η_s (Z − p) / (Z + p), where p is a of the unit between those that go and stay, over what it costs
    y       ← y + η_y (mean of m² over the units that go)
    z       ← z exp(η_z (R − budget)); it stands still while s can't follow (anti-windup), and Z = z exp(g (R − budget))

z begins as the price at which the units as they are would meet the budget. At the end the model closes: s is rounded to
a shape, and the masks go over into 0 and 1.
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


# y at the start: a mask that goes is at a tenth after some 12 % of the steps.
_FIRST = 10.0
# The least m that counts: a unit that went comes back where it matters a hundred times as much as one that stays.
_LEAST = 0.1
# A push of the sizes, of at most 1, from which on they are on their way, and the multipliers wait for them.
_FAST = 0.5


@dataclass(frozen=True)
class Rates:
    """How the players move. Rates are for the whole run: what a player covers in a step is its rate over the steps.

    Attributes:
        warmup: share of the steps in which importance is measured and nothing moves.
        closing: share of the steps after which the model closes.
        frozen: share of the steps after which the kept units are fixed and the masks are 0 and 1.
        masks: η.
        sizes: η_s, in shares of a family.
        multipliers: η_y.
        budget: η_z.
        gain: g.
        memory: share of the steps that the running mean of squared gradients looks back.
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
    """The players.

    Attributes:
        removed: s over N, by family.
        multipliers: y, `[L]` by family.
        pressure: z, of the whole budget and of each family that has one of its own.
        importance: a, `[L, R, N]` by family.
        sizes: kept units of a set, once the model closes.

    Args:
        masks: attached to the model.
        cost: R.
        shapes: what sizes a model can have.
        keep: the budget.
        keep_of: budgets of single families, as shares of their units.
        steps: of the run.
        rates: see there.
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
        """After a backward pass: move everybody once."""
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
        pushes = []  # of the sizes that can move
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
        """Of the units between those that go and stay: a mean over a fiftieth of them."""
        prices = self.prices(size, kept)
        around, at = len(prices) // 100, min(int(self.gone(size)), len(prices) - 1)
        return float(prices[max(0, at - around) : at + around + 1].mean())

    def _level(self) -> float:
        """The price at which dropping all that is cheaper would meet the budget."""
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
        return self.pressure[name] * math.exp(self.rates.gain * excess[name])

    # -- what they look at ------------------------------------------------------------------------------------------

    def order(self, family: str) -> Tensor:
        """The units of each set from the one that matters least: positions `[L, R, N]`."""
        key = self.importance[family] * self.masks.soft[family].clamp(min=_LEAST).square()
        return self.sets(key).argsort(-1)

    def sets(self, values: Tensor) -> Tensor:
        """Values `[L, R, N]`, the last dimension being one set that as many go of as of any other."""
        return values

    def gone(self, family: str) -> float:
        """How many units of a set go."""
        units = self.masks.units[family]
        if self.sizes:
            return units.count - self.shapes.count(units, self.sizes)
        return self.removed[units.size] * units.count

    def _going(self, family: str) -> Tensor:
        """The share of each unit that goes: 1 for those that matter least, `[L, R, N]`."""
        order, shape = self.order(family), self.importance[family].shape
        ranks = torch.arange(order.shape[-1], dtype=torch.float32, device=order.device)
        share = (self.gone(family) * order.shape[-1] / shape[-1] - ranks).clamp(0, 1)
        return torch.zeros_like(order, dtype=torch.float32).scatter_(-1, order, share.expand(order.shape)).view(shape)

    def residual(self, family: str) -> Tensor:
        """The mean of m² over the units that go, `[L]`."""
        share = self._going(family)
        total = share.sum((1, 2))
        return (share * self.masks.soft[family].square()).sum((1, 2)) / total.clamp(min=1e-9)

    def prices(self, size: str, kept: Mapping[str, float]) -> Tensor:
        """What units matter, over the share of the cost that they are, from those that go first: `[N]`.

        Place n is that of the n-th units of all sets of all layers together.
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
        """Kept units, by family and layer, once the model has closed.

        Raises:
            EffpassError: it has not, or a mask of a unit that goes is not 0.
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

    # -- keeping ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """What a run logs: sizes, multipliers and how far the constraints are from being met."""
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
        """Tensors and plain values that a run goes on from."""
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
