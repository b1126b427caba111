"""Merging of adapters that PEFT has attached to a model, on the model or in a traced graph; used by `merge_lora`.

On the model, the adapters are folded into the base weights and PEFT's wrappers are replaced by ordinary modules. In a
graph, the forward pass of a wrapped layer

    base(x) + lora_B(lora_A(dropout(x))) * scaling

consists of three matrix products. They are replaced by one product with a merged weight, a derived weight (see
:meth:`effpass.core.program.Program.derive`) computed from W, A and B that follows later changes of all three.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from effpass.core.inline import inline
from effpass.core.model import inner_model
from effpass.core.pass_ import Match
from effpass.core.program import Linear, Program
from effpass.core.report import Refusal
from effpass.passes.weights.lora_fold import fold, record_untied, stores_transposed
from effpass.passes.weights.quantized import dequantize_linears, scheme_of, tensor_scheme

__all__ = ["KEPT", "attach", "find", "merge_attached", "rewrite", "tuner_layers"]

aten = torch.ops.aten

# LoraVariants of PEFT whose merged weight is computed as for plain LoRA.
_PLAIN_VARIANTS = ("MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant")
_DORA_VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant")
_ANNEALED = "AfaVariant"  # effpass.trainers.afa_lora: only a finished adapter is a product of two matrices
KEPT = "quantized ({}); the adapter stays beside it"


# -- on the model ---------------------------------------------------------------------------------------------------


def tuner_layers(model: nn.Module) -> dict[str, Any]:
    """Return the modules that PEFT has wrapped by name, without wrappers inside other wrappers."""
    if "peft" not in sys.modules:  # without PEFT, no adapter can be attached
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not inside:
            found[name] = module
    return found


def merge_attached(model: nn.Module, quantized: str) -> tuple[int, list[Refusal]]:
    """Merge the active adapters of `model` in place and remove PEFT's wrappers.

    Either all adapters are merged or none, except that ``quantized="keep"`` leaves those of quantized layers attached.

    Args:
        model: a PeftModel, or a transformers model with adapters added by `add_adapter`.
        quantized: treatment of quantized layers, see :class:`~effpass.passes.weights.merge_lora.MergeLoraOptions`.

    Returns:
        The number of modules merged, and a refusal for each adapter that prevents merging or stays attached.
    """
    layers = tuner_layers(model)
    refusals = [Refusal(name, *reason) for name, layer in layers.items() if (reason := _why_not(layer))]
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" in n] if model.training else []
    refusals += [Refusal(n, "the adapter is being trained", "call model.eval() first") for n in trained]
    schemes = {n: s for n, layer in layers.items() if (s := _base_scheme(layer)) is not None}
    if quantized == "refuse":
        way_out = "merge_lora: {quantized: keep} or {quantized: dequantize}"
        refusals += [Refusal(n, f"its weight is quantized ({s})", way_out) for n, s in schemes.items()]
    if refusals or not layers:
        return 0, refusals
    base = inner_model(model)
    kept: list[str] = []
    if schemes and quantized == "dequantize":
        dequantize_linears(base, getattr(base, "dtype", torch.float32))
    else:
        kept = list(schemes)
    keeps_ties = any(getattr(c, "ensure_weight_tying", False) for c in getattr(base, "peft_config", {}).values())
    tied: dict[int, list[nn.Parameter]] = {}
    merged = {n: _merged_module(layer, tied, keeps_ties) for n, layer in layers.items() if n not in kept}
    for name, module in merged.items():
        model.set_submodule(name, module)
    if not kept:
        base.__dict__.pop("peft_config", None)
        base.__dict__.pop("_hf_peft_config_loaded", None)
    record_untied(base)
    return len(merged), [Refusal(n, KEPT.format(schemes[n])) for n in kept]


def _base_scheme(layer: Any) -> str | None:
    return scheme_of(layer.get_base_layer()) if hasattr(layer, "get_base_layer") else None


def _why_not(layer: Any) -> tuple[str, str] | None:
    """Return the reason why the adapters of a wrapped module can't be merged, with a hint; None if they can."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    by_peft = "merge it with PEFT: model.merge_and_unload()"
    if layer.disable_adapters:
        return "its adapter is disabled", "enable it, or remove it with model.unload()"
    if ModulesToSaveWrapper in type(layer).__mro__:
        return None
    if LoraLayer not in type(layer).__mro__ or not hasattr(layer.get_base_layer(), "weight"):
        return (
            f"adapters of the kind {type(layer).__module__.split('.')[-2]}.{type(layer).__name__} are not merged here",
            by_peft,
        )
    if _base_scheme(layer) is None and type(layer).__name__ not in ("Linear", "Embedding"):
        return f"LoRA on a {type(layer.get_base_layer()).__name__} ({type(layer).__name__}) is not merged here", by_peft
    active = _active(layer)
    if layer.merged and set(layer.merged_adapters) != set(active):
        return "PEFT has merged other adapters into it than are active", "call model.unmerge_adapter() first"
    variants = {a: type(v).__name__ for a in active if (v := layer.lora_variant.get(a)) is not None}
    for variant in variants.values():
        if variant == _ANNEALED:
            return (
                "its activation is still annealed (AFA-LoRA), so that it is no product of two matrices",
                "train it to β = 0 and call AfaLora.finish()",
            )
        if variant not in (*_PLAIN_VARIANTS, *_DORA_VARIANTS):
            return f"the variant {variant} is not merged here", by_peft
        if variant in _DORA_VARIANTS and len(active) > 1:
            return "DoRA is active beside another adapter", "merge one adapter at a time: model.set_adapter(NAME)"
    base = layer.get_base_layer()
    if any(layer.lora_bias.get(a) for a in active) and getattr(base, "bias", None) is None:
        return "lora_bias was trained for a layer without a bias", "leave the adapter attached"
    if base.weight.is_meta:
        return "its weight is not in memory (offloaded)", "load the model without offloading"
    return None


def _active(layer: Any) -> list[str]:
    return [a for a in layer.active_adapters if a in layer.lora_A or a in layer.lora_embedding_A]


def _merged_module(layer: Any, tied: dict[int, list[nn.Parameter]], keeps_ties: bool) -> nn.Module:
    """Merge the adapters of a wrapped module and return the plain module.

    Args:
        layer: wrapper of the module.
        tied: id of an original weight → merged parameters computed from it. Modules that shared the original weight
            share the merged one if their merged weights are equal.
        keeps_ties: whether modules that share a weight also share one adapter.
    """
    if hasattr(layer, "modules_to_save"):
        active = layer.active_adapters
        return layer.modules_to_save[active[0]] if active else layer.original_module
    base = layer.get_base_layer()
    active = _active(layer)
    if layer.merged or not active:
        return base
    original, became = base.weight, tied.setdefault(id(base.weight), [])
    with torch.no_grad():
        value = fold(original.detach(), transposed=stores_transposed(base), **_update(layer, active))
        new = next((p for p in became if keeps_ties or torch.equal(p, value)), None)
        if new is None:
            new = nn.Parameter(value, requires_grad=original.requires_grad)
            became.append(new)
        base.weight = new
        biases = [layer.lora_B[a].bias.float() * layer.scaling[a] for a in active if layer.lora_bias.get(a)]
        if biases:
            base.bias = nn.Parameter(fold(base.bias.detach(), add=torch.stack(biases).sum(0)), base.bias.requires_grad)
    return base


def _update(layer: Any, active: list[str]) -> dict[str, Tensor]:
    """Return the keyword arguments of :func:`fold` that merge the active adapters of a layer."""
    pairs = []
    for name in active:
        embedding = name in layer.lora_embedding_A
        a = layer.lora_embedding_A[name] if embedding else layer.lora_A[name].weight
        b = layer.lora_embedding_B[name] if embedding else layer.lora_B[name].weight
        pairs.append((a.detach().float(), b.detach().float() * layer.scaling[name]))
    tensors = {"a": torch.cat([a for a, _ in pairs]), "b": torch.cat([b for _, b in pairs], dim=1)}
    if type(layer.lora_variant.get(active[0])).__name__ in _DORA_VARIANTS:
        tensors["magnitude"] = layer.lora_magnitude_vector[active[0]].weight.detach()
    return tensors


def attach(model: nn.Module, updates: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Attach low-rank updates with PEFT to layers whose weight must not be changed.

    Args:
        model: model whose layers are wrapped in place.
        updates: module name → factors `a` `[r, in]` and `b` `[out, r]` of the update, with the scale included in `b`.
    """
    if not updates:
        return
    from peft import LoraConfig, inject_adapter_in_model

    trainable = [p for p in model.parameters() if p.requires_grad]
    ranks = {name: u["a"].shape[0] for name, u in updates.items()}
    config = LoraConfig(
        r=max(ranks.values()),
        target_modules=list(updates),
        rank_pattern=ranks,
        alpha_pattern=ranks,
        inference_mode=True,
    )
    inject_adapter_in_model(config, model, adapter_name="effpass")
    for parameter in trainable:
        parameter.requires_grad_(True)
    for name, update in updates.items():
        layer: Any = model.get_submodule(name)
        for factor, tensor in ((layer.lora_A, update["a"]), (layer.lora_B, update["b"])):
            device = factor["effpass"].weight.device  # but not the dtype: PEFT creates it in float8 for a float8 layer
            factor["effpass"].weight = nn.Parameter(tensor.to(device, copy=True), requires_grad=False)


# -- in a graph -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Branch:
    """Nodes of one adapter, ``linear(linear(dropout(x), A), B, bias) * scale``.

    Attributes:
        x: input of the adapter, after dropout.
        a: matrix A.
        b: matrix B.
        bias: bias of B; None if there is none.
        scale: scaling factor, a number or the node of a SymFloat.
        dropout: whether a dropout before A is active.
    """

    x: Node
    a: Node
    b: Node
    bias: Node | None
    scale: Any
    dropout: bool


def find(program: Program) -> Iterator[Match | Refusal]:
    """Yield a match for each attached adapter in the graph, and a refusal for each that can't be merged there."""
    seen: set[Node] = set()
    for node in reversed(list(program.graph.nodes)):
        if node in seen or (chain := _chain(program, node)) is None:
            continue
        adds, base, linear, branches = chain
        seen.update(adds)
        for branch in branches:
            seen.update((branch.a, branch.b))
        reason = _why_not_in_graph(program, base, linear, branches)
        if reason is not None:
            yield Refusal(_layer_name(program, branches[0]), *reason)
        else:
            yield Match(node, {"base": base, "linear": linear, "branches": branches})
    bodies = {body.caller for body in program.bodies}  # the adapters that they read are found there
    for weight in program.weights.values():
        if all(user in bodies for user in weight.node.users):
            continue
        if (".lora_A." in weight.name or ".lora_embedding_A." in weight.name) and weight.node not in seen:
            yield Refusal(
                weight.name.partition(".lora_")[0],
                "it does not compute base(x) + B A x · s in this graph (an embedding, DoRA, another variant, a mixed"
                " batch or a graph break)",
                "effpass.prepare(model, recipe) merges it on the model",
            )


def rewrite(program: Program, match: Match) -> None:
    """Make the base layer read the merged weight, and replace the sum by the output of the base layer."""
    base, linear, branches = match.nodes["base"], match.nodes["linear"], match.nodes["branches"]
    scales = [_number(branch.scale) for branch in branches]
    name = _layer_name(program, branches[0])
    adapters = [n for branch in branches for n in (branch.a, branch.b)]

    def merged(weight: Tensor, *ab: Tensor, scales: Tensor) -> Tensor:
        b = torch.cat([t.float() * s for t, s in zip(ab[1::2], scales, strict=True)], dim=1)
        return fold(weight, transposed=linear.transposed, a=torch.cat([t.float() for t in ab[::2]]), b=b)

    weight = program.derive(
        f"merge_lora:{name}.weight", [linear.weight, *adapters], merged, {"scales": torch.tensor(scales)}
    )
    biases = [(b.bias, s) for b, s in zip(branches, scales, strict=True) if b.bias is not None]
    if biases:

        def merged_bias(bias: Tensor, *more: Tensor, scales: Tensor) -> Tensor:
            return fold(bias, add=torch.stack([t.float() * s for t, s in zip(more, scales, strict=True)]).sum(0))

        constants = {"scales": torch.tensor([s for _, s in biases])}
        bias = program.derive(f"merge_lora:{name}.bias", [linear.bias, *(b for b, _ in biases)], merged_bias, constants)
        linear.node.replace_input_with(linear.bias, bias)
    linear.node.replace_input_with(linear.weight, weight)
    dtype = match.anchor.meta["val"].dtype
    if base.meta["val"].dtype != dtype:  # float32 adapters on a bfloat16 base
        with program.graph.inserting_before(match.anchor):
            base = inline(program, lambda t: t.to(dtype), [base])
    match.anchor.replace_all_uses_with(base)


def _chain(program: Program, node: Node) -> tuple[list[Node], Node, Linear, list[Branch]] | None:
    """Match ``base(x) + branch + ...`` that ends in `node`: return the additions, base output, product and branches."""
    adds: list[Node] = []
    branches: list[Branch] = []
    while node.target is aten.add.Tensor and not node.kwargs and len(node.args) == 2:
        branch = _branch(program, node.args[1])
        if branch is None or (adds and len(node.users) != 1):
            break
        adds.append(node)
        branches.append(branch)
        node = node.args[0]  # type: ignore[assignment]
        if not isinstance(node, Node):
            return None
    if not adds:
        return None
    product = node
    while product.target in (aten.view.default, aten.reshape.default):  # Conv1D flattens the batch dimensions
        product = product.args[0]  # type: ignore[assignment]
    linear = program.linear_at(product)
    if linear is None or program.weight_of(linear.weight) is None:
        return None
    if any(_root(branch.x) is not _root(linear.x) for branch in branches):
        return None
    return adds, node, linear, branches[::-1]


def _branch(program: Program, node: Any) -> Branch | None:
    if not (isinstance(node, Node) and node.target is aten.mul.Tensor and not node.kwargs):
        return None
    up, scale = node.args
    if not (isinstance(up, Node) and up.target is aten.linear.default):
        return None
    if isinstance(scale, Node) and isinstance(scale.meta.get("val"), Tensor):
        return None
    down = up.args[0]
    if not (isinstance(down, Node) and down.target is aten.linear.default and len(down.args) == 2):
        return None
    a, b = down.args[1], up.args[1]
    bias = up.args[2] if len(up.args) > 2 else None
    if any(program.weight_of(n) is None for n in (a, b, *([bias] if bias is not None else []))):
        return None
    x = down.args[0]
    dropout = False
    for step in _steps(x):
        dropout = dropout or (step.target is aten.dropout.default and step.args[2] is True)
    return Branch(x, a, b, bias, scale, dropout)  # type: ignore[arg-type]


def _why_not_in_graph(program: Program, base: Node, linear: Linear, branches: list[Branch]) -> tuple[str, str] | None:
    by_model = "effpass.prepare(model, recipe) merges it on the model"
    weights = [linear.weight, *(n for b in branches for n in (b.a, b.b, b.bias) if n is not None)]
    if linear.bias is None and any(b.bias is not None for b in branches):
        return "lora_bias was trained for a layer without a bias", "leave the adapter attached"
    if scheme := tensor_scheme(program.weights[linear.weight].tensor):
        return KEPT.format(scheme), "merge_lora: {quantized: dequantize} with effpass.prepare"
    if any(branch.dropout for branch in branches):
        return "the adapter is being trained: its dropout is active", "call model.eval()"
    if program.grad_enabled and any(program.weights[n].tensor.requires_grad for n in weights):
        return (
            "the adapter is being trained (a weight requires grad)",
            "run under torch.no_grad(), or freeze the adapter",
        )
    if program.home_of(weights) == "graph":
        return (
            "its merged weight would be computed at every call (DTensor, inference tensors or a process group)",
            by_model,
        )
    if len(base.users) > 1 or len(linear.node.users) > 1:
        return "the base layer's value is read elsewhere as well", by_model
    return None


def _steps(node: Any) -> Iterator[Node]:
    """Yield `node` and its predecessors through casts, reshapes and dropout, up to the node that computes the value."""
    while isinstance(node, Node):
        yield node
        keeps = node.target in (aten.to.dtype, aten._to_copy.default, aten.alias.default, aten.detach.default)
        keeps = keeps or node.target in (aten.view.default, aten.reshape.default, aten.contiguous.default)
        if not (keeps or (node.target is aten.dropout.default)):
            return
        node = node.args[0]


def _root(node: Any) -> Node:
    return list(_steps(node))[-1]


def _number(scale: Any) -> float:
    """Return the scaling as a number. With ``dynamic=True`` it is a SymFloat; reading it makes Dynamo guard on it."""
    return float(scale.meta["val"] if isinstance(scale, Node) else scale)


def _layer_name(program: Program, branch: Branch) -> str:
    return program.weights[branch.a].name.partition(".lora_A")[0]
