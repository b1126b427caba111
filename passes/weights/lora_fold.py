"""Changes that adapters make to each parameter, and the arithmetic of merging them.

Both stages of `merge_lora` use this module: the model stage replaces parameters (:func:`fold_into`), the graph stage
computes derived weights with :func:`fold`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.errors import ArtifactError
from effpass.passes.weights.peft_adapter import LowRank, PeftAdapter

__all__ = ["Change", "changes", "fold", "fold_into", "record_untied", "stores_transposed"]


def fold(
    weight: Tensor,
    *,
    transposed: bool = False,
    value: Tensor | None = None,
    a: Tensor | None = None,
    b: Tensor | None = None,
    magnitude: Tensor | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """Merge an adapter into a parameter: `value` or `weight`, plus `B A` or `add`, rescaled to `magnitude`.

    The result has the dtype of `weight`. It is computed in float32 (float64 for float64 weights) and rounded once.

    Args:
        weight: original parameter: a matrix `[out, in]`, or `[in, out]` if `transposed`, or a bias `[out]`.
        transposed: whether the matrix is stored transposed, as in an embedding or GPT-2's Conv1D.
        value: parameter that replaces the original (one that was fully trained); None to use `weight`.
        a: factor A, `[r, in]`; None for no low-rank update.
        b: factor B with the scale included, `[out, r]`; None for no low-rank update.
        magnitude: DoRA's m, `[out]`; None for plain LoRA.
        add: tensor that is added to a bias; None to add nothing.
    """
    merged = weight if value is None else value.to(weight.device)
    merged = merged.to(torch.promote_types(weight.dtype, torch.float32))
    if a is not None and b is not None:
        delta = b.to(merged) @ a.to(merged)
        merged = merged + (delta.T if transposed else delta)
    if magnitude is not None:
        dim = 0 if transposed else 1
        norm = torch.linalg.vector_norm(merged, dim=dim, keepdim=True)
        merged = merged * (magnitude.to(merged).unsqueeze(dim) / norm)
    if add is not None:
        merged = merged + add.to(merged)
    return merged.to(weight.dtype)


@dataclass(frozen=True)
class Change:
    """Change of one parameter of one module.

    Attributes:
        tensors: keyword arguments of :func:`fold`.
        shared: whether `value` replaces the parameter for every module that shares it, not only for this one.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    shared: bool = False

    def shape(self, transposed: bool) -> tuple[int, ...]:
        """Return the shape of the parameter to which this change applies."""
        if "a" not in self.tensors:
            return tuple(next(iter(self.tensors.values())).shape)
        shape = (self.tensors["b"].shape[0], self.tensors["a"].shape[1])
        return shape[::-1] if transposed else shape


def changes(adapters: Sequence[tuple[PeftAdapter, float]]) -> dict[str, Change]:
    """Combine several weighted adapters into one change per parameter name.

    Args:
        adapters: adapters, each with the factor on its update.

    Raises:
        ArtifactError: the adapters can't be combined, because a DoRA adapter is among several or has a weight other
            than 1, or because two of them replace the same parameter.
    """
    plan: dict[str, Change] = {}
    for adapter, weight in adapters:
        for name, tensor in (*adapter.base.items(), *adapter.modules.items()):
            if name in plan or weight != 1.0:
                raise ArtifactError(
                    f"adapter {adapter.folder}: it replaces {name} entirely, which can't be weighted or summed",
                    hint="only one adapter may hold modules_to_save, embeddings or biases, with weight 1",
                )
            plan[name] = Change({"value": tensor}, shared=name in adapter.base)
    for adapter, weight in adapters:
        for module, update in adapter.updates.items():
            if update.magnitude is not None and (len(adapters) > 1 or weight != 1.0):
                raise ArtifactError(
                    f"adapter {adapter.folder}: DoRA ({module}) rescales W + B A, so it merges alone and with weight 1",
                    hint="merge it by itself",
                )
            _add_update(plan, module, update, weight * update.scale)
    return plan


def _add_update(plan: dict[str, Change], module: str, update: LowRank, scale: float) -> None:
    """Add an update to `plan`. Σᵢ sᵢ Bᵢ Aᵢ is computed as one product of concatenated factors."""
    tensors = plan.setdefault(f"{module}.weight", Change()).tensors
    a, b = update.a.float(), update.b.float() * scale
    tensors["a"] = torch.cat([tensors["a"], a]) if "a" in tensors else a
    tensors["b"] = torch.cat([tensors["b"], b], dim=1) if "b" in tensors else b
    if update.magnitude is not None:
        tensors["magnitude"] = update.magnitude
    if update.bias is not None:
        tensors = plan.setdefault(f"{module}.bias", Change()).tensors
        add = update.bias.float() * scale
        tensors["add"] = tensors["add"] + add if "add" in tensors else add


def fold_into(model: nn.Module, plan: Mapping[str, Change], *, keeps_ties: bool, mark: object) -> None:
    """Replace the parameters that `plan` changes by merged ones.

    Modules that share a weight are untied if the plan changes them differently; for example, an adapter on a tied
    `lm_head` alone must not change the embedding. The config then records that they are no longer tied.

    Args:
        model: model that is changed in place.
        plan: parameter name → change.
        keeps_ties: whether modules that share a weight also share one adapter.
        mark: value stored on each new parameter, by which the caller detects parameters that are merged already.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        shared = next((plan[n].tensors["value"] for n in names if n in plan and plan[n].shared), None)
        original = model.get_parameter(names[0])
        merged: list[nn.Parameter] = []
        for name in names:
            tensors = dict(plan[name].tensors) if name in plan else {}
            if shared is not None:
                tensors.setdefault("value", shared)
            if not tensors:
                continue
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            one_for_all = merged[0] if merged and keeps_ties and all(n in plan for n in names) else None
            new = one_for_all if one_for_all is not None else _merged_parameter(original, module, tensors, merged)
            new._effpass_merged = mark  # type: ignore[attr-defined]
            setattr(module, leaf, new)
    record_untied(model)


def _merged_parameter(
    original: nn.Parameter, module: nn.Module, tensors: dict[str, Tensor], merged: list[nn.Parameter]
) -> nn.Parameter:
    """Return the merged parameter; if an equal one is in `merged`, that one, so that modules continue to share it."""
    with torch.no_grad():
        value = fold(original.detach(), transposed=stores_transposed(module), **tensors)
    for known in merged:
        if torch.equal(known, value):
            return known
    merged.append(nn.Parameter(value, requires_grad=original.requires_grad))
    return merged[-1]


def stores_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as `[in, out]`, as GPT-2's Conv1D and embeddings do (in = vocabulary size)."""
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)


def record_untied(model: nn.Module) -> None:
    """Set `tie_word_embeddings` to False in the config if input and output embeddings no longer share their weight."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    causal_lm: Any = model
    outputs, inputs = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if outputs is not None and inputs is not None and outputs.weight is not inputs.weight:
        for part in {id(c): c for c in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
