"""Training data of draft heads: the model's own answers to the prompts of a data set, which a draft has to predict.

A line of the data is one of::

    {"messages": [{"role": "user", "content": "…"}, …]}     assistant turns at the end are removed
    {"prompt": "…"}

Other fields, such as completions, are ignored. Answers are written to a file batch by batch, so that a run that was
interrupted continues with the next batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effpass.core.errors import EffpassError, ModelError
from effpass.core.model import LoadedModel
from effpass.core.whole import write_text
from effpass.runtime.attach import engine_of
from effpass.runtime.generation import generate
from effpass.trainers.finetune.samples import Sample, check_messages, read_lines

__all__ = ["answer", "read_prompts"]

_ROWS = 64  # number of prompts per batch


def read_prompts(path: Path, tokenizer: Any) -> list[np.ndarray]:
    """Return the token ids of each line's prompt, int32 `[T]`.

    Raises:
        EffpassError: if a line has neither form; the message names file, line and field.
        ModelError: if there are messages and the tokenizer has no chat template.
    """
    found = []
    for number, row in read_lines(path):
        where = f"{path}:{number}"
        if isinstance(row.get("messages"), list):
            messages = list(row["messages"])
            check_messages(messages, f"{where}: messages")
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            if not messages:
                raise EffpassError(f"{where}: messages: all are the assistant's, and none asks anything")
            if not tokenizer.chat_template:
                raise ModelError(
                    f"{where} has messages, and the model's tokenizer no chat template",
                    hint="a field 'prompt' needs none",
                )
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        elif isinstance(row.get("prompt"), str) and row["prompt"]:
            tokens = tokenizer(row["prompt"], verbose=False)["input_ids"]
        else:
            raise EffpassError(
                f"{where}: neither 'messages' nor a 'prompt' to answer, but {', '.join(map(repr, row)) or 'nothing'}",
                hint="--answers 0 learns from texts as they are",
            )
        found.append(np.array(tokens, dtype=np.int32))
    return found


def answer(
    loaded: LoadedModel, prompts: list[np.ndarray], path: Path, *, most: int, length: int, temperature: float,
    seed: int, say: Callable[[str], None],
) -> list[Sample]:  # fmt: skip
    """Return the prompts with the model's answers as samples, whose graded tokens are the answers.

    Args:
        loaded: the model with its tokenizer.
        prompts: token ids of the prompts, as :func:`read_prompts` returns them.
        path: JSON lines file of the answers, one line per batch; answers that it holds are reused.
        most: maximum number of tokens of an answer.
        length: maximum number of tokens of prompt and answer; prompts without room for an answer are skipped.
        temperature: sampling temperature; 0 for greedy decoding.
        seed: seed of sampling; each batch has a seed of its own, so that answers do not depend on interruptions.
        say: function that receives messages for the user.

    Raises:
        EffpassError: if no prompt leaves room for an answer, the model answers nothing, or `path` holds the answers to
            other prompts.
    """
    short = [number for number, prompt in enumerate(prompts) if len(prompt) < length]
    if not short:
        raise EffpassError(
            f"every prompt has {length} tokens or more, and a row has {length}", hint="--sequence-length"
        )
    order = sorted(short, key=lambda number: len(prompts[number]))  # batches of similar lengths need little padding
    batches = [order[first : first + _ROWS] for first in range(0, len(order), _ROWS)]
    known = _read(path, batches)
    if known < len(batches):
        say(f"{loaded.name} answers {len(order)} prompts, up to {most} tokens each")
    for batch in batches[known:]:
        torch.manual_seed(seed + batch[0])
        given = [prompts[number] for number in batch]
        lines = [
            {"number": number, "prompt": len(prompts[number]), "tokens": tokens}
            for number, tokens in zip(batch, _answers(loaded, given, most, length, temperature), strict=True)
        ]
        with path.open("a") as file:
            file.write(json.dumps(lines) + "\n")
    samples = []
    for line in path.read_text().splitlines():
        for found in json.loads(line):
            tokens = np.array(found["tokens"], dtype=np.int32)
            if len(tokens) > found["prompt"]:
                samples.append(Sample(tokens, np.arange(len(tokens)) >= max(1, found["prompt"]), found["number"] + 1))
    if not samples:
        raise EffpassError("the model answered nothing", hint="give other prompts, or --answers 0 with texts")
    return sorted(samples, key=lambda sample: sample.line)


def _read(path: Path, batches: list[list[int]]) -> int:
    """Return the number of batches that are answered, after removing a line that was written incompletely."""
    if not path.exists():
        return 0
    lines = path.read_text().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("]\n")]
    if len(whole) < len(lines):
        write_text(path, "".join(whole))
    for line, batch in zip(whole, batches, strict=False):
        if [found["number"] for found in json.loads(line)] != batch:
            raise EffpassError(f"{path} answers other prompts", hint="start anew in another folder")
    return len(whole)


def _answers(
    loaded: LoadedModel, prompts: list[np.ndarray], most: int, length: int, temperature: float
) -> list[list[int]]:
    """Return the token ids of prompts with answers, including the end-of-sequence token if it was generated."""
    model, tokenizer = loaded.model, loaded.tokenizer
    widest = max(map(len, prompts))
    new = max(1, min(most, length - widest))
    ids = torch.full((len(prompts), widest), tokenizer.eos_token_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, widest - len(prompt) :] = torch.from_numpy(prompt).long()
        mask[row, widest - len(prompt) :] = 1
    sampled = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}

    def loop(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
        return generate(engine_of(model), input_ids, **prepared)

    out = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new,
        pad_token_id=tokenizer.eos_token_id, custom_generate=loop, **sampled,
    ).tolist()  # fmt: skip
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])}
    answers = []
    for row, prompt in zip(out, prompts, strict=True):
        generated = row[widest:]
        end = next((i for i, token in enumerate(generated) if token in ends), len(generated) - 1)
        answers.append([*prompt.tolist(), *generated[: end + 1]])
    return answers
