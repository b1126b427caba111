"""MONA, the optimiser: Muon's orthogonalised momentum with an acceleration term, and AdamW for what is no matrix."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from effpass.core.errors import EffpassError, ModelError
from effpass.trainers.mona import checkpoint, fused, plain
from effpass.trainers.mona.arguments import check_group, check_nan_policy, check_parameter
from effpass.trainers.mona.describe import describe
from effpass.trainers.mona.distributed import Exchange
from effpass.trainers.mona.finite import all_finite, asked, not_finite
from effpass.trainers.mona.groups import ADAMW, Choice, Override, choose, choose_named
from effpass.trainers.mona.groups import MONA as MATRICES
from effpass.trainers.mona.layout import Part
from effpass.trainers.mona.newton_schulz import NewtonSchulz
from effpass.trainers.mona.plain import extra_buffers
from effpass.trainers.mona.sharding import is_shared
from effpass.trainers.mona.update import default_alpha

__all__ = ["MONA"]


class MONA(torch.optim.Optimizer):
    """MONA (arXiv 2605.26842) for matrices, AdamW for the rest.

    Give it the model: ``MONA(model, lr=3e-4)`` reads off the module tree which parameter is which, and
    ``print(optimizer.describe())`` shows the choice. Learning rates are AdamW's.

    Args:
        params: an ``nn.Module``; or ``named_parameters()``; or parameters, where two and more dimensions mean matrices;
            or groups, dicts whose ``"algorithm"`` is ``"mona"`` or ``"adamw"`` (by shape where it is missing) and
            whose other keys override the arguments below.
        lr: η, a float or a tensor of one element.
        weight_decay: λ, decoupled: W shrinks by 1 − ηλ a step. From a module, vectors get none.
        momentum: μ.
        nesterov: look ahead of the momentum, as torch.optim.Muon does by default.
        beta_a: β_a of the acceleration, 0.975 to 0.99.
        alpha: α; None is −1 / (2(1 − β_a)). 0 is Muon, without the extra buffer.
        form: ``"exact"``, one extra buffer; ``"paper"``, the two of the paper's algorithm 1, the same up to rounding.
        cautious: decay only entries whose sign is that of their update.
        scale: ``"rms_matched"`` (learning rates of AdamW) or ``"spectral"`` (torch.optim.Muon's default).
        newton_schulz: a :class:`NewtonSchulz`, or the name of its coefficients.
        momentum_dtype: of the momentum; None is float32, float64 for float64 parameters.
        acceleration_dtype: of the extra buffers; None is bfloat16, or as the momentum where that is float64.
        betas, eps: of AdamW.
        nan_policy: what a gradient that is not finite does: ``"raise"`` an error before anything is written, or
            ``"skip"`` the whole step, on all processes. `skipped` counts them.
        capturable: no synchronisation with the host, so that `step` can be captured in a CUDA graph; needs ``"skip"``.
        overrides: patterns of parameter names → ``"mona"``, ``"adamw"`` or a :class:`Layout`.
        replicas: process group whose ranks hold equal copies of all plain parameters (DDP): each matrix is then
            orthogonalised on one of them. DTensors (FSDP2, tensor and expert parallel) say themselves where they are.

    Raises:
        EffpassError: an argument out of range, or a gradient that is not finite.
        ModelError: parameters of a kind that can't be optimised.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = False,
        beta_a: float = 0.99,
        alpha: float | None = None,
        form: str = "exact",
        cautious: bool = False,
        scale: str = "rms_matched",
        newton_schulz: NewtonSchulz | str = "polar_express",
        momentum_dtype: torch.dtype | None = None,
        acceleration_dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        nan_policy: str = "raise",
        capturable: bool = False,
        overrides: Mapping[str, Override] | None = None,
        replicas: Any = None,
    ) -> None:
        check_nan_policy(nan_policy, capturable)
        self.newton_schulz = NewtonSchulz(newton_schulz) if isinstance(newton_schulz, str) else newton_schulz
        self.momentum_dtype = momentum_dtype
        self.acceleration_dtype = acceleration_dtype
        self.nan_policy = nan_policy
        self.capturable = capturable
        self.replicas = replicas
        self.skipped = 0
        self._overrides = dict(overrides or {})
        self._choices: dict[Tensor, Choice] = {}
        self._parts: dict[Tensor, tuple[Part, ...]] = {}
        self._forget_plans()
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov, "beta_a": beta_a,
            "alpha": default_alpha(beta_a) if alpha is None and beta_a != 1 else alpha, "form": form,
            "cautious": cautious, "scale": scale, "betas": tuple(betas), "eps": eps,
        }  # fmt: skip
        if isinstance(params, nn.Module):
            params = self._groups_of(params)
        super().__init__(params, defaults)

    # -- groups -------------------------------------------------------------------------------------------------------

    def _groups_of(self, model: nn.Module) -> list[dict[str, Any]]:
        choices = choose(model, self._overrides)
        if not choices:
            raise ModelError("the model has no parameter that requires a gradient")
        self._choices = {choice.parameter: choice for choice in choices}
        kinds: dict[tuple[str, bool], dict[str, Any]] = {
            (MATRICES, False): {"algorithm": MATRICES},
            (ADAMW, False): {"algorithm": ADAMW},
            (ADAMW, True): {"algorithm": ADAMW, "weight_decay": 0.0},
        }
        for choice in choices:
            vector = choice.algorithm == ADAMW and choice.parameter.ndim < 2
            group = kinds[choice.algorithm, vector]
            group.setdefault("params", []).append((choice.name, choice.parameter))
        return [group for group in kinds.values() if "params" in group]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; without ``"algorithm"`` it becomes up to two, one for each."""
        group = {**self.defaults, **param_group}
        given = group.pop("params")
        members = [given] if isinstance(given, Tensor) else list(given)
        names = [m[0] if isinstance(m, tuple) else f"parameter {i}" for i, m in enumerate(members)]
        tensors = [m[1] if isinstance(m, tuple) else m for m in members]
        check_group(group)
        for name, tensor in zip(names, tensors, strict=True):
            check_parameter(name, tensor)
        unknown = [(n, t) for n, t in zip(names, tensors, strict=True) if t not in self._choices]
        algorithm = group.pop("algorithm", None)
        for choice in choose_named(unknown, self._overrides if unknown and algorithm is None else None):
            if algorithm is not None:
                choice = Choice(choice.name, choice.parameter, algorithm, choice.layout, "its group")
            self._choices[choice.parameter] = choice
        for kind in (MATRICES, ADAMW):
            own = [m for m, t in zip(members, tensors, strict=True) if self._choices[t].algorithm == kind]
            if own or not members:
                super().add_param_group({**group, "params": own, "algorithm": kind})
            if not members:
                return
        for name, tensor in zip(names, tensors, strict=True):
            choice = self._choices[tensor]
            if choice.algorithm == MATRICES:
                self._parts[tensor] = tuple(choice.layout.parts(tensor.shape, name))

    def describe(self) -> str:
        """A table: which parameters get MONA and which AdamW, how they are cut, why, and the size of the state."""
        return describe(self.param_groups, self._choices, self._parts, self._state_dtypes)

    # -- state --------------------------------------------------------------------------------------------------------

    def _state_dtypes(self, parameter: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Of momentum and acceleration."""
        double = parameter.dtype == torch.float64
        momentum = self.momentum_dtype or (torch.float64 if double else torch.float32)
        return momentum, self.acceleration_dtype or (momentum if double else torch.bfloat16)

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[parameter]
        if group["algorithm"] == MATRICES:
            momentum, acceleration = self._state_dtypes(parameter)
            for name in ("momentum", *extra_buffers(group)):
                if name not in state:
                    dtype = momentum if name == "momentum" else acceleration
                    state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
        elif not state:
            device = parameter.device if self.capturable else "cpu"
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load; buffers keep their own dtypes, whatever the parameters'.

        Raises:
            ArtifactError: a state of another optimiser, or of other parameters.
        """
        checkpoint.check(state_dict, self.param_groups)
        super().load_state_dict(state_dict)
        self._forget_plans()
        checkpoint.restore_dtypes(self, state_dict, self._state_dtypes)

    def _forget_plans(self) -> None:
        self._plans: dict[int, tuple[Any, fused.Plan, list[Tensor]]] = {}
        self._exchange = Exchange()

    def __getstate__(self) -> dict[str, Any]:
        own = (
            "newton_schulz", "momentum_dtype", "acceleration_dtype", "nan_policy", "capturable", "replicas", "skipped",
            "_overrides", "_choices", "_parts",
        )  # fmt: skip
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plans()

    # -- step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of all parameters that have a gradient; the others and their buffers stay as they are.

        Gradients are taken as they are now: accumulated, averaged, clipped. The acceleration is their difference.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        for parameter in [p for _, own in work for p in own if p.grad.layout != torch.strided]:
            name = self._choices[parameter].name
            raise ModelError(f"the gradient of {name} is sparse", hint="nn.Embedding(sparse=False)")
        plans = [self._plan(group, own) if group["algorithm"] == MATRICES else None for group, own in work]
        parameters = [parameter for _, own in work for parameter in own]
        others = [p for (_, own), plan in zip(work, plans, strict=True) for p in (own if plan is None else plan[1])]
        finite = all_finite([plan[0] for plan in plans if plan is not None], others, parameters, self.replicas)
        is_finite = None if self.capturable or finite is None else asked(finite)
        # The kernels look at the flag themselves: they are queued before the host waits for it, behind the backward.
        for (group, _), plan in zip(work, plans, strict=True):
            if plan is not None and finite is not None:
                plan[0].step(group, self.newton_schulz, finite)
        if is_finite is not None and not is_finite():
            if self.nan_policy == "raise":
                where = not_finite((self._choices[parameter].name, parameter) for parameter in parameters)
                raise EffpassError(
                    f"the gradient of {where} is not finite; nothing was written",
                    hint="lower the learning rate, clip, or pass nan_policy='skip'",
                )
            self.skipped += 1
            return loss
        guard = finite if self.capturable else None
        for (group, own), plan in zip(work, plans, strict=True):
            if plan is not None:
                members = [
                    plain.Member(p, self._state_of(p, group), self._choices[p].layout, self._parts[p]) for p in plan[1]
                ]
                if members:
                    plain.step(members, group, self.newton_schulz, self._exchange, self.replicas, guard)
            elif own:
                self._step_adamw(group, own, guard)
        return loss

    def _plan(self, group: dict[str, Any], parameters: list[Tensor]) -> tuple[fused.Plan, list[Tensor]]:
        """What the kernels take, tables on the device, and the parameters that they don't."""
        compiling = torch.compiler.is_compiling()
        # What a plan rests on, as plain lists: comparing them is what a step costs where nothing has changed.
        grads = [parameter.grad for parameter in parameters]
        signature = (
            group["form"], group["alpha"] == 0, compiling,
            [id(parameter) for parameter in parameters],
            [parameter.dtype for parameter in parameters],
            [parameter.device for parameter in parameters],
            [grad.dtype for grad in grads],  # type: ignore[union-attr]
            [grad.is_contiguous() for grad in grads],  # type: ignore[union-attr]
        )  # fmt: skip
        kept = self._plans.get(id(group))
        if kept is None or kept[0] != signature:
            members, others = [], []
            for parameter in parameters:
                state = self._state_of(parameter, group)
                member = fused.Member(parameter, state["momentum"], state.get("average"), self._parts[parameter])
                fits = (
                    not compiling
                    and group["form"] == "exact"
                    and not is_shared(parameter, self._choices[parameter].layout, self.replicas)
                )
                if fits and fused.supported(member, self.newton_schulz):
                    members.append(member)
                else:
                    others.append(parameter)
            kept = signature, fused.Plan(members), others
            self._plans[id(group)] = kept
        if kept[1].members:
            kept[1].upload()
        return kept[1], kept[2]

    def _step_adamw(self, group: dict[str, Any], parameters: list[Tensor], guard: Tensor | None) -> None:
        states = [self._state_of(parameter, group) for parameter in parameters]
        adamw(
            parameters,
            [p.grad.to(p.dtype) for p in parameters],  # type: ignore[union-attr]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True if guard is not None else None,
            capturable=self.capturable,
            found_inf=None if guard is None else (~guard).to(torch.float32),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
