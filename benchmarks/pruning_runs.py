"""Runs of area `pruning` (:mod:`.kept_runs`): one model, one method, one seed; the same tokens, loss and recovery for
all."""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import effpass
from benchmarks import kept_runs
from benchmarks.adapters_runs import Questions, _data
from benchmarks.pruning_learners import LEARNERS, learn_non_uniform
from effpass.trainers.finetune.loop import held_out_loss
from effpass.trainers.finetune.packing import PackedBatches
from effpass.trainers.lm.config import OptimizerConfig
from effpass.trainers.lm.corpus import Corpus, find_files, read_corpus, write_corpus
from effpass.trainers.pruning.choice import best_units, keep_indices, score_units
from effpass.trainers.pruning.data import Rows
from effpass.trainers.pruning.scores import Calibration
from effpass.trainers.pruning.settings import Settings
from effpass.trainers.pruning.stages import Learned, Problem, choose, cut, learn, recover, state_problem
from effpass.trainers.run_folder import Recorder

__all__ = ["Found", "Run", "Size", "losses_of", "results"]

_ADAPTERS = 1e-3  # learning rate after the cut
TEXT = ("$EFFPASS_DATA/text/*.txt", "$EFFPASS_DATA/gsm8k/train.jsonl", "$STDLIB/*.py")
_OPTIONS: dict[str, dict[str, Any]] = {"mona": {"capturable": True, "nan_policy": "skip"}, "adamw": {"fused": True}}


@dataclass(frozen=True)
class Size:
    """What a run reads: steps, rows of a step and its micro-batches, tokens of a row; rows of WikiText-2 and questions
    of GSM8K that are reported on; batches that scores are made of."""

    steps: int
    batch: int
    accumulate: int
    length: int
    reported: int
    questions: int
    calibration: int


@dataclass(frozen=True)
class Run:
    """
    Attributes:
        choose: a chooser, a learner of :data:`LEARNERS`, or `taylor at SIZES` of another run.
        sizes: kept units of a set, for the latter.
    """

    size: Size
    model: str
    device: str
    choose: str
    keep: float
    seed: int
    rate: float = 1e-4
    cost: str = "parameters"
    optimizer: str = "mona"
    recovery: str = "full"
    sizes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Found:
    """
    Attributes:
        text: WikiText-2 validation, nats a token, and its standard error over rows.
        answers: GSM8K test, nats a token of an answer, and its standard error over questions.
        cut: WikiText-2 right after the cut.
        share: what is left of the cost.
        sizes: kept units of a set, by family; layers.
        overlap: share of the kept units that Taylor's scores keep too, at the same sizes.
        seconds: of the run.
        peak: bytes of the GPU that learning took at most.
    """

    text: tuple[float, float]
    answers: tuple[float, float]
    cut: float
    share: float
    sizes: dict[str, int]
    overlap: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    peak: int = 0


# -- many runs --------------------------------------------------------------------------------------------------------


def results(runs: Sequence[Run]) -> list[Found | None]:
    """Of each run; None where the time is over."""
    return kept_runs.results(runs, _result, _read, runs[0].device)


def _read(given: dict[str, Any]) -> Found:
    return Found(**{**given, "text": tuple(given["text"]), "answers": tuple(given["answers"])})


def _result(run: Run) -> Found:
    started = time.perf_counter()
    found = _run(run)
    found = Found(**{**asdict(found), "seconds": round(time.perf_counter() - started, 2)})
    print(f"{run.choose} {run.keep:g} of {run.cost}, seed {run.seed}: WikiText-2 {found.text[0]:.4f}, GSM8K"
          f" {found.answers[0]:.4f}, {found.sizes}, {found.share:.3f}, {found.seconds:.1f} s", flush=True)  # fmt: skip
    return found


# -- data -------------------------------------------------------------------------------------------------------------


@cache
def _model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    loaded = effpass.load_model(name, dtype=dtype)
    return loaded.model.to(device).requires_grad_(False), loaded.tokenizer


def _place() -> Path:
    place = os.environ.get("EFFPASS_DATA")
    if not place:
        raise SystemExit("pruning: EFFPASS_DATA must name a folder with text/, gsm8k/ and wikitext-2/")
    return Path(place)


@cache
def _corpus(name: str, device: str) -> Corpus:
    """What is trained and calibrated on: text, GSM8K's training questions, the standard library."""
    _place()
    with tempfile.TemporaryDirectory() as folder:
        files = find_files(list(TEXT), Path.cwd(), "pruning")
        write_corpus(Path(folder), files, _model(name, "float32", device)[1], 0.0, 0, "pruning")
        corpus = read_corpus(Path(folder))
        return Corpus(corpus.training[:].copy(), corpus.held_out[:].copy())


@cache
def _wikitext(name: str, device: str, length: int, count: int) -> Tensor:
    """The first rows of WikiText-2's validation text: ids `[count, T]`."""
    text = (_place() / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
    ids = _model(name, "float32", device)[1](text, add_special_tokens=False, verbose=False)["input_ids"]
    ids = torch.tensor(ids[: len(ids) // length * length], device=device).view(-1, length)
    return ids[:count]


@torch.no_grad()
def losses_of(model: Any, name: str, device: str, size: Size) -> tuple[tuple[float, float], tuple[float, float]]:
    """`text` and `answers` of :class:`Found`."""
    rows = _wikitext(name, device, size.length, size.reported)
    means = []
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        for part in rows.split(8):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            each = cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="none")
            means.append(each.view(len(part), -1).double().mean(1).cpu())
        text = torch.cat(means)
        questions = _data(name, device, Questions(1, size.questions, 8, 1024))[1]
        like = PackedBatches(questions, length=1024, batch=8, steps=1)
        answers = held_out_loss(model, questions, like)
    error = float(text.std() / len(text) ** 0.5) if len(text) > 1 else 0.0
    return (float(text.mean()), error), (answers.loss, answers.error)


# -- one run ----------------------------------------------------------------------------------------------------------


def _settings(run: Run) -> Settings:
    is_cuda = run.device == "cuda"
    is_learned = run.choose in LEARNERS
    return Settings(
        OptimizerConfig(run.rate, run.optimizer, 0.0, options=_OPTIONS.get(run.optimizer, {}) if is_cuda else {}),  # type: ignore[arg-type]
        keep=run.keep,
        choose="minimax" if is_learned else "taylor" if run.sizes else run.choose,  # type: ignore[arg-type]
        cost=run.cost,  # type: ignore[arg-type]
        recovery=run.recovery,  # type: ignore[arg-type]
        recovery_lr=None if run.recovery == "full" else _ADAPTERS,
        steps=run.size.steps,
        batch=run.size.batch,
        accumulate=run.size.accumulate,
        sequence_length=run.size.length,
        calibration=run.size.calibration,
        dtype="bfloat16" if is_cuda else "float32",
        seed=run.seed,
        log_every=50 if run.size.steps >= 50 else 5,
        save_every=0,
    )


def _run(run: Run) -> Found:
    settings = _settings(run)
    teacher, _ = _model(run.model, settings.dtype, run.device)
    source, _ = _model(run.model, "float32", run.device)
    held = torch.cuda.memory_allocated() if run.device == "cuda" else 0
    held -= sum(p.numel() * p.element_size() for p in teacher.parameters())  # a part of the learner
    model = copy.deepcopy(source)
    problem = state_problem(teacher, settings)
    size, first = run.size, settings.learning_steps
    corpus = _corpus(run.model, run.device)
    rows, after = (
        Rows(corpus, size.batch, size.accumulate, size.length, steps, run.seed, begin)
        for steps, begin in ((first, 0), (settings.recovery_steps, first))
    )
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recorder = Recorder(folder / "metrics.jsonl", settings.steps, lambda line: None, ())
        if run.choose == "not uniform":
            model, masks, sizes = learn_non_uniform(model, teacher, problem, settings, rows, after, folder)
            with masks.attached():
                text, answers = losses_of(model, run.model, run.device, size)
            return Found(text, answers, float("nan"), problem.cost.share(problem.shapes.share(sizes)), sizes)
        learned = None
        if run.choose in LEARNERS:
            model, learned = learn(
                model, teacher, problem, settings, rows, folder, recorder, make=LEARNERS[run.choose]
            )  # fmt: skip
        elif run.sizes:
            learned = _taylor(teacher, problem, settings, rows, dict(run.sizes))
        else:
            learned = choose(teacher, problem, settings, rows)
        peak = torch.cuda.max_memory_allocated() - held if run.device == "cuda" else 0
        sizes, share = _sizes(problem, learned)
        overlap = _overlap(teacher, problem, settings, rows, learned, sizes) if run.choose == "minimax" else {}
        cut(model, problem, learned, rows.calibration(1)[0].to(run.device))
        after_cut = losses_of(model, run.model, run.device, size)[0][0]
        model = recover(model, teacher, settings, after, folder / "recovery", recorder)
        text, answers = losses_of(model, run.model, run.device, size)
    return Found(text, answers, after_cut, share, sizes, overlap, peak=peak)


def _sizes(problem: Problem, learned: Learned) -> tuple[dict[str, int], float]:
    """Kept units of a set, by family, and the share of the cost that is left."""
    keep = learned.keep
    if keep.layers:
        count = len(keep.layers)
        return {"layers": count}, problem.cost.depth_share(count, keep.before.num_hidden_layers)
    assert learned.kept is not None
    sizes = {u.size: next(iter(learned.kept[f].values())).shape[-1] for f, u in problem.units.items() if u.size == f}
    return sizes, problem.cost.share(problem.shapes.share(sizes))


def _taylor(teacher: Any, problem: Problem, settings: Settings, rows: Rows, sizes: Mapping[str, int]) -> Learned:
    """Taylor's choice, at sizes that are given."""
    device = next(teacher.parameters()).device
    calibration = Calibration([ids.to(device) for ids in rows.calibration(settings.calibration)], settings.seed)
    with torch.autocast(device.type, torch.bfloat16) if settings.dtype == "bfloat16" else nullcontext():
        scores = score_units("taylor", teacher, problem.units, calibration)
    kept = best_units(scores, problem.units, problem.shapes, sizes)
    return Learned(keep_indices(teacher, problem.units, kept), kept)


def _overlap(
    teacher: Any, problem: Problem, settings: Settings, rows: Rows, learned: Learned, sizes: Mapping[str, int]
) -> dict[str, float]:
    """Share of the kept units that Taylor's scores keep too."""
    other = _taylor(teacher, problem, settings, rows, sizes).kept
    assert learned.kept is not None
    assert other is not None
    found = {}
    for family, layers in learned.kept.items():
        pairs = [(a, b) for layer in layers for a, b in zip(layers[layer], other[family][layer], strict=True)]
        shared = sum(len(set(a.tolist()) & set(b.tolist())) for a, b in pairs)
        found[family] = shared / sum(len(a) for a, _ in pairs)
    return found
