"""Drafts and trees for the tests of speculative decoding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import families
import torch
from torch import Tensor
from transformers import LlamaConfig

import effpass
from effpass.lowering.ops.ancestors import relations
from effpass.lowering.ops.tree_growth import positions_at
from effpass.runtime.speculative import C2T, Classifier, Eagle2, EagleHead, HeadConfig, Static, chain
from effpass.runtime.speculative.tree import TokenTree

__all__ = [
    "KINDS",
    "LIKELY",
    "PEAKED",
    "Fixed",
    "classifier",
    "classifier_of",
    "draft_model",
    "layer_config",
    "make_head",
    "prepared",
    "sure_checkpoint",
]


def classifier(seed: int = 0, offset: float = 0.0) -> Classifier:
    """A small one, random, whose logits are moved by `offset`."""
    torch.manual_seed(seed)
    made = Classifier(8)
    with torch.no_grad():
        made.outer.bias.add_(offset)
    return Classifier.of(made.state_dict())


def classifier_of(inner: list[list[float]], bias: list[float], outer: list[float], offset: float) -> Classifier:
    """The one with these weights W₁ `[h, 3]`, b₁ `[h]`, w₂ `[h]` and b₂."""
    names = ("inner.weight", "inner.bias", "outer.weight", "outer.bias")
    return Classifier.of(dict(zip(names, map(torch.tensor, (inner, bias, [outer], [offset])), strict=True)))


#: Keeps a part of the nodes that a tiny random model with 96 tokens proposes, all of them nearly equally likely: below
#: the root those with P > 1.4 / 96, and further down those after distributions with H < 4.5505. Its logit is
#: 20 (96 P − 1.4) + 500 (4.5505 − H) below the root, and without the 1.4 further down, where 96 P is about 0.
PICKY = classifier_of(
    [[96.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]], [0.0, 5.0, 0.0, -1.0],
    [20.0, 500.0, 28.0, -28.0], -28.0 - 500 * (5 - 4.5505),
)  # fmt: skip

KINDS: dict[str, Any] = {
    "chain": chain(3),
    "chain of one": chain(1),
    "static": Static((3, 2, 1)),
    "eagle2": Eagle2(4, 3, 12),
    "eagle2, smaller than its layers": Eagle2(6, 3, 4),
    "eagle2, larger than its pool": Eagle2(2, 2, 20),
    "eagle2, two words": Eagle2(9, 2, 70),
    "c2t": C2T(PICKY, 0.5, 4, 3, 12),
    "c2t, keeps all": C2T(classifier(), 0.0, 3, 4, 16),
    "c2t, keeps none": C2T(classifier(), 1.0, 3, 2, 8),
}


#: Settings of a small model whose logits are far from even and depend on the text, for tests of distributions.
PEAKED: dict[str, Any] = {
    "vocab_size": 8,
    "initializer_range": 0.3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
#: Its confidence is above one half for paths of probability 0.15 or more.
LIKELY = classifier_of([[1.0, 0.0, 0.0]], [0.0], [20.0], -3.0)


def draft_model(how: str, family: str = "llama", **overrides: Any) -> Any:
    """The target itself, its opposite, another model, or one a quarter of the way to the other: *near*."""
    model = families.make(family, seed=3 if how == "random" else 0, **overrides)
    if how == "near":
        other = families.make(family, seed=3, **overrides)
        with torch.no_grad():
            for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
                ours.lerp_(theirs, 0.25)
    if how == "wrong":
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(-head.weight.detach())
    return model


def prepared(family: str = "llama", **overrides: Any) -> Any:
    return effpass.prepare(families.make(family, **overrides), {"version": 1, "passes": []})


def layer_config(**overrides: Any) -> Any:
    common = {name: families.COMMON[name] for name in families.COMMON if not name.endswith("token_id")}
    return LlamaConfig(**{**common, "num_hidden_layers": 1, "head_dim": 16, **overrides})


def make_head(model: Any, vocabulary: int = 40, layers: int = 1, **flags: bool) -> EagleHead:
    """A random head with every second token, or with all."""
    torch.manual_seed(1)
    head = EagleHead(HeadConfig(layer_config(num_hidden_layers=layers), vocabulary, (0, 1), **flags))
    if head.d2t is not None:
        head.choose_tokens(torch.arange(vocabulary) * 2 + 1)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    head.share(model)
    return head.eval().requires_grad_(False)


class Fixed:
    """Proposes what follows in known texts, as a tree of a given shape.

    Args:
        texts: int64 `[B, C]`: prompts with answers.
        parents: of the tree's nodes, the root first.
        wrong: nodes that propose another token than the text's.
    """

    taps: tuple[int, ...] = ()
    models: tuple[Any, ...] = ()

    def __init__(self, texts: Tensor, parents: list[int], wrong: tuple[int, ...] = ()) -> None:
        self.texts, self.wrong = texts, list(wrong)
        self.parents = torch.tensor([parents]).expand(len(texts), -1)
        self.depths, self.ancestors = relations(self.parents, len(parents))
        self.kind = chain(int(self.depths.max()))
        object.__setattr__(self.kind, "widths", (1,) * (len(parents) - 1))  # room for every node

    def check(self, target: Any) -> None: ...

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext()

    recording = running

    def start(self, target: Any) -> Fixed:
        return self

    def begin(self, *_: Any) -> None: ...

    def extend(self, progress: Any) -> Tensor:
        return progress.root

    def propose(self, progress: Any, sampled: Any) -> TokenTree:
        column = (progress.count[:, None] - 1 + self.depths).clamp(max=self.texts.shape[1] - 1)
        tokens = self.texts.gather(1, column)
        tokens[:, self.wrong] = 95 - tokens[:, self.wrong]
        tokens[:, 0] = progress.root
        positions = positions_at(progress.position, self.depths)
        ancestors = torch.where((positions >= 0)[..., None], self.ancestors, 0)
        return TokenTree(tokens, self.parents, positions, ancestors, int(self.depths.max()))

    def state(self) -> list[Tensor]:
        return []

    def has_moved(self) -> bool:
        return False


def sure_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A checkpoint whose next token follows from the one before, and clearly: its layers add next to nothing."""
    from tiny_tuning import checkpoint
    from transformers import LlamaForCausalLM

    checkpoint(folder, **overrides)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
        model.lm_head.weight.mul_(60)
    model.save_pretrained(folder)
    return folder
