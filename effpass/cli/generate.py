"""`effpass generate`: stream text from a model, rewritten by a recipe where one is given."""

from __future__ import annotations

import sys
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from effpass.cli.console import stderr, step
from effpass.cli.model import Device, Dtype, Model, TrustRemoteCode, load, read_recipe
from effpass.cli.ranks import placed
from effpass.core.errors import ArtifactError, EffpassError, ModelError
from effpass.core.prompt import open_image

__all__ = ["generate"]


def generate(
    model: Model,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The user's text; - reads it from stdin.", show_default=False)
    ],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", "-r", metavar="RECIPE", help="Rewrite by this recipe, a file or a name.")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Attach this PEFT adapter. A recipe with merge_lora then merges it."),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Show the model this image, before the text; may be given again."),
    ] = None,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="DRAFT",
            help="Decode speculatively: a smaller model, an EAGLE-3 head, ngram, or layers:0,1,5 of the model itself.",
        ),
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(
            metavar="TREE",
            help="That the draft grows: chain, static, eagle2 or c2t; sizes as in chain:7, and c2t:classifier=DIR.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text on the decode engine, written as it comes. Sampling follows the model's own generation config."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise EffpassError("the prompt is empty", hint="effpass generate MODEL --prompt 'some text'")
    parsed = read_recipe(recipe)
    if draft is None and parsed is not None and any(s.name == "sparse_verification" for s in parsed.steps):
        raise EffpassError(
            "sparse_verification acts on the trees of a draft, and none was given",
            hint="--draft DRAFT, or leave it out of the recipe",
        )
    if draft is not None:
        from effpass.runtime.speculative.open_draft import check_draft

        check_draft(draft, tree)
    elif tree is not None:
        raise EffpassError(f"--tree {tree} is of a draft, and none was given", hint="--draft DRAFT, or leave it out")
    images = [open_image(path) for path in image or ()]
    with placed(parsed, device) as place:
        if dtype is None and place.runs_on != place.loads_on and place.runs_on != "cpu":
            dtype = "auto"  # as without a recipe that spreads the model
        loaded = load(model, place.loads_on, dtype, trust_remote_code, images=bool(images))
        if loaded.tokenizer is None:
            raise ModelError(f"{model} has no tokenizer", hint="save the tokenizer into the model's folder")
        from effpass import api
        from effpass.core.model import inner_model

        ready: Any = loaded.model if adapter is None else _attach(loaded.model, adapter)
        with step("preparing" if parsed is None else "rewriting"):
            ready = api.prepare(ready, parsed or {"version": 1, "passes": []})
        if place.runs_on != place.loads_on:
            ready.to(place.runs_on)
        options: dict[str, Any] = {"images": images, "processor": loaded.processor, "max_new_tokens": max_new_tokens}
        if draft is not None:
            if not hasattr(inner_model(ready), "effpass_engine"):
                raise ModelError(
                    f"{model} does not run on the decode engine, which a draft needs", hint="leave --draft out"
                )
            options.update(draft=draft, tree=tree)
        pieces = api.generate(ready, loaded.tokenizer, text, **options)
        with step("waiting for the first token"):  # a minute or more where graphs are compiled for it
            first = next(pieces, "")
        for piece in chain([first], pieces):
            if place.writes:
                sys.stdout.write(piece)
                sys.stdout.flush()
        if place.writes:
            sys.stdout.write("\n")
        if draft is not None and place.writes:
            stderr().print(str(inner_model(ready).effpass_engine.last_speculation))
        if place.runs_on != place.loads_on and hasattr(inner_model(ready), "effpass_engine"):
            inner_model(ready).effpass_engine.release()  # graphs with collectives end before the process group does


def _attach(model: Any, adapter: Path) -> Any:
    """The model with a stock PEFT adapter beside its weights."""
    from effpass.passes.weights.peft_adapter import read_adapter

    read_adapter(adapter)  # the checks, before PEFT touches the model
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(adapter)).eval()
    except Exception as error:  # PEFT's own words, as one message
        raise ArtifactError(
            f"adapter {adapter} does not fit this model: {' '.join(str(error).split())[:300]}"
        ) from error
