"""Sparse verification: a target that reads less when it looks at a tree, the same for all nodes.

    attention   blocks of the prefix, chosen by the root's query (:mod:`effpass.lowering.ops.tree_blocks`)
    channels    in which the tree's nodes together have most (:mod:`effpass.runtime.speculative.shared_channels`)
    experts     those that the tree's nodes together like best (:mod:`effpass.runtime.speculative.shared_experts`)

("Accelerate Speculative Decoding with Sparse Computation in Verification", https://arxiv.org/abs/2512.21911; its own
rules for channels and experts, token by token, are in :mod:`effpass.runtime.speculative.token_rules`.) What is
accepted is then what the sparse model says, and its keys and values are in the cache; so every few rounds the tokens
since are run again, densely, and their keys and values take the place of those (SpecPV, https://arxiv.org/abs/2512.02337).
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
    """Which part of a prefix a tree attends to.

    Attributes:
        share: of the slots beyond `dense_below`.
        dense_below: slots that are read of every prefix; shorter ones wholly.
        block: slots of a block.
        anchors: layers that choose, ascending; others take the blocks of the last one before. None for all layers.
    """

    share: float = 0.25
    dense_below: int = 4096
    block: int = 64
    anchors: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SparseVerification:
    """What the verifications of one model leave out.

    Attributes:
        blocks: of the prefix; None for none.
        experts: which a call reads; None for all.
        channels: likewise, of feed-forward networks that all tokens go through.
        refresh: rounds after which tokens are run again densely; None for never.
    """

    blocks: SharedBlocks | None = None
    experts: ExpertRule | None = None
    channels: ChannelRule | None = None
    refresh: int | None = 8

    def acts_on(self, length: int) -> bool:
        """Whether a verification behind `length` tokens is another than a dense one."""
        if self.experts is not None or self.channels is not None:
            return True
        return self.blocks is not None and length > self.blocks.dense_below

    def tokens(self, depth: int) -> int:
        """That a dense call runs again, of rounds with trees of `depth`; 0 where there is none.

        Raises:
            EffpassError: they are more than one call takes.
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
    """What the model was prepared with."""
    return getattr(model, ROOM, None)


class Verifier:
    """Makes calls of one model sparse.

    Args:
        model: a transformers causal LM.
        settings: see :class:`SparseVerification`.

    Attributes:
        is_on: the current call is sparse.
        is_node: bool `[B · T]`: which rows of the current call are nodes, and not padding.
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
        """Inside, calls while :attr:`is_on` are sparse; others are as they were."""
        with ExitStack() as stack:
            if self.settings.experts is not None:
                stack.enter_context(shared_experts.attached(self._model, self.settings.experts, self))
            if self.settings.channels is not None:
                stack.enter_context(shared_channels.attached(self._networks, self.settings.channels, self))
            yield

    @contextmanager
    def on(self, positions: Tensor) -> Iterator[None]:
        """Inside, calls are on nodes at `positions` int32 `[B, T]`, -1 for padding, and sparse."""
        self.is_on, self.is_node = True, (positions >= 0).flatten()
        try:
            yield
        finally:
            self.is_on = False
            del self.is_node
