"""Tokenizer of a run: one token per byte, or the tokenizer in a folder."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from effpass.core.errors import ModelError

__all__ = ["END", "PAD", "PICTURE", "SPECIAL", "byte_ids", "byte_tokenizer", "load_tokenizer"]

# Byte b is token b, from 0 to 255; these tokens follow.
PICTURE = "<image>"
SPECIAL = ("<end>", "<pad>", PICTURE)
END, PAD = 256, 257


def byte_tokenizer() -> Any:
    """Return a standard `PreTrainedTokenizerFast` with 259 tokens: the 256 bytes, followed by :data:`SPECIAL`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: byte for byte, letter in _letters().items()}
    vocabulary |= {name: END + i for i, name in enumerate(SPECIAL)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[1],
        extra_special_tokens=list(SPECIAL[2:]),
        clean_up_tokenization_spaces=False,
    )


def byte_ids(text: bytes) -> np.ndarray:
    """Return the ids that :func:`byte_tokenizer` gives for `text`: uint16 `[len(text)]`."""
    return np.frombuffer(text, dtype=np.uint8).astype(np.uint16)


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer `bytes`, or the tokenizer in a folder.

    Raises:
        ModelError: if the folder has no tokenizer, or if the tokenizer has no end-of-text token.
    """
    if name == "bytes":
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"tokenizer {name}: can't be loaded: {' '.join(str(error).split())[:200]}",
            hint="give `tokenizer: bytes`, or a folder with tokenizer.json",
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"tokenizer {name} has no end-of-text token, which stands between packed documents")
    return tokenizer


@cache
def _letters() -> dict[int, str]:
    """Return, for each byte, the printable character that stands for it in byte-level BPE vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
