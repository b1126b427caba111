"""What the names of drafts, trees and classifiers stand for, and the tokenizers behind them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from speculative_drafts import classifier, layer_config
from tiny_tuning import checkpoint
from transformers import TextIteratorStreamer

import effpass
from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, EffpassError, ModelError
from effpass.core.fingerprint import Fingerprint
from effpass.runtime.speculative import C2T, EagleHead, HeadConfig, skip_layers, speculator_of, write_head
from effpass.runtime.speculative.open_draft import check_draft

FEW = {"input_ids": torch.tensor([[52, 43, 52, 61]]), "max_new_tokens": 4, "pad_token_id": 257}
OTHER = r"have different tokenizers: 'a' has id 98 in the draft's and id 97 in the model's\n  → "


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, a draft with the same tokenizer, and one in whose tokenizer two letters have changed places."""
    found = {name: checkpoint(tmp_path_factory.mktemp(name)) for name in ("model", "same", "other")}
    file = found["other"] / "tokenizer.json"
    text = file.read_text()
    assert text.count('"a": 97,') == text.count('"b": 98,') == 1
    file.write_text(text.replace('"a": 97,', '"a": 98,').replace('"b": 98,', '"b": 97,'))
    return found


@pytest.fixture
def model(folders: dict[str, Path]) -> Any:
    return effpass.prepare(effpass.load_model(folders["model"]).model, {"version": 1, "passes": []})


def head_of(folder: Path, verifier: Path, vocabulary: int) -> Path:
    head = EagleHead(HeadConfig(layer_config(vocab_size=vocabulary), vocabulary, (0, 1)))
    return write_head(head, folder, verifier=str(verifier), architecture="LlamaForCausalLM", tokens=3)


def save_classifier(folder: Path, draft: Any, device: str | None = None, **options: Any) -> Path:
    provenance = {} if device is None else {"device": device}
    Artifact("c2t", 1, options, Fingerprint.of(draft), provenance, tensors=dict(classifier().state_dict())).save(folder)
    return folder


# -- tokenizers -------------------------------------------------------------------------------------------------------


def test_another_tokenizer_of_a_model(folders: dict[str, Path], model: Any) -> None:
    for draft in (folders["other"], effpass.load_model(folders["other"]).model):
        with pytest.raises(ModelError, match=f"the draft {folders['other']} and the model .* {OTHER}take a draft of"):
            model.generate(**FEW, draft=draft)
    for same in (folders["same"], effpass.load_model(folders["same"]).model):
        assert torch.equal(model.generate(**FEW, draft=same), model.generate(**FEW))


def test_another_tokenizer_of_a_head(folders: dict[str, Path], model: Any, tmp_path: Path) -> None:
    vocabulary = model.config.vocab_size
    other = head_of(tmp_path / "other", folders["other"], vocabulary)
    said = f"the head trained for {folders['other']} and the model .* {OTHER}effpass train draft MODEL"
    with pytest.raises(ModelError, match=said):
        model.generate(**FEW, draft=other)
    for verifier in (folders["model"], folders["same"], tmp_path / "gone"):
        name = f"head of {verifier.name}"
        head = head_of(tmp_path / name, verifier, vocabulary)
        assert torch.equal(model.generate(**FEW, draft=head), model.generate(**FEW))


def test_a_token_that_only_one_has(folders: dict[str, Path], tmp_path: Path) -> None:
    loaded = effpass.load_model(checkpoint(tmp_path / "model"))
    loaded.tokenizer.add_tokens(["<more>"])
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    ready = effpass.prepare(loaded.model, {"version": 1, "passes": []})
    with pytest.raises(ModelError, match="'<more>' has no id in the draft's and id 259 in the model's"):
        ready.generate(**FEW, draft=folders["same"])


def test_another_vocabulary_names_the_draft(folders: dict[str, Path], model: Any) -> None:
    draft = families.make("llama", vocab_size=50)
    with pytest.raises(ModelError, match="the draft LlamaForCausalLM has a vocabulary of 50 tokens"):
        model.generate(**FEW, draft=draft)
    draft.config._name_or_path = "org/small"
    with pytest.raises(ModelError, match="the draft org/small has a vocabulary of 50 tokens"):
        model.generate(**FEW, draft=draft)


# -- classifiers ------------------------------------------------------------------------------------------------------


def test_a_tree_names_its_classifier(folders: dict[str, Path], model: Any, tmp_path: Path) -> None:
    small = skip_layers(model, [0])
    sizes = {"top_k": 3, "depth": 2, "nodes": 6, "beta": 0.0}
    folder = save_classifier(tmp_path / "of layers", small, **sizes)
    tree = f"c2t:classifier={folder},nodes=5"
    for draft in ("layers:0", small):
        assert torch.equal(model.generate(**FEW, draft=draft, tree=tree), model.generate(**FEW))
        kind = speculator_of(model.effpass_engine, draft, tree).draft.kind
        assert isinstance(kind, C2T)
        assert (kind.top_k, kind.depth, kind.nodes, kind.beta) == (3, 2, 5, 0.0)
    with pytest.raises(ArtifactError, match="wrong weights"):
        model.generate(**FEW, draft="layers:1", tree=tree)
    for draft, name in (("layers:0", "layers:0"), (small, folders["model"])):
        with pytest.raises(EffpassError, match=f"the draft {name} is no folder with one\n  → tree c2t:classifier=FOLD"):
            model.generate(**FEW, draft=draft, tree="c2t")


def test_sizes_of_another_device(model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = skip_layers(model, [0])
    with caplog.at_level(logging.WARNING, logger="effpass"):
        for device in (None, "cpu"):
            here = save_classifier(tmp_path / f"{device}", small, device)
            model.generate(**FEW, draft="layers:0", tree=f"c2t:classifier={here}")
        assert caplog.messages == []
        there = save_classifier(tmp_path / "there", small, "NVIDIA H200")
        for _ in range(2):
            model.generate(**FEW, draft="layers:0", tree=f"c2t:classifier={there}")
    assert caplog.messages == [
        f"effpass: nodes and β in {there} were measured on NVIDIA H200, and this device is cpu; effpass train c2t"
        " measures again"
    ]


@pytest.mark.parametrize(
    ("draft", "tree", "message"),
    [
        ("layers:0", "chain:99", "a tree of depth 99"),
        ("layers:0", "eagle2:nodes=300", "a tree of 300 nodes"),
        ("layers:0", "c2t:classifier={folder},nodes=300", "a tree of 300 nodes"),
        ("layers:0", "c2t:classifier={folder},beta=2", "beta of a tree is 2.0"),
        ("layers:0", "c2t:clasifier={folder}", "unknown size 'clasifier', did you mean 'classifier'?"),
        ("layers:0", "c2t:classifier=./nowhere", "nowhere: no classifier there"),
        ("layers:0", "c2t", "a c2t tree needs its classifier, and the draft layers:0"),
        ("layers:x", None, "draft 'layers:x'"),
        ("ngram", "static", "the n-gram draft grows chains, and tree is 'static'"),
        ("ngram", "c2t", "the n-gram draft grows chains, and tree is 'c2t'"),
        ("./nowhere", None, "no file or folder './nowhere'"),
        ("{same}", "c2t", "c2t: no classifier there"),
    ],
)
def test_names_are_checked_without_the_model(
    draft: str, tree: str | None, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    known = {"folder": save_classifier(tmp_path / "c2t", families.make("llama"), top_k=4, depth=2), **folders}
    with pytest.raises(EffpassError) as caught:
        check_draft(draft.format(**known), None if tree is None else tree.format(**known))
    assert message in str(caught.value)


def test_names_that_are_right(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save_classifier(tmp_path / "c2t", families.make("llama"), top_k=60, depth=2)
    check_draft("ngram")
    check_draft("layers:0,1", "static:2,1")
    check_draft(str(folders["same"]), f"c2t:classifier={folder},nodes=200")
    check_draft(str(head_of(tmp_path / "head", folders["model"], 258)), "eagle2")


# -- streamers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [None, "layers:0"])
def test_a_streamer_of_an_unprepared_model(folders: dict[str, Path], draft: str | None) -> None:
    loaded = effpass.load_model(folders["model"])
    how = {**FEW, "custom_generate": effpass.custom_generate, "draft": draft}
    streamer = TextIteratorStreamer(loaded.tokenizer, timeout=10)
    out = loaded.model.generate(**how, streamer=streamer)
    assert "".join(streamer) == loaded.tokenizer.decode(out[0])
    alone = TextIteratorStreamer(loaded.tokenizer, timeout=10)
    loaded.model.generate(**how, token_streamer=alone)
    assert "".join(alone) == loaded.tokenizer.decode(out[0, 4:])
    with pytest.raises(EffpassError, match="streamer and token_streamer are both given"):
        loaded.model.generate(**how, streamer=streamer, token_streamer=alone)


def test_a_tree_without_a_draft_of_an_unprepared_model(folders: dict[str, Path]) -> None:
    plain = effpass.load_model(folders["model"]).model
    with pytest.raises(EffpassError, match="tree='chain' without a draft"):
        plain.generate(**FEW, custom_generate=effpass.custom_generate, tree="chain")
