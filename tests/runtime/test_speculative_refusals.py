"""What speculative decoding refuses, before it runs anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from speculative_drafts import classifier, prepared
from tiny_checkpoint import make_checkpoint

import effpass
from effpass.core.artifact import Artifact
from effpass.core.errors import ArtifactError, EffpassError, ModelError
from effpass.core.fingerprint import Fingerprint
from effpass.runtime.speculative import C2T, Eagle2, ModelDraft, NGramDraft, Static, chain, load_classifier
from effpass.runtime.speculative.session import TreeSession

IDS = families.batch(8)["input_ids"]


@pytest.fixture(scope="module")
def model() -> Any:
    return prepared()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draft": "ngram", "tree": "eagle2"}, "the n-gram draft grows chains, and tree is 'eagle2'"),
        ({"draft": "layers:0,x"}, "draft 'layers:0,x'\n  → give numbers of layers"),
        ({"draft": "layers:1,0"}, "layers [1, 0] can't be kept of a model with 2\n  → name layers from 0 to 1"),
        ({"draft": "layers:2"}, "layers [2] can't be kept of a model with 2"),
        ({"draft": "layers:0", "tree": "eagle"}, "unknown tree 'eagle', did you mean 'eagle2'?"),
        ({"draft": "layers:0", "tree": "c2t"}, "a c2t tree needs its classifier"),
        ({"draft": "layers:0", "tree": "chain:x"}, "tree 'chain:x' can't be read\n  → such as chain:7"),
        ({"draft": "layers:0", "tree": "chain:1,2"}, "tree 'chain:1,2' can't be read"),
        ({"draft": "layers:0", "tree": "static:4,0"}, "a static tree of widths (4, 0)"),
        ({"draft": "layers:0", "tree": "eagle2:size=3"}, "tree 'eagle2:size=3': unknown size 'size'"),
        ({"draft": "layers:0", "tree": "eagle2:nodes=many"}, "tree 'eagle2:nodes=many' can't be read"),
        ({"draft": "./nowhere"}, "no file or folder './nowhere'"),
        ({"draft": 7}, "draft is a int\n  → give a model"),
        ({"tree": "chain"}, "tree='chain' without a draft"),
        ({"draft": "ngram", "keep_tokens": torch.ones(2, 8, dtype=torch.bool)}, "keep_tokens: speculative decoding"),
        ({"draft": "ngram", "num_beams": 2}, "no beam search"),
        (
            {"draft": "ngram", "output_scores": True, "return_dict_in_generate": True},
            "speculative decoding has no output_scores",
        ),
        (
            {"draft": "ngram", "prefix_allowed_tokens_fn": lambda row, ids: [3]},
            "prefix_allowed_tokens_fn of a batch of 2 rows",
        ),
        ({"draft": NGramDraft(), "tree": "chain"}, "a draft that was made knows its tree"),
    ],
    ids=lambda value: value.split("\n")[0] if isinstance(value, str) else "",
)
def test_bad_arguments(model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(EffpassError) as caught:
        model.generate(**{"input_ids": IDS, "max_new_tokens": 4, **arguments})
    assert message in str(caught.value)


def test_a_cache_of_an_earlier_call(model: Any) -> None:
    first = model.generate(input_ids=IDS, max_new_tokens=4, return_dict_in_generate=True)
    with pytest.raises(EffpassError, match="speculative decoding has no cache of an earlier call"):
        model.generate(
            input_ids=first.sequences, max_new_tokens=4, past_key_values=first.past_key_values, draft="ngram"
        )


def test_a_draft_with_another_vocabulary(model: Any) -> None:
    with pytest.raises(ModelError, match="a vocabulary of 50 tokens, and the model one of 96\n  → take a draft of the"):
        model.generate(input_ids=IDS, max_new_tokens=4, draft=families.make("llama", vocab_size=50))


def test_a_draft_with_another_tokenizer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "model")
    make_checkpoint(tmp_path / "draft")
    text = (tmp_path / "draft" / "tokenizer.json").read_text()
    (tmp_path / "draft" / "tokenizer.json").write_text(text.replace('"a":', '"?":', 1).replace('"b":', '"a":', 1))
    loaded = effpass.load_model(tmp_path / "model")
    ready = effpass.prepare(loaded.model, {"version": 1, "passes": []})
    with pytest.raises(ModelError, match="have different tokenizers"):
        ready.generate(input_ids=IDS, max_new_tokens=4, draft=tmp_path / "draft")


def test_a_model_whose_cache_has_no_room_for_trees() -> None:
    recipe = {"version": 1, "passes": [{"sparse_attention": {"tokens": 16, "blocks": 4, "block": 16}}]}
    sparse = effpass.prepare(families.make("llama"), recipe)
    with pytest.raises(ModelError, match="a pass has replaced the cache of this model"):
        sparse.generate(input_ids=IDS, max_new_tokens=4, draft="ngram")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Static(()), "a static tree of widths ()"),
        (lambda: Static((2, 0)), "a static tree of widths (2, 0)"),
        (lambda: chain(61), "a tree of depth 61\n  → give 60 or less"),
        (lambda: Static((4, 4, 4, 4)), "a tree of 341 nodes"),
        (lambda: Eagle2(nodes=257), "a tree of 257 nodes is larger than the mask of ancestors, which has 256 bits"),
        (lambda: Eagle2(nodes=1), "nodes of a tree is 1\n  → give 2 or more"),
        (lambda: Eagle2(depth=0), "depth of a tree is 0"),
        (lambda: Eagle2(16, 17), "17 layers of 16 nodes are more than the mask of ancestors holds"),
        (lambda: C2T(classifier(), beta=1.5), "beta of a tree is 1.5\n  → it is a confidence"),
        (lambda: NGramDraft(0), "depth of the n-gram draft is 0"),
        (
            lambda: ModelDraft(families.make("llama", vocab_size=6), Eagle2(8)),
            "8 children of a node, and the draft knows 6",
        ),
    ],
    ids=lambda value: value.split("\n")[0] if isinstance(value, str) else "",
)
def test_trees_that_can_not_be(make: Any, message: str) -> None:
    with pytest.raises(EffpassError) as caught:
        make()
    assert message in str(caught.value)


def test_a_cache_too_small_for_the_tree() -> None:
    session = TreeSession(families.make("llama"), 1, 32, 4, None)
    with pytest.raises(EffpassError, match="a tree of 5 nodes has no room in a cache for 4\n  → make the session"):
        session.cache.enter(torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3, 1, dtype=torch.long), 2)


def save_classifier(folder: Path, draft: Any, **tensors: Any) -> Path:
    Artifact("c2t", 1, {}, Fingerprint.of(draft), tensors={**classifier().state_dict(), **tensors}).save(folder)
    return folder


def test_a_classifier_of_another_draft(tmp_path: Path) -> None:
    draft, other = families.make("llama"), families.make("llama", seed=1)
    folder = save_classifier(tmp_path / "c2t", draft)
    loaded, expected = load_classifier(folder, draft).state_dict(), classifier().state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    with pytest.raises(ArtifactError, match="weights"):
        load_classifier(folder, other)
    with pytest.raises(ArtifactError, match="no classifier there\n  → effpass train c2t"):
        load_classifier(tmp_path / "nowhere", draft)
    with pytest.raises(ArtifactError, match="size mismatch"):
        load_classifier(save_classifier(tmp_path / "odd", draft, **{"inner.weight": torch.zeros(8, 4)}), draft)
