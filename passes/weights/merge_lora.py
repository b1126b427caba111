"""`merge_lora`: fold LoRA adapters into the weights, so that an adapted layer is a single matrix product again.

    W' = W + Σᵢ wᵢ · sᵢ · Bᵢ Aᵢ             s = alpha / r, for rsLoRA alpha / √r
    W' = m · (W + s·B A) / ‖W + s·B A‖      DoRA, with the norm over each row

W `[out, in]` is the base weight; A `[r, in]` and B `[out, r]` are the factors of an adapter, w is its weight in a sum
of several, and m `[out]` is DoRA's magnitude. Merging is computed in float32 and rounded once to the dtype of W. LoRA:
https://arxiv.org/abs/2106.09685, rsLoRA: https://arxiv.org/abs/2312.03732, DoRA: https://arxiv.org/abs/2402.09353.

On the model, the pass replaces parameters. In a graph, it makes each use read a *derived weight*, which is computed
from the original and the adapter (:meth:`effpass.core.program.Program.derive`), so that :func:`swap` can exchange the
adapter of a compiled model. If no adapter is named, the pass merges the adapters that PEFT has attached to the model
(:mod:`effpass.passes.weights.attached_lora`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Node

from effpass.core.errors import ArtifactError, ModelError, PassRefusedError, RecipeError
from effpass.core.live_weights import Slot, slots_of
from effpass.core.pass_ import Match, WeightsPass
from effpass.core.program import Linear, Program, Weight
from effpass.core.report import Refusal
from effpass.passes.weights import attached_lora
from effpass.passes.weights.composition import check_first
from effpass.passes.weights.lora_fold import Change, changes, fold, fold_into, stores_transposed
from effpass.passes.weights.peft_adapter import PeftAdapter, read_adapter
from effpass.passes.weights.quantized import dequantize_linears, scheme_of, tensor_scheme

__all__ = ["MergeLora", "MergeLoraOptions", "WeightedAdapter", "logit_difference", "swap"]

aten = torch.ops.aten


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and its weight in a sum of several.

    Attributes:
        path: folder of a standard PEFT adapter.
        weight: factor on the update of the adapter.
    """

    path: Path
    weight: float = 1.0


@dataclass(frozen=True)
class MergeLoraOptions:
    """Options of `merge_lora`.

    Attributes:
        adapter: folder of a standard PEFT adapter. If neither `adapter` nor `adapters` is given, the adapters attached
            to the model are merged.
        adapters: several adapters, whose weighted updates are summed: `{path: ./a, weight: 0.7}`.
        quantized: treatment of adapted layers whose weight is quantized. ``refuse`` raises an error that names the
            layer, ``keep`` leaves the adapter attached to the layer without merging it, and ``dequantize`` dequantizes
            the whole model and merges.
    """

    adapter: Path | None = None
    adapters: tuple[WeightedAdapter, ...] = ()
    quantized: Literal["refuse", "keep", "dequantize"] = "refuse"

    def __post_init__(self) -> None:
        if self.adapter is not None and self.adapters:
            raise RecipeError("both adapter and adapters are given", hint="list all of them under adapters")
        for item in self.adapters:
            if not math.isfinite(item.weight):
                raise RecipeError(f"the weight of {item.path} is {item.weight}, expected a finite number")

    @property
    def named(self) -> tuple[WeightedAdapter, ...]:
        return (WeightedAdapter(self.adapter),) if self.adapter is not None else self.adapters


class MergeLora(WeightsPass):
    """Folds adapters from folders, or those attached by PEFT, into the weights."""

    name = "merge_lora"
    exact = True
    changes = "values"
    Options = MergeLoraOptions
    options: MergeLoraOptions

    @property
    def keeps_outputs(self) -> bool:
        return not self.options.named

    @cached_property
    def adapters(self) -> list[tuple[PeftAdapter, float]]:
        return [(read_adapter(item.path), item.weight) for item in self.options.named]

    @cached_property
    def plan(self) -> dict[str, Change]:
        return changes(self.adapters)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Key of the adapters and their weights; it marks parameters into which they are merged already."""
        return ("merge_lora", tuple((str(item.path.resolve()), item.weight) for item in self.options.named))

    def could_act(self, weight_names: Sequence[str]) -> bool:
        return bool(self.options.named) or any(".lora_" in name for name in weight_names)

    # -- model stage ------------------------------------------------------------------------------------------------

    def check_model(self, model: nn.Module) -> None:
        if not self.options.named:
            return
        if attached_lora.tuner_layers(model):
            raise ModelError(
                "the model already has adapters attached, and merge_lora names another",
                hint="name no adapter to merge the attached ones, or remove them with model.unload()",
            )
        quantized = self._quantized(model)
        shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
        for name in quantized:  # the shape of a packed weight is that of its storage
            layer: Any = model.get_submodule(name)
            shapes[f"{name}.weight"] = (layer.out_features, layer.in_features)
        transposed = frozenset(n for n, m in model.named_modules() if stores_transposed(m))
        for adapter, _ in self.adapters:
            adapter.check_fit(shapes, transposed)
        for name, change in self.plan.items():
            module = name.rpartition(".")[0]
            if module in quantized:
                self._check_quantized(module, quantized[module], change)
            elif model.get_parameter(name).is_meta:
                raise ModelError(f"{name} is not in memory (offloaded)", hint="load the model without offloading")

    def _check_quantized(self, module: str, scheme: str, change: Change) -> None:
        if self.options.quantized == "refuse":
            raise ModelError(
                f"{module} is quantized ({scheme}), and merging would quantize it a second time",
                hint="merge_lora: {quantized: keep} leaves the adapter beside such layers, {quantized: dequantize}"
                " makes the model unquantized; or load the model unquantized",
            )
        if self.options.quantized == "keep" and change.tensors.keys() != {"a", "b"}:
            raise ModelError(
                f"{module} is quantized ({scheme}), and its adapter is more than B A (DoRA, a bias or a full weight)",
                hint="merge_lora: {quantized: dequantize}, or attach the adapter with PEFT",
            )

    def _quantized(self, model: nn.Module) -> dict[str, str]:
        """Return the adapted modules whose weight is quantized, each with the name of its quantization scheme."""
        modules = dict(model.named_modules())
        names = dict.fromkeys(name.rpartition(".")[0] for name in self.plan)
        return {n: s for n in names if n in modules and (s := scheme_of(modules[n])) is not None}

    def prepare(self, model: nn.Module) -> tuple[int, list[Refusal]]:
        """Merge into the model's parameters in place; hits are changed parameters, or modules for attached adapters."""
        if not self.options.named:
            return attached_lora.merge_attached(model, self.options.quantized)
        self.check_model(model)
        quantized = self._quantized(model)
        if quantized and self.options.quantized == "dequantize":
            dequantize_linears(model, getattr(model, "dtype", torch.float32))
            quantized = {}
        attached_lora.attach(model, {n: self.plan[f"{n}.weight"].tensors for n in quantized})
        parameters = dict(model.named_parameters(remove_duplicate=False))
        done = [n for n in self.plan if getattr(parameters.get(n), "_effpass_merged", None) == self.key]
        left_alone = {*done, *(f"{n}.weight" for n in quantized)}
        plan = {n: change for n, change in self.plan.items() if n not in left_alone}
        fold_into(model, plan, keeps_ties=all(a.keeps_ties for a, _ in self.adapters), mark=self.key)
        refusals = [Refusal(n, attached_lora.KEPT.format(s)) for n, s in quantized.items()]
        return len(plan), refusals + [Refusal(n, "merged already by effpass.prepare") for n in done]

    # -- graph stage ------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        if not self.options.named:
            yield from attached_lora.find(program)
            return
        check_first(program, self.plan, self.name)
        found: set[str] = set()
        linears = {linear.node: linear for linear in program.linears()}
        bodies = {body.caller for body in program.bodies}
        for weight in list(program.weights.values()):
            users = [node for node in weight.node.users if node not in bodies]
            names = [_name_at(weight, node, linears.get(node)) for node in users]
            all_names = (*weight.names, *names)
            shared = next((self.plan[n] for n in all_names if n in self.plan and self.plan[n].shared), None)
            for node, name in zip(users, names, strict=True):
                change = self.plan.get(name)
                if change is None and shared is not None:
                    change = Change({"value": shared.tensors["value"]})
                if change is not None:
                    found.add(name)
                    yield self._match(weight, node, name, change)
        if program.parent is None and not program.bodies:
            for name in sorted(self.plan.keys() - found):
                yield Refusal(name, "the graph reads no weight of this name", "it may be in another graph of the model")

    def _match(self, weight: Weight, node: Node, name: str, change: Change) -> Match | Refusal:
        if getattr(weight.tensor, "_effpass_merged", None) == self.key:
            return Refusal(name, "merged already by effpass.prepare")
        if scheme := tensor_scheme(weight.tensor):
            raise PassRefusedError(
                f"merge_lora: {name} is quantized ({scheme}), and merging would quantize it a second time",
                hint="call effpass.prepare(model, recipe) before compiling, with merge_lora: {quantized: keep} or"
                " {quantized: dequantize}",
            )
        transposed = _reads_transposed(weight.node, node)
        if transposed is None and "a" in change.tensors:
            raise PassRefusedError(
                f"merge_lora: {name} is read by {node.format_node()}, which is no product that the adapter fits",
                hint="call effpass.prepare(model, recipe) before compiling",
            )
        transposed = bool(transposed)
        expected, actual = change.shape(transposed), tuple(weight.tensor.shape)
        if expected != actual:
            raise ArtifactError(
                f"merge_lora: the adapter's change of {name} is for shape {expected}, the model's is {actual}",
                hint="use the base model that the adapter was trained on",
            )
        return Match(node, {"weight": weight, "name": name, "change": change, "transposed": transposed})

    def rewrite(self, program: Program, match: Match) -> None:
        if not self.options.named:
            attached_lora.rewrite(program, match)
            return
        weight, name, change = match.nodes["weight"], match.nodes["name"], match.nodes["change"]
        compute = partial(fold, transposed=match.nodes["transposed"])
        slot = Slot.shared((*self.key, name), lambda: change.tensors)
        merged = program.derive(f"merge_lora:{name}", [weight.node], compute, slot=slot)
        match.anchor.replace_input_with(weight.node, merged)


def _name_at(weight: Weight, node: Node, linear: Linear | None) -> str:
    """Return the name of the parameter at this use; a tied weight has the name of the module that reads it there."""
    path = next((path for path, _ in reversed(list(node.meta.get("nn_module_stack", {}).values()))), "")
    for name in weight.names:
        if f".{path}".endswith(f".{name.rpartition('.')[0]}"):
            return name
    return linear.name if linear is not None and linear.weight is weight.node and linear.name else weight.name


def _reads_transposed(weight: Node, node: Node) -> bool | None:
    """Whether `node` reads the weight as `[in, out]`; None if it is neither a matrix product nor an embedding look-up.

    A cast before the product is skipped.
    """
    if node.target in (aten.to.dtype, aten._to_copy.default, aten.detach.default, aten.alias.default):
        layouts = {_reads_transposed(node, user) for user in node.users}
        return layouts.pop() if len(layouts) == 1 else None
    if node.target is aten.linear.default:
        return False if node.args[1] is weight else None
    if node.target is aten.addmm.default:
        return True if node.args[2] is weight else None
    return True if node.target is aten.embedding.default else None


# -- around the pass ------------------------------------------------------------------------------------------------


def logit_difference(model: nn.Module, reference: nn.Module | Tensor, input_ids: Tensor, **inputs: Any) -> float:
    """Return the largest absolute difference between the logits of two models.

    Args:
        model: causal language model.
        reference: another model with the same vocabulary, or logits `[B, T, vocabulary size]` that were recorded before
            `model` was changed in place.
        input_ids: token ids `[B, T]`.
        inputs: further arguments of both calls, such as `attention_mask`.

    Raises:
        ModelError: the two logits have different shapes.
    """
    with torch.no_grad():
        ours = model(input_ids=input_ids, **inputs).logits
        theirs = reference if isinstance(reference, Tensor) else reference(input_ids=input_ids, **inputs).logits
    if ours.shape != theirs.shape:
        raise ModelError(f"logits {tuple(ours.shape)} can't be compared with logits {tuple(theirs.shape)}")
    return float((ours.float() - theirs.to(ours.device).float()).abs().max())


def swap(model: nn.Module, adapter: str | Path | Sequence[WeightedAdapter]) -> int:
    """Replace the adapter that the compiled graphs of `model` merge by another one, without recompiling.

    The merged weights are recomputed at the next call, with the tensors of the new adapter. A weight that the new
    adapter does not change returns to that of the base model. The replacement also affects other models in this process
    that were compiled with the same adapter.

    Args:
        model: original module or its compiled wrapper, which has been called with ``merge_lora: {adapter: ...}``.
        adapter: folder of the new adapter, or several adapters with weights.

    Returns:
        The number of merged weights that will be recomputed.

    Raises:
        ArtifactError: the new adapter changes a weight that the compiled graphs do not merge, or is of another kind
            (DoRA instead of LoRA). Nothing is changed in this case.
        ModelError: no compiled graph of this model merges a named adapter.
    """
    items = (WeightedAdapter(Path(adapter)),) if isinstance(adapter, str | Path) else tuple(adapter)
    plan = changes([(read_adapter(item.path), item.weight) for item in items])
    model = getattr(model, "_orig_mod", model)
    slots = {s.key[2]: s for s in slots_of(model) if isinstance(s.key, tuple) and s.key[0] == "merge_lora"}
    if not slots:
        raise ModelError(
            "no compiled graph of this model merges a named adapter",
            hint="compile with options={'passes': [{'merge_lora': {'adapter': ...}}]} and call the model once",
        )
    if unmerged := sorted(plan.keys() - slots.keys()):
        raise ArtifactError(
            f"the new adapter changes {unmerged[0]}, which the compiled model does not merge",
            hint="compile the model with an adapter that touches the same layers",
        )
    new = {name: _swapped(name, slot, plan.get(name)) for name, slot in slots.items()}
    for name, slot in slots.items():
        try:
            slot.check_fit(new[name])
        except ArtifactError as error:
            raise ArtifactError(f"{name}: {error.message}", hint=error.hint) from None
    for name, slot in slots.items():
        slot.swap(new[name])
    return len(slots)


def _swapped(name: str, slot: Slot, change: Change | None) -> dict[str, Tensor]:
    """Return the new tensors of `slot`; zeros if the new adapter has no update, which gives the base weight."""
    old = slot.tensors
    new = dict(change.tensors) if change is not None else {}
    if change is None and not old.keys() & {"value", "magnitude"}:
        new = {key: torch.zeros_like(tensor) for key, tensor in old.items()}
    if new.keys() != old.keys():
        raise ArtifactError(
            f"{name}: the compiled model merges {', '.join(sorted(old))}, the new adapter has"
            f" {', '.join(sorted(new)) or 'nothing'}",
            hint="compile again for an adapter of another kind",
        )
    return new
