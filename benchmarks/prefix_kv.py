"""Area `prefix_kv`: caches with a budget against the whole cache, and against each other.

Speed and memory are in :mod:`benchmarks.prefix_kv_speed`, pictures in :mod:`benchmarks.prefix_kv_pictures`. *Quality*
is that of what follows a prompt: log-perplexity of the next tokens, and answers to questions. A prompt is run once;
every method chooses from the same keys and the same sums of attention. A row marked *no signal* can't tell methods
apart: the whole cache is no better than a sliding window of the budget, or answers fewer than a fifth of the questions.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.backend import _dtype
from benchmarks.prefix_kv_speed import KEPT, decode, operator, prefill
from benchmarks.quality import MODELS, SEEDS, _batches, _load, _models, _tiny
from benchmarks.rows import Row, row
from effpass.runtime.attention import reading_cache
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.calibrate import calibrate
from effpass.runtime.prefix_kv.peers.global_top_k import GlobalTopK
from effpass.runtime.prefix_kv.peers.h2o import H2O
from effpass.runtime.prefix_kv.peers.pyramid_kv import PyramidKV
from effpass.runtime.prefix_kv.peers.snap_kv import SnapKV
from effpass.runtime.prefix_kv.peers.streaming_llm import StreamingLLM
from effpass.runtime.prefix_kv.peers.uniform import Uniform
from effpass.runtime.prefix_kv.plan import Settings
from effpass.runtime.prefix_kv.policy import Policy
from effpass.runtime.prefix_kv.prefix import PrefixKV
from effpass.runtime.prefix_kv.quantized import layer_class
from effpass.runtime.prefix_kv.session import BudgetSession
from effpass.runtime.prefix_kv.staging import Staging
from effpass.trainers.lm.model import reads_pictures
from effpass.trainers.lm.tasks import TASKS, make_example, shortest

AREA = "prefix_kv"
BUDGETS = (0.1, 0.2, 0.3, 0.5)


_KINDS = (("full", 0), ("window", Policy.window))


class _All(Staging):
    """A prompt with all kinds of importance."""

    def attended(self, index: int, query: Tensor, keys: Tensor, scale: float, softcap: float) -> None:
        layer = self.staged(index)
        sums = vars(layer).setdefault("sums", {})
        for kind in _KINDS:
            self._importance, self._window = kind
            layer.from_all = layer.from_last = sums.setdefault(kind, torch.zeros_like(layer.from_all))
            super().attended(index, query, keys, scale, softcap)


class _Prompt:
    """A prompt that was run once, with the logits of its last tokens; `inputs` are what the model takes beside them."""

    def __init__(self, model: Any, ids: Tensor, **inputs: Tensor) -> None:
        rows, tokens = ids.shape
        runner = BudgetSession(model, rows, tokens, None, Settings(Policy(), Budget(ratio=0.5)))
        runner.begin(rows)
        runner._call = self._keeping(runner._call)  # type: ignore[method-assign]
        self.ids, self.model = ids, model
        self.staging = _All(runner.cache, model.config, 0, rows, tokens, False, "full", 0, None)
        runner.cache, piece = self.staging, tokens if inputs else max(1, (1 << 15) // rows)
        positions = torch.arange(tokens, dtype=torch.int32, device=ids.device).expand(rows, -1).contiguous()
        for first in range(0, tokens, piece):
            part = positions[:, first : first + piece].contiguous()
            runner._enter(part)
            runner._call(model, ids[:, first : first + piece], part.long(), **inputs)

    def _keeping(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*arguments: Any, **inputs: Any) -> Tensor:
            self.last = call(*arguments, **inputs)
            return self.last

        return run

    def logits(self, settings: Settings, tail: Tensor) -> Tensor:
        """Of the prompt's last token and of `tail` `[rows, C]`, after a method's choice."""
        rows, tokens = tail.shape
        session = _Again(self.model, rows, self.ids.shape[1] + tokens, None, replace(settings, every=tokens))
        session.prompt = self
        session.begin(rows)
        session.prefill(self.ids, None, self.ids.shape[1])
        steps = torch.arange(1, tokens + 1, dtype=torch.int32, device=tail.device)
        positions = session._position[:rows] + steps
        session._enter(positions)
        after = self.model(
            input_ids=tail, position_ids=positions.long(), past_key_values=session.cache,
            effpass_cache=session.cache, use_cache=True,
        ).logits  # fmt: skip
        return torch.cat([session.logits[:, None], after], 1)


class _Again(BudgetSession):
    """Takes a prompt that was run before."""

    prompt: _Prompt

    def _stage(self, *arguments: Any) -> Staging:
        *_, row, lengths, counts, limits = arguments
        kept, staging = self.cache, copy.copy(self.prompt.staging)
        self.length += self.prompt.ids.shape[1]
        staging.layers = [copy.copy(layer) for layer in staging.layers]
        for index in range(len(kept)):
            layer = staging.staged(index)
            sums = layer.sums  # type: ignore[attr-defined]
            layer.from_all, layer.from_last = sums[_KINDS[0]], sums["window", self.settings.policy.window]
        self._keep_logits(self.prompt.last, row)
        if counts is not None:
            self._grow(counts, limits)
            for index in range(len(kept)):
                self._settle(staging, index, row, lengths, counts, limits)
        return staging


def _methods(budget: float, profile: Any, head: int) -> dict[str, Settings]:
    """Every method at a budget in bytes, as a share of the whole cache in 16 bits."""
    policies = {
        "prefix_kv, profile": PrefixKV(profile),
        "prefix_kv, searched": PrefixKV(),
        "prefix_kv, searched, all tokens asked, not pooled": PrefixKV(None, "full", pool=1),
        "prefix_kv, searched, not pooled": PrefixKV(pool=1),
        "prefix_kv, searched, last tokens asked": PrefixKV(None, "window"),
        "uniform": Uniform(),
        "uniform, both asked": _asking_both(Uniform()),
        "StreamingLLM": StreamingLLM(),
        "H2O": H2O(),
        "SnapKV": SnapKV(),
        "PyramidKV": PyramidKV(),
        "global top-k": GlobalTopK(),
        "global top-k, both asked": _asking_both(GlobalTopK()),
    }
    found = {name: Settings(policy, Budget(ratio=budget), page=1) for name, policy in policies.items()}
    for dtype in ("int8", "fp8", "int4"):
        share = budget * 2 * head / layer_class(dtype).bytes_of(head, 2)
        if share >= 1:
            found[f"{dtype}, all tokens"] = Settings(Uniform(), Budget(ratio=1.0), kv_cache_dtype=dtype)
        else:
            found[f"prefix_kv, searched, {dtype}"] = Settings(
                PrefixKV(), Budget(ratio=share), page=1, kv_cache_dtype=dtype
            )
    return found


def _asking_both(policy: Policy) -> Policy:
    """A peer with PrefixKV's importance."""
    policy.importance = "both"
    return policy


_OURS = "prefix_kv, searched"


def _names(smoke: bool) -> list[str]:
    given = os.environ.get("EFFPASS_MODEL")
    if given:
        return given.split(",")
    return [] if smoke else ["smollm2", *(path.parent.name for path in sorted(MODELS.glob("tiny-*/model.safetensors")))]


def _model(name: str, device: str) -> tuple[Any, Any, str]:
    if name != "smollm2":
        return _load(name, device)
    from effpass.core.model import load_model

    loaded = load_model("smollm2", dtype=_dtype(device), device_map=None if device == "cpu" else {"": device})
    return loaded.model, loaded.tokenizer, "SmolLM2-135M-Instruct"


def quality(device: str, smoke: bool) -> Iterator[Row]:
    """Every method at 10, 20, 30 and 50 % of the bytes: text that follows a prompt, and answers."""
    for name in _names(smoke) or [None]:
        model, tokenizer, told = _tiny(device) if name is None else _model(name, device)
        if reads_pictures(model.config):
            continue
        with torch.no_grad():
            yield from _of_model(model, tokenizer, told, device, smoke)


def _of_model(model: Any, tokenizer: Any, told: str, device: str, smoke: bool) -> Iterator[Row]:
    place = os.environ.get("EFFPASS_DATA")
    if place is None:
        raise SystemExit("prefix_kv: set EFFPASS_DATA (or --data) to the folder that holds wikitext-2/valid.txt")
    text = (Path(place) / "wikitext-2" / "valid.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], device=device)
    is_small = smoke or device == "cpu"
    positions = model.config.max_position_embeddings
    after = 16 if smoke else 64
    length = min(positions - after, 192 if smoke else int(os.environ.get("EFFPASS_PROMPT", 1024 if is_small else 4096)))
    learned = [{"input_ids": ids[i * length : (i + 1) * length][None]} for i in range(1 if smoke else 4)]
    profile = calibrate(model, learned)
    curve = ", ".join(f"{share:.0%}" for share in profile.at(KEPT))
    yield row(AREA, told, f"smallest share of a layer at {KEPT:.0%}", 100 * min(profile.at(KEPT)), "%", device=device,
              note=f"shares of the layers: {curve}")  # fmt: skip
    rest = ids[len(learned) * length :]
    yield from _texts(model, told, rest, length, after, profile, device, 1 if smoke else 2 if is_small else 16)
    if tokenizer.vocab_size < 1000:  # bytes: the tasks that the model was trained on
        longest = min(positions, 256 if smoke else 1024 if is_small else 8192)
        for task in TASKS:
            if longest >= shortest(task, {}):
                count = 2 if smoke else 8 if is_small else 32
                yield from _task(model, tokenizer, told, task, longest, profile, device, count)


def _texts(
    model: Any, told: str, ids: Tensor, length: int, after: int, profile: Any, device: str, count: int
) -> Iterator[Row]:
    """Log-perplexity of the `after` tokens behind a prompt of `length`, `count` prompts for each seed."""
    losses: dict[tuple[float, str], list[float]] = {}
    whole = []
    head = model.config.hidden_size // model.config.num_attention_heads
    for seed in SEEDS:
        drawn = np.random.default_rng(seed).integers(0, len(ids) - length - after, count)
        batch = torch.stack([ids[i : i + length + after] for i in drawn.tolist()])
        with reading_cache(model):
            prompt, tail = _Prompt(model, batch[:, :length]), batch[:, length:]

            def loss(settings: Settings, prompt: _Prompt = prompt, tail: Tensor = tail) -> float:
                logits = prompt.logits(settings, tail)[:, 1:-1]  # the first follows from the prompt alone
                return cross_entropy(logits.flatten(0, 1).float(), tail[:, 1:].flatten()).item()

            whole.append(loss(Settings(Uniform(), Budget(ratio=1.0))))
            for budget in BUDGETS:
                for name, settings in _methods(budget, profile, head).items():
                    losses.setdefault((budget, name), []).append(loss(settings))
    case = f"{told}, WikiText-2 validation, {after} tokens after {length}"
    yield from _compared(case, "log-perplexity", losses, whole, device, count * len(SEEDS), False)


def _task(
    model: Any, tokenizer: Any, told: str, task: str, length: int, profile: Any, device: str, count: int
) -> Iterator[Row]:
    """Share of right answers to a question that comes after the choice, and to one that is in the prompt."""
    head = model.config.hidden_size // model.config.num_attention_heads
    for asked in ("asked afterwards", "asked in the prompt"):
        right: dict[tuple[float, str], list[float]] = {}
        whole = []
        for seed in SEEDS:
            rngs = [np.random.default_rng((seed, length, i)) for i in range(count)]
            examples = [make_example(task, rng, length, 1, {}) for rng in rngs]
            found: dict[tuple[float, str], list[bool]] = {}
            for context, question, answer in _batches(model, tokenizer, examples):
                if asked == "asked in the prompt":
                    context, question = torch.cat([context, question], 1), question[:, :0]
                tail = torch.cat([question, answer], 1)[:, :-1]
                if not tail.shape[1]:
                    continue
                with reading_cache(model):
                    prompt = _Prompt(model, context)
                    settings = {(1.0, ""): Settings(Uniform(), Budget(ratio=1.0))}
                    for budget in BUDGETS:
                        settings |= {(budget, n): s for n, s in _methods(budget, profile, head).items()}
                    for key, chosen in settings.items():
                        best = prompt.logits(chosen, tail)[:, -answer.shape[1] :].argmax(-1)
                        found.setdefault(key, []).extend((best == answer).all(1).tolist())
            whole.append(100 * mean(found.pop((1.0, ""))))
            for key, values in found.items():
                right.setdefault(key, []).append(100 * mean(values))
        case = f"{told}, {task}, {length} bytes, {asked}"
        yield from _compared(case, "answers right", right, whole, device, count * len(SEEDS), True)


def _compared(
    case: str, metric: str, found: dict[tuple[float, str], list[float]], whole: list[float], device: str, runs: int,
    more_is_better: bool,
) -> Iterator[Row]:  # fmt: skip
    """One row a budget and method: ours against it."""
    unit = "%" if more_is_better else "nats"
    yield row(AREA, case, f"{metric}, the whole cache", mean(whole), unit, device=device, runs=runs)
    for budget in BUDGETS:
        window, ours = found[budget, "StreamingLLM"], found[budget, _OURS]
        gap = abs(mean(whole) - mean(window))
        has_signal = gap > 5 and mean(whole) >= 20 if more_is_better else gap > 0.02
        for name in [n for b, n in found if b == budget]:
            values = found[budget, name]
            differences = [a - b for a, b in zip(ours, values, strict=True)]
            error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
            yield row(
                AREA, f"{case}, {budget:.0%} of the bytes", f"{metric}, {_OURS}", mean(ours), unit, device=device,
                peer=mean(values), peer_name=name, lower_is_better=not more_is_better, bound=mean(whole), runs=runs,
                note=f"difference {mean(differences):+.4f} ± {error:.4f} over {len(SEEDS)} seeds"
                + ("" if has_signal else "; no signal"),
            )  # fmt: skip


def quality_pictures(device: str, smoke: bool) -> Iterator[Row]:
    """The same of models that read pictures: captions, and answers to questions about pictures."""
    from benchmarks.prefix_kv_pictures import of_model, tiny

    models = [tiny(device)] if smoke else _models(device, smoke)
    for model, _, told in models:
        if reads_pictures(model.config):
            with torch.no_grad():
                yield from of_model(model, told, device, smoke)


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "operator": operator,
    "decode": decode,
    "prefill": prefill,
    "quality": quality,
    "quality_pictures": quality_pictures,
}
