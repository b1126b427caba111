"""Loading of an optimizer state: check that it belongs to MONA and its parameters, and restoration of buffer dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effpass.core.errors import ArtifactError

__all__ = ["check", "restore_dtypes"]

_KEYS = {"mona": "momentum", "adamw": "exp_avg"}


def check(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> None:
    """Raise ArtifactError unless `state_dict` is a state of MONA for the parameters in these groups."""
    if not {"state", "param_groups"} <= set(state_dict):
        raise ArtifactError(f"no state of an optimizer: keys {sorted(map(str, state_dict))}")
    saved = state_dict["param_groups"]
    kinds = [group.get("algorithm") for group in saved]
    if any(kind not in _KEYS for kind in kinds):
        known = sorted({key for group in saved for key in group} - {"params"})
        raise ArtifactError(
            f"the checkpoint is another optimizer's: its groups have {', '.join(known)} and no algorithm",
            hint="start MONA without it; the model's weights can be loaded alone",
        )
    ours = [(group["algorithm"], len(group["params"])) for group in groups]
    theirs = [(kind, len(group["params"])) for kind, group in zip(kinds, saved, strict=True)]
    if ours != theirs:
        raise ArtifactError(
            f"the checkpoint's groups (algorithm, parameters) are {theirs}, this optimizer's {ours}",
            hint="build MONA as it was built for the checkpoint: same model, same overrides",
        )
    for own, group in zip(groups, saved, strict=True):
        for parameter, key in zip(own["params"], group["params"], strict=True):
            state = state_dict["state"].get(key)
            if not state:
                continue
            buffer = _KEYS[own["algorithm"]]
            if buffer not in state:
                raise ArtifactError(f"the checkpoint's state of parameter {key} has {sorted(state)}, and no {buffer}")
            if tuple(state[buffer].shape) != tuple(parameter.shape):
                raise ArtifactError(
                    f"the checkpoint's {buffer} of parameter {key} is {tuple(state[buffer].shape)}, "
                    f"the parameter {tuple(parameter.shape)}"
                )


def restore_dtypes(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    dtypes: Callable[[Tensor], tuple[torch.dtype, torch.dtype]],
) -> None:
    """Restore MONA's buffers in their own dtypes; when loading, torch casts them to the dtypes of the parameters.

    Args:
        optimizer: optimizer that has loaded `state_dict`.
        state_dict: state that was saved.
        dtypes: function that returns the dtypes of momentum and acceleration of a parameter.
    """
    for own, group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        if own["algorithm"] != "mona":
            continue
        for parameter, key in zip(own["params"], group["params"], strict=True):
            momentum, acceleration = dtypes(parameter)
            for name, value in state_dict["state"].get(key, {}).items():
                dtype = momentum if name == "momentum" else acceleration
                optimizer.state[parameter][name] = value.detach().to(parameter.device, dtype, copy=True)
