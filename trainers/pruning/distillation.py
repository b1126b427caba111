"""The loss: how far the pruned model is from the whole one, in logits and hidden states, and the task's own.

    L = task · CE(data) + KL(teacher ‖ student) + hidden · mean over layers of ‖h_s − h_t‖² / ‖h_t‖²

Logits of a large vocabulary are the largest tensor of a step. They are computed for some tokens at a time, from the
last hidden states, and again in the backward pass.
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

# Logits of a piece, in elements.
PIECE = 1 << 24

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Distillation:
    """Weights of the loss's parts.

    Attributes:
        task: of the cross entropy of the data.
        logits: of the divergence from the teacher, mean over tokens.
        hidden: of the relative squared distance of the hidden states, mean over layers.
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
        """
        Args:
            student: learns.
            teacher: does not; the same depth where `hidden` is not 0.
            ids: int64 `[B, T]`.

        Returns:
            The loss, and its parts without gradients, in nats a token (`task`, `logits`) and as a share (`hidden`).
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
    """Embeddings, what each layer gives, and in the last place what the head reads: `[B, T, D]` each."""
    return model(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states


def make_head(model: Any) -> Head:
    """What turns the last hidden states into logits."""
    output = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    if cap is None:
        return output
    return lambda hidden: torch.tanh(output(hidden) / cap) * cap


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise ModelError where logits are more than :func:`make_head` makes of the last hidden states."""
    ids = torch.arange(8, device=next(model.parameters()).device)[None]
    out = model(input_ids=ids, use_cache=False, output_hidden_states=True)
    made = make_head(model)(out.hidden_states[-1])
    if not torch.allclose(made.float(), out.logits.float(), rtol=1e-2, atol=1e-2 * float(out.logits.abs().max())):
        raise ModelError(f"{type(model).__name__} computes its logits in a way that is not known here")


def _over_tokens(ours: Head, theirs: Head, student: Tensor, teacher: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy and divergence, means over the tokens that have one before."""

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
    return (ours.float() - theirs.float()).square().mean() / theirs.float().square().mean()
