"""`effpass generate --draft`."""

from __future__ import annotations

import pytest


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
        (["--tree", "chain"], "tree='chain' without a draft"),
        (["--draft", "ngram", "--tree", "eagle2"], "the n-gram draft grows chains"),
        (["--draft", "./nowhere"], "no file or folder './nowhere'"),
        (["--draft", "layers:7"], "can't be kept of a model with 2"),
    ],
)
def test_what_it_refuses(run, tiny_model, options, message):
    done = run("generate", tiny_model, "-p", "hi", *options)
    assert done.exit_code == 1
    assert message in done.stderr
