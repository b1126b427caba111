"""`effpass generate --draft`."""

from __future__ import annotations

import pytest
from tiny_tuning import sums


@pytest.mark.parametrize(
    "draft", [["ngram"], ["layers:0", "--tree", "eagle2:top_k=3,depth=2,nodes=6"], ["MODEL", "--tree", "static:2,1"]]
)
def test_the_text_is_what_it_is_without(run, tiny_model, draft):
    options = ["generate", tiny_model, "-p", "hi there, hi there", "--max-new-tokens", 12]
    plain = run(*options)
    draft = [str(tiny_model) if part == "MODEL" else part for part in draft]
    out = run(*options, "--draft", *draft)
    assert out.stdout == plain.stdout
    assert "tokens a step" in out.stderr
    assert "tokens a step" not in plain.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tree", "chain"], "--tree chain is of a draft, and none was given"),
        (["--draft", "ngram", "--tree", "eagle2"], "the n-gram draft grows chains"),
        (["--draft", "./nowhere"], "no file or folder './nowhere'"),
        (["--draft", "layers:0", "--tree", "chain:99"], "a tree of depth 99"),
        (["--draft", "layers:0", "--tree", "c2t"], "tree c2t:classifier=FOLDER, which effpass train c2t -o FOLDER"),
    ],
)
def test_what_it_refuses_before_it_loads_the_model(refused, options, message):
    assert message in refused("generate", "/no/model", "-p", "hi", *options)


def test_layers_that_the_model_does_not_have(refused, tiny_model):
    assert "can't be kept of a model with 2" in refused("generate", tiny_model, "-p", "hi", "--draft", "layers:7")


def test_a_classifier_of_the_model_s_own_layers(run, tiny_model, tmp_path):
    data, folder = sums(tmp_path / "d.jsonl", 6), tmp_path / "found"
    done = run(
        "train", "c2t", tiny_model, "--draft", "layers:0,1", "--data", data, "-o", folder, "--top-k", 2, "--depth", 2,
        "--trees", 20, "--answers", 8, "--epochs", 1, "--dtype", "float32",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    options = ["generate", tiny_model, "-p", "hi there", "--max-new-tokens", 8]
    out = run(*options, "--draft", "layers:0,1", "--tree", f"c2t:classifier={folder},beta=0.1")
    assert out.exit_code == 0, out.output
    assert out.stdout == run(*options).stdout


@pytest.mark.parametrize("draft", ["layers:0,1", "org/name", "smollm2"])
def test_a_draft_that_is_no_folder_needs_a_place_for_its_classifier(refused, tmp_path, monkeypatch, draft):
    monkeypatch.chdir(tmp_path)
    said = refused("train", "c2t", "/no/model", "--draft", draft, "--data", "d.jsonl")
    assert f"--draft {draft} is no folder that the classifier could go into" in said
    assert "-o FOLDER, which effpass generate takes as --tree c2t:classifier=FOLDER" in said
    assert list(tmp_path.iterdir()) == []


def test_a_draft_without_probabilities_has_no_classifier(refused, tmp_path):
    said = refused("train", "c2t", "/no/model", "--draft", "ngram", "--data", "d.jsonl", "-o", tmp_path / "out")
    assert "the n-gram draft has no probabilities to classify" in said
