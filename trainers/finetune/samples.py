"""Tokenized samples from a JSON lines file, with a marker for the graded tokens, whose predictions the loss counts.

A line has one of these forms::

    {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}
    {"prompt": "…", "completion": "…"}
    {"text": "…"}

Completions and the assistant's turns are graded, or the whole of a plain text. Prompts and completions are tokenized
separately, and so are the turns of a conversation, so that a prompt has the same tokens as during generation. Other
fields are ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effpass.core.errors import EffpassError, ModelError

__all__ = ["Sample", "file_hash", "read_lines", "read_samples"]

_FORMS = ("messages", "prompt", "text")


@dataclass(frozen=True)
class Sample:
    """Tokens of one line.

    Attributes:
        tokens: token ids, int32 `[T]`.
        graded: bool `[T]`, whether the loss counts the prediction of this token from the tokens before it.
        line: line number in the file, counted from 1.
    """

    tokens: np.ndarray
    graded: np.ndarray
    line: int


def read_samples(path: Path, tokenizer: Any) -> list[Sample]:
    """Return all lines of a file as samples, in order.

    Raises:
        EffpassError: if a line does not have one of the forms; the message names file, line and field.
        ModelError: if the tokenizer has no end-of-text token, or has no chat template although there are messages.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no end-of-text token, by which a completion ends")
    return [_sample(row, f"{path}:{line}", line, tokenizer) for line, row in read_lines(path)]


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of each line that is not empty.

    Raises:
        EffpassError: if the file can't be read, is not UTF-8, has a line that is not a JSON object, or has no lines.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EffpassError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    except OSError as error:
        raise EffpassError(f"{path}: {error.strerror}", hint="a file of JSON lines") from error
    count = 0
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        count += 1
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EffpassError(f"{path}:{number}: not JSON: {error}", hint="one object a line") from error
        if not isinstance(row, dict):
            raise EffpassError(f"{path}:{number}: got {type(row).__name__}, expected an object", hint='{"text": "…"}')
        yield number, row
    if not count:
        raise EffpassError(f"{path}: no lines", hint='one object a line: {"prompt": "…", "completion": "…"}')


def file_hash(path: Path) -> str:
    """Return the SHA-256 hash of a file in hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sample(row: dict[str, Any], where: str, line: int, tokenizer: Any) -> Sample:
    found = [form for form in _FORMS if form in row]
    if len(found) != 1:
        got = f"both {found[0]!r} and {found[1]!r}" if found else f"the fields {', '.join(map(repr, row)) or 'none'}"
        raise EffpassError(
            f"{where}: {got}; expected one of 'messages', 'prompt' with 'completion', or 'text'",
            hint="rename the fields of the file",
        )
    if found[0] == "text":
        pieces = [(_string(row, "text", where), True, True)]
        ends = True
    elif found[0] == "prompt":
        prompt, completion = (_string(row, name, where) for name in ("prompt", "completion"))
        pieces, ends = [(prompt, False, True), (completion, True, False)], True
    else:
        pieces = [(text, graded, False) for text, graded in _turns(row["messages"], where, tokenizer)]
        ends = False  # the chat template marks the end of a turn
    tokens: list[int] = []
    graded: list[bool] = []
    for text, counts, special in pieces:
        ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        while special and ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]  # some tokenizers append the token to every text, and only a complete sample gets one here
        tokens += ids
        graded += [counts] * len(ids)
    if ends:
        tokens.append(tokenizer.eos_token_id)
        graded.append(True)
    graded[0] = False  # there are no tokens before it to predict it from
    if not any(graded):
        raise EffpassError(f"{where}: no token to learn from", hint="a completion, or a text of several tokens")
    return Sample(np.array(tokens, dtype=np.int32), np.array(graded), line)


def _string(row: dict[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise EffpassError(f"{where}: field {name!r} is missing; it has {', '.join(map(repr, row))}")
    if not isinstance(row[name], str):
        raise EffpassError(f"{where}: field {name!r} is {row[name]!r:.60}, expected a string")
    if not row[name]:
        raise EffpassError(f"{where}: field {name!r} is empty")
    return row[name]


def check_messages(messages: Any, where: str) -> None:
    """Raise EffpassError unless `messages` is a non-empty list of messages with role and content."""
    if not isinstance(messages, list) or not messages:
        raise EffpassError(f"{where}: got {messages!r:.60}, expected a list of messages")
    for i, message in enumerate(messages):
        for name in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(name), str):
                raise EffpassError(
                    f"{where}[{i}]: field {name!r} is missing or no string: {message!r:.60}",
                    hint='{"role": "user", "content": "…"}',
                )


def _turns(messages: Any, where: str, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yield the pieces of a conversation as the chat template renders it, and whether each is the assistant's."""
    check_messages(messages, f"{where}: messages")
    if not any(message["role"] == "assistant" for message in messages):
        raise EffpassError(f"{where}: messages: none is the assistant's, so there is nothing to learn from")
    if not tokenizer.chat_template:
        raise ModelError(
            f"{where} has messages, and the model's tokenizer no chat template",
            hint="fields 'prompt' and 'completion' need none",
        )
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True) if i else ""
        after = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise EffpassError(
                f"{where}: messages[{i}]: the chat template renders earlier turns in another way once this one is"
                " there, so that it can't be told what is graded",
                hint="make each assistant's turn a line of its own with 'prompt' and 'completion'",
            )
        yield before[len(done) :], False
        yield after[len(before) :], True
        done = after
