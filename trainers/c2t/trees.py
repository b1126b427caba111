"""Collection of trees that a draft grows, with the candidates that the model accepts.

Trees are grown by EAGLE-2, and all of their candidates are recorded, including those that would not be verified. A
candidate is accepted if the model's greedy text continues along the candidate's path.

Shapes: N trees, P candidates per tree, K children per node, D layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effpass.core.errors import EffpassError
from effpass.core.model import LoadedModel
from effpass.runtime.engine import Engine
from effpass.runtime.speculative.drafts import Draft
from effpass.runtime.speculative.growing import Eagle2, Growing
from effpass.runtime.speculative.shapes import Grower
from effpass.runtime.speculative.speculator import Speculator

__all__ = ["Trees", "Watched", "collect"]


@dataclass(frozen=True)
class Trees:
    """Candidates of collected trees.

    Attributes:
        top_k: number of children per node K.
        depth: number of layers D.
        probability: float32 `[N, P]`, product of the draft's probabilities on each candidate's path.
        entropy: float32 `[N, P]`, entropy of the distribution that the candidate comes from, in nats.
        layer: int64 `[P]`, layer of the candidate, 0 below the root.
        parent: int64 `[N, P]`, index of its parent among the candidates; -1 for the root.
        accepted: bool `[N, P]`, whether the model accepts the candidate.
    """

    top_k: int
    depth: int
    probability: Tensor
    entropy: Tensor
    layer: Tensor
    parent: Tensor
    accepted: Tensor

    def __len__(self) -> int:
        return len(self.probability)

    def __getitem__(self, index: Tensor) -> Trees:
        parts = (getattr(self, name)[index] for name in ("probability", "entropy", "parent", "accepted"))
        probability, entropy, parent, accepted = parts
        return Trees(self.top_k, self.depth, probability, entropy, self.layer, parent, accepted)

    def features(self) -> Tensor:
        """Return the inputs of the classifier, `[N, P, 3]`: probability, entropy and layer."""
        return torch.stack((self.probability, self.entropy, self.layer.float().expand_as(self.entropy)), -1)

    def along_paths(self, sure: Tensor) -> Tensor:
        """Return the smallest of the confidences `sure` `[N, P]` on each candidate's path, `[N, P]`."""
        worth = sure.clone()
        for layer in range(1, self.depth):
            here = self.layer == layer
            worth[:, here] = torch.minimum(worth[:, here], worth.gather(1, self.parent[:, here]))
        return worth


@dataclass(frozen=True)
class Watched(Eagle2):
    """EAGLE-2 trees whose growers are kept, to read all candidates of a tree."""

    growers: list[Growing] = field(default_factory=list, compare=False)

    def grower(self, rows: int, device: torch.device) -> Grower:
        made = Growing(self, rows, device, least=0.0, keeps_all=True)
        made.entropies = []
        self.growers.append(made)
        return made


def collect(
    loaded: LoadedModel,
    engine: Engine,
    open_draft: Callable[[Watched], Draft],
    prompts: Sequence[np.ndarray],
    *,
    top_k: int,
    depth: int,
    trees: int,
    answer: int,
    say: Callable[[str], None],
) -> Trees:
    """Collect trees while the model answers prompts greedily, one after the other.

    Args:
        loaded: the model with its tokenizer.
        engine: decode engine of the model.
        open_draft: function that creates the draft for a kind of tree.
        prompts: token ids of the prompts, int32 `[T]` each.
        top_k, depth: sizes of the trees, as for :class:`Eagle2`.
        trees: number of trees to collect; fewer if the prompts do not give as many.
        answer: maximum number of tokens of an answer.
        say: function that receives messages for the user.

    Raises:
        EffpassError: if the prompts give no trees.
    """
    kind = Watched(top_k, depth, min(256, 1 + top_k * depth))
    speculator = Speculator(engine, open_draft(kind), switches=False)
    longest = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", 1 << 20)
    capacity = min(longest, max(map(len, prompts), default=0) + answer)  # the same for all prompts
    found: list[list[Tensor]] = []
    sizes = [top_k, *[top_k * top_k] * (depth - 1)]
    layer = torch.cat([torch.full((size,), number) for number, size in enumerate(sizes)])
    for number, prompt in enumerate(prompts):
        if len(found) >= trees:
            break
        room = min(answer, longest - len(prompt))
        if room < 2:
            continue
        found += _of_prompt(loaded, speculator, kind, prompt, room, layer, capacity)
        if number % 20 == 19:
            say(f"{len(found)} of {trees} trees")
    if not found:
        raise EffpassError("the prompts gave no trees", hint="give prompts that leave room for an answer")
    stacked = [torch.stack(parts) for parts in zip(*found[:trees], strict=True)]
    probability, entropy, parent, accepted = stacked
    return Trees(top_k, depth, probability, entropy, layer, parent, accepted)


def _of_prompt(
    loaded: LoadedModel, speculator: Speculator, kind: Watched, prompt: np.ndarray, room: int, layer: Tensor,
    capacity: int,
) -> list[list[Tensor]]:  # fmt: skip
    """Return probability, entropy, parent and acceptance, `[P]` each, of every tree of one answer."""
    ids = torch.from_numpy(prompt).long()[None].to(loaded.model.device)
    grown: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
    text: list[int] = []

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Tensor:
        with torch.inference_mode(False), torch.no_grad(), speculator.round(1, capacity) as (round_, _):
            target, progress = round_.target, round_.progress
            target.prefill(input_ids, None, 1 << 15)
            round_.drafting.begin(input_ids, None, 1 << 15)
            round_.begin(
                input_ids, prepared["logits_processor"], prepared["stopping_criteria"], prepared["generation_config"],
                len(prompt) + room,
            )  # fmt: skip
            while bool(progress.goes_on):
                column = int(progress.count[0])
                round_.step()
                grower = kind.growers[-1]
                assert grower.entropies is not None
                of_layers = grower.entropies[-kind.depth :]  # of the last tree, or in the buffers of its CUDA graph
                # The candidates below a node share its entropy.
                entropy = torch.cat([e[0].repeat_interleave(kind.top_k) for e in of_layers])
                pool = (grower.pool_tokens[0], grower.pool_worth[0], grower.pool_parents[0], entropy)
                grown.append((column, *(part.cpu().clone() for part in pool)))  # type: ignore[arg-type]
                if not input_ids.is_cuda:
                    grower.entropies.clear()
            text.extend(progress.ids[0, : int(progress.count[0])].tolist())
        return input_ids

    loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=room, do_sample=False,
        pad_token_id=loaded.tokenizer.eos_token_id, custom_generate=loop,
    )  # fmt: skip
    rows = []
    padded = torch.tensor([*text, *[-1] * kind.depth])
    for column, tokens, probability, parent, entropy in grown:
        accepted = tokens == padded[(column + layer).clamp(max=len(padded) - 1)]
        for number in range(1, kind.depth):
            here = layer == number
            accepted[here] &= accepted[parent[here]]
        rows.append([probability, entropy, parent, accepted])
    return rows
