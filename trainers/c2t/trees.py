"""Trees of a draft with what the model made of them.

Trees are grown as EAGLE-2's, and all of their candidates count, those that would not be verified too. A candidate is
accepted where the text went on as its path does.

Shapes: N trees, P candidates of a tree, K children of a node, D layers.
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
    """
    Attributes:
        top_k: K.
        depth: D.
        probability: float32 `[N, P]`: P of each candidate's path.
        entropy: float32 `[N, P]`: of the distribution that it comes from, in nats.
        layer: int64 `[P]`: 0 below the root.
        parent: int64 `[N, P]`: place of its parent, -1 for the root.
        accepted: bool `[N, P]`.
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
        """What the classifier sees: `[N, P, 3]`."""
        return torch.stack((self.probability, self.entropy, self.layer.float().expand_as(self.entropy)), -1)

    def along_paths(self, sure: Tensor) -> Tensor:
        """The smallest of `sure` `[N, P]` on each candidate's path."""
        worth = sure.clone()
        for layer in range(1, self.depth):
            here = self.layer == layer
            worth[:, here] = torch.minimum(worth[:, here], worth.gather(1, self.parent[:, here]))
        return worth


@dataclass(frozen=True)
class Watched(Eagle2):
    """EAGLE-2's trees, whose growers are kept."""

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
    """Greedy answers to prompts, one after the other, until there are enough trees.

    Args:
        loaded: the model with its tokenizer.
        engine: of the model.
        open_draft: makes the draft that grows trees of a kind.
        prompts: tokens int32 `[T]` each.
        top_k, depth: of the trees.
        trees: how many.
        answer: tokens of an answer, at most.
        say: gets lines for people.

    Raises:
        EffpassError: the prompts give none.
    """
    kind = Watched(top_k, depth, min(256, 1 + top_k * depth))
    speculator = Speculator(engine, open_draft(kind), switches=False)
    longest = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", 1 << 20)
    capacity = min(longest, max(map(len, prompts), default=0) + answer)  # one size of buffers for all
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
    """Of each tree of one answer: probability, entropy, parent and acceptance `[P]`."""
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
                of_layers = grower.entropies[-kind.depth :]  # those of the last tree, or of the graph that grew it
                # A frontier's entropies, once for each child.
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
    said = torch.tensor([*text, *[-1] * kind.depth])
    for column, tokens, probability, parent, entropy in grown:
        accepted = tokens == said[(column + layer).clamp(max=len(said) - 1)]
        for number in range(1, kind.depth):
            here = layer == number
            accepted[here] &= accepted[parent[here]]
        rows.append([probability, entropy, parent, accepted])
    return rows
