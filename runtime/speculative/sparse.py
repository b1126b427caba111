"""Sparse verification: the target reads only a part of its cache and weights for a tree, the same for all nodes.

    attention   blocks of the prefix, chosen by the root's query (:mod:`effpass.lowering.ops.tree_blocks`)
    channels    those with the largest sums of squared activations over the nodes
                (:mod:`effpass.runtime.speculative.shared_channels`)
    experts     those with the largest sums of routing weights over the nodes
                (:mod:`effpass.runtime.speculative.shared_experts`)

The method follows "Accelerate Speculative Decoding with Sparse Computation in Verification"
(https://arxiv.org/abs/2512.21911), whose own rules for channels and experts differ from token to token
(:mod:`effpass.runtime.speculative.token_rules`). Acceptance then follows the sparse model, and the cache holds its keys
and values. Every few rounds, the tokens since the last refresh are therefore run again densely, and their keys and
values replace those of sparse calls (SpecPV, https://arxiv.org/abs/2512.02337).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.lowering.ops.ancestors import MOST_NODES
from effpass.runtime.speculative import shared_channels, shared_experts
from effpass.runtime.speculative.shared_channels import ChannelRule
from effpass.runtime.speculative.shared_experts import ExpertRule

__all__ = ["ROOM", "SharedBlocks", "SparseVerification", "Verifier", "settings_of"]

ROOM = "effpass_sparse_verification"


@dataclass(frozen=True)
class SharedBlocks:
    """Choice of the part of a prefix that a tree attends to.

    Attributes:
        share: share of the slots beyond `dense_below` to read.
        dense_below: number of slots of every prefix that are read in any case; shorter prefixes are read completely.
        block: number of slots per block.
        anchors: indices of the layers that choose blocks, ascending; the other layers use the choice of the last anchor
            before them. None if all layers choose.
    """

    share: float = 0.25
    dense_below: int = 4096
    block: int = 64
    anchors: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SparseVerification:
    """Settings of sparse verification for one model.

    Attributes:
        blocks: choice of the blocks of the prefix to attend to; None to attend to all of it.
        experts: rule for the experts that a call reads; None to read all that its tokens are routed to.
        channels: rule for the channels that a call reads, in feed-forward networks that run on all tokens; None for
            all.
        refresh: number of rounds after which tokens are run again densely; None for never.
    """

    blocks: SharedBlocks | None = None
    experts: ExpertRule | None = None
    channels: ChannelRule | None = None
    refresh: int | None = 8

    def acts_on(self, length: int) -> bool:
        """Return whether a verification after `length` tokens differs from a dense one."""
        if self.experts is not None or self.channels is not None:
            return True
        return self.blocks is not None and length > self.blocks.dense_below

    def tokens(self, depth: int) -> int:
        """Return the maximum number of tokens that a dense call runs again, for trees of `depth`; 0 without refresh.

        Raises:
            EffpassError: if one call can't run that many tokens.
        """
        if self.refresh is None:
            return 0
        tokens, most = self.refresh * (depth + 1), MOST_NODES // (depth + 1)
        if tokens > MOST_NODES:
            raise EffpassError(
                f"refresh: {self.refresh} rounds of trees of depth {depth} are up to {tokens} tokens, and a call runs"
                f" {MOST_NODES}",
                hint=f"refresh: {most} is the most for this tree",
            )
        return tokens


def settings_of(model: Any) -> SparseVerification | None:
    """Return the settings that the pass `sparse_verification` has stored on the model; None if there are none."""
    return getattr(model, ROOM, None)


class Verifier:
    """Makes calls of one model sparse in experts and channels.

    Args:
        model: a transformers causal LM.
        settings: settings of sparse verification.

    Attributes:
        is_on: whether the current call is sparse.
        is_node: bool `[B · T]`, tokens of the current sparse call that are nodes, and not padding.
    """

    is_node: Tensor

    def __init__(self, model: Any, settings: SparseVerification) -> None:
        self.settings, self.is_on = settings, False
        self._model = model
        self._networks: list[Any] = []
        if settings.channels is not None:
            self._networks += shared_channels.gated_networks(model)[0].values()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Context with hooks on the model, which make calls sparse while :attr:`is_on` is set."""
        with ExitStack() as stack:
            if self.settings.experts is not None:
                stack.enter_context(shared_experts.attached(self._model, self.settings.experts, self))
            if self.settings.channels is not None:
                stack.enter_context(shared_channels.attached(self._networks, self.settings.channels, self))
            yield

    @contextmanager
    def on(self, positions: Tensor) -> Iterator[None]:
        """Context in which calls are sparse; their tokens are at `positions`, int32 `[B, T]`, -1 for padding."""
        self.is_on, self.is_node = True, (positions >= 0).flatten()
        try:
            yield
        finally:
            self.is_on = False
            del self.is_node
