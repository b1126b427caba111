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

from effpass.core.errors import EffpassError, did_you_mean
from effpass.core.model import load_model, read_source
from effpass.core.user_path import expand_user
from effpass.runtime.engine import Engine
from effpass.runtime.speculative.classifier import Classifier, load_classifier
from effpass.runtime.speculative.drafts import Draft
from effpass.runtime.speculative.eagle_draft import EagleDraft
from effpass.runtime.speculative.eagle_format import is_head, read_head
from effpass.runtime.speculative.growing import C2T, Eagle2
from effpass.runtime.speculative.model_draft import ModelDraft
from effpass.runtime.speculative.ngram_draft import NGramDraft
from effpass.runtime.speculative.same_tokens import check_tokens, name_of, read_tokenizer, source_of
from effpass.runtime.speculative.session import decoder_layers
from effpass.runtime.speculative.shapes import Static, TreeKind, chain
from effpass.runtime.speculative.skipped_layers import skip_layers
from effpass.runtime.speculative.speculator import Speculator

__all__ = ["TREES", "check_draft", "open_draft", "speculator_of"]

TREES = ("chain", "static", "eagle2", "c2t")
_NGRAM, _LAYERS = "ngram", "layers:"

#: Loads the classifier of a c2t tree from the folder that the tree names; None if it names none.
_Load = Callable[[Path | None], Classifier]


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
            chain. The classifier of `"c2t"` and its default sizes are loaded from the folder that the tree names,
            `"c2t:classifier=FOLDER"`, or else from the subfolder ``c2t`` of the draft's folder.

    Raises:
        EffpassError: if the tree is unknown, or the draft can't grow it.
        ModelError: if the draft can't be loaded, or is for another model.
    """
    if isinstance(draft, str) and draft == _NGRAM:
        return NGramDraft(_chain_of_ngrams(tree).depth)
    if isinstance(draft, str) and draft.startswith(_LAYERS):
        small = skip_layers(engine.model, _numbers(draft))
        return ModelDraft(small, _kind(tree, _loading(engine, draft, small)), engine.backend)
    if isinstance(draft, (str, os.PathLike)):
        return _load(engine, draft, tree)
    if isinstance(draft, nn.Module):
        tokenizer = read_tokenizer(source_of(draft), local_files_only=True)
        return _model_draft(engine, draft, draft, tokenizer, tree)
    if not all(hasattr(draft, name) for name in ("start", "kind", "taps")):
        raise EffpassError(f"draft is a {type(draft).__name__}", hint="give a model, a folder, 'ngram' or 'layers:...'")
    if tree is not None:
        raise EffpassError("a draft that was made knows its tree", hint="leave tree out")
    return draft


def check_draft(draft: str, tree: str | None = None) -> None:
    """Check the names of a draft and a tree, without the model that they are for.

    Args:
        draft, tree: as for :func:`open_draft`.

    Raises:
        EffpassError, ModelError: as :func:`open_draft`, except for what depends on the model.
    """
    if draft == _NGRAM:
        _chain_of_ngrams(tree)
        return
    if draft.startswith(_LAYERS):
        _numbers(draft)
    elif not is_head(expand_user(draft)):
        read_source(draft)
    _kind(tree, lambda given: load_classifier(_classifier_folder(draft, given)))


def _load(engine: Engine, name: str | os.PathLike[str], tree: Any) -> Draft:
    """Load a draft from a folder with an EAGLE-3 head or a model, or from the hub id of a model."""
    folder = expand_user(name)
    if is_head(folder):
        head = read_head(folder, len(decoder_layers(engine.model)))
        kind = _kind(tree, _loading(engine, name, head))
        if head.embed_tokens.weight.is_meta:
            head.share(engine.model)
        return EagleDraft(head.to(engine.device, next(engine.model.parameters()).dtype), kind, engine.backend)
    loaded = load_model(name, dtype=next(engine.model.parameters()).dtype)
    return _model_draft(engine, name, loaded.model.to(engine.device), loaded.tokenizer, tree)


def _model_draft(engine: Engine, draft: Any, model: Any, tokenizer: Any, tree: Any) -> Draft:
    """Create a draft from a model, with its tokenizer or None if that is not known; `draft` is what the user gave."""
    hint = "take a draft of the same family"
    same = check_tokens(f"the draft {name_of(model)}", tokenizer, engine.model, hint=hint)
    kind = _kind(tree, _loading(engine, draft, model))
    return ModelDraft(model, kind, engine.backend, same_tokens=same)


def _loading(engine: Engine, draft: Any, learned_for: nn.Module) -> _Load:
    """Return the function that loads the classifier of a draft."""
    return lambda given: load_classifier(_classifier_folder(draft, given), learned_for, engine.device)


def _classifier_folder(draft: Any, given: Path | None) -> Path:
    """Return the folder of a draft's classifier: the one that the tree names, or else ``c2t`` in the draft's."""
    is_name = isinstance(draft, (str, os.PathLike))
    if given is not None:
        return given
    if is_name and expand_user(draft).is_dir():
        return expand_user(draft) / "c2t"
    raise EffpassError(
        f"a c2t tree needs its classifier, and the draft {draft if is_name else name_of(draft)} is no folder with one",
        hint="tree c2t:classifier=FOLDER, which effpass train c2t -o FOLDER writes",
    )


def _chain_of_ngrams(tree: Any) -> Static:
    def refuse(*_: Any) -> NoReturn:
        raise EffpassError(f"the n-gram draft grows chains, and tree is {tree!r}", hint="leave tree out")

    kind = chain(7) if tree is None else _kind(tree, refuse)
    return kind if isinstance(kind, Static) and kind.widest == 1 else refuse()


def _numbers(draft: str) -> list[int]:
    try:
        return [int(part) for part in draft.removeprefix(_LAYERS).split(",")]
    except ValueError as error:
        raise EffpassError(f"draft {draft!r}", hint="give numbers of layers with commas: layers:0,1,5") from error


def _kind(tree: Any, load: _Load) -> TreeKind:
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
        options = _options(tree, parts, C2T)
        learned = load(options.pop("classifier", None))
        return C2T(classifier=learned, **{**learned.sizes, **options})
    raise EffpassError(f"unknown tree {name!r}{did_you_mean(name, TREES)}")


def _integers(tree: str, parts: list[str]) -> list[int]:
    try:
        return [int(part) for part in parts]
    except ValueError:
        return _wrong(tree, "chain:7 or static:4,2,1")


def _options(tree: str, parts: list[str], kind: Any) -> dict[str, Any]:
    """Parse sizes of the form `name=value`, with the types of the defaults of `kind`; a classifier is a folder."""
    known: dict[str, Any] = {f.name: expand_user if f.name == "classifier" else type(f.default) for f in fields(kind)}
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
