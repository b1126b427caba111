"""Choice of MONA or AdamW for each parameter, read from the module tree.

MONA is for matrices between hidden activations. AdamW is used for everything else: embeddings, output heads, routers,
vectors (norms and biases) and depthwise convolutions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import Tensor, nn

from effpass.core.errors import ModelError, did_you_mean
from effpass.trainers.mona.layout import Layout

__all__ = ["Choice", "Override", "choose", "choose_named", "output_heads", "routers"]

ADAMW, MONA = "adamw", "mona"
# Value of an override: the name of an algorithm, or a layout for MONA.
Override = str | Layout

_HEADS = ("lm_head", "score", "classifier", "embed_out", "unembed")
_EMBEDDINGS = ("embed", "embedding", "embeddings", "wte", "wpe", "embed_tokens")
_ROUTERS = ("gate", "router")


@dataclass(frozen=True)
class Choice:
    """Algorithm and layout of a parameter, and the reason for the choice."""

    name: str
    parameter: Tensor
    algorithm: str
    layout: Layout
    reason: str


def choose(model: nn.Module, overrides: Mapping[str, Override] | None = None) -> list[Choice]:
    """Return a choice for each parameter of `model` that requires a gradient; a tied parameter has one choice.

    Args:
        model: model whose parameters are optimized.
        overrides: ``"mona"``, ``"adamw"`` or a :class:`Layout` for parameters whose names match a pattern (``*`` and
            ``?``); the first matching pattern is used.

    Raises:
        ModelError: if an override matches no parameter or has another value, or if a layout does not fit its parameter.
    """
    owners = {
        f"{path}.{name}" if path else name: (path, module)
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    heads, choosing = output_heads(model), routers(model)
    found = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path, module = owners[name]
        algorithm, layout, reason = _by_module(parameter, path, module, name, heads, choosing, model)
        found.append(Choice(name, parameter, algorithm, layout, reason))
    return _overridden(found, overrides or {})


def choose_named(named: Iterable[tuple[str, Tensor]], overrides: Mapping[str, Override] | None = None) -> list[Choice]:
    """Return choices as :func:`choose` does, for parameters of which only names are known.

    Heads, embeddings and routers are recognized by name, and parameters with three dimensions are stacks of experts.
    """
    found = []
    for name, parameter in named:
        words = name.split(".")
        if any(word in _HEADS for word in words):
            choice = (ADAMW, Layout(), "output head, by its name")
        elif any(word in _EMBEDDINGS for word in words):
            choice = (ADAMW, Layout(), "embedding, by its name")
        elif any(word in _ROUTERS for word in words):
            choice = (ADAMW, Layout(), "router, by its name")
        else:
            choice = _by_shape(parameter)
        found.append(Choice(name, parameter, *choice))
    return _overridden(found, overrides or {})


def _by_shape(parameter: Tensor) -> tuple[str, Layout, str]:
    if parameter.ndim < 2:
        return ADAMW, Layout(), "vector"
    if parameter.ndim == 2 and min(parameter.shape) == 1:
        return ADAMW, Layout(), "vector in two dimensions"
    if parameter.ndim > 3:
        return MONA, Layout(convolution=True), "convolution, flattened"
    return MONA, Layout(), "matrix" if parameter.ndim == 2 else "stack of matrices"


def _by_module(
    parameter: Tensor,
    path: str,
    module: nn.Module,
    name: str,
    heads: set[int],
    choosing: set[str],
    model: nn.Module,
) -> tuple[str, Layout, str]:
    kind = type(module).__name__
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or (kind.endswith("Embedding") and parameter.ndim == 2):
        return ADAMW, Layout(), "embedding"
    if id(parameter) in heads:
        return ADAMW, Layout(), "output head"
    if path in choosing and parameter.ndim == 2:
        return ADAMW, Layout(), "router"
    algorithm, layout, reason = _by_shape(parameter)
    if algorithm == ADAMW:
        return algorithm, layout, reason
    if isinstance(module, nn.modules.conv._ConvNd):
        if parameter.shape[1] == 1 or module.transposed:
            return ADAMW, Layout(), "depthwise convolution" if parameter.shape[1] == 1 else "transposed convolution"
        return MONA, Layout(convolution=True), "convolution, flattened"
    if isinstance(module, nn.MultiheadAttention) and name.endswith("in_proj_weight"):
        return MONA, Layout(split=(module.embed_dim,) * 3), "q, k, v apart"
    split = _fused(parameter, path.rpartition(".")[2], kind, getattr(model, "config", None))
    if split is not None:
        return MONA, split, f"{len(split.split)} fused projections apart"
    return algorithm, layout, reason


def _fused(parameter: Tensor, leaf: str, kind: str, config: object) -> Layout | None:
    """Return the layout of a fused projection if the model's config confirms the sizes of its parts; otherwise None."""
    dim = 1 if kind == "Conv1D" else 0  # GPT-2's Conv1D stores [input, output]
    if parameter.ndim != 2 or config is None:
        return None
    width = parameter.shape[dim]
    sizes: tuple[int, ...] = ()
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if leaf in ("qkv_proj", "c_attn") and heads and hidden:
        head = getattr(config, "head_dim", None) or hidden // heads
        shared = getattr(config, "num_key_value_heads", None) or heads
        sizes = (heads * head, shared * head, shared * head)
    elif leaf == "gate_up_proj":
        inner = getattr(config, "intermediate_size", None)
        sizes = (inner, inner) if isinstance(inner, int) else ()
    else:
        return None
    return Layout(split=sizes, dim=dim) if sum(sizes) == width else None


def output_heads(model: nn.Module) -> set[int]:
    """Return the ids of weights that compute logits.

    These are linear layers named like heads, and the output embeddings that the model reports. If it can't report any,
    they are linear layers outside of numbered layers whose weight has the shape of an embedding.
    """
    named = {p: m for p, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = {id(module.weight) for path, module in named.items() if path.rpartition(".")[2] in _HEADS}
    ask = getattr(model, "get_output_embeddings", None)
    if callable(ask):
        weight = getattr(ask(), "weight", None)
        return found | ({id(weight)} if weight is not None else set())
    sizes = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, nn.Embedding)}
    outside = [module for path, module in named.items() if not any(word.isdigit() for word in path.split("."))]
    return found | {id(module.weight) for module in outside if tuple(module.weight.shape) in sizes}


def routers(model: nn.Module) -> set[str]:
    """Return the paths of modules that choose experts: classes named so, and a `gate` or `router` beside `experts`."""
    found = set()
    for path, module in model.named_modules():
        if type(module).__name__.endswith(("Router", "TopkRouter", "TopKRouter")):
            found.add(path)
        if any(name == "experts" for name, _ in module.named_children()):
            found |= {f"{path}.{name}" if path else name for name in _ROUTERS if hasattr(module, name)}
    return found


def _overridden(choices: list[Choice], overrides: Mapping[str, Override]) -> list[Choice]:
    names = [choice.name for choice in choices]
    for pattern, value in overrides.items():
        if value not in (MONA, ADAMW) and not isinstance(value, Layout):
            raise ModelError(
                f"override {pattern!r} is {value!r}", hint='an override is "mona", "adamw" or a Layout(...)'
            )
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ModelError(f"override {pattern!r} fits no trainable parameter{did_you_mean(pattern, names)}")
    found = []
    for choice in choices:
        for pattern in [p for p in overrides if fnmatchcase(choice.name, p)][:1]:
            value = overrides[pattern]
            layout = value if isinstance(value, Layout) else choice.layout if value == MONA else Layout()
            algorithm = MONA if isinstance(value, Layout) else value
            choice = Choice(choice.name, choice.parameter, algorithm, layout, f"override {pattern!r}")
        found.append(choice)
    for choice in found:
        if choice.algorithm == MONA:
            choice.layout.parts(choice.parameter.shape, choice.name)
    return found
