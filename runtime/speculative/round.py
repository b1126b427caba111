"""One round of speculative decoding: the draft grows a tree, the target verifies it, and accepted tokens are entered.

The *target* is the model to decode with, and the *draft* proposes a tree of tokens that may follow. Buffers have fixed
sizes and a round does not synchronize with the device, so that on a GPU the whole round, draft and target, is one CUDA
graph. Logits processors and stopping criteria that see more than scores and last tokens are run on the host, as the
objects that transformers prepared. They are called along the accepted path only, with the prefix of each node
(:mod:`effpass.runtime.speculative.walk`), and such a round waits for the device.

If verification is sparse, the tokens that sparse calls entered are run again from time to time, in one dense call
(:mod:`effpass.runtime.speculative.sparse`).

A sampled token is determined by noise that belongs to its column (:mod:`effpass.lowering.ops.token_noise`). The text
has the model's distribution, and depends on the seed but not on the proposed tokens.

Shapes: B batch, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation import EosTokenCriteria

import effpass.lowering.ops.token_noise
import effpass.lowering.ops.top_tokens  # noqa: F401  (registers the operators)
from effpass.lowering.ops.tree_acceptance import accept_tokens
from effpass.runtime.choice import SEES_LAST_TOKEN, SEES_SCORES
from effpass.runtime.cuda_graph import record
from effpass.runtime.session import ENDS
from effpass.runtime.speculative.dense_again import DenseAgain
from effpass.runtime.speculative.drafts import Draft
from effpass.runtime.speculative.progress import Progress
from effpass.runtime.speculative.session import TreeSession
from effpass.runtime.speculative.shapes import Sampled
from effpass.runtime.speculative.tree import TokenTree
from effpass.runtime.speculative.tree_size import TreeSize
from effpass.runtime.speculative.walk import Walk

__all__ = ["Round"]

_Verified = tuple[TokenTree, Tensor, Tensor | None]  # tree, logits and features of the target


class Round:
    """Decodes with one target and one draft; buffers and CUDA graphs are reused by later generations.

    Args:
        target: session of the target, with room for the draft's trees and for the tokens that a dense call runs again.
        draft: draft that proposes trees.
        columns: maximum number of tokens of prompt and answer together.

    Attributes:
        progress: tokens that were emitted, and the state of each sequence.
        drafting: state of the draft for this target.
        size: chooses how many nodes the next round verifies.
        largest: int64 `[]`, number of nodes of the largest tree of the last round; written if their sizes vary.
        is_fixed: whether rounds of the current generation run without synchronization with the device.
        was_recorded: whether the last step was recorded as a CUDA graph before it ran, so that its time does not count.
    """

    was_recorded = False

    def __init__(self, target: TreeSession, draft: Draft, columns: int) -> None:
        self.target, self.draft, self.drafting = target, draft, draft.start(target)
        self.progress = Progress(target.batch, columns, target.model.device)
        self.size = TreeSize(draft.kind.sizes)
        self.largest = torch.zeros((), dtype=torch.long, device=target.model.device)
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._parents = torch.full((target.batch, 1), -1, dtype=torch.long, device=target.model.device)
        self._itself = torch.ones_like(self._parents)[:, :, None]
        self._last: Tensor | None = None  # `[B, 1, D]`, features of the last token of each prompt
        self._again: DenseAgain | None = None
        if target.sparse is not None and (tokens := target.sparse.tokens(draft.kind.depth)):
            self._again = DenseAgain(target, self.progress, tokens)

    def begin(
        self, prompt: Tensor, processors: LogitsProcessorList, criteria: StoppingCriteriaList, config: Any, limit: int
    ) -> None:
        """Start a generation after the target has run its prompt, and choose the first token.

        Args:
            prompt: int64 `[rows, T]`, token ids of the prompts.
            processors, criteria, config: logits processors, stopping criteria and config that transformers prepared.
            limit: number of tokens, of prompt and answer together, at which a sequence ends.
        """
        target, progress = self.target, self.progress
        self._processors, self._samples = processors, bool(config.do_sample)
        ends = [c.eos_token_id.flatten() for c in criteria if isinstance(c, EosTokenCriteria)]
        self.is_fixed = (
            all(type(p) in SEES_SCORES for p in processors)
            and all(type(c) in SEES_LAST_TOKEN for c in criteria)
            and sum(map(len, ends)) <= ENDS
        )
        self._walk = None if self.is_fixed else Walk(progress, len(prompt), processors, criteria, self._samples)
        pads = any(hasattr(c, "eos_token_id") for c in criteria)
        known = torch.cat(ends) if ends and self.is_fixed else prompt.new_zeros(0)
        progress.begin(prompt, target.position, known, config._pad_token_tensor if pads else 0, limit)
        target.cache.begin_tree()
        if self._again is not None:
            self._again.begin()
        features = target.prompt_features
        if features is not None:
            if progress.features is None:
                progress.features = features.new_zeros(target.batch, 2 * self.draft.kind.catches_up, features.shape[2])
                self._last = features.new_zeros(target.batch, 1, features.shape[2])
            assert self._last is not None
            self._last[: len(features)].copy_(features[:, -1:])
            target.prompt_features = None
        if self.is_fixed:
            self._run(("first", self._samples, _names(processors)), self._take_first)
        else:
            self._take_first()
        progress.totals.zero_()

    def step(self, *, nodes: int | None = None, plain: bool = False, reached: int = 0) -> None:
        """Run a round, or a plain decode step.

        Args:
            nodes: number of nodes to verify, with the root; None for all that the draft proposes.
            plain: whether to leave the draft out.
            reached: lower bound on the number of tokens of the longest sequence.
        """
        self.was_recorded = False
        nodes = 1 if plain else nodes or self.draft.kind.nodes
        verification = "plain" if plain else f"round of {nodes}"
        is_sparse = self.target.sparse is not None and self.target.sparse.acts_on(reached)
        if is_sparse:
            verification = f"sparse {verification}"
            if self._again is not None and self._again.is_due(1 if plain else self.draft.kind.depth + 1):
                self._run(("dense again",), self._again.run)
        if self.is_fixed:
            how = verification, self._samples, _names(self._processors)
            self._run(how, lambda: self._take(self._verify(nodes, plain, is_sparse)))
        else:
            self._take(self._run((verification, "verify"), lambda: self._verify(nodes, plain, is_sparse)))

    def catch_up(self) -> None:
        """Let the draft run the tokens that plain steps have emitted, as many as one call takes."""
        self._run(("catch up",), lambda: self.drafting.extend(self.progress))

    def forget_graphs(self) -> None:
        """Drop the CUDA graphs, as the addresses of weights have changed."""
        self._graphs.clear()

    # -- a round ------------------------------------------------------------------------------------------------------

    def _take_first(self) -> None:
        """Accept the token that follows the prompt, whose last token is in the cache already: nothing is committed."""
        self._take((self._alone(), self.target.logits[:, None], self._last), commits=False)

    def _alone(self) -> TokenTree:
        """Return trees that consist of the root alone, for a plain decode step."""
        progress, itself = self.progress, self._itself
        return TokenTree(progress.root[:, None], self._parents, progress.position[:, None], itself, 0)

    def _verify(self, nodes: int, plain: bool, is_sparse: bool) -> _Verified:
        if plain:
            tree = self._alone()
        else:
            tree = self.drafting.propose(self.progress, self._sampled() if self._samples and self.is_fixed else None)
            tree = tree.first(nodes)
            if self.size.varies:
                self.largest.copy_((tree.positions >= 0).sum(1).amax())
        return tree, *self.target.run(tree.tokens, tree.positions, tree.ancestors, is_sparse=is_sparse)

    def _take(self, verified: _Verified, *, commits: bool = True) -> None:
        """Accept a path of each verified tree, and enter its tokens in the progress and the target's cache."""
        (tree, logits, features), progress = verified, self.progress
        if self._walk is not None:
            path, taken = self._walk.accept(tree, logits)
        else:
            path, taken = accept_tokens(
                self._choices(tree, logits), tree.tokens, tree.parents, progress.ends, progress.limit, progress.ids,
                progress.count, progress.position, progress.root, progress.goes_on, progress.totals, tree.depth + 1,
            )  # fmt: skip
        if commits:
            self.target.cache.commit(path, taken)
        if features is not None:
            progress.note(features, path, taken)

    def _choices(self, tree: TokenTree, logits: Tensor) -> Tensor:
        """Return the token that the target chooses at each node, int64 `[B, N]`."""
        if self._samples:
            below = (tree.positions - self.progress.position[:, None]).clamp(min=0).long()
            noise = self._noise(tree.depth + 1, logits.shape[2])
            noise = noise.gather(1, below[:, :, None].expand(-1, -1, logits.shape[2]))
            return (self._distribution(logits) / noise).argmax(-1)
        if self._processors:
            return self._distribution(logits).argmax(-1)
        return torch.ops.effpass.top_tokens(logits.flatten(0, 1), 1)[1].view_as(tree.tokens)

    def _sampled(self) -> Sampled:
        """Return the function by which a draft scores tokens with the noise that the target will sample with."""
        depth, vocabulary = self.draft.kind.depth, self.target.logits.shape[1]
        noise = self._noise(depth, vocabulary)

        def sampled(logits: Tensor, depth: int, names: Tensor | None) -> Tensor:
            of_tokens = noise[:, depth]
            if names is None:
                of_tokens = of_tokens[:, : logits.shape[2]]
            else:
                of_tokens = of_tokens[:, torch.arange(len(names), device=names.device) + names]
            return self._distribution(logits) / of_tokens[:, None]

        return sampled

    def _noise(self, columns: int, vocabulary: int) -> Tensor:
        """Return the noise of the next columns of each sequence, `[B, columns, vocabulary]`."""
        step = torch.arange(columns, device=self.progress.count.device)
        return torch.ops.effpass.token_noise(self.progress.seed, self.progress.count[:, None] + step, vocabulary)

    def _distribution(self, logits: Tensor) -> Tensor:
        """Return the processed probabilities, float32 `[B, N, V]`."""
        scores = logits.float()
        if self._processors:
            flat = scores.flatten(0, 1)
            scores = self._processors(None, flat.clone()).view_as(scores)  # type: ignore[arg-type]
        return scores.softmax(-1)

    # -- the CUDA graph -----------------------------------------------------------------------------------------------

    def _run(self, key: Any, work: Callable[[], Any]) -> Any:
        """Run `work`, as a CUDA graph that is recorded the first time; its result has a fixed address."""
        if self.target.model.device.type != "cuda":
            return work()
        if key not in self._graphs:
            self.was_recorded = True
            self._graphs[key] = self._record(work)
        graph, result = self._graphs[key]
        graph.replay()
        return result

    def _record(self, work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        cache = self.target.cache
        state = [*self.progress.state(), cache.lengths, cache.slots.positions, *self.drafting.state()]
        if self._again is not None:
            state.append(self._again.known)
        saved, results = [t.clone() for t in state], []

        def try_out() -> None:
            for _ in range(2):
                work()
                for tensor, value in zip(state, saved, strict=True):
                    tensor.copy_(value)

        with self.target.recording(), self.drafting.recording():
            graph = record(lambda: results.append(work()), warm_up=try_out)
        return graph, results[0]


def _names(processors: LogitsProcessorList) -> tuple[Any, ...]:
    return tuple((type(p).__name__, *sorted(vars(p).items())) for p in processors)
