"""Creation of drafts, trees and speculative decoders from the names that a user gives.

`generate` calls :func:`speculator_of` with its arguments `draft` and `tree`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from torch import nn

from effpass.core.errors import EffpassError, ModelError, did_you_mean
from effpass.core.model import load_model, read_source
from effpass.runtime.engine import Engine
from effpass.runtime.speculative.classifier import load_classifier
from effpass.runtime.speculative.drafts import Draft
from effpass.runtime.speculative.eagle_draft import EagleDraft
from effpass.runtime.speculative.eagle_format import is_head, read_head
from effpass.runtime.speculative.growing import C2T, Eagle2
from effpass.runtime.speculative.model_draft import ModelDraft
from effpass.runtime.speculative.ngram_draft import NGramDraft
from effpass.runtime.speculative.session import decoder_layers
from effpass.runtime.speculative.shapes import Static, TreeKind, chain
from effpass.runtime.speculative.skipped_layers import skip_layers
from effpass.runtime.speculative.speculator import Speculator

__all__ = ["TREES", "open_draft", "speculator_of"]

TREES = ("chain", "static", "eagle2", "c2t")
_NGRAM, _LAYERS = "ngram", "layers:"


def speculator_of(engine: Engine, draft: Any, tree: Any = None) -> Speculator:
    """Return the speculative decoder of an engine's model with a draft; the engine keeps it for later calls.

    Args:
        engine: decode engine of the model.
        draft: draft, as for :func:`open_draft`.
        tree: kind of tree, as for :func:`open_draft`.

    Raises:
        EffpassError: as :func:`open_draft` and :class:`Speculator`.
    """
    named = isinstance(draft, (str, os.PathLike))
    key = os.fspath(draft) if named else id(draft), tree
    if key not in engine.speculators:
        # The draft itself is kept too, so that no other object gets its id.
        engine.speculators[key] = Speculator(engine, open_draft(engine, draft, tree)), draft
    return engine.speculators[key][0]


def open_draft(engine: Engine, draft: Any, tree: Any = None) -> Draft:
    """Create a draft for an engine's model.

    Args:
        engine: decode engine of the model.
        draft: a model; a folder or hub id of one; a folder with an EAGLE-3 head in the `speculators` format;
            `"ngram"`, which looks up n-grams in the preceding text;
            `"layers:0,1,5"`, the model itself with these layers only; or a :class:`Draft`.
        tree: `"chain"`, `"static"`, `"eagle2"` or `"c2t"`, optionally with sizes: `"chain:7"`,
            `"static:4,2,1"`, `"eagle2:top_k=10,depth=6,nodes=60"`, `"c2t:beta=0.4"`; or a :class:`TreeKind`; None for a
            chain. The classifier of `"c2t"` and its default sizes are loaded from the subfolder ``c2t`` of the draft's
            folder.

    Raises:
        EffpassError: if the tree is unknown, or the draft can't grow it.
        ModelError: if the draft can't be loaded, or is for another model.
    """
    if isinstance(draft, str) and draft == _NGRAM:
        kind = chain(7) if tree is None else _kind(tree, None)
        if not isinstance(kind, Static) or kind.widest > 1:
            raise EffpassError(f"the n-gram draft grows chains, and tree is {tree!r}", hint="leave tree out")
        return NGramDraft(kind.depth)
    if isinstance(draft, str) and draft.startswith(_LAYERS):
        draft = skip_layers(engine.model, _numbers(draft))
    if isinstance(draft, (str, os.PathLike)):
        return _load(engine, draft, tree)
    if isinstance(draft, nn.Module):
        return ModelDraft(draft, _kind(tree, None), engine.backend)
    if not all(hasattr(draft, name) for name in ("start", "kind", "taps")):
        raise EffpassError(f"draft is a {type(draft).__name__}", hint="give a model, a folder, 'ngram' or 'layers:...'")
    if tree is not None:
        raise EffpassError("a draft that was made knows its tree", hint="leave tree out")
    return draft


def _load(engine: Engine, name: str | os.PathLike[str], tree: Any) -> Draft:
    """Load a draft from a folder with an EAGLE-3 head or a model, or from the hub id of a model."""
    if is_head(Path(name)):
        head = read_head(Path(name), len(decoder_layers(engine.model)))
        kind = _kind(tree, lambda: load_classifier(Path(name, "c2t"), head))
        if head.embed_tokens.weight.is_meta:
            head.share(engine.model)
        return EagleDraft(head.to(engine.device, next(engine.model.parameters()).dtype), kind, engine.backend)
    loaded = load_model(name, dtype=next(engine.model.parameters()).dtype)
    ours, theirs = loaded.tokenizer, _tokenizer(engine.model)
    if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
        raise ModelError(
            f"the draft {name} and the model {engine.model.config._name_or_path} have different tokenizers",
            hint="take a draft of the same family",
        )
    kind = _kind(tree, lambda: load_classifier(Path(name, "c2t"), loaded.model))
    same = ours is not None and theirs is not None
    return ModelDraft(loaded.model.to(engine.device), kind, engine.backend, same_tokens=same)


def _tokenizer(model: Any) -> Any:
    """Load the tokenizer of a model from where the model was loaded; None if that is not known."""
    name = getattr(model.config, "_name_or_path", "")
    try:
        return read_source(name)[1] if name else None
    except EffpassError:
        return None


def _numbers(draft: str) -> list[int]:
    try:
        return [int(part) for part in draft.removeprefix(_LAYERS).split(",")]
    except ValueError as error:
        raise EffpassError(f"draft {draft!r}", hint="give numbers of layers with commas: layers:0,1,5") from error


def _kind(tree: Any, classifier: Callable[[], Any] | None) -> TreeKind:
    if tree is None:
        return chain()
    if not isinstance(tree, str):
        return tree
    name, _, sizes = tree.partition(":")
    parts = [part.strip() for part in sizes.split(",") if part.strip()]
    if name == "chain":
        return chain(*_integers(tree, parts[:1])) if len(parts) < 2 else _wrong(tree, "chain:7")
    if name == "static":
        return Static(tuple(_integers(tree, parts))) if parts else Static()
    if name == "eagle2":
        return Eagle2(**_options(tree, parts, Eagle2))
    if name == "c2t":
        if classifier is None:
            raise EffpassError("a c2t tree needs its classifier", hint="give tree=C2T(classifier), or a draft's folder")
        learned = classifier()
        return C2T(classifier=learned, **{**learned.sizes, **_options(tree, parts, C2T)})
    raise EffpassError(f"unknown tree {name!r}{did_you_mean(name, TREES)}")


def _integers(tree: str, parts: list[str]) -> list[int]:
    try:
        return [int(part) for part in parts]
    except ValueError:
        return _wrong(tree, "chain:7 or static:4,2,1")


def _options(tree: str, parts: list[str], kind: Any) -> dict[str, Any]:
    """Parse sizes of the form `name=value`, with the types of the defaults of `kind`."""
    known: dict[str, Any] = {f.name: type(f.default) for f in fields(kind) if f.name != "classifier"}
    options = {}
    for part in parts:
        name, _, value = part.partition("=")
        if name not in known:
            raise EffpassError(f"tree {tree!r}: unknown size {name!r}{did_you_mean(name, known)}")
        try:
            options[name] = known[name](value)
        except ValueError:
            _wrong(tree, f"{name}={2 if known[name] is int else 0.5}")
    return options


def _wrong(tree: str, example: str) -> NoReturn:
    raise EffpassError(f"tree {tree!r} can't be read", hint=f"such as {example}")
