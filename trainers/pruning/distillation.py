"""Distillation loss between the whole model (teacher) and the pruned model (student), used before and after the cut.

    L = task · CE(data) + logits · KL(teacher ‖ student) + hidden · mean over layers of ‖h_s − h_t‖² / ‖h_t‖²

CE is the cross entropy of the data, and h_s and h_t are the hidden states of student and teacher. With a large
vocabulary, logits are the largest tensor of a step. They are therefore computed from the last hidden states for a few
tokens at a time, and recomputed in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, nll_loss
from torch.utils.checkpoint import checkpoint

from effpass.core.errors import EffpassError, ModelError

__all__ = ["PIECE", "Distillation", "check_head", "hidden_states", "make_head"]

# Maximum number of logits that are computed at once.
PIECE = 1 << 24

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Distillation:
    """Weights of the terms of the loss.

    Attributes:
        task: weight of the cross entropy of the data.
        logits: weight of the KL divergence from the teacher, a mean over tokens.
        hidden: weight of the relative squared distance between hidden states, a mean over layers.
    """

    task: float = 0.5
    logits: float = 1.0
    hidden: float = 1.0

    def __post_init__(self) -> None:
        for name in ("task", "logits", "hidden"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise EffpassError(f"{name}: got {getattr(self, name)}, expected at least 0")
        if not self.task + self.logits:
            raise EffpassError("both the task and the logits have weight 0", hint="give one of them a weight")

    def loss(self, student: Any, teacher: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a micro-batch.

        Args:
            student: model that is trained.
            teacher: whole model, which gets no gradients. If its depth differs from that of the student, the term
                `hidden` is left out.
            ids: token ids, int64 `[B, T]`.

        Returns:
            The loss, and its unweighted terms without gradients: `task` and `logits` in nats per token, `hidden` as a
            relative squared distance.
        """
        with torch.no_grad():
            theirs = hidden_states(teacher, ids)
        ours = hidden_states(student, ids)
        task, logits = _over_tokens(make_head(student), make_head(teacher), ours[-1], theirs[-1], ids)
        loss = self.task * task + self.logits * logits
        parts = {"task": task.detach(), "logits": logits.detach()}
        if self.hidden and len(ours) == len(theirs):
            pairs = zip(ours[1:], theirs[1:], strict=True)
            far = torch.stack([checkpoint(_distance, a, b, use_reentrant=False) for a, b in pairs]).mean()
            loss = loss + self.hidden * far
            parts["hidden"] = far.detach()
        return loss, parts


def hidden_states(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """Return the embeddings and the output of each layer, `[B, T, D]` each; the last one is the input of the head."""
    return model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states


def make_head(model: Any) -> Head:
    """Return a function that computes logits from the last hidden states."""
    output = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is None:
        return output
    return lambda hidden: torch.tanh(output(hidden) / cap) * cap


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise a :class:`ModelError` if the model's logits differ from those that :func:`make_head` computes."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    made = make_head(model)(out.hidden_states[-1])
    if not torch.allclose(made.float(), out.logits.float(), rtol=1e-2, atol=1e-2 * float(out.logits.abs().max())):
        raise ModelError(f"{type(model).__name__} computes its logits in a way that is not known here")


def _over_tokens(ours: Head, theirs: Head, student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross entropy and the KL divergence, as means over all tokens except the first of each sequence."""

    def piece(h: Tensor, g: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        found = ours(h).float().log_softmax(-1)
        with torch.no_grad():
            wanted = theirs(g).float().log_softmax(-1)
        return (
            nll_loss(found, labels, reduction="sum"),
            kl_div(found, wanted, reduction="sum", log_target=True),
        )

    h, g = student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1)
    labels = ids[:, 1:].flatten()
    vocabulary = int(getattr(ours, "out_features", 0) or 1 << 16)
    size = max(1, PIECE // vocabulary)
    sums = [
        checkpoint(piece, h[i : i + size], g[i : i + size], labels[i : i + size], use_reentrant=False)
        for i in range(0, len(labels), size)
    ]
    task, logits = (torch.stack(parts).sum() / len(labels) for parts in zip(*sums, strict=True))
    return task, logits


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Relative squared distance."""
    return (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean()
