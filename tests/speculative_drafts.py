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

__all__ = ["KINDS", "Fixed", "classifier", "draft_model", "layer_config", "make_head", "prepared", "sure_checkpoint"]


def classifier(seed: int = 0, offset: float = 0.0) -> Classifier:
    """A small one, random, whose logits are moved by `offset`."""
    torch.manual_seed(seed)
    made = Classifier(8)
    with torch.no_grad():
        made.outer.bias += offset
    return Classifier.of(made.state_dict())


KINDS: dict[str, Any] = {
    "chain": chain(3),
    "chain of one": chain(1),
    "static": Static((3, 2, 1)),
    "eagle2": Eagle2(4, 3, 12),
    "eagle2, smaller than its layers": Eagle2(6, 3, 4),
    "eagle2, larger than its pool": Eagle2(2, 2, 20),
    "eagle2, two words": Eagle2(9, 2, 70),
    "c2t": C2T(classifier(), 0.45, 4, 3, 12),
    "c2t, keeps all": C2T(classifier(), 0.0, 3, 4, 16),
    "c2t, keeps none": C2T(classifier(), 1.0, 3, 2, 8),
}


def draft_model(how: str, family: str = "llama", **overrides: Any) -> Any:
    """The target itself, its opposite, or another model."""
    model = families.make(family, seed=3 if how == "random" else 0, **overrides)
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
