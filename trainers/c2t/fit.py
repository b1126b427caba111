"""Training of the C2T classifier on collected trees.

The loss is logistic, on all accepted candidates and a random subset of the rejected ones in each epoch. Features are
standardized during training; afterwards the standardization is folded into the first layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from effpass.core.errors import EffpassError
from effpass.runtime.speculative.classifier import Classifier
from effpass.trainers.c2t.trees import Trees

__all__ = ["fit"]

_NEGATIVES = 16  # rejected candidates per accepted one; the paper gives no number
_BATCH, _RATE = 1024, 1e-2  # the learning rate decays linearly to 0


def fit(trees: Trees, *, hidden: int, epochs: int, seed: int, say: Callable[[str], None]) -> Classifier:
    """Train a classifier with Adam.

    Args:
        trees: trees to train on.
        hidden: number of hidden units.
        epochs: number of passes over the trees.
        seed: seed of the initialization and of the choice of candidates.
        say: function that receives messages for the user.

    Raises:
        EffpassError: if no candidate, or every candidate, was accepted.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    features, labels = trees.features().flatten(0, 1), trees.accepted.flatten()
    positive, negative = labels.nonzero().flatten(), (~labels).nonzero().flatten()
    if not len(positive) or not len(negative):
        which = "no candidate" if not len(positive) else "every candidate"
        raise EffpassError(f"{which} of {len(trees)} trees was accepted: there is nothing to tell apart")
    mean, deviation = features.mean(0), features.std(0).clamp(min=1e-6)
    features = (features - mean) / deviation
    model = Classifier(hidden)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs)
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
        falling.step()
        say(f"epoch {epoch + 1}/{epochs}  loss {total / len(every):.4f}")
    with torch.no_grad():
        model.inner.weight.div_(deviation)
        model.inner.bias.sub_(model.inner.weight @ mean)
    return model.eval().requires_grad_(False)
