"""Trainable block-sparse attention in a transformers model, installed through its attention interface.

    routed = install(model, block=256, budget=4096)
    routed.budgets = torch.tensor(...)  # int32 [layers]: a new budget of each layer, from the next forward pass on

Each token attends to the blocks of keys that a router chooses for it, up to a *budget* of keys
(:mod:`effpass.lowering.ops.routed_attention`). Every forward pass determines the boundaries of its sequences once, and
keeps the budgets that were set when it began, so that the recomputation of gradient checkpointing attends to the same
keys even if budgets were changed since. Changing budgets triggers no recompilation. A micro-batch may be distributed
over several ranks, see :mod:`effpass.runtime.context_parallel`.

Shapes: B batch, T tokens per sequence, H query heads, G KV heads, K key size, V value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from effpass.core.errors import EffpassError, ModelError
from effpass.core.model import inner_model
from effpass.lowering.ops.routed_attention import trainable_sparse_attention
from effpass.lowering.ops.routed_blocks import check_block, check_budget
from effpass.lowering.ops.routed_coverage import coverage_curve
from effpass.runtime.cache import full_layers
from effpass.runtime.context_parallel import Context, Spread, check_groups, spread
from effpass.runtime.document_starts import document_starts

__all__ = ["NAME", "RoutedModel", "ends_of", "install", "routed_attention", "routed_layers"]

NAME = "effpass_routed"
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "head_mask")


class RoutedModel:
    """A model whose full-attention layers attend to blocks of keys that each token chooses; see :func:`install`.

    Attributes:
        layers: number of layers that attend sparsely.
        block: number of keys per block.
        max_budget: largest allowed budget in keys.
        budgets: int32 [layers] on the model's device, number of keys that a token attends to in each layer. Assign a
            new tensor to change them; a tensor that a forward pass has used must not be written before its backward
            pass.
        coverage: float32 [layers], fraction of the router's softmax on the blocks that the last forward pass attended
            to; with context parallelism over this rank's heads only.
        curves: float32 [layers, M], coverage at the M budgets given to :meth:`watch`, over all heads; None if no
            budgets are watched.
    """

    def __init__(self, model: Any, numbers: list[int], block: int, budget: int, max_budget: int) -> None:
        self._model, self._place = model, {number: place for place, number in enumerate(numbers)}
        self.layers, self.block, self.max_budget = len(numbers), block, max_budget
        device = next(model.parameters()).device
        self.budgets = torch.full((self.layers,), budget, dtype=torch.int32, device=device)
        # Written in place, because a new tensor would make a compiled model recompile.
        self.coverage = torch.zeros(self.layers, device=device)
        self.curves: Tensor | None = None
        self._watched: Tensor | None = None
        text = model.config.get_text_config(decoder=True)
        # Only the language model is changed; a vision tower keeps its attention implementation.
        self._part = next((n for n in model.config.sub_configs if getattr(model.config, n) is text), None)
        self._before = text._attn_implementation
        self._set(NAME)
        self._hook = model.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _set(self, implementation: str) -> None:
        self._model.set_attn_implementation(implementation if self._part is None else {self._part: implementation})

    def undo(self) -> None:
        """Restore the model's previous attention implementation."""
        self._hook.remove()
        self._set(self._before)

    def watch(self, budgets: Tensor | None) -> None:
        """Measure in :attr:`curves` the coverage at other budgets, from the next forward pass on.

        Args:
            budgets: int32 [M], budgets to measure; None to stop measuring.
        """
        self._watched = None if budgets is None else budgets.to(self.coverage.device)
        self.curves = None if budgets is None else self.coverage.new_zeros((self.layers, len(budgets)))

    def _begin(self, model: Any, positional: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        context: Context | None = kwargs.get("effpass_context")
        if context is None and model.config.get_text_config(decoder=True)._attn_implementation != NAME:
            return None  # the decode engine has selected its own attention
        if self.budgets.shape != (self.layers,) or self.budgets.dtype not in (torch.int32, torch.int64):
            raise EffpassError(
                f"sparse attention: budgets are {self.budgets.dtype} {tuple(self.budgets.shape)}",
                hint=f"int32 [{self.layers}], the budget of each layer that attends sparsely",
            )
        inputs = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        if inputs is None:
            inputs = positional[0]
        ranks: Spread | None = None
        ends: Tensor | None
        if context is not None:
            self._check_split(model)
            ranks, ends = spread(context, inputs, kwargs)
            kwargs = {name: value for name, value in kwargs.items() if name != "effpass_context"}
        else:
            ends = kwargs.get("cu_seq_lens_q")
            if ends is None:
                _check_padding(kwargs.get("attention_mask"))
                ends = ends_of(kwargs.get("position_ids"), inputs.shape[0], inputs.shape[1], inputs.device)
        budgets = self.budgets.to(inputs.device)
        return positional, {**kwargs, "effpass_routed": (self, ends, budgets, ranks)}

    def _check_split(self, model: Any) -> None:
        """Raise a :class:`ModelError` if a layer needs all tokens of a sequence without this module's attention."""
        if (attends := model.config.get_text_config(decoder=True)._attn_implementation) != NAME:
            raise ModelError(
                f"context parallelism: the model attends by {attends!r} now, which sees this rank's tokens alone",
                hint="sparse attention that is installed spreads over ranks; to generate, call without effpass_context",
            )
        for number, what in full_layers(model.config)[1].items():
            raise ModelError(
                f"layer {number}: {what}, and context parallelism splits its sequences",
                hint="models whose attention layers all see every earlier token",
            )

    def attend(
        self, number: int, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, budgets: Tensor, scale: float | None,
        ranks: Spread | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the attention of a layer on sequences that are concatenated into T tokens.

        Args:
            number: index of the layer.
            q: [T, H, K], queries.
            k: [T, G, K], keys.
            v: [T, G, V], values.
            ends: int32 [N + 1], offsets of the N sequences, followed by the number of tokens on all ranks.
            budgets: int32 [layers], budgets of this forward pass.
            scale: factor on the scores; None for K^-½.
            ranks: exchange between ranks, of which each passes its own T tokens; None for a single rank.

        Returns:
            The output [T, H, V].
        """
        place = self._place[number]
        if ranks is not None:
            check_groups(k.shape[1], ranks.mesh.size())
            q, k, v = (ranks.to_heads(x) for x in (q, k, v))
        out, coverage = trainable_sparse_attention(
            q, k, v, ends, budgets[place], block=self.block, max_budget=self.max_budget, scale=scale
        )
        with torch.no_grad():
            self.coverage[place].copy_(coverage)
            if self._watched is not None and self.curves is not None:
                curve = coverage_curve(q, k, ends, self._watched, block=self.block, scale=scale)
                self.curves[place].copy_(curve if ranks is None else ranks.mean(curve))
        return out if ranks is None else ranks.to_tokens(out)


def install(model: Any, *, block: int = 256, budget: int = 4096, max_budget: int | None = None) -> RoutedModel:
    """Make the full-attention layers of a model attend sparsely, in training and in other calls without a cache.

    Args:
        model: a transformers model, or a PeftModel.
        block: number of keys per block.
        budget: initial number of keys that a token attends to, in every layer.
        max_budget: largest budget that will be assigned later, which determines the size of buffers; None for `budget`.

    Returns:
        An object to change budgets, read statistics and undo the change with.

    Raises:
        ModelError: if the model's attention uses a feature that sparse attention does not support.
        EffpassError: if the block size is not supported, or the budget is above `max_budget` or below the keys of the
            blocks that are always chosen.
    """
    most = budget if max_budget is None else max_budget
    check_block("sparse attention", block)
    check_budget(budget, block, most)
    runs = inner_model(model)
    numbers = routed_layers(runs)
    AttentionInterface.register(NAME, routed_attention)
    return RoutedModel(runs, numbers, block, budget, most)


def routed_layers(model: Any) -> list[int]:
    """Return the indices of the layers that :func:`install` would change; raises the same :class:`ModelError`."""
    name = type(model).__name__
    if not hasattr(model, "_can_set_attn_implementation") or not model._can_set_attn_implementation():
        raise ModelError(f"{name} does not attend through transformers' AttentionInterface")
    for path, module in model.named_modules():
        if isinstance(getattr(module, "sinks", None), torch.nn.Parameter):
            raise ModelError(f"{path} attends to sinks of its own, which sparse attention lacks")
    full, others = full_layers(model.config)
    windows = [f"layer {number}: {what}" for number, what in others.items() if "positions only" in what]
    if windows or not full:
        raise ModelError(
            f"{name} has layers that sparse attention would change: {'; '.join(windows[:2]) or 'none attends to all'}",
            hint="models whose attention layers all see every earlier token",
        )
    return full


def routed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    effpass_routed: tuple[RoutedModel, Tensor, Tensor, Spread | None] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend sparsely; the attention implementation that a model's attention layers call.

    Args:
        module: the attention layer, whose `layer_idx` is the index of the layer.
        query: [B, H, T, K], queries.
        key: [B, G, T, K], keys.
        value: [B, G, T, V], values.
        attention_mask: must be None.
        scaling: factor on the scores; None for K^-½.
        dropout: must be 0.
        effpass_routed: the model's :class:`RoutedModel`; offsets of the N sequences in the B · T tokens, followed by
            B · T, int32 [N + 1]; the budgets of this forward pass; and the exchange between the ranks that share its
            tokens, None for a single rank. The forward pre-hook of the model adds this argument.

    Returns:
        The output [B, T, H, V], and None in place of the attention weights that transformers allows for.

    Raises:
        ModelError: if the layer uses a feature that sparse attention does not support, or reads a cache.
    """
    name = type(module).__name__
    if effpass_routed is None:
        raise ModelError(
            f"{name} was called without what the model's forward pass passes on",
            hint="call the model that effpass.runtime.routed_attention.install was given, not a part of it",
        )
    unknown = [what for what in _UNKNOWN if kwargs.get(what) is not None]
    if attention_mask is not None or unknown or dropout:
        what = f"dropout of {dropout}" if dropout else unknown[0] if unknown else "an attention mask of its own"
        raise ModelError(f"{name} passes {what} to attention, which sparse attention lacks")
    batch, _, tokens, _ = query.shape
    if key.shape[2] != tokens:
        raise ModelError(
            f"{name} attends to a cache of {key.shape[2]} keys with {tokens} queries",
            hint="sparse attention trains and reads whole sequences; to generate, call undo() first",
        )
    routed, ends, budgets, ranks = effpass_routed
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = routed.attend(module.layer_idx, q, k, v, ends, budgets, scaling, ranks)
    return out.unflatten(0, (batch, tokens)), None


def ends_of(position_ids: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    """Return the offsets of the N sequences in a flattened batch, followed by B · T: int32 [N + 1].

    A sequence begins at the start of each row, and where positions don't go up by one. The call synchronizes with the
    device if there are positions; a data collator can avoid this by passing `cu_seq_lens_q` to the model.

    Args:
        position_ids: [B, T] or [1, T]; None or another shape for one sequence per row.
        batch: number of rows B.
        tokens: number of tokens T per row.
        device: device of the result.
    """
    if position_ids is None or position_ids.dim() != 2:
        return torch.arange(0, batch * tokens + 1, tokens, dtype=torch.int32, device=device)
    is_first = document_starts(position_ids).expand(batch, tokens)
    starts = is_first.flatten().nonzero()[:, 0].to(torch.int32)
    return torch.nn.functional.pad(starts, (0, 1), value=batch * tokens)


def _check_padding(attention_mask: Any) -> None:
    """Raise an :class:`EffpassError` for padding before tokens; causal tokens do not attend to padding after them."""
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        what = tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise EffpassError(
            f"sparse attention: attention_mask is {what}", hint="[B, T] with padding behind each row, or none at all"
        )
    if bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise EffpassError(
            "sparse attention: attention_mask has padding in front of tokens",
            hint="pad on the right, or pack sequences in one row with position_ids that begin at 0",
        )
