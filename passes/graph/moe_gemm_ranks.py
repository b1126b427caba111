"""Distribute a model's experts over the ranks of a torchrun job: the model stage of `moe_gemm`.

Each rank keeps its share of the experts of every layer and releases the others; a layer becomes a call of
`effpass::expert_parallel`. This is done on the model, before anything is traced: only there can the memory of the other
experts be released, and only there are the experts of transformers still one module, whichever implementation computes
them. If transformers has already distributed the experts while loading the model, each rank keeps the experts that it
has, and only the call is replaced.

Shapes: T tokens, k experts per token, E experts, D hidden size, F intermediate size of an expert.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.fx.experimental.proxy_tensor import make_fx

import effpass.lowering.ops.expert_parallel  # noqa: F401  (registers the operator)
from effpass.core.errors import ModelError, PassRefusedError
from effpass.core.report import Refusal
from effpass.passes.graph.moe_gemm_gate import Gate, gate_at
from effpass.passes.graph.moe_gemm_inside import Miss

__all__ = ["SpreadExperts", "check_ranks", "ranks", "spread"]


def ranks() -> int:
    """Return the number of processes: the world size, or that of torchrun before a process group is up, or 1."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


class SpreadExperts(nn.Module):
    """This rank's share of a layer's experts, with the call signature of the module of all experts.

    Args:
        experts: module of all E experts, or of this rank's share if transformers has distributed them; not changed.
        gate: gate of the experts.
        replicated: whether all ranks have the same tokens.
    """

    gate_up_proj: nn.Parameter
    gate_up_proj_bias: nn.Parameter | None
    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter | None

    def __init__(self, experts: Any, gate: Gate, replicated: bool) -> None:
        super().__init__()
        group: Any = experts.gate_up_proj.device_mesh.get_group() if _spread_already(experts) else dist.group.WORLD
        for name in _NAMES:
            weight = getattr(experts, name, None)
            own = None if weight is None else nn.Parameter(_share(weight, group), requires_grad=weight.requires_grad)
            self.register_parameter(name, own)
        self.num_experts, self.transposed = experts.gate_up_proj.shape[0], _transposed(experts)
        self.gate = (gate.activation, float(gate.alpha), float(gate.limit), float(gate.offset), gate.interleaved)
        self.replicated, self.group = replicated, group.group_name

    @property
    def waits_for_ranks(self) -> bool:
        """Whether a call blocks until all other ranks make the same call with their own tokens."""
        return not self.replicated

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Compute outputs [T, D] from hidden states [T, D], ids [T, k] among all experts, routing weights [T, k]."""
        gate_up: Tensor = self.gate_up_proj
        down: Tensor = self.down_proj
        if self.transposed:
            gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
        return torch.ops.effpass.expert_parallel(
            hidden_states, top_k_index, top_k_weights, gate_up, self.gate_up_proj_bias, down, self.down_proj_bias,
            *self.gate, self.replicated, 0, self.group,
        )  # fmt: skip

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise ModelError(
            f"{prefix.rstrip('.')} holds {self.gate_up_proj.shape[0]} of {self.num_experts} experts, and a checkpoint"
            " of this process would lack the others",
            hint="save the model before effpass.prepare spreads its experts",
        )

    def extra_repr(self) -> str:
        return f"{self.gate_up_proj.shape[0]} of {self.num_experts} experts, {'TP' if self.replicated else 'DP'} + EP"


_NAMES = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def check_ranks(model: nn.Module, replicated: bool) -> None:
    """Check that the experts of `model` can be distributed evenly over the ranks.

    Raises:
        PassRefusedError: no process group is up, the number of experts is not a multiple of the number of ranks, or
            transformers has distributed the experts for replicated tokens but `replicated` is False.
        ModelError: the model has no layer of stacked experts.
    """
    count = ranks()
    if not (dist.is_available() and dist.is_initialized()):
        raise PassRefusedError(
            f"moe_gemm: expert_parallel with {count} processes, and no process group is up",
            hint="call torch.distributed.init_process_group() before effpass.prepare(model, recipe)",
        )
    found = _layers(model)
    if not found:
        raise ModelError(
            f"{type(model).__name__} has no layer of stacked experts (gate_up_proj and down_proj)",
            hint="leave expert_parallel out for this model",
        )
    for name, experts in found.items():
        total = experts.gate_up_proj.shape[0]
        if _spread_already(experts):
            if not replicated:
                raise PassRefusedError(
                    f"moe_gemm: transformers has spread {name} over ranks that all have the same tokens",
                    hint="expert_parallel: tp; or load the model without a distributed_config",
                )
        elif total % count:
            raise PassRefusedError(
                f"moe_gemm: {name} has {total} experts, and {count} ranks can't share them evenly",
                hint=f"start as many processes as divide {total}",
            )


def spread(model: nn.Module, replicated: bool) -> tuple[int, list[Refusal]]:
    """Replace the experts of each layer by :class:`SpreadExperts`.

    Returns:
        The number of layers replaced, and a refusal for each layer that stays whole on every rank.
    """
    hits, refusals = 0, []
    for name, experts in _layers(model).items():
        try:
            gate = _gate(name, experts)
        except _Whole as reason:
            refusals.append(Refusal(name, str(reason), "it stays as it is on every rank"))
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, SpreadExperts(experts, gate, replicated))
        hits += 1
    return hits, refusals


class _Whole(Exception):
    """Raised with the reason why a layer's experts can't be distributed; the layer then stays whole on every rank."""


def _layers(model: nn.Module) -> dict[str, Any]:
    """Return the modules of transformers that hold stacked experts, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "_apply_gate") and getattr(getattr(module, "gate_up_proj", None), "ndim", 0) == 3
    }


def _spread_already(experts: Any) -> bool:
    """Whether transformers has given each rank its share of the experts, and calls it with ids among all experts."""
    # transformers sets this forward while it loads a model with a DistributedConfig. Older versions change the router.
    calls = getattr(vars(experts).get("forward"), "__qualname__", "")
    return calls.startswith("EpDispatchExpertsParallel.") and _part(experts.gate_up_proj) is not None


def _part(weight: Any) -> Tensor | None:
    """Return the local shard of a DTensor that is sharded along its first dimension only; None for any other weight."""
    if not isinstance(weight.data, DTensor) or weight.data.placements != (Shard(0),):
        return None
    return weight.detach().to_local()


def _share(weight: Any, group: Any) -> Tensor:
    """Return this rank's experts of `weight` [E, …]."""
    part = _part(weight)
    if part is not None:
        return part
    local = weight.shape[0] // group.size()
    return weight.detach()[group.rank() * local : (group.rank() + 1) * local].clone()


def _transposed(experts: Any) -> bool:
    """Whether weights are stored as [E, D, 2 F] and [E, F, D]."""
    return bool(getattr(experts, "is_transposed", False))


def _gate(name: str, experts: Any) -> Gate:
    """Determine the gate of the experts `name` by tracing it.

    Raises:
        _Whole: the operator can't compute these experts.
    """
    if getattr(experts, "_is_expert_parallel", False) and not _spread_already(experts):
        raise _Whole("transformers has spread its experts in a way of its own")
    if getattr(experts, "has_post_expert_norm", False):
        raise _Whole("there is a norm behind each expert")
    for weight in (getattr(experts, n, None) for n in _NAMES):
        if weight is not None and _spread_already(experts):
            weight = _part(weight)
        elif weight is not None and (type(weight) is not nn.Parameter or type(weight.data) is not Tensor):
            raise _Whole(f"a weight is a {type(weight.data).__name__}")
        if weight is not None and (weight.is_meta or not weight.is_floating_point()):
            raise _Whole("its weights are not in memory" if weight.is_meta else f"a weight is {weight.dtype}")
    both = experts.gate_up_proj.shape[2 if _transposed(experts) else 1]
    trace = make_fx(lambda projected: experts._apply_gate(projected), tracing_mode="fake", pre_dispatch=True)
    with torch.no_grad():
        traced = trace(torch.empty(2, both, dtype=experts.gate_up_proj.dtype))
    (placeholder,), (output,) = (traced.graph.find_nodes(op=op) for op in ("placeholder", "output"))
    try:
        gate = gate_at(output.args[0])
    except Miss as miss:
        raise _Whole(miss.reason) from None
    if gate is None or gate.projected is not placeholder:
        raise _Whole("its gate is none that effpass::moe_ffn computes")
    return gate
