"""The engine for a long time: requests of every kind in random order, some given up midway, memory flat.

EFFPASS_SOAK_SECONDS=3600 python -m pytest -m slow tests/runtime/test_soak.py -s
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoint import make_checkpoint
from torch import Tensor
from transformers import StoppingCriteria

import effpass
from effpass.core.errors import EffpassError

SECONDS = float(os.environ.get("EFFPASS_SOAK_SECONDS", "60"))
# Beyond what there was after a third of the time: pages of an allocator, not of a request, of which one cache alone
# has 0.3 MB and a soak thousands.
ALLOWED_GROWTH = 24e6
# Float32 sums in another order: two tokens whose logits are this close may change places.
TIE = 1e-4
LETTERS = "abcdefghij klmno pqrst"


class _GivenUpError(Exception):
    """What a user's streamer raises, to end a generation."""


class GivesUp:
    """A streamer that has enough after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def put(self, value: Tensor) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _GivenUpError

    def end(self) -> None:
        pass


class After(StoppingCriteria):
    """Stops all sequences at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Requests:
    """Makes requests of one model, and compares what comes with transformers' own loop on the same weights."""

    def __init__(self, model: Any, tokenizer: Any, seed: int) -> None:
        self.model, self.tokenizer, self.random = model, tokenizer, random.Random(seed)
        self.compared, self.other_draws = 0, 0
        self.kinds: tuple[Callable[[], None], ...] = (
            self.batch, self.sampled, self.stopped, self.stream, self.drafted, self.conversation, self.closed,
            self.given_up, self.refused,
        )  # fmt: skip

    def one(self) -> str:
        kind = self.random.choice(self.kinds)
        kind()
        return kind.__name__

    # -- kinds ---------------------------------------------------------------------------------------------------------

    def batch(self) -> None:
        self.same(max_new_tokens=self.length(), do_sample=False, eos_token_id=self.random.randrange(97, 122))

    def sampled(self) -> None:
        how = self.random.choice(({"temperature": 0.7}, {"top_k": 9}, {"top_p": 0.8}, {"repetition_penalty": 1.3}))
        self.same(max_new_tokens=self.length(), do_sample=True, **how)

    def stopped(self) -> None:
        stop = self.random.sample(LETTERS, k=2)
        self.same(max_new_tokens=self.length(), do_sample=False, stop_strings=stop, tokenizer=self.tokenizer)

    def stream(self, **how: Any) -> None:
        text, new = self.text(), self.length()
        pieces = effpass.generate(self.model, self.tokenizer, text, max_new_tokens=new, do_sample=False, **how)
        inputs = self.tokenizer(text, return_tensors="pt")
        theirs = self.theirs(**inputs, max_new_tokens=new, do_sample=False)
        expected = self.tokenizer.decode(theirs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert "".join(pieces) == expected or self.least_gap(theirs) < TIE

    def drafted(self) -> None:
        self.stream(draft="ngram")

    def conversation(self) -> None:
        """A second turn on the first one's cache is one long prompt."""
        inputs, rest = self.prompts(), self.tokenizer(self.text(), return_tensors="pt")["input_ids"]
        rows, length = inputs["input_ids"].shape
        end = length + self.random.randint(2, 10)
        first = self.model.generate(
            **inputs, max_length=length + 80, max_new_tokens=None, do_sample=False, eos_token_id=None,
            return_dict_in_generate=True, stopping_criteria=[After(end)],
        )  # fmt: skip
        ids = torch.cat([first.sequences, rest.expand(rows, -1)], dim=1)
        known = torch.ones(rows, ids.shape[1] - length, dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], known], dim=1)
        how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        ours = self.model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **how)
        self.compare(ours, self.theirs(input_ids=ids, attention_mask=mask, **how), **how)

    def closed(self) -> None:
        stream = effpass.generate(self.model, self.tokenizer, self.text(), max_new_tokens=48, do_sample=True)
        for _ in range(self.random.randint(0, 3)):
            next(stream, None)
        stream.close()

    def given_up(self) -> None:
        inputs, streamer = self.tokenizer(self.text(), return_tensors="pt"), GivesUp(self.random.randint(0, 20))
        with pytest.raises(_GivenUpError):
            self.model.generate(**inputs, max_new_tokens=40, eos_token_id=None, streamer=streamer)

    def refused(self) -> None:
        inputs = self.prompts()
        with pytest.raises(EffpassError, match="beam search"):
            self.model.generate(**inputs, max_new_tokens=4, num_beams=2)
        with pytest.raises(EffpassError, match="prompt and answer come to"):
            self.model.generate(**inputs, max_new_tokens=300)

    # -- of which they are made ----------------------------------------------------------------------------------------

    def text(self) -> str:
        return "".join(self.random.choices(LETTERS, k=self.random.randint(1, 60)))

    def length(self) -> int:
        return self.random.randint(1, 48)

    def prompts(self) -> Any:
        texts = [self.text() for _ in range(self.random.randint(1, 4))]
        return self.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")

    def theirs(self, **given: Any) -> Tensor:
        return type(self.model).generate(self.model, **given)

    def same(self, **how: Any) -> None:
        inputs, seed = self.prompts(), self.random.randrange(1 << 30)
        torch.manual_seed(seed)
        ours = self.model.generate(**inputs, **how)
        torch.manual_seed(seed)
        self.compare(ours, self.theirs(**inputs, **how), **how)

    def compare(self, ours: Tensor, theirs: Tensor, *, do_sample: bool, **how: Any) -> None:
        self.compared += 1
        if torch.equal(ours, theirs):
            return
        if do_sample:
            self.other_draws += 1  # a draw that falls between two tokens, in one of many thousands
        else:
            assert self.least_gap(theirs) < TIE, how

    @torch.no_grad()
    def least_gap(self, ids: Tensor) -> float:
        """Between the best two tokens at any place."""
        best = self.model(input_ids=ids, attention_mask=(ids != 0).long()).logits.topk(2).values
        return float((best[..., 0] - best[..., 1]).min())


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, Tensor) for thing in gc.get_objects())


@pytest.mark.slow
def test_mixed_requests(tmp_path: Path) -> None:
    loaded = effpass.load_model(str(make_checkpoint(tmp_path / "tiny")))
    model = effpass.prepare(loaded.model, {"version": 1, "passes": []})
    requests, done = Requests(model, loaded.tokenizer, seed=0), Counter[str]()
    for kind in requests.kinds:  # each once, so that nothing is made for the first time later
        kind()
    started, threads = time.monotonic(), threading.active_count()
    lines: list[tuple[float, int]] = []
    tensors = settled = None
    while (passed := time.monotonic() - started) < SECONDS:
        done[requests.one()] += 1
        if passed > SECONDS / 3 and tensors is None:
            model.effpass_engine.release()
            tensors, settled = live_tensors(), resident()
        if not lines or passed - lines[-1][0] > SECONDS / 20:
            lines.append((passed, resident()))
            print(f"{passed:6.0f} s  {sum(done.values()):6d} requests  {lines[-1][1] / 1e6:.1f} MB", flush=True)
    model.effpass_engine.release()
    print(dict(done), f"{requests.compared} compared, {requests.other_draws} other draws", sep="\n")
    assert tensors is not None
    assert settled is not None
    assert live_tensors() <= tensors
    assert resident() - settled < ALLOWED_GROWTH
    assert threading.active_count() == threads
    assert len(done) == len(requests.kinds) or sum(done.values()) < 100
    assert requests.other_draws <= 1 + requests.compared // 1000
    assert model.config._attn_implementation == "sdpa"
