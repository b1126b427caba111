"""Trees grown by EAGLE-2's and C2T's rules, in loops over texts, beside what the operators grow."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tree_shapes import words_of

Language = Callable[[int, tuple[int, ...]], list[float]]


def language(vocabulary: int, seed: int) -> Language:
    """Log-probabilities of the next token, for a row and a text; those of different tokens differ."""
    known: dict[tuple[int, tuple[int, ...]], list[float]] = {}

    def next_token(row: int, text: tuple[int, ...]) -> list[float]:
        if (row, text) not in known:
            generator = torch.Generator().manual_seed(hash((row, text, seed)) % 2**31)
            known[row, text] = (torch.randn(vocabulary, generator=generator) * 2).log_softmax(-1).tolist()
        return known[row, text]

    return next_token


class Steps:
    """A draft that speaks a language."""

    def __init__(self, speaks: Language, names: Tensor | None, device: torch.device, k: int) -> None:
        self.speaks, self.names, self.device, self.k = speaks, names, device, k
        self.texts: dict[int, list[list[tuple[int, ...]]]] = {}
        self.faults = 0

    def first(self, rows: int) -> Tensor:
        self.layer: list[list[tuple[int, ...]]] = [[()] for _ in range(rows)]
        return self._logits()[:, 0]

    def step(self, tokens: Tensor, positions: Tensor, ancestors: Tensor, up: Tensor, first: int) -> Tensor:
        rows, k = tokens.shape
        layer = [[(*self.layer[b][int(up[b, i])], int(tokens[b, i])) for i in range(k)] for b in range(rows)]
        self.texts[first // self.k] = layer
        for b in range(rows):
            for i in range(k):
                if int(positions[b, i]) < 0:
                    self.faults += bool(ancestors[b, i].any())
                    continue
                text = layer[b][i]
                slots = [
                    d * self.k + self.texts[d][b].index(text[: d + 1]) for d in range(len(text))
                ]  # texts are distinct
                self.faults += not torch.equal(ancestors[b, i].cpu(), words_of([slots], ancestors.shape[2])[0])
                self.faults += int(positions[b, i]) != 10 * (b + 1) + len(text)
        self.layer = layer
        return self._logits()

    def _logits(self) -> Tensor:
        own = 0 if self.names is None else self.names.cpu()
        logits = []
        for b, texts in enumerate(self.layer):
            named = [self.speaks(b, text) for text in texts]
            of_row = torch.tensor(named)
            if self.names is not None:  # the draft has every second token
                of_row = of_row[:, torch.arange(of_row.shape[1] // 2) + own]
            logits.append(of_row)
        return torch.stack(logits).to(self.device)


def grown(
    speaks: Language, row: int, k: int, depth: int, nodes: int, least: float, names: Tensor | None, classifier: Any,
    vocabulary: int,
) -> dict[tuple[int, ...], float]:  # fmt: skip
    """Texts of the nodes of EAGLE-2's or C2T's tree with their worth, as the papers have it."""
    tokens = range(vocabulary) if names is None else [i + int(n) for i, n in enumerate(names)]
    pool: dict[tuple[int, ...], float] = {}
    frontier: list[tuple[tuple[int, ...], float, float]] = [((), 1.0, 1.0)]
    for d in range(depth):
        found = []
        for text, probability, worth in frontier:
            every = [speaks(row, text)[t] for t in tokens]
            whole = math.log(sum(map(math.exp, every)))
            log_p = {t: v - whole for t, v in zip(tokens, every, strict=True)}
            entropy = -sum(math.exp(v) * v for v in log_p.values())
            for token in sorted(log_p, key=log_p.__getitem__, reverse=True)[:k]:
                p = probability * math.exp(log_p[token])
                sure = p
                if classifier:
                    w1, b1, w2, b2 = (x.double() for x in classifier)
                    hidden = (w1 @ torch.tensor([p, entropy, d], dtype=torch.float64) + b1).relu()
                    sure = float((w2[0] @ hidden + b2[0]).sigmoid())
                if sure >= least:
                    found.append(((*text, token), p, sure, min(worth, sure)))
        found.sort(key=lambda f: -f[2])
        if not classifier:
            pool.update({text: worth for text, _, _, worth in found})
        frontier = [(text, p, worth) for text, p, _, worth in found[:k]]
        if classifier:
            pool.update({text: worth for text, _, worth in frontier})
    best = sorted(pool, key=lambda text: -pool[text])[: nodes - 1]
    return {text: pool[text] for text in best}


def growth_errors(
    ops: Any, rows: int, k: int, depth: int, nodes: int, least: float, units: int, renamed: bool, **of: Any
) -> dict[str, float]:
    """Nodes that differ, and what is wrong in positions, ancestors and order."""
    from effpass.runtime.speculative.growing import Eagle2, Growing

    device, vocabulary = of["device"], 2 * max(k, 12)
    torch.manual_seed(k * depth)
    classifier = [torch.randn(units, 3), torch.randn(units), torch.randn(1, units) / 2, torch.randn(1)] if units else []
    names = torch.arange(vocabulary // 2, device=device) + 1 if renamed else None  # tokens 1, 3, 5, ...
    kind = Eagle2(k, depth, nodes)
    growing = Growing(
        kind, rows, device, least=least, keeps_all=not units, classifier=[x.to(device) for x in classifier]
    )
    growing.operators = ops
    speaks = language(vocabulary, seed=depth)
    steps = Steps(speaks, names, device, k)
    root = torch.arange(rows, device=device) + 90
    position = torch.tensor([10 * (b + 1) for b in range(rows - 1)] + [-1 if rows > 1 else 10], dtype=torch.int32)
    tree = growing.grow(steps, root, position.to(device), steps.first(rows), None)
    found = {"nodes": 0.0, "order": 0.0, "structure": float(steps.faults)}
    tokens, parents, positions, ancestors = (
        x.tolist() for x in (tree.tokens, tree.parents, tree.positions, tree.ancestors)
    )
    for b in range(rows):
        expected = grown(speaks, b, k, depth, nodes, least, names, classifier, vocabulary)
        texts: list[tuple[int, ...]] = [()]
        above = [[0]]
        alive = int(position[b]) >= 0
        found["structure"] += tokens[b][0] != 90 + b or parents[b][0] != -1
        for i in range(1, nodes):
            parent = parents[b][i]
            if parent < 0:
                found["structure"] += positions[b][i] != -1
                above.append([])
                continue
            found["structure"] += not parent < i or i > len(texts)
            texts.append((*texts[parent], tokens[b][i]))
            above.append([*above[parent], i])
            found["structure"] += positions[b][i] != (int(position[b]) + len(texts[i]) if alive else -1)
        found["structure"] += not torch.equal(torch.tensor(ancestors[b]), words_of(above, len(ancestors[b][0])))
        if alive:  # of a row that has ended nobody looks at the tree
            found["nodes"] += len(set(texts[1:]) ^ set(expected)) + (len(texts) - 1 != len(expected))
    return found
