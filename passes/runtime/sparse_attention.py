"""`sparse_attention`: attention over long contexts that reads only the keys it selects.

* Decoding: a step selects blocks of keys, then tokens inside these blocks, and computes exact attention over the
  selected tokens (:mod:`effpass.lowering.ops.two_level_attention`; AsyncTLS, https://arxiv.org/abs/2604.07815). This
  acts in the decode engine.
* Prompts, if enabled: each tile of queries attends to the blocks of keys that it selects
  (:mod:`effpass.lowering.ops.block_sparse_attention`). This acts in the engine and in programs.
* Training, if enabled, instead of both: each token attends to the blocks of keys that it selects, in the forward and
  the backward pass (:mod:`effpass.lowering.ops.routed_attention`; MoBA, https://arxiv.org/abs/2502.13189).

For decoding and prompts nothing is trained, and contexts that are too short to benefit are attended to densely.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from effpass.core.artifact import Artifact
from effpass.core.attention import Attention, attentions
from effpass.core.errors import ModelError, PassRefusedError
from effpass.core.model import inner_model
from effpass.core.pass_ import Match, Pass
from effpass.core.pattern import erase_unread
from effpass.core.program import Program
from effpass.core.report import Refusal
from effpass.core.roofline import ceilings, device_and_dtype
from effpass.lowering.ops import block_sparse_attention_causal  # noqa: F401  (registers the operator)
from effpass.lowering.ops.block_sparse_attention import BlockSelection
from effpass.lowering.ops.routed_blocks import check_block, check_budget
from effpass.lowering.ops.two_level_attention import KERNELS, has_kernels
from effpass.lowering.ops.two_level_attention_index import Selection
from effpass.passes.graph.few_rows import why_not_program
from effpass.passes.runtime.mla_absorption import absorb, latent_layers
from effpass.passes.runtime.prefix_kv import PrefixKV
from effpass.passes.weights.structured_pruning import StructuredPruning
from effpass.runtime.attach import engine_of
from effpass.runtime.cache import full_layers
from effpass.runtime.engine import check_decodable
from effpass.runtime.routed_attention import install, routed_layers
from effpass.runtime.sparse_attention import SparseSettings
from effpass.runtime.sparse_audit import Audit
from effpass.runtime.sparse_channels import check_channels, load_channels
from effpass.runtime.sparse_cost import break_even

__all__ = ["SparseAttention", "SparseAttentionOptions", "recall"]

_MOST_CANDIDATES = 16384


@dataclass(frozen=True)
class SparseAttentionOptions:
    """Options of `sparse_attention`.

    Attributes:
        tokens: number of keys that a decode step attends to, for each KV head.
        blocks: number of blocks whose keys the second level scores; None for as many as hold 8192 keys, or twice
            `tokens` if that is more (at most 16384).
        block: number of cache slots per block.
        sink: number of blocks at the start of the sequence that are always selected.
        recent: number of blocks at the end of the sequence that are always selected.
        levels: levels of selection: `both`; `blocks` attends to all keys of the selected blocks (Quest); `tokens`
            scores the labels of all keys (Double Sparsity). A label is a key quantized to four bits per channel.
        statistic: statistic by which a block is scored: `min_max` gives an upper bound of the scores of its keys,
            `mean` and `mean_std` give estimates.
        aggregation: reduction over the query heads that share a KV head: `sum` or `max`.
        pipelined: whether to select tokens in the blocks that the previous step selected.
        artifact: folder of calibrated channels written by `effpass calibrate sparse-attention`, to which labels are
            restricted; None for labels of all channels.
        dense_below: length in tokens below which attention is dense; with None, the cost model determines it for decode
            steps, and prompts are sparse as soon as they have blocks to leave out.
        prefill_density: share of the blocks that prompts attend to; None for all.
        prefill_threshold: share of the pooled attention weight that the blocks selected for a prompt must hold, used
            instead of `prefill_density`; None to disable.
        audit: whether to measure the quality of the selection at each step, see :func:`recall`. This is slow, because
            it reads all keys.
        train_budget: number of keys that a token attends to in training; None for no training. If given, the model is
            prepared for training only, and its decoding stays unchanged.
        train_block: number of keys per block in training.
    """

    tokens: int = 2048
    blocks: int | None = None
    block: int = 64
    sink: int = 1
    recent: int = 2
    levels: Literal["both", "blocks", "tokens"] = "both"
    statistic: Literal["min_max", "mean", "mean_std"] = "min_max"
    aggregation: Literal["sum", "max"] = "sum"
    pipelined: bool = False
    artifact: Path | None = None
    dense_below: int | None = None
    prefill_density: float | None = None
    prefill_threshold: float | None = None
    audit: bool = False
    train_budget: int | None = None
    train_block: int = 256

    def __post_init__(self) -> None:
        if self.train_budget is not None:
            self._check_training(self.train_budget)
        if self.dense_below is not None and self.dense_below < 1:
            raise ValueError(f"dense_below: got {self.dense_below}, expected 1 or more")
        if self.prefill_density is not None and self.prefill_threshold is not None:
            raise ValueError("prefill_density and prefill_threshold are two ways to say it; give one of them")
        how = self.selection
        if how.levels == "both" and how.blocks * how.block > _MOST_CANDIDATES:
            raise ValueError(
                f"blocks: {how.blocks} of {how.block} slots are {how.blocks * how.block} candidates, and at most"
                f" {_MOST_CANDIDATES} are looked at in a step"
            )
        if how.levels == "tokens" and how.tokens > _MOST_CANDIDATES // 4:
            raise ValueError(f"tokens: got {how.tokens}, with levels: tokens expected at most {_MOST_CANDIDATES // 4}")
        self.prompts  # noqa: B018  (building it checks the values)

    def _check_training(self, budget: int) -> None:
        for field in fields(self):
            if not field.name.startswith("train_") and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} and train_budget: a recipe prepares a model to decode and read prompts, or to train"
                )
        check_block("train_block", self.train_block)
        check_budget(budget, self.train_block, None)

    @property
    def selection(self) -> Selection:
        blocks = self.blocks
        if blocks is None:
            blocks = -(-min(max(8192, 2 * self.tokens), max(_MOST_CANDIDATES, self.tokens)) // self.block)
        return Selection(
            self.tokens, blocks, self.block, self.sink, self.recent, self.statistic, self.aggregation, self.levels,
            self.pipelined,
        )  # fmt: skip

    @property
    def prompts(self) -> BlockSelection | None:
        if self.prefill_density is not None:
            return BlockSelection(self.prefill_density)
        return None if self.prefill_threshold is None else BlockSelection(1.0, self.prefill_threshold)


class SparseAttention(Pass):
    """Attends to chosen keys of long contexts: tokens while decoding, blocks in prompts."""

    name = "sparse_attention"
    kind = "runtime"
    exact = False
    entrances = ("model", "program", "backend")
    Options = SparseAttentionOptions
    options: SparseAttentionOptions
    _pruning: StructuredPruning | None = None  # precedes this pass in its recipe

    @cached_property
    def _channels(self) -> tuple[Artifact, dict[int, Tensor]] | None:
        return None if self.options.artifact is None else load_channels(self.options.artifact)

    @property
    def artifact(self) -> Artifact | None:
        return None if self._channels is None else self._channels[0]

    # -- decoding, in the engine --------------------------------------------------------------------------------------

    def check_beside(self, before: Sequence[Pass], behind: Sequence[Pass]) -> None:
        budget = next((pass_ for pass_ in (*before, *behind) if isinstance(pass_, PrefixKV)), None)
        if budget is not None and budget.options.kv_cache_dtype != "auto":
            raise PassRefusedError(
                f"prefix_kv stores keys as {budget.options.kv_cache_dtype}, and sparse_attention reads them as they"
                " are",
                hint="set kv_cache_dtype: auto in prefix_kv, or leave sparse_attention out",
            )
        if budget is not None and self.options.prompts is not None:
            raise PassRefusedError(
                "prefix_kv stages a prompt while it chooses what to keep, and its tokens attend to all others",
                hint="leave out prefill_density and prefill_threshold, or prefix_kv",
            )
        self._pruning = next((pass_ for pass_ in before if isinstance(pass_, StructuredPruning)), None)

    def check_model(self, model: torch.nn.Module) -> None:
        runs = inner_model(model)
        if self.options.train_budget is not None:
            routed_layers(runs)
            return
        if not hasattr(runs, "config") or not hasattr(runs, "generate"):
            raise ModelError(f"{type(runs).__name__} is no transformers model that generates")
        check_decodable(runs)
        latent_layers(runs)
        sizes = _sizes(runs)
        for index, (_, size) in sizes.items():
            if size % 2 and self._channels is None:
                raise ModelError(
                    f"keys of layer {index} have {size} channels, and a label has an even number",
                    hint="calibrate an even number: effpass calibrate sparse-attention",
                )
        if self._channels is not None:
            self._channels[0].check_model(runs)
            check_channels(self._channels[1], sizes)
        self._check_kernels(runs, sizes)

    def _check_kernels(self, model: Any, sizes: dict[int, tuple[int, int]]) -> None:
        """Raise if a layer has no GPU kernels; the steps are CUDA graphs, which can't capture the reference."""
        device, dtype = device_and_dtype(model)
        if device.type != "cuda":
            return
        heads = model.config.get_text_config(decoder=True).num_attention_heads
        latents = latent_layers(model)
        pruned = None if self._pruning is None else self._pruning.keep.after
        for index, (groups, key_size) in sizes.items():
            if pruned is not None:
                heads, groups = pruned.num_attention_heads, 1 if latents else pruned.num_key_value_heads
            value_size = next(iter(latents.values())).kv_lora_rank if latents else key_size
            channels = key_size if self._channels is None else self._channels[1][index].shape[1]
            if not has_kernels(self.options.selection, heads, groups, key_size, value_size, channels, dtype):
                raise ModelError(
                    f"layer {index}: there are no kernels for {heads} query heads of {key_size} channels over {groups}"
                    f" key-value heads, values of {value_size} and labels of {channels} channels in {dtype}",
                    hint=f"{KERNELS}; on the CPU any model runs",
                )

    def prepare(self, model: torch.nn.Module) -> tuple[int, list[Refusal]]:
        """Make the attention of the model sparse, for decoding and prompts or for training; hits are layers."""
        runs = inner_model(model)
        full, others = full_layers(runs.config)
        left_alone = [Refusal(f"layer {i}", f"{what}, and stays as it is") for i, what in others.items()]
        if not full:
            return 0, left_alone
        options = self.options
        if options.train_budget is not None:
            runs.effpass_routed = install(runs, block=options.train_block, budget=options.train_budget)
            return len(full), left_alone
        absorb(runs)
        channels = None if self._channels is None else self._channels[1]
        if channels is not None and self._pruning is not None:
            channels = self._pruning.keep.of_kept_heads(channels)
        audits = {index: Audit(runs.device) for index in full} if options.audit else None
        below = self._break_even(runs) if options.dense_below is None else options.dense_below
        runs.effpass_reader = SparseSettings(
            options.selection, below, channels, options.prompts, options.dense_below or 0, audits
        )
        engine_of(runs).release()
        return len(full), left_alone

    def _break_even(self, model: Any) -> int:
        """Return the context length from which sparse attention is faster on the model's device, by the cost model."""
        device, dtype = device_and_dtype(model)
        latents = latent_layers(model)
        sizes = _sizes(model)
        groups, key_size = next(iter(sizes.values()))
        value_size = next(iter(latents.values())).kv_lora_rank if latents else key_size
        of_label = key_size if self._channels is None else next(iter(self._channels[1].values())).shape[1]
        return break_even(
            self.options.selection, groups, key_size, value_size, of_label, dtype.itemsize, bool(latents),
            ceilings(device, dtype),
        )  # fmt: skip

    # -- prompts, in a program ----------------------------------------------------------------------------------------

    def could_act(self, weight_names: Sequence[str]) -> bool:
        return self.options.prompts is not None

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        found = list(attentions(program))
        if not found:
            return
        if self.options.train_budget is not None:
            yield Refusal(found[0].node.name, "training is sparse in the model", "effpass.prepare(model, recipe)")
            return
        if self.options.prompts is None:
            yield Refusal(
                found[0].node.name,
                "prompts attend to everything unless prefill_density or prefill_threshold is given",
                "decoding is sparse in the engine: effpass.prepare(model, recipe)",
            )
            return
        if refusal := why_not_program(program):
            yield refusal
            return
        for attention in found:
            reason = _why_not(attention)
            if reason is not None:
                yield Refusal(attention.node.name, *reason)
            else:
                yield Match(attention.node, {"attention": attention})

    def rewrite(self, program: Program, match: Match) -> None:
        attention: Attention = match.nodes["attention"]
        how, below = self.options.prompts, self.options.dense_below
        assert how is not None
        scale = attention.scale
        if scale is None:
            scale = attention.query.meta["val"].shape[-1] ** -0.5
        with program.graph.inserting_before(attention.node):
            new = program.graph.call_function(
                torch.ops.effpass.block_sparse_causal_attention.default,
                (attention.query, attention.key, attention.value, scale, how.density, how.threshold, how.block_q,
                 how.block_k, how.sink, how.recent, 0 if below is None else below),
            )  # fmt: skip
        new.meta.update(attention.node.meta)
        attention.node.replace_all_uses_with(new)
        erase_unread(program, attention.node)


def _why_not(attention: Attention) -> tuple[str, str] | None:
    """Return the reason why an attention of a program can't be replaced, with a hint; None if it can."""
    if attention.layout != "BHTD" or attention.implementation != "sdpa":
        return f"it is {attention.implementation} attention", "load the model with attn_implementation='sdpa'"
    if attention.mask is not None or not attention.is_causal:
        return "it has a mask, or sees tokens after its own", "pass no attention_mask where nothing is padding"
    if isinstance(attention.scale, Node):
        return "its scale is computed", ""
    query, key = (node.meta["val"].shape for node in (attention.query, attention.key))
    if query[2] is not key[2] and query[2] != key[2]:
        return "it attends to a cache", "decoding is sparse in the engine: effpass.prepare(model, recipe)"
    return None


def _sizes(model: Any) -> dict[int, tuple[int, int]]:
    """Return the number of KV heads and the key size in the cache, for each layer with full attention."""
    text = model.config.get_text_config(decoder=True)
    if latent_layers(model):
        size = (1, text.kv_lora_rank + text.qk_rope_head_dim)
    else:
        heads = text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        size = (getattr(text, "num_key_value_heads", None) or heads, head_dim)
    return dict.fromkeys(full_layers(model.config)[0], size)


def recall(model: Any) -> dict[int, tuple[float, float]]:
    """Return the quality of the selection of keys, as a mean over all decode steps since `prepare`, for each layer.

    Returns:
        For each layer, the fraction of the best keys that was selected (recall), and the fraction of the weight of full
        attention that falls on the selected keys (mass).

    Raises:
        ModelError: the model was prepared without ``audit: true``.
    """
    settings = getattr(inner_model(model), "effpass_reader", None)
    if not isinstance(settings, SparseSettings) or settings.audits is None:
        raise ModelError("nothing was audited", hint="prepare the model with sparse_attention: {audit: true}")
    return {index: audit.result() for index, audit in settings.audits.items()}
