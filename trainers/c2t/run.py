"""The training run of `effpass train c2t`.

It collects trees while the model answers prompts, trains the classifier on them, measures the time of rounds with trees
of several sizes on the device, and saves the classifier with the best sizes as an artifact.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, EffpassError
from effpass.core.fingerprint import Fingerprint
from effpass.core.model import LoadedModel, load_model
from effpass.runtime.attach import engine_of
from effpass.runtime.engine import Engine
from effpass.runtime.speculative.classifier import ARTIFACT, VERSION, Classifier, measured_on
from effpass.runtime.speculative.eagle_draft import EagleDraft
from effpass.runtime.speculative.growing import C2T
from effpass.runtime.speculative.model_draft import ModelDraft
from effpass.runtime.speculative.open_draft import check_draft, open_draft
from effpass.runtime.speculative.speculator import Speculator
from effpass.trainers.c2t.curves import BETAS, by_confidence, by_probability, choose, saved
from effpass.trainers.c2t.fit import fit
from effpass.trainers.c2t.trees import Trees, collect
from effpass.trainers.draft.answers import read_prompts
from effpass.trainers.finetune.samples import file_hash

__all__ = ["train_c2t"]

_SIZES = (8, 16, 32, 64)  # numbers of nodes for which the time of a round is measured
_ROUNDS = 24  # minimum number of rounds per measurement


def train_c2t(
    source: str,
    draft: str,
    data: Path,
    folder: Path,
    *,
    top_k: int = 8,
    depth: int = 5,
    trees: int = 4000,
    answer: int = 128,
    hidden: int = 48,
    epochs: int = 10,
    seed: int = 0,
    dtype: str = "float32",
    device: str = "cpu",
    backend: Any = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Collect trees, train the classifier, and choose β and the number of nodes for the device.

    Args:
        source: model, as for `effpass.load_model`.
        draft: draft of the model, as for :func:`~effpass.runtime.speculative.open_draft.open_draft`, but not `"ngram"`,
            which has no probabilities.
        data: JSON lines file of prompts (:mod:`effpass.trainers.draft.answers`).
        folder: folder of the artifact to create; `c2t` trees load it from ``DRAFT/c2t`` if they name no other.
        top_k, depth: sizes of the trees, as for :class:`~effpass.runtime.speculative.growing.C2T`.
        trees: number of trees to collect, of which a twentieth is held out.
        answer: maximum number of tokens of an answer.
        hidden: number of hidden units of the classifier.
        epochs: number of passes over the trees.
        seed: seed of the order of the prompts and of training.
        dtype, device: dtype and device of both models.
        backend: `torch.compile` backend that compiles decode steps on a GPU; None runs the model's own operators.
        say: function that receives messages for the user.

    Returns:
        The folder of the artifact.

    Raises:
        EffpassError: if arguments, data or models are unsuitable.
    """
    if folder.exists():
        raise ArtifactError(f"{folder} exists", hint="give another folder, or remove it")
    for name, value, least in (
        ("trees", trees, 1), ("epochs", epochs, 1), ("hidden", hidden, 1), ("answer", answer, 2), ("seed", seed, 0),
    ):  # fmt: skip
        if value < least:
            raise EffpassError(f"{name}: got {value}, expected at least {least}")
    if draft == "ngram":
        raise EffpassError("the n-gram draft has no probabilities to classify", hint="give a head or a model as draft")
    check_draft(draft, f"eagle2:top_k={top_k},depth={depth}")
    loaded = load_model(source, dtype=dtype)
    loaded.model.to(device)
    prompts = read_prompts(data, loaded.tokenizer)
    order = np.random.default_rng(seed).permutation(len(prompts))
    engine = engine_of(loaded.model, backend=backend)
    found = collect(
        loaded, engine, lambda kind: open_draft(engine, draft, kind), [prompts[i] for i in order], top_k=top_k,
        depth=depth, trees=trees, answer=answer, say=say,
    )  # fmt: skip
    say(f"{len(found)} trees of {found.probability.shape[1]} candidates, {_accepted(found):.2f} of each accepted")
    held_out = torch.arange(len(found)) % 20 == 0
    learned, rest = found[~held_out], found[held_out]
    if len(learned) < 1:
        raise EffpassError(f"{len(found)} trees are nothing to learn from", hint="more prompts, or longer answers")
    classifier = fit(learned, hidden=hidden, epochs=epochs, seed=seed, say=say)
    shares = saved(rest, classifier)
    usual = sorted(shares.values())[len(shares) // 2] if shares else math.nan
    say(f"at the tokens a tree of EAGLE-2, {usual:.0%} fewer nodes (half of all β)")
    seconds = {n: _seconds(loaded, engine, draft, classifier, prompts, top_k, depth, n) for n in _sizes(top_k, depth)}
    sizes = choose(rest, classifier, seconds)
    say("  ".join(f"{n} nodes {1e3 * s:.3g} ms" for n, s in seconds.items()))
    say(f"chosen for this device: {sizes.nodes} nodes, β {sizes.beta}")
    _save(folder, engine, draft, classifier, data, rest, shares, seconds, sizes, found, seed)
    say(f"saved {folder}")
    return folder


def _accepted(trees: Trees) -> float:
    return float(trees.accepted.sum(1).double().mean())


def _sizes(top_k: int, depth: int) -> list[int]:
    """Return the tree sizes to measure, those for which a tree has enough candidates."""
    most = top_k + (depth - 1) * top_k * top_k
    return [size for size in _SIZES if size - 1 <= most] or [most + 1]


def _seconds(
    loaded: LoadedModel, engine: Engine, draft: str, classifier: Classifier, prompts: list[np.ndarray], top_k: int,
    depth: int, nodes: int,
) -> float:  # fmt: skip
    """Measure the duration of a round with trees of `nodes` nodes."""
    from effpass.runtime.speculative.generation import generate

    kind = C2T(classifier, 0.0, top_k, depth, nodes)
    speculator = Speculator(engine, open_draft(engine, draft, kind), switches=False)
    prompt = min(prompts, key=len)
    ids = torch.from_numpy(prompt).long()[None].to(loaded.model.device)

    def loop(model: Any, input_ids: torch.Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    longest = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", 1 << 20)
    new = min(_ROUNDS * (depth + 1), longest - len(prompt))
    loaded.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=None,
        pad_token_id=0, custom_generate=loop,
    )  # fmt: skip
    (pace,) = speculator._paces.values()
    assert pace.round is not None
    return pace.round


def _save(
    folder: Path, engine: Engine, draft: str, classifier: Classifier, data: Path, trees: Trees,
    shares: dict[float, float], seconds: dict[int, float], sizes: Any, found: Trees, seed: int,
) -> None:  # fmt: skip
    made = open_draft(engine, draft, "chain")
    assert isinstance(made, (EagleDraft, ModelDraft))
    learned_for = made.head if isinstance(made, EagleDraft) else made.model
    curve = by_confidence(trees, classifier, BETAS)
    eagle2 = [8, 15, 31, 63]
    metrics = {
        "tokens_by_beta": {str(b): [round(p.nodes, 3), round(p.tokens, 4)] for b, p in zip(BETAS, curve, strict=True)},
        "eagle2": {str(n): round(p.tokens, 4) for n, p in zip(eagle2, by_probability(trees, eagle2), strict=True)},
        "fewer_nodes_by_beta": {str(b): round(s, 4) for b, s in shares.items()},
        "round_seconds_by_nodes": {str(n): s for n, s in seconds.items()},
    }
    provenance = {
        "data": file_hash(data), "trees": len(found), "held_out": len(trees), "seed": seed,
        "device": measured_on(engine.device), "torch": importlib.metadata.version("torch"),
    }  # fmt: skip
    options = {"top_k": found.top_k, "depth": found.depth, "nodes": sizes.nodes, "beta": sizes.beta}
    Artifact(
        ARTIFACT, VERSION, options, Fingerprint.of(learned_for), provenance, metrics, dict(classifier.state_dict())
    ).save(folder)
