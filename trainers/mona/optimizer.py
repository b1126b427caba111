"""The MONA optimizer: Muon's orthogonalized momentum with an acceleration term for matrices, and AdamW for the rest.

Matrices that the Triton kernels support take their step in :mod:`.fused`, and all others in :mod:`.plain`.
"""

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
    """MONA (arXiv 2605.26842) for matrices, and AdamW for all other parameters.

    Given a model, ``MONA(model, lr=3e-4)`` chooses the algorithm of each parameter from the module tree, and
    ``print(optimizer.describe())`` shows the choices. Learning rates are those of AdamW.

    Args:
        params: an ``nn.Module``; or ``named_parameters()``; or parameters, of which those with two or more dimensions
            are matrices; or groups, dicts whose ``"algorithm"`` is ``"mona"`` or ``"adamw"`` (chosen by shape if
            missing) and whose other keys override the arguments below.
        lr: learning rate η, a float or a tensor with one element.
        weight_decay: decoupled weight decay λ: W is multiplied by 1 − ηλ in each step. If `params` is a module, it is
            not applied to vectors.
        momentum: decay μ of the momentum.
        nesterov: whether to look ahead of the momentum, as torch.optim.Muon does by default.
        beta_a: decay β_a of the acceleration, 0.975 to 0.99.
        alpha: weight α of the acceleration; None for −1 / (2(1 − β_a)). With 0 the optimizer is Muon and keeps no extra
            buffer.
        form: ``"exact"`` with one extra buffer, or ``"paper"`` with the two of algorithm 1 of the paper; they are equal
            up to rounding.
        cautious: whether to decay only entries whose sign is that of their update.
        scale: ``"rms_matched"`` (for learning rates of AdamW) or ``"spectral"`` (the default of torch.optim.Muon).
        newton_schulz: a :class:`NewtonSchulz`, or the name of its coefficients.
        momentum_dtype: dtype of the momentum; None for float32, or float64 for float64 parameters.
        acceleration_dtype: dtype of the extra buffers; None for bfloat16, or the dtype of the momentum for float64
            parameters.
        betas, eps: hyper-parameters of AdamW.
        nan_policy: reaction to a gradient that is not finite: ``"raise"`` an error before anything is written, or
            ``"skip"`` the whole step on all processes. `skipped` counts skipped steps.
        capturable: whether `step` avoids synchronization with the host, so that a CUDA graph can capture it; requires
            ``"skip"``.
        overrides: ``"mona"``, ``"adamw"`` or a :class:`Layout` for parameters whose names match a pattern.
        replicas: process group whose ranks hold equal copies of all plain parameters (DDP); each matrix is then
            orthogonalized on one of them. DTensors (FSDP2, tensor and expert parallelism) have placements of their own.

    Raises:
        EffpassError: if an argument is out of range, or a gradient is not finite.
        ModelError: if a parameter can't be optimized.
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
        """Add a parameter group; without ``"algorithm"`` it is divided into up to two groups, one per algorithm."""
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
        """Return a table of the parameters with algorithm, matrices and reason, and the size of the optimizer state."""
        return describe(self.param_groups, self._choices, self._parts, self._state_dtypes)

    # -- state --------------------------------------------------------------------------------------------------------

    def _state_dtypes(self, parameter: Tensor) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes of momentum and acceleration."""
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
        """Load a state; buffers keep their own dtypes, which may differ from those of the parameters.

        Raises:
            ArtifactError: if the state belongs to another optimizer or to other parameters.
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
        """Take a step with all parameters that have a gradient; other parameters and their buffers stay unchanged.

        Gradients are used as they are: accumulated, averaged, clipped. The acceleration is computed from their
        differences.
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
        # The kernels read the flag on the device, so that they can be launched before the host waits for it.
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
        """Return the uploaded plan of the parameters that the kernels support, and the other parameters."""
        compiling = torch.compiler.is_compiling()
        # Everything that a plan depends on, as plain lists, which are fast to compare when nothing has changed.
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
                    and not hasattr(parameter, "device_mesh")  # a DTensor has no address that kernels could read
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
