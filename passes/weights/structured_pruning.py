"""`structured_pruning`: remove heads, channels and experts, the same number in every layer, or whole layers.

A KV group is a KV head together with the query heads that read it. Removing it removes its rows of `q_proj`, `k_proj`
and `v_proj` and its columns of `o_proj`; removing a channel removes its rows of `gate_proj` and `up_proj` and its
column of `down_proj`. The result is equivalent to setting these columns of `o_proj` and `down_proj` to zero; a removed
expert is one that the router never chooses. The pruned model is an ordinary smaller model with an ordinary config. The
units that remain are read from a keep-index artifact (:mod:`effpass.passes.weights.keep_indices`), which is learned
separately, for example by :mod:`effpass.trainers.pruning`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, ModelError, PassRefusedError
from effpass.core.pass_ import Match, Pass, WeightsPass
from effpass.core.program import Program
from effpass.core.report import Refusal
from effpass.passes.weights.composition import check_first
from effpass.passes.weights.dropped_layers import drop_layers
from effpass.passes.weights.keep_indices import Cut, KeepIndices, make_keep_artifact
from effpass.passes.weights.lora_fold import stores_transposed
from effpass.passes.weights.narrowing import Narrowing, NotNarrowableError
from effpass.passes.weights.prunable_models import check_heads, check_result, check_units, set_sizes
from effpass.passes.weights.prunable_units import Dimensions
from effpass.passes.weights.pruned_experts import check_experts, expert_layers, prune_experts
from effpass.passes.weights.quantized import scheme_of, tensor_scheme

__all__ = [
    "StructuredPruning",
    "StructuredPruningOptions",
    "check_cut",
    "cut_model",
    "make_keep_artifact",
    "save_pruned",
]


@dataclass(frozen=True)
class StructuredPruningOptions:
    """Options of `structured_pruning`.

    Attributes:
        artifact: folder of a keep-index artifact.
    """

    artifact: Path


class StructuredPruning(WeightsPass):
    """Slices the weights by a keep-index artifact."""

    name = "structured_pruning"
    exact = False
    changes = "sizes"
    needs_artifact = True
    Options = StructuredPruningOptions
    options: StructuredPruningOptions
    _behind: Sequence[Pass] = ()  # passes that follow this one in its recipe

    @cached_property
    def keep(self) -> KeepIndices:
        return KeepIndices.load(self.options.artifact)

    @property
    def artifact(self) -> Artifact:
        return self.keep.artifact

    # -- model stage ------------------------------------------------------------------------------------------------

    def check_beside(self, before: Sequence[Pass], behind: Sequence[Pass]) -> None:
        self._behind = behind

    def check_model(self, model: nn.Module) -> None:
        config = getattr(model, "config", None)
        if config is None or not hasattr(config, "get_text_config"):
            raise ModelError(f"{type(model).__name__} is no transformers model, whose config could tell its sizes")
        if Dimensions.of(config) == self.keep.after != self.keep.before:
            raise ModelError(
                "the model already has the sizes that structured_pruning would give it",
                hint="leave the pass out of the recipe for a model that is pruned",
            )
        self.artifact.check_model(model)
        learned = [pass_.name for pass_ in self._behind if pass_.artifact is not None]
        if learned and self.keep.layers:
            raise PassRefusedError(
                f"structured_pruning drops layers, and the artifact of {learned[0]} was learned for the model with all"
                f" {self.keep.before.num_hidden_layers} of them",
                hint=f"save the pruned model (effpass optimize), and learn the artifact of {learned[0]} for that one",
            )
        check_cut(model, self.keep)

    def prepare(self, model: nn.Module) -> tuple[int, list[Refusal]]:
        # The fingerprint is not checked again, because an earlier pass may have changed the weights.
        return cut_model(model, self.keep), []

    # -- graph stage ------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        if not self.keep.fits_graphs:
            families = ", ".join(self.keep.units) or "layers"
            raise PassRefusedError(
                f"structured_pruning can't cut {families} of this model in a graph",
                hint="call effpass.prepare(model, recipe) before torch.compile or export: it cuts the model itself",
            )
        check_first(program, self.keep.cuts([n for w in program.weights.values() for n in w.names]), self.name)
        linears = {str(linear.name): linear for linear in program.linears() if linear.name is not None}
        cuts = self.keep.cuts(list(linears))
        parameters = {name: weight.tensor for weight in program.weights.values() for name in weight.names}
        check_heads(self.keep.units, self.keep.before, parameters)
        if not cuts:
            yield Refusal("graph", "it reads no weight that the artifact prunes", "a submodule needs options['prefix']")
            return
        dims = {name: cut.dim(2, linears[name].transposed) for name, cut in cuts.items()}
        if all(parameters[n].shape[dims[n]] == len(cut.index) < cut.old_size for n, cut in cuts.items()):
            yield Refusal("graph", "its weights are pruned already", "leave the pass out for a pruned model")
            return
        for name, cut in cuts.items():
            _check_weight(name, parameters[name], cut, dims[name])
        matches = [Match(linears[n].node, {"linear": linears[n], "cut": cuts[n], "dim": dims[n]}) for n in cuts]
        try:
            narrowing = Narrowing(program, {match.anchor: match.nodes["cut"] for match in matches})
        except NotNarrowableError as error:
            raise PassRefusedError(
                f"structured_pruning can't narrow this graph: {error}",
                hint="call effpass.prepare(model, recipe) before torch.compile: it slices the model itself",
            ) from None
        waiting = list(matches)
        for match in matches:
            match.nodes.update(narrowing=narrowing, waiting=waiting)
            yield match

    def rewrite(self, program: Program, match: Match) -> None:
        linear, cut, dim = match.nodes["linear"], match.nodes["cut"], match.nodes["dim"]
        pruned = {linear.weight: self._pruned(program, linear.weight, cut, dim)}
        if linear.bias is not None and cut.out:
            pruned[linear.bias] = self._pruned(program, linear.bias, cut, 0)
        for old, new in pruned.items():
            linear.node.replace_input_with(old, new)
        match.nodes["waiting"].remove(match)
        if not match.nodes["waiting"]:  # the sizes between the linear layers change together
            match.nodes["narrowing"].apply()

    def _pruned(self, program: Program, node: torch.fx.Node, cut: Cut, dim: int) -> torch.fx.Node:
        def select(weight: Tensor, index: Tensor) -> Tensor:
            return weight.index_select(dim, index.to(weight.device))

        name = program.weights[node].name
        return program.derive(f"structured_pruning:{name}", [node], select, {"index": cut.index})


def _check_weight(name: str, weight: Tensor, cut: Cut, dim: int) -> None:
    if scheme := tensor_scheme(weight):
        raise PassRefusedError(f"{name} is quantized ({scheme})", hint="prune the unquantized model, then quantize it")
    if weight.shape[dim] != cut.old_size:
        raise ArtifactError(
            f"structured_pruning: {name} is {tuple(weight.shape)}, the artifact prunes dimension {dim} of size"
            f" {cut.old_size}",
            hint="use the model that the artifact was learned for",
        )


# -- cutting a model ------------------------------------------------------------------------------------------------


def check_cut(model: Any, keep: KeepIndices) -> dict[str, Cut]:
    """Check that `model` can be pruned, and return the pruning of each parameter of its linear layers.

    Raises:
        ModelError: the model has no such units or can't be pruned; the message names the part and the reason.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    cuts = keep.cuts(list(parameters))
    check_heads(keep.units, keep.before, parameters)
    check_units(model, keep)
    check_experts(model, keep)
    stacks = [f"{name}.experts.down_proj" for name in expert_layers(model, keep).values()]
    for name in [*cuts, *stacks]:
        module = model.get_submodule(name.rpartition(".")[0])
        if scheme := scheme_of(module) or tensor_scheme(parameters[name]):
            raise ModelError(f"{name} is quantized ({scheme})", hint="prune the unquantized model, then quantize it")
        if parameters[name].is_meta:
            raise ModelError(f"{name} is not in memory (offloaded)", hint="load the model without offloading")
    check_result(model, keep, cuts)
    return cuts


def cut_model(model: Any, keep: KeepIndices) -> int:
    """Prune the modules and the config of `model` in place. If a check fails, nothing is changed.

    Returns:
        The number of linear layers and mixtures of experts that were pruned, or of layers that were removed.

    Raises:
        ModelError: as :func:`check_cut`.
    """
    cuts = check_cut(model, keep)
    if keep.layers:
        return drop_layers(model, keep.layers)
    for name, cut in cuts.items():
        path, _, leaf = name.rpartition(".")
        module: Any = model.get_submodule(path)
        old = model.get_parameter(name)
        dim = cut.dim(old.dim(), stores_transposed(module))
        new = old.detach().index_select(dim, cut.index.to(old.device))
        setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
        if leaf == "weight":
            _set_features(module, new.shape)
    hits = sum(name.endswith(".weight") for name in cuts) + prune_experts(model, keep)
    set_sizes(model, keep)
    return hits


def _set_features(module: Any, shape: torch.Size) -> None:
    if stores_transposed(module):
        module.nx, module.nf = shape
    else:
        module.out_features, module.in_features = shape


def save_pruned(model: Any, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a pruned model as an ordinary checkpoint for `AutoModelForCausalLM.from_pretrained(folder)`.

    Args:
        model: transformers model after :meth:`StructuredPruning.prepare`.
        folder: folder to create, completely or not at all; it must not exist or must be empty.
        tokenizer: tokenizer to save in the same folder; None to save no tokenizer.

    Raises:
        ArtifactError: `folder` exists and is not an empty folder.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError(f"{folder}: is there already", hint="give a folder that does not exist")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new = Path(temporary, "new")
        model.save_pretrained(new)
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        new.replace(folder)
