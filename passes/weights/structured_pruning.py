"""`structured_pruning`: drop whole key-value groups and feed-forward channels, alike in every layer.

A group is one key-value head with the query heads that read it; its rows of `q_proj`, `k_proj`, `v_proj` and its
columns of `o_proj` go. A channel's rows of `gate_proj`, `up_proj` and its column of `down_proj` go. Dropping units is
the same function as setting their columns of `o_proj` and `down_proj` to zero, and what is left is an ordinary, smaller
model with an ordinary config. Which units stay is learned elsewhere and read from an artifact
(:mod:`effpass.passes.weights.keep_indices`); LLM-Pruner (https://arxiv.org/abs/2305.11627) and MaskPrune
(https://arxiv.org/abs/2502.14008) are two ways to learn it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, ModelError, PassRefusedError
from effpass.core.pass_ import Match, WeightsPass
from effpass.core.program import Program
from effpass.core.report import Refusal
from effpass.passes.weights.composition import check_first
from effpass.passes.weights.keep_indices import Cut, Dimensions, KeepIndices, make_keep_artifact
from effpass.passes.weights.lora_fold import stores_transposed
from effpass.passes.weights.narrowing import Narrowing, NotNarrowableError
from effpass.passes.weights.quantized import scheme_of, tensor_scheme

__all__ = ["StructuredPruning", "StructuredPruningOptions", "make_keep_artifact", "save_pruned"]


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
    needs_artifact = True
    Options = StructuredPruningOptions
    options: StructuredPruningOptions

    @cached_property
    def keep(self) -> KeepIndices:
        return KeepIndices.load(self.options.artifact)

    @property
    def artifact(self) -> Artifact:
        return self.keep.artifact

    # -- first hand -------------------------------------------------------------------------------------------------

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
        self._cuts(model)

    def _cuts(self, model: nn.Module) -> dict[str, Cut]:
        """The parameters to cut, all of them.

        Raises:
            ModelError: the architecture has no such units, or can't be cut; says which and why.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        cuts = self.keep.cuts(list(parameters))
        _check_architecture(self.keep, cuts, parameters)
        for name in cuts:
            module = model.get_submodule(name.rpartition(".")[0])
            if scheme := scheme_of(module):
                raise ModelError(
                    f"{name} is quantised ({scheme})", hint="prune the unquantised model, then quantise it"
                )
            if model.get_parameter(name).is_meta:
                raise ModelError(f"{name} is not in memory (offloaded)", hint="load the model without offloading")
        _check_result(model, self.keep, cuts)
        return cuts

    def prepare(self, model: nn.Module) -> tuple[int, list[Refusal]]:
        """Slice modules and config in place; hits are linear layers."""
        cuts = self._cuts(model)  # not the fingerprint: a pass before this one may have changed the weights
        for name, cut in cuts.items():
            path, _, leaf = name.rpartition(".")
            module: Any = model.get_submodule(path)
            old = model.get_parameter(name)
            dim = cut.dim(old.dim(), stores_transposed(module))
            new = old.detach().index_select(dim, cut.index.to(old.device))
            setattr(module, leaf, nn.Parameter(new, requires_grad=old.requires_grad))
            if leaf == "weight":
                _set_features(module, new.shape)
        _set_sizes(model, self.keep)
        return sum(name.endswith(".weight") for name in cuts), []

    # -- second hand ------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        check_first(program, self.keep.cuts([n for w in program.weights.values() for n in w.names]), self.name)
        linears = {str(linear.name): linear for linear in program.linears() if linear.name is not None}
        cuts = self.keep.cuts(list(linears))
        parameters = {name: weight.tensor for weight in program.weights.values() for name in weight.names}
        _check_architecture(self.keep, cuts, parameters, whole=False)
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
        if not match.nodes["waiting"]:  # the sizes between the products change together
            match.nodes["narrowing"].apply()

    def _pruned(self, program: Program, node: torch.fx.Node, cut: Cut, dim: int) -> torch.fx.Node:
        def select(weight: Tensor, index: Tensor) -> Tensor:
            return weight.index_select(dim, index.to(weight.device))

        name = program.weights[node].name
        return program.derive(f"structured_pruning:{name}", [node], select, {"index": cut.index})


def _check_weight(name: str, weight: Tensor, cut: Cut, dim: int) -> None:
    if scheme := tensor_scheme(weight):
        raise PassRefusedError(f"{name} is quantised ({scheme})", hint="prune the unquantised model, then quantise it")
    if weight.shape[dim] != cut.old_size:
        raise ArtifactError(
            f"structured_pruning: {name} is {tuple(weight.shape)}, the artifact prunes dimension {dim} of size"
            f" {cut.old_size}",
            hint="use the model that the artifact was learned for",
        )


# -- what can be pruned ---------------------------------------------------------------------------------------------


def _check_architecture(
    keep: KeepIndices, cuts: dict[str, Cut], parameters: dict[str, Any], whole: bool = True
) -> None:
    """Raise :class:`ModelError` where an architecture has no such units, with the reason.

    Args:
        keep: what is to be pruned.
        cuts: what was found of it.
        parameters: all parameters, by name.
        whole: `parameters` are those of the whole model, not of one graph of it.
    """
    ends = {name.rpartition("layers.")[2].partition(".")[2] for name in parameters}
    if keep.kv_groups:
        if any(".attn.c_attn." in name for name in parameters):
            raise ModelError(
                "key-value groups of GPT-2 can't be pruned: its head size is width / heads, so a config with fewer"
                " heads describes another model",
                hint="prune ffn_channels only",
            )
        if any("kv_b_proj" in name for name in parameters):
            raise ModelError(
                "a model with latent attention (MLA) has no key-value groups: all heads share one compressed key-value",
                hint="prune ffn_channels only",
            )
        for end in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
            name = next((n for n in parameters if n.endswith(end)), None)
            if name is not None and parameters[name].shape[0] != keep.before.head_dim:
                raise ModelError(
                    f"{name} normalises over all heads together, so that dropping a head changes every other one",
                    hint="prune ffn_channels only",
                )
    if keep.ffn_channels and any(end.startswith("mlp.experts.") or end.startswith("mlp.gate.") for end in ends):
        raise ModelError(
            "ffn_channels are those of one dense feed-forward block, and this model has experts",
            hint="prune kv_groups only",
        )
    if not whole:
        return
    for family, indices, output in (
        ("kv_groups", keep.kv_groups, ("o_proj",)),
        ("ffn_channels", keep.ffn_channels, ("down_proj", "mlp.c_proj")),
    ):
        there = {c.axis[0].units for n, c in cuts.items() if not c.out and n.removesuffix(".weight").endswith(output)}
        for layer in range(len(indices)):
            if f"layers.{layer}.{family}" not in there:
                raise ModelError(f"layer {layer} has no {' or '.join(output)} whose inputs are {family}")


def _check_result(model: nn.Module, keep: KeepIndices, cuts: dict[str, Cut]) -> None:
    """Build the pruned architecture from its config, without memory, and compare every shape with the sliced one's."""
    smaller: Any = copy.deepcopy(model.config)
    try:
        _write_sizes(smaller, keep.after)
        smaller = type(smaller).from_dict(smaller.to_dict())
        with torch.device("meta"):
            expected: nn.Module = type(model)(smaller)
    except Exception as error:  # whatever a model class does not accept
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(
            f"{type(model).__name__} accepts no config of {keep.after.num_attention_heads} query heads,"
            f" {keep.after.num_key_value_heads} key-value heads and {keep.after.intermediate_size} feed-forward"
            f" channels: {reason}",
            hint="keep another number of groups",
        ) from error
    shapes = {n: tuple(p.shape) for n, p in expected.named_parameters(remove_duplicate=False)}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = list(parameter.shape)
        if name in cuts:
            module = model.get_submodule(name.rpartition(".")[0])
            dim = cuts[name].dim(parameter.dim(), stores_transposed(module))
            shape[dim] = len(cuts[name].index)
        if shapes.get(name) != tuple(shape):
            raise ModelError(
                f"{type(model).__name__} with the pruned sizes has {name} of shape {shapes.get(name)}, slicing gives"
                f" {tuple(shape)}: this architecture uses the pruned sizes in another way",
                hint="report the architecture",
            )


# -- sizes ----------------------------------------------------------------------------------------------------------


def _write_sizes(config: Any, after: Dimensions) -> None:
    """Set the sizes in a transformers config, by the names that it uses."""
    config = config.get_text_config()
    before = Dimensions.of(config)
    fewer_heads = after.num_attention_heads < before.num_attention_heads
    for name, size in asdict(after).items():
        # The size of a head stays and must then be said: by default it follows from the number of heads.
        if size != getattr(before, name) or (name == "head_dim" and fewer_heads):
            own = "n_inner" if name == "intermediate_size" and hasattr(config, "n_inner") else name
            setattr(config, own, size)


def _set_sizes(model: Any, keep: KeepIndices) -> None:
    """The config of the model (one object, shared by its modules) and the sizes that modules keep for themselves."""
    _write_sizes(model.config, keep.after)
    before, after = asdict(keep.before), asdict(keep.after)
    names = {
        "num_heads": "num_attention_heads",
        "num_attention_heads": "num_attention_heads",
        "num_key_value_heads": "num_key_value_heads",
        "intermediate_size": "intermediate_size",
    }
    for path, module in model.named_modules():
        if not path.endswith(("self_attn", "mlp", "attn")):
            continue
        for attribute, size in names.items():
            if module.__dict__.get(attribute) == before[size]:
                setattr(module, attribute, after[size])


def _set_features(module: Any, shape: torch.Size) -> None:
    if stores_transposed(module):
        module.nx, module.nf = shape
    else:
        module.out_features, module.in_features = shape


def save_pruned(model: Any, folder: str | Path, tokenizer: Any = None) -> None:
    """Write a pruned model as an ordinary checkpoint that `AutoModelForCausalLM.from_pretrained(folder)` loads.

    Args:
        model: a transformers model, after :meth:`StructuredPruning.prepare`.
        folder: a folder that is not there yet; written whole or not at all.
        tokenizer: saved beside it.

    Raises:
        ArtifactError: `folder` exists.
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
