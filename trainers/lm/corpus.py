"""Text of a source as one array of tokens: documents one after the other, each followed by an end token.

The array is cut into blocks, a share of which is drawn with the seed and held out. The rest is cut into sequences, with
another offset and in another order for each stage and each pass over the text.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import string
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from effpass.core.errors import EffpassError
from effpass.core.user_path import expand_user
from effpass.trainers.lm.tokenizer import END, byte_ids

__all__ = ["Corpus", "TextFile", "find_files", "read_corpus", "write_corpus"]

_BLOCK = 16384


@dataclass(frozen=True)
class TextFile:
    """A text file of a source.

    Attributes:
        path: path of the file.
        name: path as in the config: relative to the config, or with its variable.
        sha256: SHA-256 hash of the content.
        bytes: size of the file.
    """

    path: str
    name: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class Corpus:
    """Tokens of a source, on disk.

    Attributes:
        training: training tokens, uint16 or uint32 `[N]`.
        held_out: held-out tokens of the same dtype, `[M]`.
    """

    training: np.ndarray
    held_out: np.ndarray

    def sequence(self, index: int, length: int, key: tuple[int, ...]) -> np.ndarray:
        """Return training sequence number `index`, `[length]`; passes over the text follow each other.

        Args:
            index: number of the sequence, counted from 0 without limit.
            length: number of tokens; at most that of the corpus.
            key: numbers that determine the order.
        """
        around, place = divmod(index, len(self.training) // length)
        start = int(_cut((*key, around), len(self.training), length)[place])
        return self.training[start : start + length]


def find_files(patterns: list[str], base: Path, where: str) -> list[TextFile]:
    """Return the files of a text source, sorted by path and without duplicates.

    Args:
        patterns: file patterns, as in :attr:`.config.Source.text`.
        base: folder of the config, to which patterns are relative.
        where: name of the source, for messages.

    Raises:
        EffpassError: if a variable is not set, or if a pattern matches no file.
    """
    variables = {"STDLIB": sysconfig.get_path("stdlib"), **os.environ}
    found: dict[str, str] = {}
    for pattern in patterns:
        try:
            expanded = string.Template(pattern).substitute(variables)
        except (KeyError, ValueError) as error:
            name = error.args[0] if isinstance(error, KeyError) else pattern
            raise EffpassError(
                f"{where}: the environment variable {name!r} in {pattern!r} is not set", hint=f"export {name}=FOLDER"
            ) from error
        whole = os.fspath(base / expand_user(expanded))
        paths = [path for path in glob.glob(whole, recursive=True) if os.path.isfile(path)]
        if not paths:
            raise EffpassError(f"{where}: no file matches {pattern!r}, which is {whole}")
        for path in paths:
            found.setdefault(os.path.realpath(path), _public_name(pattern, path, base, variables))
    return [_describe(path, name) for path, name in sorted(found.items())]


def write_corpus(folder: Path, files: list[TextFile], tokenizer: Any, held_out: float, seed: int, where: str) -> None:
    """Tokenize files into ``training.npy`` and ``held_out.npy`` in `folder`.

    Args:
        folder: folder to write.
        files: files to tokenize.
        tokenizer: tokenizer; None for bytes.
        held_out: share of the tokens to hold out.
        seed: seed of the choice of held-out blocks.
        where: name of the source, for messages.

    Raises:
        EffpassError: if a file is not UTF-8, or if there are too few tokens to hold out a share.
    """
    dtype = np.uint16 if tokenizer is None or len(tokenizer) <= 1 << 16 else np.uint32
    end = END if tokenizer is None else tokenizer.eos_token_id
    parts: list[np.ndarray] = []
    for file in files:
        for document in _documents(file.path):
            if tokenizer is None:
                ids = byte_ids(document.encode())
            else:
                ids = np.array(tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"])
            parts += [ids.astype(dtype), np.array([end], dtype=dtype)]
    tokens = np.concatenate(parts)
    training, kept = _split(tokens, held_out, seed)
    if held_out and not len(kept):
        raise EffpassError(
            f"{where}: {len(tokens)} tokens are too few to hold out a share of {held_out} in blocks of {_BLOCK}",
            hint="give more text, a larger held_out, or `held_out: 0`",
        )
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "training.npy", training)
    np.save(folder / "held_out.npy", kept)


def read_corpus(folder: Path) -> Corpus:
    """Return the corpus that :func:`write_corpus` wrote, memory-mapped."""
    return Corpus(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("training", "held_out")))


def _split(tokens: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return training and held-out tokens."""
    blocks = len(tokens) // _BLOCK
    wanted = min(max(1, round(blocks * share)), blocks - 1) if share else 0
    if wanted < 1:
        return tokens, tokens[:0]
    is_kept = np.zeros(len(tokens), dtype=bool)
    for block in np.random.default_rng(seed).permutation(blocks)[:wanted]:
        is_kept[block * _BLOCK : (block + 1) * _BLOCK] = True
    return tokens[~is_kept], tokens[is_kept]


@lru_cache(maxsize=8)
def _cut(key: tuple[int, ...], tokens: int, length: int) -> np.ndarray:
    """Return where the sequences of one pass over the text start, in reading order: int64 `[tokens // length]`."""
    rng = np.random.default_rng(key)
    count = tokens // length
    return rng.integers(tokens - count * length + 1) + rng.permutation(count) * length


def _documents(path: str) -> Iterator[str]:
    """Yield the documents of a file: a text is one, and each line of a JSON lines file is one, made of its strings."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EffpassError(f"{path}: not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}") from error
    if not path.endswith(".jsonl"):
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):  # other line separators may stand in a string
        if not line.strip():
            continue
        try:
            values = list(json.loads(line).values())
        except (ValueError, AttributeError) as error:
            raise EffpassError(f"{path}:{number}: not a JSON object") from error
        yield "\n".join(value for value in values if isinstance(value, str))


def _describe(path: str, name: str) -> TextFile:
    data = Path(path).read_bytes()
    return TextFile(path, name, hashlib.sha256(data).hexdigest(), len(data))


def _public_name(pattern: str, path: str, base: Path, variables: dict[str, str]) -> str:
    """Return the path of a file as the config spells it, without the value of a variable."""
    if not pattern.startswith("$"):
        return path if os.path.isabs(pattern) else os.path.relpath(path, base)
    name = pattern[1:].partition("/")[0].strip("{}")
    return f"${name}{path.removeprefix(variables[name])}"
