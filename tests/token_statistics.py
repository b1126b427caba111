"""Whether sampled texts follow given distributions: Pearson's χ² of every column and every pair of neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["FALSE_ALARM", "conditionals", "drawn_from", "joint_of", "p_value"]

#: Texts that are drawn as they should be have a smaller p-value in one case of a million.
FALSE_ALARM = 1e-6

_LEAST = 10.0  # expected draws of a cell; rarer ones are counted together


def conditionals(model: Any, prompt: Tensor, new: int, **how: Any) -> list[Tensor]:
    """Probabilities of each of `new` tokens after those before, `[V]`, `[V, V]`, ..., as transformers samples them.

    Args:
        model: a transformers causal LM that nothing was done to.
        prompt: int64 `[1, T]`.
        new: number of tokens.
        how: arguments of `generate`.
    """
    vocabulary, found, texts = model.config.vocab_size, [], prompt
    one: dict[str, Any] = {"do_sample": True, "top_k": 0, "eos_token_id": None, "pad_token_id": 0, **how}
    one |= {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    every = torch.arange(vocabulary, device=prompt.device)
    for column in range(new):
        (scores,) = model.generate(texts, attention_mask=torch.ones_like(texts), **one).scores
        found.append(scores.double().softmax(-1).view((vocabulary,) * (column + 1)).cpu())
        texts = torch.cat((texts.repeat_interleave(vocabulary, 0), every.repeat(len(texts))[:, None]), 1)
    return found


def joint_of(given: list[Tensor]) -> Tensor:
    """Probabilities of whole texts, from those of each token after the ones before."""
    joint = torch.ones((), dtype=torch.double)
    for conditional in given:
        joint = joint[..., None] * conditional
    return joint


def drawn_from(joint: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Texts int64 `[count, new]`."""
    cells = torch.multinomial(joint.flatten(), count, replacement=True, generator=generator)
    return torch.stack(torch.unravel_index(cells, joint.shape), 1)


def p_value(joint: Tensor, drawn: Tensor) -> float:
    """The probability of texts at least as far from `joint` in one of the statistics; 0 if one of them can't be.

    Args:
        joint: probabilities of the texts, double `[V, V, ...]`.
        drawn: int64 `[count, new]`, independent texts.
    """
    columns, least, statistics = range(joint.dim()), 1.0, 0
    for kept in [(column,) for column in columns] + [(column, column + 1) for column in columns[:-1]]:
        gone = [column for column in columns if column not in kept]
        expected = joint.sum(gone) if gone else joint
        cells = torch.zeros_like(expected)
        cells.index_put_(tuple(drawn[:, kept].T), torch.ones(len(drawn)).double(), accumulate=True)
        least, statistics = min(least, _pearson(expected.flatten() * len(drawn), cells.flatten())), statistics + 1
    return min(1.0, least * statistics)


def _pearson(expected: Tensor, found: Tensor) -> float:
    can_be = expected > 0
    if bool(found[~can_be].any()):
        return 0.0
    expected, order = expected[can_be].sort()
    found = found[can_be][order]
    rare = max(int((expected < _LEAST).sum()), int((expected.cumsum(0) < _LEAST).sum()) + 1)
    expected, found = (torch.cat((x[:rare].sum()[None], x[rare:])) for x in (expected, found))
    if len(expected) == 1:
        return 1.0
    distance = ((found - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), distance / 2))
