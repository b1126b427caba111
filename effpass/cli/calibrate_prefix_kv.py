"""`effpass calibrate prefix-kv`: learn which share of a key-value cache each layer needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from effpass.cli.console import step
from effpass.cli.model import Device, Dtype, Model, TrustRemoteCode, load
from effpass.cli.text import most_tokens
from effpass.core.errors import EffpassError, ModelError

__all__ = ["prefix_kv"]


class Importance(StrEnum):
    """Whose attention counts."""

    both = "both"
    window = "window"
    full = "full"


def prefix_kv(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Text, or JSONL: one prompt a line, {'text': ...}, with 'image': FILE for a vision-language model.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PROFILE", help="The folder to write.", show_default=False)
    ],
    samples: Annotated[int, typer.Option(min=1, help="Prompts to run, at most.")] = 8,
    tokens: Annotated[int, typer.Option(min=128, help="Tokens of a prompt that is cut from text.")] = 2048,
    importance: Annotated[
        Importance, typer.Option(help="Attention from all tokens, from the last 64, or both; as in the recipe.")
    ] = Importance.both,
    pool: Annotated[int, typer.Option(min=1, help="Neighbors over which that is averaged; as in the recipe.")] = 7,
    sink: Annotated[int, typer.Option(min=0, help="First tokens that always stay; as in the recipe.")] = 4,
    recent: Annotated[int, typer.Option(min=1, help="Last tokens that always stay; as in the recipe.")] = 32,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Learn a profile for the pass prefix_kv: what share of its tokens each layer keeps, for every budget."""
    lines = _read(data)
    from effpass.core.artifact import check_replaceable

    check_replaceable(output)
    has_images = any("image" in line for line in lines) if isinstance(lines, list) else False
    loaded = load(model, device, dtype, trust_remote_code, images=has_images)
    if loaded.tokenizer is None:
        raise ModelError(f"{model} has no tokenizer", hint="save the tokenizer into the model's folder")
    from effpass.runtime.prefix_kv.calibrate import calibrate

    with step("measuring attention"):
        profile = calibrate(
            loaded.model,
            _prompts(lines, loaded, data, samples, tokens),
            importance=importance.value,
            pool=pool,
            sink=sink,
            recent=recent,
            provenance={"data": data.name, "model": loaded.name},
        )
    profile.artifact.save(output)
    shares = ", ".join(f"{share:.0%}" for share in profile.at(0.2))
    typer.echo(f"{profile.artifact.provenance['samples']} prompts; at a budget of 20 % the layers keep {shares}")


def _read(path: Path) -> str | list[dict[str, Any]]:
    """A text, or the objects of a JSONL file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EffpassError(f"{path}: can't be read as text: {error}") from error
    if path.suffix != ".jsonl":
        return text
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            raise EffpassError(f"{path}:{number}: no JSON: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("text"), str):
            raise EffpassError(
                f"{path}:{number}: expected an object with 'text'", hint='{"text": "...", "image": "a.png"}'
            )
        if "image" in found and not isinstance(found["image"], str):
            raise EffpassError(f"{path}:{number}: image: got {found['image']!r}, expected a file's name")
        lines.append(found)
    return lines


def _prompts(lines: Any, loaded: Any, path: Path, samples: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Model inputs; images lie relative to the data's folder."""
    from effpass.core.prompt import open_image, prompt_inputs

    if isinstance(lines, str):
        yield from _pieces(lines, loaded, path, samples, tokens)
        return
    for line in lines[:samples]:
        images = [open_image(path.parent / line["image"])] if "image" in line else []
        yield dict(prompt_inputs(loaded.tokenizer, line["text"], images, loaded.processor))


def _pieces(text: str, loaded: Any, path: Path, samples: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Pieces of a text that are spread over it evenly."""
    ids = loaded.tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    tokens = min(most_tokens(tokens, loaded.model), ids.shape[1])
    count = min(samples, ids.shape[1] // tokens) if tokens else 0
    if not count:
        raise EffpassError(f"{path}: holds no tokens", hint="give some pages of text")
    for i in range(count):
        first = i * (ids.shape[1] - tokens) // max(1, count - 1)
        yield {"input_ids": ids[:, first : first + tokens]}
