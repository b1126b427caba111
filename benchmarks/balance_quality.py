"""What moving budgets does to a model: `tiny-long` is trained on with fixed and with moved budgets.

8 ranks are played by one device: a step's micro-batches run one after the other, each with the budgets that its rank
would have, and their gradients are added up, which is what 8 ranks compute. How long a step would take is *simulated*.
Lengths are a quarter of those that area `balance` simulates, and so are budgets; the latency table is that of the large
model, at four times a document's length. All ways have the same documents in the same micro-batches.

Documents are questions about a context (needles among 64) and code of the standard library, half and half, both with
the answers, or all, graded. Held out: other code, and needles of other seeds, at the default budget for all ways.

    EFFPASS_TABLE      file of the large model's latency table

Runs are kept, side by side and timed as :mod:`benchmarks.kept_runs` says.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import kept_runs
from benchmarks.balance_lengths import BUDGETS, DEFAULT, LENGTHS, the_table
from benchmarks.quality import MODELS, _load, _tiny
from benchmarks.rows import Row, row
from effpass.runtime.routed_attention import RoutedModel, install
from effpass.trainers.balance.costs import micro_batches, sample_seconds
from effpass.trainers.balance.expected import Expected
from effpass.trainers.balance.shares import share
from effpass.trainers.balance.table import LatencyTable
from effpass.trainers.balance.tuning import Direction, Tuning, imbalance, micro_batch_seconds, slowest, tune
from effpass.trainers.lm.tasks import make_example

__all__ = ["ablation", "quality"]

AREA = "balance"
RANKS, SAMPLES = 8, 2
BLOCK, SCALE = 64, 4
SEEDS = (0, 1, 2)
STEPS = 40
RATE = 3e-4


@dataclass(frozen=True)
class Sizes:
    """Of a run.

    Attributes:
        device: of it.
        scale: of lengths and budgets, by which those of a large model are divided.
        block: keys of a block.
        steps: of the run with fixed budgets.
        held_out: examples of each kind, and their bytes.
    """

    device: str
    scale: int
    block: int
    steps: int
    held_out: tuple[int, tuple[int, ...]]

    @property
    def tuning(self) -> Tuning:
        return Tuning(tuple(k // self.scale for k in BUDGETS), DEFAULT // self.scale)


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        way: that budgets may move.
        steps: at most.
        seconds: of simulated time, after which it ends; 0 for no end but `steps`.
        table: device of the latency table.
    """

    sizes: Sizes
    way: Direction
    seed: int
    steps: int
    seconds: float
    table: str


@dataclass(frozen=True)
class Outcome:
    """
    Attributes:
        loss: nats a byte of held-out code.
        right: share of needles found, by the bytes of their context.
        seconds: simulated, of a step.
        imbalance: slowest over mean, simulated.
        budget: keys, over micro-batches and layers.
        steps: that were trained.
    """

    loss: float
    right: dict[int, float]
    seconds: float
    imbalance: float
    budget: float
    steps: int


def quality(device: str, smoke: bool) -> Iterator[Row]:
    """Fixed and moved budgets, equal tokens."""
    sizes = _sizes(device, smoke)
    ways: tuple[Direction, ...] = ("none", "both")
    found = _found([Run(sizes, way, seed, sizes.steps, 0.0, _table()) for way in ways for seed in _seeds(smoke)])
    if found is not None:
        yield from _compared(f"{_name(device, smoke)}, {sizes.steps} steps", "both", found, device)


def ablation(device: str, smoke: bool) -> Iterator[Row]:
    """Budgets that stay, fall alone, rise alone, or both, for the same simulated time."""
    sizes = _sizes(device, smoke)
    fixed = [Run(sizes, "none", seed, sizes.steps, 0.0, _table()) for seed in _seeds(smoke)]
    ways: tuple[Direction, ...] = ("down", "up", "both")
    base = _found(fixed)
    if base is None:
        return
    time = [one.seconds * one.steps for one in base["none"]]
    timed = [replace(run, steps=4 * run.steps, seconds=t) for run, t in zip(fixed, time, strict=True)]
    found = _found([*fixed, *(replace(run, way=way) for way in ways for run in timed)])
    for way in ways if found is not None else ():
        case = f"{_name(device, smoke)}, the simulated time of {sizes.steps} steps with fixed budgets"
        yield from _compared(case, way, found, device)


def _compared(case: str, way: Direction, found: dict[Direction, list[Outcome]], device: str) -> Iterator[Row]:
    words = {"both": "budgets down and up", "down": "budgets down", "up": "budgets up"}
    ours, base = found[way], found["none"]
    faster = mean(o.seconds for o in base) / mean(o.seconds for o in ours)
    note = (
        f"simulated step {faster:.3f} times as fast, imbalance"
        f" {mean(o.imbalance for o in ours):.3f} for {mean(o.imbalance for o in base):.3f}, budget"
        f" {mean(o.budget for o in ours):.0f} for {mean(o.budget for o in base):.0f}; {mean(o.steps for o in ours):.0f}"
        f" steps for {mean(o.steps for o in base):.0f}; by seed "
    )
    common: dict[str, Any] = {"device": device, "peer_name": "fixed budget", "runs": len(ours)}
    pairs = ", ".join(f"{a.loss:.4f} for {b.loss:.4f}" for a, b in zip(ours, base, strict=True))
    yield row(
        AREA, case, f"loss of held-out code, {words[way]}", mean(o.loss for o in ours), "nats a byte",
        peer=mean(o.loss for o in base), note=note + pairs, **common,
    )  # fmt: skip
    for length in ours[0].right:
        pairs = ", ".join(f"{a.right[length]:.1%} for {b.right[length]:.1%}" for a, b in zip(ours, base, strict=True))
        yield row(
            AREA, case, f"needles found in {length} bytes, {words[way]}", 100 * mean(o.right[length] for o in ours),
            "%", peer=100 * mean(o.right[length] for o in base), lower_is_better=False, note=note + pairs, **common,
        )  # fmt: skip


def _sizes(device: str, smoke: bool) -> Sizes:
    if smoke:
        return Sizes(device, 16, 64, 2, (2, (256,)))
    return Sizes(device, SCALE, BLOCK, STEPS, (48, (4096, 16384)))


def _seeds(smoke: bool) -> tuple[int, ...]:
    return SEEDS[:1] if smoke else SEEDS


def _name(device: str, smoke: bool) -> str:
    return "random" if smoke else _load(str(MODELS / "tiny-long"), device)[2]


# -- a run ------------------------------------------------------------------------------------------------------------


def _found(runs: Sequence[Run]) -> dict[Direction, list[Outcome]] | None:
    """Outcomes by way, seed after seed; None where runs are missing."""
    found: dict[Direction, list[Outcome]] = {}
    for run, outcome in zip(runs, kept_runs.results(runs, _run, _read, runs[0].sizes.device), strict=True):
        if outcome is None:
            print("more runs are needed: call again")
            return None
        found.setdefault(run.way, []).append(outcome)
    return found


def _table() -> str:
    return the_table().device


def _read(given: dict[str, Any]) -> Outcome:
    return Outcome(**{**given, "right": {int(length): share for length, share in given["right"].items()}})


def _run(run: Run) -> Outcome:
    sizes, seconds = run.sizes, run.seconds
    model = _model(sizes)
    how = replace(sizes.tuning, direction=run.way)
    routed = install(model, block=sizes.block, budget=how.default, max_budget=how.budgets[-1])
    layers = routed.layers
    table = _scaled(sizes.scale, layers)
    expected = Expected(how, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    watched = torch.tensor(how.budgets, device=sizes.device, dtype=torch.int32)
    taken: list[float] = []
    ratios: list[float] = []
    budgets: list[float] = []
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 5)
        documents = _documents(sizes, run.seed, step)
        lengths = [len(ids) for ids, _ in documents]
        costs = sample_seconds(table, lengths, np.full(len(lengths), float(how.default)), sum(lengths) / RANKS)
        shares = share(costs, lengths, RANKS, 1, 2 * max(lengths))
        assert shares is not None
        attention, rest, longest = micro_batches(table, shares, lengths, how.budgets)
        chosen = tune(attention, rest, *expected.guard(longest), how)
        keys = torch.from_numpy(np.asarray(how.budgets)[chosen].astype(np.int32)).to(sizes.device)
        graded = sum(int(marks.sum()) for _, marks in documents)
        for rank, (samples,) in enumerate(shares):
            routed.budgets = keys[rank, 0]
            is_measured = rank == step % RANKS
            routed.watch(watched if is_measured else None)
            _backward(model, [documents[n] for n in samples], graded, sizes.device)
            if is_measured and routed.curves is not None:
                expected.cover(int(longest[rank, 0]), routed.curves.double().cpu().numpy())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found = micro_batch_seconds(attention, rest, chosen)
        taken.append(slowest(found, how.waits))
        ratios.append(imbalance(found, how.waits)[0])
        budgets.append(float(keys.float().mean()))
        if seconds and sum(taken) >= seconds:
            break
    routed.watch(None)
    routed.budgets = torch.full((layers,), how.default, dtype=torch.int32, device=sizes.device)
    loss, right = _held_out(model, routed, sizes)
    return Outcome(loss, right, mean(taken), mean(ratios), mean(budgets), len(taken))


def _model(sizes: Sizes) -> Any:
    """A copy in float32, whose products are bfloat16 on a GPU."""
    if sizes.scale != SCALE:
        return _tiny(sizes.device)[0].float().requires_grad_(True).train()
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODELS / "tiny-long", dtype=torch.float32)
    return model.to(sizes.device).requires_grad_(True).train()


def _scaled(scale: int, layers: int) -> LatencyTable:
    """The large model's times, at `scale` times a length and a budget."""
    large = the_table()
    lengths = tuple(sorted({max(1, s // scale) for s in large.lengths}))
    budgets = tuple(k // scale for k in large.budgets)
    attention = large.attention_seconds(np.array(lengths) * scale, np.array(budgets) * scale) * (large.layers / layers)
    return replace(
        large, layers=layers, lengths=lengths, budgets=budgets, attention=tuple(map(tuple, attention.tolist())),
        tokens=lengths, rest=tuple(large.rest_seconds(np.array(lengths) * scale).tolist()),
    )  # fmt: skip


def _documents(sizes: Sizes, seed: int, step: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Bytes, and which of them are graded."""
    rng = np.random.default_rng((seed, step))
    lengths = np.maximum(LENGTHS["tail"](RANKS * SAMPLES, rng) // sizes.scale, 96)
    return [_needles(rng, int(n), 32) if i % 2 else _code(rng, int(n)) for i, n in enumerate(lengths)]


def _needles(rng: np.random.Generator, length: int, questions: int) -> tuple[np.ndarray, np.ndarray]:
    example = make_example("needle", rng, length, questions, {"keys": 64})
    graded = [np.zeros(len(example.context), bool)]
    for question, answer in example.pairs:
        graded += [np.zeros(len(question), bool), np.ones(len(answer), bool)]
    return np.frombuffer(example.text, np.uint8), np.concatenate(graded)


def _code(rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
    text = _library()[0]
    begin = int(rng.integers(0, len(text) - length))
    return text[begin : begin + length], np.arange(length) > 0


@cache
def _library() -> tuple[np.ndarray, np.ndarray]:
    """Code to learn from, and code that is held out: every tenth file."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = ([f for i, f in enumerate(files) if i % 10], files[::10])
    learnt, kept = (np.frombuffer(b"".join(file.read_bytes() for file in part), np.uint8) for part in parts)
    return learnt, kept


def _packed(documents: list[tuple[np.ndarray, np.ndarray]], device: str) -> tuple[dict[str, Tensor], Tensor]:
    ids = torch.from_numpy(np.concatenate([ids for ids, _ in documents]).astype(np.int64))[None]
    positions = torch.cat([torch.arange(len(ids)) for ids, _ in documents])[None]
    graded = torch.from_numpy(np.concatenate([marks for _, marks in documents]))
    ends = torch.tensor(np.cumsum([0, *(len(ids) for ids, _ in documents)]), dtype=torch.int32)
    inputs = {"input_ids": ids, "position_ids": positions, "cu_seq_lens_q": ends}
    return {name: tensor.to(device) for name, tensor in inputs.items()}, graded.to(device)


def _logits(model: Any, inputs: dict[str, Tensor], device: str) -> Tensor:
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        return model(**inputs, use_cache=False).logits[0]


def _backward(model: Any, documents: list[tuple[np.ndarray, np.ndarray]], graded: int, device: str) -> None:
    inputs, marks = _packed(documents, device)
    losses = cross_entropy(_logits(model, inputs, device)[:-1].float(), inputs["input_ids"][0, 1:], reduction="none")
    ((losses * marks[1:]).sum() / graded).backward()


@torch.no_grad()
def _held_out(model: Any, routed: RoutedModel, sizes: Sizes) -> tuple[float, dict[int, float]]:
    model.eval()
    count, lengths = sizes.held_out
    code, losses = _library()[1], []
    longest = lengths[-1]
    for begin in range(0, min(len(code), 8 * longest) - longest + 1, longest):
        document = code[begin : begin + longest], np.ones(longest, bool)
        inputs, _ = _packed([document], sizes.device)
        found = _logits(model, inputs, sizes.device)[:-1].float()
        losses.append(float(cross_entropy(found, inputs["input_ids"][0, 1:])))
    right = {}
    for length in lengths:
        hits = []
        for number in range(count):
            ids, marks = _needles(np.random.default_rng((99, length, number)), length, 1)
            inputs, graded = _packed([(ids, marks)], sizes.device)
            best = _logits(model, inputs, sizes.device)[:-1].argmax(-1)
            hits.append(bool((best == inputs["input_ids"][0, 1:])[graded[1:]].all()))
        right[length] = mean(hits)
    model.train()
    return mean(losses), right
