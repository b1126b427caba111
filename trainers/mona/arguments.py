"""Validation of the optimizer's arguments; each error message names the invalid value."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effpass.core.errors import EffpassError, ModelError, did_you_mean
from effpass.trainers.mona.batches import scale_of

__all__ = ["check_group", "check_nan_policy", "check_parameter"]

ALGORITHMS = ("mona", "adamw")
STATE_FORMS = ("exact", "paper")
NAN_POLICIES = ("raise", "skip")


def check_nan_policy(nan_policy: str, capturable: bool) -> None:
    """Raise EffpassError if the policy is unknown, or if it would wait for the device in a captured step."""
    if nan_policy not in NAN_POLICIES:
        raise EffpassError(f"unknown nan_policy {nan_policy!r}{did_you_mean(nan_policy, NAN_POLICIES)}")
    if capturable and nan_policy == "raise":
        raise EffpassError(
            "nan_policy='raise' has to wait for the device, which capturable=True rules out", hint="nan_policy='skip'"
        )


def check_group(group: dict[str, Any]) -> None:
    """Raise EffpassError if a hyper-parameter of a parameter group is out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise EffpassError(f"lr is a tensor of {lr.numel()} elements", hint="one element")
    ranges = {
        "weight_decay": (0.0, float("inf")), "momentum": (0.0, 1.0), "beta_a": (0.0, 1.0), "eps": (0.0, float("inf")),
    }  # fmt: skip
    if not isinstance(lr, Tensor):
        ranges["lr"] = (0.0, float("inf"))
    for name, (low, high) in ranges.items():
        if not low <= group[name] < high:
            raise EffpassError(f"{name}={group[name]} is outside [{low:g}, {high:g})")
    if not all(0 <= beta < 1 for beta in group["betas"]):
        raise EffpassError(f"betas={group['betas']} are outside [0, 1)")
    if group["form"] not in STATE_FORMS:
        raise EffpassError(f"unknown form {group['form']!r}{did_you_mean(group['form'], STATE_FORMS)}")
    if group.get("algorithm", "mona") not in ALGORITHMS:
        raise EffpassError(f"unknown algorithm {group['algorithm']!r}{did_you_mean(group['algorithm'], ALGORITHMS)}")
    scale_of(group["scale"], 1, 1)
    if group["alpha"] > 0:
        raise EffpassError(
            f"alpha={group['alpha']} is positive, which takes the step against the curvature's sign",
            hint="alpha=None for -1 / (2 (1 - beta_a)), 0 for Muon",
        )


def check_parameter(name: str, parameter: Any) -> None:
    """Raise ModelError unless a parameter is a real floating-point tensor."""
    if not isinstance(parameter, Tensor):
        raise ModelError(f"{name} is a {type(parameter).__name__}, not a tensor", hint="MONA(model), or its parameters")
    if not parameter.is_floating_point():
        raise ModelError(f"{name} is {parameter.dtype}: only real floating-point parameters can be optimized")
