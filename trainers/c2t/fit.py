"""From trees to a classifier: logistic loss, with so many candidates that were refused for each that was accepted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from effpass.core.errors import EffpassError
from effpass.runtime.speculative.classifier import Classifier
from effpass.trainers.c2t.trees import Trees

__all__ = ["fit"]

_NEGATIVES = 16  # for a positive; the paper gives no number
_BATCH, _RATE = 1024, 1e-3


def fit(trees: Trees, *, hidden: int, epochs: int, seed: int, say: Callable[[str], None]) -> Classifier:
    """A classifier of `hidden` units, by Adam.

    Raises:
        EffpassError: nothing, or everything, was accepted.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    features, labels = trees.features().flatten(0, 1), trees.accepted.flatten()
    positive, negative = labels.nonzero().flatten(), (~labels).nonzero().flatten()
    if not len(positive) or not len(negative):
        which = "no candidate" if not len(positive) else "every candidate"
        raise EffpassError(f"{which} of {len(trees)} trees was accepted: there is nothing to tell apart")
    model = Classifier(hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    for epoch in range(epochs):
        count = min(len(negative), _NEGATIVES * len(positive))
        chosen = negative[torch.randperm(len(negative), generator=generator)[:count]]
        every = torch.cat((positive, chosen))
        every = every[torch.randperm(len(every), generator=generator)]
        total = 0.0
        for part in every.split(_BATCH):
            loss = binary_cross_entropy_with_logits(model(features[part]), labels[part].float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * len(part)
        say(f"epoch {epoch + 1}/{epochs}  loss {total / len(every):.4f}")
    return model.eval().requires_grad_(False)
