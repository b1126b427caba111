"""`sparse_verification`: speculative decoding whose verification reads only a part of the cache and the weights.

A verification is the call of the target model on a tree of draft tokens. It reads the blocks of the prefix with the
largest scores for the query of the tree's root, the channels of feed-forward networks with the largest squared
activations summed over the nodes of the tree, and the experts with the largest routing weights summed over the nodes.
All nodes share the selection. The method follows "Accelerate Speculative Decoding with Sparse Computation in
Verification" (https://arxiv.org/abs/2512.21911).

The pass acts when `generate` is given a draft; see :mod:`effpass.runtime.speculative.sparse`. Nothing is trained, but
two things can be calibrated: which layers select blocks, and the thresholds below which single tokens skip experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, ModelError, PassRefusedError
from effpass.core.model import inner_model
from effpass.core.pass_ import Pass, RuntimePass
from effpass.core.report import Refusal
from effpass.passes.runtime.mla_absorption import latent_layers
from effpass.runtime.attach import engine_of
from effpass.runtime.cache import full_layers
from effpass.runtime.engine import check_decodable
from effpass.runtime.speculative.calibrated import PASS, load_calibrated
from effpass.runtime.speculative.shared_channels import ChannelBudget, ChannelRule, gated_networks, lay_by_channel
from effpass.runtime.speculative.shared_experts import ExpertBudget, ExpertRule, expert_modules, rescales
from effpass.runtime.speculative.sparse import ROOM, SharedBlocks, SparseVerification
from effpass.runtime.speculative.token_rules import TokenChannels, TokenExperts

__all__ = ["SparseVerificationOptions", "SparseVerificationPass"]

_OWN_CACHES = ("prefix_kv", "sparse_attention", "kv_offload")


@dataclass(frozen=True)
class SparseVerificationOptions:
    """Options of `sparse_verification`.

    Attributes:
        attention: share of the prefix beyond `dense_below` that a tree attends to; None for all of it.
        dense_below: number of tokens of every prefix that are attended to in any case; shorter prefixes are attended to
            densely.
        block: number of tokens per block; GPU kernels support multiples of 64.
        channels: share of the channels of feed-forward networks that a tree reads; None for all.
        experts: share of a layer's experts that a tree reads; None for all.
        refresh: number of rounds after which the tokens since the last refresh are run again densely; None for never.
        artifact: folder with calibration results written by `effpass calibrate sparse-verification`; None if nothing
            was calibrated.
        skip_below: threshold on the activated gate; each token skips the channels whose gate is smaller in magnitude.
            Used instead of `channels`; None to disable.
        skip_experts: maximum number of its experts that each token skips. Used instead of `experts` and requires
            `artifact`; None to disable.
    """

    attention: float | None = 0.25
    dense_below: int = 4096
    block: int = 64
    channels: float | None = None
    experts: float | None = None
    refresh: int | None = 8
    artifact: Path | None = None
    skip_below: float | None = None
    skip_experts: int | None = None

    def __post_init__(self) -> None:
        for name in ("attention", "channels", "experts"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name}: got {share}, expected a share: more than 0, and 1 at most")
        for name, least in (("dense_below", 0), ("block", 1), ("refresh", 1), ("skip_experts", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: got {value}, expected {least} or more")
        if self.skip_below is not None and self.skip_below <= 0:
            raise ValueError(f"skip_below: got {self.skip_below}, expected more than 0")
        for one, other in (("channels", "skip_below"), ("experts", "skip_experts")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{one} and {other} are two ways to say it; give one of them")
        if self.skip_experts is not None and self.artifact is None:
            raise ValueError("skip_experts: needs shares that were calibrated; give artifact")
        if not self.leaves_out:
            raise ValueError("nothing is left out: give attention, channels or experts")

    @property
    def leaves_out(self) -> bool:
        of = (self.attention, self.channels, self.experts, self.skip_below, self.skip_experts)
        return any(value is not None for value in of)


class SparseVerificationPass(RuntimePass):
    """Makes a tree's verification read a part of the cache, channels and experts, the same for all its nodes."""

    name = PASS
    exact = False
    Options = SparseVerificationOptions
    options: SparseVerificationOptions

    @cached_property
    def _calibrated(self) -> Artifact | None:
        return None if self.options.artifact is None else load_calibrated(self.options.artifact)

    @property
    def artifact(self) -> Artifact | None:
        return self._calibrated

    def check_beside(self, before: Sequence[Pass], behind: Sequence[Pass]) -> None:
        others = [pass_.name for pass_ in (*before, *behind) if pass_.name in _OWN_CACHES]
        if others:
            raise PassRefusedError(
                f"{others[0]} replaces the key-value cache, and sparse_verification acts in speculative decoding, which"
                " needs a cache with room for token trees",
                hint=f"leave one of {others[0]} and sparse_verification out",
            )

    def check_model(self, model: torch.nn.Module) -> None:
        runs: Any = inner_model(model)
        if not hasattr(runs, "config") or not hasattr(runs, "generate"):
            raise ModelError(f"{type(runs).__name__} is no transformers model that generates")
        check_decodable(runs)
        options, full = self.options, full_layers(runs.config)[0]
        if options.attention is not None and latent_layers(runs):
            raise ModelError(
                f"attention: {options.attention}: {type(runs).__name__} caches latents, of which no blocks are chosen",
                hint="attention: null, and leave out channels or experts",
            )
        if options.attention is not None and not full:
            raise ModelError(
                f"attention: {options.attention}: no layer of {type(runs).__name__} attends to all of its prefix",
                hint="attention: null",
            )
        if self._leaves_channels and not (networks := gated_networks(runs))[0]:
            why = f": {next(iter(networks[1].values()))}" if networks[1] else ""
            raise ModelError(
                f"channels: {type(runs).__name__} has no feed-forward network of gate, up and down that all tokens go"
                f" through{why}",
                hint="channels: null",
            )
        if self._leaves_experts and not expert_modules(runs):
            raise ModelError(f"experts: {type(runs).__name__} has no experts", hint="experts: null")
        if self.artifact is not None:
            self.artifact.check_model(runs)
            self._check_calibrated(runs, full)

    def _check_calibrated(self, model: Any, full: list[int]) -> None:
        assert self.artifact is not None
        folder, tensors, options = self.options.artifact, self.artifact.tensors, self.options
        if options.attention is not None:
            anchors = tensors["anchors"].tolist()
            if not anchors or anchors[0] != full[0] or not set(anchors) <= set(full):
                raise ArtifactError(
                    f"{folder}: anchors {anchors} of a model whose layers with full attention are {full}",
                    hint="calibrate again with this model",
                )
            if self.artifact.options.get("block") != options.block:
                raise ArtifactError(
                    f"{folder}: calibrated with blocks of {self.artifact.options.get('block')}, and the recipe says"
                    f" {options.block}",
                    hint="use one for both",
                )
        if options.skip_experts is not None:
            shares, layers = tensors["expert_shares"], len(expert_modules(model))
            each = _experts_a_token(model)
            if shares.shape != (layers, each - 1):
                raise ArtifactError(
                    f"{folder}: expert_shares {list(shares.shape)} of a model with {layers} layers of experts, of which"
                    f" a token takes {each}",
                    hint="calibrate again with this model",
                )
            if options.skip_experts >= each:
                raise ModelError(f"skip_experts: {options.skip_experts}, and a token takes {each}; one at least stays")

    def prepare(self, model: torch.nn.Module) -> tuple[int, list[Refusal]]:
        """Store the settings on the model for speculative decoding; hits are layers and networks that become sparse."""
        runs: Any = inner_model(model)
        options, hits, alone = self.options, 0, []
        blocks: SharedBlocks | None = None
        channels: ChannelRule | None = None
        experts: ExpertRule | None = None
        if options.attention is not None:
            full, others = full_layers(runs.config)
            anchors = None if self.artifact is None else tuple(self.artifact.tensors["anchors"].tolist())
            blocks = SharedBlocks(options.attention, options.dense_below, options.block, anchors)
            hits += len(full)
            alone += [Refusal(f"layer {i}", f"{what}, and reads all of that") for i, what in others.items()]
        if self._leaves_channels:
            networks, others_ = gated_networks(runs)
            if options.channels is not None:
                channels = ChannelBudget(options.channels)
                for network in networks.values():
                    lay_by_channel(network)
            else:
                assert options.skip_below is not None
                channels = TokenChannels(options.skip_below)
            hits += len(networks)
            alone += [Refusal(name, f"{why}, and is read wholly") for name, why in others_.items()]
        if self._leaves_experts:
            hits += len(expert_modules(runs))
            if options.skip_experts is None:
                experts = ExpertBudget(options.experts, rescales(runs.config))  # type: ignore[arg-type]
            else:
                assert self.artifact is not None
                shares = tuple(map(tuple, self.artifact.tensors["expert_shares"].tolist()))
                experts = TokenExperts(options.skip_experts, shares, rescales(runs.config))
        setattr(runs, ROOM, SparseVerification(blocks, experts, channels, options.refresh))
        engine_of(runs).release()
        return hits, alone

    @property
    def _leaves_channels(self) -> bool:
        return self.options.channels is not None or self.options.skip_below is not None

    @property
    def _leaves_experts(self) -> bool:
        return self.options.experts is not None or self.options.skip_experts is not None


def _experts_a_token(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).num_experts_per_tok)
