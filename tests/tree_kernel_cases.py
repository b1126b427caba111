"""The operators of token trees against loops in Python: references, kernels on a GPU or, run as a program, without one.

`python tree_kernel_cases.py interpret` runs the kernels through Triton's interpreter, and `compile` compiles them for a
GPU that is not there. Both print JSON.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_cases import error
from offline_kernels import compile_instead
from torch import Tensor
from tree_growth_cases import growth_errors
from tree_shapes import ancestors_of, random_parents, words_of
from triton_interpreter import set_up

MODULES = (
    "tree_attention", "tree_blocks", "chosen_channels", "top_tokens", "tree_growth", "tree_acceptance", "token_noise",
    "ring_buffer",
)  # fmt: skip
KERNELS = (
    "_attend", "_top", "_grow", "_choose", "_accept", "_take", "_move", "_noise", "_up", "_down", "_largest", "_write",
    "_read",
)  # fmt: skip


# -- tree_attention ---------------------------------------------------------------------------------------------------


def attention_case(
    B: int,
    H: int,
    G: int,
    T: int,
    first: int,
    nodes: int,
    K: int,
    V: int,
    window: int,
    softcap: float,
    chosen: tuple[int, ...] = (),
    **of: Any,
) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of `tree_attention`, and what it gives: by a loop over queries, each with its slots gathered.

    Of `chosen` blocks of 64 slots, odd key-value heads have all but the second.
    """
    torch.manual_seed(first + T)
    device = of["device"]
    query = torch.randn(B, T, H, K, **of).transpose(1, 2)
    keys, values = torch.randn(B, G, first + nodes, K, **of), torch.randn(B, G, first + nodes, V, **of)
    lengths = [max(1, first - 3 * b) for b in range(B)]
    key_positions = torch.full((B, first + nodes), -1, dtype=torch.int32)
    query_positions = torch.full((B, T), -1, dtype=torch.int32)
    words = -(-nodes // 64)

    def of_head(g: int) -> list[int]:
        return [c for i, c in enumerate(chosen) if g % 2 == 0 or i != 1]

    ancestors = torch.zeros(B, T, words, dtype=torch.long)
    expected = torch.zeros(B, T, H, V, dtype=torch.float64, device=device)
    padding = 2  # of the first row's prompt
    for b, length in enumerate(lengths):
        parents = random_parents(nodes, nodes // 5 if nodes == T else 0, seed=b)
        key_positions[b, :length] = torch.arange(length)
        if b == 0:
            key_positions[b, :length] = (torch.arange(length) - padding).clamp(min=-1)
        # Behind the prefix stands what an earlier, longer one left.
        key_positions[b, length:first] = torch.arange(length, first)
        at = length - (padding if b == 0 else 0)
        above = [ancestors_of(node, parents) for node in range(nodes)]
        key_positions[b, first:] = torch.tensor([at + len(a) - 1 if a else -1 for a in above])
        asked = range(nodes - T, nodes)  # the last nodes
        query_positions[b] = key_positions[b, first + nodes - T :]
        ancestors[b] = words_of([above[node] for node in asked], words)
        for t, node in enumerate(asked):
            position = int(query_positions[b, t])
            for g in range(G):
                seen = [s for s in range(length) if 0 <= key_positions[b, s] <= position]
                if chosen:
                    seen = [s for s in seen if s // 64 in of_head(g)]
                seen += [first + j for j in sorted(above[node])]
                seen = [s for s in seen if not window or position - int(key_positions[b, s]) < window]
                if not above[node] or not seen:
                    continue
                heads = slice(g * (H // G), (g + 1) * (H // G))
                score = query[b, heads, t].double() @ keys[b, g, seen].double().mT * K**-0.5
                score = softcap * torch.tanh(score / softcap) if softcap else score
                expected[b, t, heads] = score.softmax(-1) @ values[b, g, seen].double()
    on_device = [x.to(device) for x in (key_positions, query_positions, torch.tensor(lengths).int(), ancestors)]
    lists = [[*of_head(g), *[-1] * (len(chosen) + 1 - len(of_head(g)))] for g in range(G)]
    listed = torch.tensor([lists] * B, dtype=torch.int32, device=device) if chosen else None
    return (query, keys, values, *on_device, first, K**-0.5, window, softcap, listed, 64 if chosen else 0), expected


def attention_errors(ops: Any, *case: Any, **of: Any) -> dict[str, float]:
    arguments, expected = attention_case(*case, **of)
    got = ops.tree_attention(*arguments)
    unseen = (expected == 0).all(-1)
    return {"attention": error(got, expected), "unseen": float(got[unseen].abs().sum())}


# -- top_tokens -------------------------------------------------------------------------------------------------------


def top_errors(ops: Any, rows: int, vocabulary: int, k: int, few: bool, **of: Any) -> dict[str, float]:
    """Differences in nats, and tokens that are not the first ones; `few` values have many equal logits."""
    torch.manual_seed(vocabulary)
    logits = torch.randint(-9, 9, (rows, vocabulary)).double() if few else torch.randn(rows, vocabulary).double() * 3
    logits = logits.to(**of)
    logits[0, : vocabulary // 2] = float("-inf")
    values, tokens, entropy = (x.cpu() for x in ops.top_tokens(logits, k))
    found = {"log p": 0.0, "entropy": 0.0, "tokens": 0.0, "order": 0.0}
    for row, x in enumerate(logits.double().tolist()):
        highest = max(x)
        whole = highest + math.log(sum(math.exp(v - highest) for v in x))
        log_p = [v - whole for v in x]
        order = sorted(range(vocabulary), key=lambda i: (-x[i], i))[:k]
        mine = tokens[row].tolist()
        found["tokens"] += len(set(mine)) != k
        found["order"] += mine != order
        for j, token in enumerate(order):
            if math.isfinite(log_p[token]):
                found["log p"] = max(found["log p"], abs(values[row, j].item() - log_p[token]))
                found["tokens"] += x[mine[j]] != x[token]
            else:
                found["tokens"] += values[row, j].item() != log_p[token]
        sure = -sum(math.exp(v) * v for v in log_p if math.isfinite(v))
        found["entropy"] = max(found["entropy"], abs(entropy[row].item() - sure))
    return found


# -- around the verified tree -----------------------------------------------------------------------------------------


def acceptance_errors(ops: Any, rows: int, nodes: int, steps: int, **of: Any) -> dict[str, float]:
    """What differs from a loop after three trees: texts, counts, roots, positions, paths, totals."""
    device, generator = of["device"], torch.Generator().manual_seed(nodes)
    long: Any = {"dtype": torch.long, "device": device}
    columns, limit, ends = 30, 14, [5, -1, 6]
    ids, count, root = torch.zeros(rows, columns, **long), torch.full((rows,), 4, **long), torch.zeros(rows, **long)
    position = torch.tensor([3 + b if b != 1 else -1 for b in range(rows)], dtype=torch.int32, device=device)
    goes_on, totals = torch.zeros((), dtype=torch.bool, device=device), torch.zeros(2, **long)
    expected = [[0] * 4 for _ in range(rows)]
    at, total, faults = position.tolist(), [0, 0], 0
    for turn in range(4):
        parents = [random_parents(nodes, nodes // 4, seed=9 * turn + b) for b in range(rows)]
        tokens = torch.randint(3, (rows, nodes), generator=generator)
        choices = torch.randint(3, (rows, nodes), generator=generator)
        choices[choices == 2] = torch.tensor(5 if turn > 1 else 1)
        path, taken = ops.accept_tokens(
            choices.to(device), tokens.to(device), torch.tensor(parents, device=device), torch.tensor(ends, **long),
            torch.tensor(limit, **long), ids, count, position, root, goes_on, totals, steps,
        )  # fmt: skip
        for b in range(rows):
            walked, node = [], 0
            alive = at[b] >= 0
            while alive and node is not None:
                walked.append(node)
                token = int(choices[b, node])
                expected[b].append(token)
                if token in (5, 6) or len(expected[b]) >= limit:
                    alive = False
                below = [i for i in range(1, nodes) if parents[b][i] == node and int(tokens[b, i]) == token]
                node = below[0] if below and alive and len(walked) < steps else None
            if walked:
                total[0] += 1
                total[1] += sum(parent >= 0 for parent in parents[b])
                at[b] = at[b] + len(walked) if alive else -1
                faults += int(root[b]) != expected[b][-1]
            faults += path[b].tolist() != walked + [0] * (steps - len(walked))
            faults += int(taken[b]) != (len(walked) if alive else 0)
        faults += bool(goes_on) != any(a >= 0 for a in at)
    texts = [ids[b, : int(count[b])].tolist() != expected[b] for b in range(rows)]
    rest = sum(int(ids[b, int(count[b]) :].abs().sum()) for b in range(rows))
    return {
        "texts": float(sum(texts) + rest),
        "state": float(faults + (position.tolist() != at) + (totals.tolist() != total)),
    }


def take_errors(ops: Any, rows: int, width: int, **of: Any) -> dict[str, float]:
    device = of["device"]
    long: Any = {"dtype": torch.long, "device": device}
    ids = torch.arange(rows * 40, **long).view(rows, 40)
    count = torch.tensor([9 + 3 * b for b in range(rows)], **long)
    position = torch.tensor([7 + b if b != 1 else -1 for b in range(rows)], dtype=torch.int32, device=device)
    entered = torch.tensor([9 - b for b in range(rows)], **long)
    before = entered.tolist()
    tokens, positions, chain, taken = ops.take_tokens(ids, count, position, entered, width)
    faults = 0
    for b in range(rows):
        end = int(count[b]) if b != 1 else 0
        columns = list(range(before[b], min(end, before[b] + width)))
        short = width - len(columns)
        faults += tokens[b].tolist() != [int(ids[b, c]) for c in columns] + [0] * short
        faults += positions[b].tolist() != [int(position[b]) - (end - 1 - c) for c in columns] + [-1] * short
        faults += chain[b, :, 0].tolist() != [2 ** (i + 1) - 1 for i in range(len(columns))] + [0] * short
        faults += (int(taken[b]), int(entered[b])) != (len(columns), before[b] + len(columns))
    return {"taken": float(faults)}


def move_errors(ops: Any, L: int, B: int, G: int, K: int, V: int, steps: int, **of: Any) -> dict[str, float]:
    """What differs in the buffers after a move; of latents both are views of one."""
    torch.manual_seed(steps)
    device, first, slots = of["device"], 20, 20 + 9
    whole = torch.randn(L, B, G, slots, K + V, **of)
    keys, values = whole[..., :K], whole[..., K:]
    positions = torch.arange(B * slots, dtype=torch.int32, device=device).view(B, slots)
    lengths = torch.tensor([5 + 2 * b for b in range(B)], dtype=torch.int32, device=device)
    path = torch.stack([torch.randperm(9)[:steps].sort().values for _ in range(B)])
    taken = torch.tensor([(steps, 0, 1)[b % 3] for b in range(B)])
    expected, expected_positions = whole.clone(), positions.clone()
    for b in range(B):
        for j in range(int(taken[b])):
            place = int(lengths[b]) + j
            expected[:, b, :, place] = whole[:, b, :, first + int(path[b, j])]
            expected_positions[b, place] = positions[b, first + int(path[b, j])]
    ops.move_slots(keys, values, positions, lengths, path.to(device), taken.to(device), first, True)
    moved = [5 + 2 * b + int(taken[b]) for b in range(B)]
    return {
        "buffers": float((whole != expected).sum()),
        "positions": float((positions != expected_positions).sum() + (lengths.tolist() != moved)),
    }


def blocks_errors(
    ops: Any, B: int, H: int, G: int, K: int, slots: int, block: int, dense_below: int, share: int, **of: Any
) -> dict[str, float]:
    """Blocks that differ from a loop's, where scores are told apart by more than rounding."""
    from effpass.lowering.ops.tree_blocks import most_blocks

    torch.manual_seed(slots)
    count = -(-slots // block)
    query, means = torch.randn(B, H, K, **of), torch.randn(B, G, count, K, **of)
    lengths = [max(1, slots - 3 * block * b - b) for b in range(B)]
    most = most_blocks(slots, block, dense_below, share)
    chosen = ops.choose_tree_blocks(
        query, means, torch.tensor(lengths, device=of["device"]).int(), most, block, dense_below, share
    )
    faults = 0
    for b, length in enumerate(lengths):
        blocks = -(-length // block)
        kept = length if length <= dense_below else dense_below + (length - dense_below) * share // 1024
        wanted = min(max(3, -(-kept // block)), most, blocks)
        for g in range(G):
            asked = query[b, g * (H // G) : (g + 1) * (H // G)].double().sum(0)
            score = [float(asked @ means[b, g, n].double()) for n in range(blocks)]
            score[0] = score[-1] = score[max(-2, -blocks)] = float("inf")
            expected = sorted(sorted(range(blocks), key=lambda n: -score[n])[:wanted])
            faults += chosen[b, g].tolist() != expected + [-1] * (most - len(expected))
    return {"blocks": float(faults)}


def channels_errors(ops: Any, tokens: int, width: int, channels: int, chosen: int, **of: Any) -> dict[str, float]:
    """Of the best of few different energies, and of the network whose other channels are 0."""
    torch.manual_seed(tokens)
    energy = torch.randint(0, 4 * channels, (channels,)).float() ** 3
    energy[1::3] = energy[0]
    order = sorted(range(channels), key=lambda c: -float(energy[c]))  # stable: of equal ones the first
    best = ops.largest_channels(energy.to(of["device"]), chosen)
    faults = best.tolist() != sorted(order[:chosen])
    x, active = torch.randn(tokens, width, **of), torch.randn(tokens, channels, **of)
    up, down = torch.randn(channels, width, **of) * width**-0.5, torch.randn(channels, width, **of).t()
    got = ops.chosen_channels(x, active, up, down, best)
    hidden = active.double() * (x.double() @ up.double().mT)
    hidden[:, [c for c in range(channels) if c not in order[:chosen]]] = 0
    return {"channels": error(got, hidden @ down.double().mT), "largest": float(faults)}


def noise_errors(ops: Any, rows: int, steps: int, vocabulary: int, **of: Any) -> dict[str, float]:
    """Relative error of a few numbers, from SplitMix64 in Python's integers."""
    device, mask = of["device"], (1 << 64) - 1
    seed = -(2**40) + 12345
    columns = torch.randint(2**20, (rows, steps), generator=torch.Generator().manual_seed(1))
    got = ops.token_noise(torch.tensor(seed, device=device), columns.to(device), vocabulary).double().cpu()
    worst = 0.0
    for b in range(rows):
        for j in range(steps):
            for token in {0, vocabulary // 2, vocabulary - 1}:
                place = (b << 44) + (int(columns[b, j]) << 20) + token + 1
                z = (seed + place * 0x9E3779B97F4A7C15) & mask
                z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
                z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
                v = float((torch.tensor((z ^ (z >> 31)) >> 32).float() + 0.5) * 2**-32)  # rounded as float32 does
                expected = -math.log1p(-min(v, 1 - 2**-24))
                worst = max(worst, abs(got[b, j, token].item() / expected - 1))
    return {"noise": worst, "range": float((got <= 0).sum())}


def ring_errors(ops: Any, B: int, R: int, D: int, N: int, steps: int, **of: Any) -> dict[str, float]:
    """Numbers that differ in a ring buffer after a write, and in what is read from it; rows are those of a slice."""
    torch.manual_seed(D)
    device = of["device"]
    ring, rows = torch.randn(B, R, D, **of), torch.randn(B, N, 2 * D, **of)[..., :D]
    path = torch.randint(N, (B, steps))
    end, taken = [3 * R + 2 + b for b in range(B)], [(steps, 0, 1)[b % 3] for b in range(B)]
    expected = ring.clone()
    for b in range(B):
        for j in range(taken[b]):
            expected[b, (end[b] - taken[b] + j) % R] = rows[b, path[b, j]]
    ends = torch.tensor(end, device=device)
    ops.write_ring(ring, rows, path.to(device), ends, torch.tensor(taken, device=device))
    faults = int((ring != expected).sum())
    first = torch.arange(B, device=device)
    for start, offset, width in ((ends, 0, steps), (ends, -steps, R), (first, -1, 1), (first, -R - 2, 3)):
        read = ops.read_ring(ring, start, offset, width)
        for b in range(B):
            places = [(int(start[b]) + offset + j) % R for j in range(width)]
            faults += int((read[b] != expected[b, places]).sum())
    return {"ring": float(faults)}


# -- cases ------------------------------------------------------------------------------------------------------------

# B, H, G, T, first, nodes, K, V, window, softcap
ATTENTIONS = {
    "one node": (1, 4, 4, 1, 30, 1, 32, 32, 0, 0.0),
    "a tree": (2, 6, 2, 12, 70, 12, 16, 16, 0, 0.0),
    "the last nodes of a tree, three words": (1, 4, 1, 20, 100, 150, 32, 48, 0, 0.0),
    "several parts and row tiles": (1, 8, 1, 30, 900, 30, 64, 64, 0, 0.0),
    "window, softcap": (2, 2, 1, 9, 200, 9, 24, 16, 30, 20.0),
    "a window inside the tree": (1, 2, 2, 40, 90, 40, 16, 16, 3, 0.0),
    "heads of 256": (1, 2, 1, 5, 80, 5, 256, 256, 0, 0.0),
    "a long prefix": (1, 4, 2, 70, 2100, 70, 32, 24, 0, 0.0),
    "a long prefix, window, softcap": (2, 4, 2, 9, 2150, 9, 16, 16, 90, 20.0),
    "chosen blocks": (2, 8, 4, 7, 400, 7, 32, 32, 0, 0.0, (0, 2, 5, 6)),
    "chosen blocks of large heads": (1, 4, 2, 20, 200, 20, 256, 256, 0, 0.0, (0, 1, 3)),
}
# rows, vocabulary, k, equal logits
TOPS = {"one": (1, 5000, 1, True), "eight": (1, 2500, 8, False), "odd, few values": (2, 1500, 5, True),
        "all of a small one": (4, 12, 12, False), "32": (1, 300, 32, True)}  # fmt: skip
# rows, k, depth, nodes, least, units, renamed
GROWTHS = {
    "eagle2": (3, 4, 3, 12, 0.0, 0, False),
    "eagle2, two words": (1, 9, 3, 70, 0.0, 0, False),
    "eagle2, more nodes than there are": (2, 2, 2, 20, 0.0, 0, True),
    "c2t": (2, 5, 3, 12, 0.4, 12, False),
    "c2t, keeps all": (1, 3, 3, 5, 0.0, 5, True),
    "c2t, keeps none": (2, 3, 2, 8, 1.0, 5, False),
    "one child": (2, 1, 3, 4, 0.0, 0, False),
}
ACCEPTANCES = {"one row": (1, 1, 1), "a tree": (4, 20, 5), "a large tree": (2, 70, 4)}
TAKES = {"rows": (3, 6), "one": (1, 1)}
# L, B, G, K, V, steps
MOVES = {"layers": (3, 3, 2, 16, 16, 4), "odd sizes": (1, 2, 1, 24, 10, 3), "one": (2, 1, 1, 8, 8, 1)}
# B, H, G, K, slots, block, dense_below, share
BLOCKS = {
    "a quarter": (3, 4, 2, 16, 2000, 64, 512, 256),
    "all": (1, 2, 2, 24, 300, 64, 4096, 256),
    "the first and the last two": (2, 2, 1, 8, 640, 64, 0, 0),
    "one and two": (2, 2, 1, 8, 128, 64, 0, 256),
}
# tokens, width, channels, chosen
CHANNELS = {
    "one token": (1, 72, 130, 7),
    "a tree": (20, 200, 640, 300),
    "rows of two programs": (70, 64, 768, 97),
    "all": (9, 96, 192, 192),
    "one channel": (40, 128, 256, 1),
}
# B, R, D, N, steps
RINGS = {"rows": (4, 8, 24, 7, 4), "wide": (1, 6, 1100, 3, 3), "full": (2, 3, 5, 9, 3), "one": (1, 1, 1, 1, 1)}
NOISES = {"rows": (3, 2, 1500), "few tokens": (1, 1, 5)}

_CASES: dict[str, tuple[Callable[..., dict[str, float]], dict[str, tuple[Any, ...]]]] = {
    "attention": (attention_errors, ATTENTIONS),
    "top": (top_errors, TOPS),
    "growth": (growth_errors, GROWTHS),
    "acceptance": (acceptance_errors, ACCEPTANCES),
    "take": (take_errors, TAKES),
    "move": (move_errors, MOVES),
    "blocks": (blocks_errors, BLOCKS),
    "channels": (channels_errors, CHANNELS),
    "noise": (noise_errors, NOISES),
    "ring": (ring_errors, RINGS),
}


def cases(**of: Any) -> Iterator[tuple[str, Callable[[Any], dict[str, float]]]]:
    """Name, and a function of the operators to test."""
    for what, (run, named) in _CASES.items():
        for name, case in named.items():
            yield f"{what}: {name}", lambda ops, run=run, case=case: run(ops, *case, **of)


class Kernels:
    """The kernels, under the operators' names."""

    def __getattr__(self, name: str) -> Any:
        for module in MODULES:
            found = getattr(importlib.import_module(f"effpass.lowering.kernels.{module}"), name, None)
            if found is not None:
                return found
        raise AttributeError(name)


# -- programs ---------------------------------------------------------------------------------------------------------


def interpret() -> dict[str, dict[str, float]]:
    set_up()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    return {name: run(Kernels()) for name, run in cases(device=torch.device("cpu"), dtype=torch.float32)}


def compile_all() -> dict[str, int]:
    """Bytes of shared memory of each kernel, compiled for compute capability 9.0 at the sizes of real models."""
    modules = [importlib.import_module(f"effpass.lowering.kernels.{name}") for name in MODULES]
    launches, ops = compile_instead(modules, KERNELS), Kernels()

    def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    long: Any = {"dtype": torch.long}
    for tokens, heads, groups, size, dtype, window in (
        (1, 32, 8, 128, torch.bfloat16, 0), (16, 9, 3, 64, torch.bfloat16, 0), (64, 32, 8, 128, torch.bfloat16, 0),
        (128, 32, 8, 128, torch.bfloat16, 512), (64, 8, 4, 256, torch.bfloat16, 0), (8, 4, 2, 64, torch.float32, 0),
    ):  # fmt: skip
        words = -(-tokens // 64)
        ops.tree_attention(
            some(1, heads, tokens, size, dtype=dtype), some(1, groups, 1024 + tokens, size, dtype=dtype),
            some(1, groups, 1024 + tokens, size, dtype=dtype), numbers(1, 1024 + tokens), numbers(1, tokens),
            numbers(1), numbers(1, tokens, words, **long), 1024, 0.1, window, 30.0 if window else 0.0,
            numbers(1, groups, 12) if tokens == 64 else None, 64 if tokens == 64 else 0,
        )  # fmt: skip
    ops.choose_tree_blocks(some(1, 32, 128), some(1, 8, 1024, 128), numbers(1), 300, 64, 4096, 256)
    for rows, dtype in ((1, torch.bfloat16), (20, torch.bfloat16), (64, torch.bfloat16), (64, torch.float32)):
        ops.chosen_channels(
            some(rows, 4096, dtype=dtype), some(rows, 14336, dtype=dtype), some(14336, 4096, dtype=dtype),
            some(14336, 4096, dtype=dtype).t(), numbers(7168),
        )  # fmt: skip
    ops.largest_channels(some(14336, dtype=torch.float32), 7168)
    for rows, vocabulary, k in ((1, 49152, 1), (64, 128256, 1), (8, 32000, 8)):
        ops.top_tokens(some(rows, vocabulary), k)
    real: Any = {"dtype": torch.float32}
    for frontier, width, units, names in ((1, 8, 0, None), (8, 8, 0, None), (15, 15, 48, numbers(32000, **long))):
        pool = 8 + 4 * 64 if not units else 150
        classifier = [some(48, 3, **real), some(48, **real), some(1, 48, **real), some(1, **real)] if units else []
        ops.grow_layer(
            some(1, frontier, width, **real), numbers(1, frontier, width, **long), some(1, frontier, **real),
            some(1, frontier, **real), some(1, frontier, **real), numbers(1, frontier, **long),
            numbers(1, frontier, 3, **long), numbers(1), names, classifier, numbers(1, pool, **long),
            some(1, pool, **real), numbers(1, pool, **long), 0, 0, 0.5, not units,
        )  # fmt: skip
        if frontier > 1:
            ops.best_nodes(
                numbers(1, **long), numbers(1), numbers(1, pool, **long), some(1, pool, **real),
                numbers(1, pool, **long), 32 if units else 128, 5,
            )  # fmt: skip
    for nodes in (1, 64):
        tree = numbers(2, nodes, **long)
        ops.accept_tokens(
            tree, tree, tree, numbers(16, **long), torch.zeros((), **long),
            numbers(2, 512, **long), numbers(2, **long), numbers(2), numbers(2, **long),
            torch.ones((), dtype=torch.bool), numbers(2, **long), 6,
        )  # fmt: skip
    ops.take_tokens(numbers(2, 512, **long), numbers(2, **long), numbers(2), numbers(2, **long), 6)
    ops.move_slots(
        some(32, 2, 8, 1024, 128), some(32, 2, 8, 1024, 128), numbers(2, 1024), numbers(2), numbers(2, 6, **long),
        numbers(2, **long), 960, True,
    )  # fmt: skip
    ops.token_noise(torch.zeros((), **long), numbers(2, 6, **long), 128256)
    ops.write_ring(
        some(2, 12, 12288), some(2, 60, 12288), numbers(2, 6, **long), numbers(2, **long), numbers(2, **long)
    )
    ops.read_ring(some(2, 12, 1728), numbers(2, **long), -1, 6)
    return {f"{name}{number}": size for number, (name, size) in enumerate(launches)}


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
        print(json.dumps(interpret()))
    else:
        print(json.dumps(compile_all()))
