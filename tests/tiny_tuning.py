"""Checkpoints and data for tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from families import make

from effpass.trainers.lm.tokenizer import byte_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def checkpoint(folder: Path, family: str = "llama", **overrides: Any) -> Path:
    """A tiny model with the byte tokenizer and a chat template."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    settings = {"vocab_size": len(tokenizer), "pad_token_id": 257, "bos_token_id": None, "eos_token_id": 256}
    make(family, **settings, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sums(path: Path, count: int = 40, first: int = 0) -> Path:
    """`1+2=` with the completion `3`, as JSON lines."""
    rows = [{"prompt": f"{i % 7}+{i % 5}=", "completion": str(i % 7 + i % 5)} for i in range(first, first + count)]
    return write(path, *rows)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def quiet(_: str) -> None:
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
