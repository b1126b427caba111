"""C2T's classifier: trees with what was accepted, the fit, the curves, and a run."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from speculative_drafts import sure_checkpoint
from tiny_tuning import quiet, sums, write

import effpass
from effpass.core.errors import ArtifactError, EffpassError
from effpass.runtime.attach import engine_of
from effpass.runtime.speculative import C2T, Classifier, ModelDraft, load_classifier, speculator_of
from effpass.trainers.c2t.curves import Sizes, _mean_seconds, by_confidence, by_probability, choose, saved
from effpass.trainers.c2t.fit import fit
from effpass.trainers.c2t.run import train_c2t
from effpass.trainers.c2t.trees import Trees, collect


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and a draft that agrees with it now and then."""
    folder = tmp_path_factory.mktemp("models")
    sure_checkpoint(folder / "model")
    draft = effpass.load_model(sure_checkpoint(folder / "draft")).model
    with torch.no_grad():
        draft.lm_head.weight.mul_(0.05).add_(torch.randn_like(draft.lm_head.weight) * 0.03)
    draft.save_pretrained(folder / "draft")
    return folder / "model", folder / "draft"


def test_a_tree_with_what_the_text_says_of_it(models: tuple[Path, Path]) -> None:
    """Each candidate's path against the text, its probability and entropy against the draft's own logits."""
    model, draft = (effpass.load_model(folder) for folder in models)
    engine, prompts = engine_of(model.model), [np.array([52, 43, 52, 61]), np.array([50, 43])]
    trees = collect(
        model, engine, lambda kind: ModelDraft(draft.model, kind), prompts, top_k=3, depth=3, trees=50, answer=9,
        say=quiet,
    )  # fmt: skip
    assert trees.probability.shape[1] == 3 + 2 * 9
    assert trees.layer.tolist() == [0] * 3 + [1] * 9 + [2] * 9
    number, accepted = 0, 0
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        text = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, pad_token_id=0)[
            0
        ].tolist()
        end = len(prompt) + 1
        while end < len(text):
            of_draft: dict[tuple[int, ...], torch.Tensor] = {}

            def log_p(path: tuple[int, ...], before: Any = text[:end], known: Any = of_draft) -> torch.Tensor:
                if path not in known:
                    given = torch.tensor([[*before, *path]])
                    known[path] = draft.model(given).logits[0, -1].detach().log_softmax(-1)
                return known[path]

            paths: list[tuple[int, ...]] = []
            for i in range(21):
                parent = int(trees.parent[number, i])
                above = paths[parent] if parent >= 0 else ()
                order = log_p(above).argsort(descending=True)[:3].tolist()
                token = order[i % 3]
                paths.append((*above, token))
                said = tuple(text[end : end + len(paths[i])])
                assert bool(trees.accepted[number, i]) == (said == paths[i])
                p = sum(float(log_p(paths[i][:d])[paths[i][d]]) for d in range(len(paths[i])))
                assert float(trees.probability[number, i].log()) == pytest.approx(p, abs=1e-3)
                q = log_p(above).exp()
                assert float(trees.entropy[number, i]) == pytest.approx(float(-(q * q.log()).sum()), abs=1e-3)
            matched = int(trees.accepted[number].sum())
            accepted += matched
            end += matched + 1
            number += 1
    assert number == len(trees)
    assert 0 < accepted < number * 3


def random_trees(count: int = 40, top_k: int = 3, depth: int = 3) -> Trees:
    """Trees whose candidates are accepted as their probability says."""
    generator = torch.Generator().manual_seed(0)
    sizes = [top_k, *[top_k**2] * (depth - 1)]
    layer = torch.cat([torch.full((size,), d) for d, size in enumerate(sizes)])
    starts = [0, *itertools.accumulate(sizes)]
    total = sum(sizes)
    probability, parent = torch.zeros(count, total), torch.full((count, total), -1)
    accepted = torch.zeros(count, total, dtype=torch.bool)
    for n in range(count):
        for d in range(depth):
            for i in range(starts[d], starts[d + 1]):
                if d:
                    frontier = (
                        starts[d - 1]
                        + torch.randperm(sizes[d - 1], generator=generator)[: (i - starts[d]) // top_k + 1]
                    )
                    parent[n, i] = frontier[-1]
                above = float(probability[n, parent[n, i]]) if d else 1.0
                probability[n, i] = above * float(torch.rand((), generator=generator))
                holds = bool(torch.rand((), generator=generator) < probability[n, i] / max(above, 1e-9))
                free = not any(
                    accepted[n, j] and parent[n, j] == parent[n, i] for j in range(starts[d], i)
                )  # one child at most
                accepted[n, i] = holds and free and (not d or bool(accepted[n, parent[n, i]]))
    entropy = torch.rand(count, total, generator=generator) * 5
    return Trees(top_k, depth, probability, entropy, layer, parent, accepted)


def steady(offset: float = 0.0) -> Classifier:
    """One that says of a node what its probability is, more or less."""
    made = Classifier(2)
    with torch.no_grad():
        made.inner.weight.copy_(torch.tensor([[6.0, 0.0, 0.0], [0.0, 0.1, 0.2]]))
        made.inner.bias.zero_()
        made.outer.weight.copy_(torch.tensor([[1.0, -0.3]]))
        made.outer.bias.fill_(offset - 3)
    return Classifier.of(made.state_dict())


def test_curves_by_loops() -> None:
    trees, classifier = random_trees(), steady()
    sure_of = classifier(trees.features()).sigmoid()
    worth = trees.along_paths(sure_of)
    for n, i in itertools.product(range(len(trees)), range(trees.probability.shape[1])):
        least, node = float("inf"), i
        while node >= 0:
            least, node = min(least, float(sure_of[n, node])), int(trees.parent[n, node])
        assert float(worth[n, i]) == least
    for most, beta in ((1 << 30, 0.3), (4, 0.0), (4, 0.3)):
        (point,) = by_confidence(trees, classifier, [beta], most)
        nodes = tokens = 0
        for n in range(len(trees)):
            order = sorted(range(worth.shape[1]), key=lambda i, n=n: -float(worth[n, i]))[:most]
            kept = [i for i in order if worth[n, i] >= beta]
            nodes += len(kept)
            tokens += 1 + sum(bool(trees.accepted[n, i]) for i in kept)
        assert point.nodes == pytest.approx(nodes / len(trees))
        assert point.tokens == pytest.approx(tokens / len(trees))
    lengths = [point.tokens for point in by_probability(trees, [1, 3, 8, 21])]
    assert lengths == sorted(lengths)
    assert [point.nodes for point in by_probability(trees, [1, 3, 8, 21])] == [1, 3, 8, 21]


def test_what_is_saved_is_read_off_the_other_curve() -> None:
    trees, classifier = random_trees(), steady()
    shares = saved(trees, classifier, (0.1, 0.3, 0.5, 0.999))
    assert len(shares) >= 2
    assert 0.999 not in shares  # it keeps nothing: no tree of EAGLE-2 emits as little
    for beta, share in shares.items():
        (point,) = by_confidence(trees, classifier, [beta])
        sizes = range(1, 22)
        lengths = [p.tokens for p in by_probability(trees, sizes)]
        above = next(i for i, tokens in enumerate(lengths) if tokens >= point.tokens)
        low, high = lengths[max(0, above - 1)], lengths[above]
        between = (point.tokens - low) / (high - low) if high > low else 1.0
        nodes = sizes[above] - 1 + between if above else 1.0
        assert share == pytest.approx(1 - point.nodes / nodes, abs=1e-6)


def area(scores: torch.Tensor, trees: Trees) -> float:
    """Under the curve of true over false positives."""
    return float((scores[trees.accepted][:, None] > scores[~trees.accepted]).float().mean())


def test_the_fit_tells_apart_what_can_be() -> None:
    trees = random_trees(80)
    # What is accepted depends on the entropy as much as on the probability.
    trees = replace(trees, accepted=trees.probability > 0.1 + 0.1 * trees.entropy)
    classifier = fit(trees, hidden=12, epochs=300, seed=0, say=quiet)
    assert area(trees.probability, trees) < 0.96
    assert area(classifier(trees.features()), trees) > 0.99
    again = fit(trees, hidden=12, epochs=300, seed=0, say=quiet)
    assert torch.equal(again.inner.weight, classifier.inner.weight)
    none = replace(trees, accepted=torch.zeros_like(trees.accepted))
    with pytest.raises(EffpassError, match="no candidate of 80 trees was accepted"):
        fit(none, hidden=4, epochs=1, seed=0, say=quiet)


def test_sizes_follow_the_device() -> None:
    trees, classifier = random_trees(), steady()
    flat = choose(trees, classifier, {4: 1.0, 8: 1.01, 16: 1.02})
    steep = choose(trees, classifier, {4: 1.0, 8: 2.0, 16: 4.0})
    assert (flat.nodes, steep.nodes) == (16, 4)
    assert isinstance(flat, Sizes)
    whole, cut = (by_confidence(trees, classifier, [beta], 15)[0].tokens for beta in (0.0, flat.beta))
    assert cut >= whole * 0.97  # a larger β saves at most 2 % of the time


def test_rounds_take_the_time_of_the_size_that_holds_the_latest_trees() -> None:
    seconds = {8: 1.0, 16: 2.0, 32: 4.0}
    assert _mean_seconds(torch.tensor([2, 5, 8]), seconds) == 1.0
    assert _mean_seconds(torch.tensor([3, 31, 32]), {32: 4.0}) == 4.0
    nodes = torch.tensor([8] * 98 + [9, 17])
    eight, sixteen = 0.98**8, 0.99**8
    expected = eight + 2 * (sixteen - eight) + 4 * (1 - sixteen)
    assert _mean_seconds(nodes, seconds) == pytest.approx(expected)


def test_a_rate_is_tokens_by_that_time() -> None:
    trees, classifier, seconds = random_trees(), steady(), {8: 1.0, 16: 1.1}
    found = choose(trees, classifier, seconds)
    worth = trees.along_paths(classifier(trees.features()).sigmoid())
    nodes = 1 + (worth >= found.beta).sum(1).clamp(max=found.nodes - 1)
    tokens = by_confidence(trees, classifier, [found.beta], found.nodes - 1)[0].tokens
    assert found.rate == pytest.approx(tokens / _mean_seconds(nodes, seconds))


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    model, draft = models
    said: list[str] = []
    data = sums(tmp_path_factory.mktemp("data") / "d.jsonl", 12)
    folder = train_c2t(
        str(model), str(draft), data, draft / "c2t", top_k=3, depth=3, trees=40, answer=12, epochs=3, say=said.append
    )  # fmt: skip
    return folder, said


def test_a_run_gives_a_tree(models: tuple[Path, Path], finished: tuple[Path, list[str]]) -> None:
    model, draft = (effpass.load_model(folder) for folder in models)
    folder, said = finished
    assert any("fewer nodes" in line for line in said)
    classifier = load_classifier(folder, draft.model)
    assert (classifier.sizes["top_k"], classifier.sizes["depth"]) == (3, 3)
    inputs = model.tokenizer(["3+4="], return_tensors="pt")
    how = {**inputs, "max_new_tokens": 14, "eos_token_id": None, "pad_token_id": 257}
    expected = model.model.generate(**how)
    ready = effpass.prepare(model.model, {"version": 1, "passes": []})
    assert torch.equal(ready.generate(**how, draft=models[1], tree="c2t"), expected)
    kind = speculator_of(ready.effpass_engine, models[1], "c2t").draft.kind
    assert isinstance(kind, C2T)
    assert (kind.top_k, kind.depth, kind.nodes, kind.beta) == tuple(
        classifier.sizes[name] for name in ("top_k", "depth", "nodes", "beta")
    )
    ready.generate(**how, draft=models[1], tree="c2t:beta=0.25,nodes=5")
    other = speculator_of(ready.effpass_engine, models[1], "c2t:beta=0.25,nodes=5").draft.kind
    assert (other.top_k, other.nodes, other.beta) == (3, 5, 0.25)  # type: ignore[union-attr]


def test_what_a_run_refuses(models: tuple[Path, Path], finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    model, draft = models
    data = sums(tmp_path / "d.jsonl", 3)
    with pytest.raises(ArtifactError, match="exists"):
        train_c2t(str(model), str(draft), data, finished[0])
    with pytest.raises(EffpassError, match="trees: got 0"):
        train_c2t(str(model), str(draft), data, tmp_path / "c2t", trees=0)
    with pytest.raises(EffpassError, match="answer: got 1"):
        train_c2t(str(model), str(draft), data, tmp_path / "c2t", answer=1)
    long = write(tmp_path / "long.jsonl", {"prompt": "x" * 300})
    with pytest.raises(EffpassError, match="the prompts gave no trees"):
        train_c2t(str(model), str(draft), long, tmp_path / "c2t")
    assert not (tmp_path / "c2t").exists()


def test_the_command(models: tuple[Path, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from effpass.cli.app import app

    model, draft = models
    command = [
        "train", "c2t", str(model), "--draft", str(draft), "--data", str(sums(tmp_path / "d.jsonl", 12)), "-o",
        str(tmp_path / "c2t"), "--top-k", "2", "--depth", "2", "--trees", "25", "--answers", "8", "--epochs", "1",
        "--dtype", "float32",
    ]  # fmt: skip
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert load_classifier(tmp_path / "c2t", effpass.load_model(draft).model).sizes["depth"] == 2
