"""Speculative decoding against plain decoding, token for token, at float32 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from speculative_drafts import KINDS, Fixed, draft_model, prepared
from torch import Tensor

import effpass
from effpass.passes.weights.keep_indices import make_keep_artifact
from effpass.passes.weights.structured_pruning import save_pruned
from effpass.runtime.speculative import Eagle2, ModelDraft, NGramDraft, Speculator, Static, chain, generate, skip_layers
from effpass.runtime.speculative.cache import TreeCache

GIVEN = families.batch(11)
PADDED = {k: GIVEN[k] for k in ("input_ids", "attention_mask")}
FREE = {"max_new_tokens": 20, "eos_token_id": None}


def speculate(model: Any, draft: Any, **arguments: Any) -> tuple[Tensor, Any]:
    """What `generate` gives where every step is a round, and what it was."""
    speculator = Speculator(model.effpass_engine, draft, switches=False)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    return type(model).generate(model, **arguments, custom_generate=loop), speculator.last


@pytest.fixture(scope="module")
def model() -> Any:
    return prepared()


@pytest.fixture(scope="module")
def plain() -> Tensor:
    return families.make("llama").generate(**PADDED, **FREE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["right", "wrong", "random"])
def test_greedy_is_plain_greedy(model: Any, plain: Tensor, kind: str, how: str) -> None:
    out, found = speculate(model, ModelDraft(draft_model(how), KINDS[kind]), **PADDED, **FREE)
    assert torch.equal(out, plain)
    assert found.tokens == 2 * 19  # the first of each row came with the prompt
    assert found.verified <= found.rounds * (KINDS[kind].nodes - 1)
    if how == "right" and kind not in ("c2t", "c2t, keeps none"):
        rounds = -(-19 // (KINDS[kind].depth + 1))
        assert found.rounds >= 2 * rounds
        if isinstance(KINDS[kind], Static):  # the path of the best tokens is in the tree
            assert found.rounds == 2 * rounds


class _Noted(ModelDraft):
    """Notes the number of nodes, without the root, of each tree of a row that has not ended."""

    def start(self, target: Any) -> Any:
        at_work, self.sizes = super().start(target), list[int]()
        propose = at_work.propose

        def proposing(progress: Any, sampled: Any) -> Any:
            tree = propose(progress, sampled)
            self.sizes += (tree.parents >= 0).sum(1)[progress.position >= 0].tolist()
            return tree

        at_work.propose = proposing  # type: ignore[method-assign]
        return at_work


@pytest.mark.parametrize("how", ["right", "wrong", "random"])
def test_c2t_keeps_a_part_of_the_nodes(model: Any, plain: Tensor, how: str) -> None:
    draft = _Noted(draft_model(how), KINDS["c2t"])
    out, found = speculate(model, draft, **PADDED, **FREE)
    assert torch.equal(out, plain)
    cap = KINDS["c2t"].nodes - 1
    assert 1 < found.verified / found.rounds < cap - 1
    assert sum(0 < size < cap for size in draft.sizes) > len(draft.sizes) / 3
    assert len(set(draft.sizes)) > 4
    if how == "right":
        assert found.acceptance_length > 1.5


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family: str) -> None:
    model, draft = prepared(family), draft_model("random", family)
    expected = families.make(family).generate(**PADDED, **FREE)
    assert torch.equal(speculate(model, ModelDraft(draft, Eagle2(4, 3, 12)), **PADDED, **FREE)[0], expected)
    assert torch.equal(speculate(model, NGramDraft(4), **PADDED, **FREE)[0], expected)


@pytest.mark.parametrize("kind", ["chain", "static", "eagle2", "c2t", "c2t, keeps all"])
@pytest.mark.parametrize("new", [1, 2, 3, 6])
def test_a_length_limit_inside_a_tree(model: Any, plain: Tensor, kind: str, new: int) -> None:
    arguments = {**PADDED, "max_new_tokens": new, "eos_token_id": None}
    out, found = speculate(model, ModelDraft(draft_model("right"), KINDS[kind]), **arguments)
    assert torch.equal(out, plain[:, : 11 + new])
    assert found.tokens == 2 * (new - 1)


@pytest.mark.parametrize("kind", ["chain", "static", "eagle2", "c2t", "c2t, keeps all"])
@pytest.mark.parametrize("ends", [(2, 13), (5, 6), (0, 19), (14, 3)])
def test_an_end_inside_a_tree(model: Any, plain: Tensor, kind: str, ends: tuple[int, int]) -> None:
    tokens = [int(plain[row, 11 + after]) for row, after in enumerate(ends)]
    arguments = {**PADDED, "max_new_tokens": 20, "eos_token_id": tokens, "pad_token_id": 0}
    expected = families.make("llama").generate(**arguments)
    out, _ = speculate(model, ModelDraft(draft_model("right"), KINDS[kind]), **arguments)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("ends", [(2, 5), (7, 1), (0, 4), (6, 6)])
def test_an_end_inside_what_is_looked_up(ends: tuple[int, int]) -> None:
    """Each prompt has its answer in it, with the token that ends it, and each answer takes one round."""
    reference = families.make("llama")
    with torch.no_grad():
        for layer in reference.model.layers:  # a token follows from the one before alone
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        follows = reference(torch.arange(96)[:, None]).logits[:, 0].argmax(-1).tolist()
    texts = []
    for token in range(3, 96):
        text = [token]
        while len(text) < 10:
            text.append(follows[text[-1]])
        texts.append(text)
    first = next(text for text in texts if len(set(text)) == 10)
    second = next(text for text in texts if len(set(text)) == 10 and not set(text) & set(first))
    ids = torch.tensor([[*text, text[0]] for text in (first, second)])
    tokens = [text[1 + after] for text, after in zip((first, second), ends, strict=True)]
    arguments = {"input_ids": ids, "max_new_tokens": 20, "eos_token_id": tokens, "pad_token_id": 0}
    expected = reference.generate(**arguments)
    assert expected.shape[1] == 11 + 1 + max(ends)
    ready = effpass.prepare(reference, {"version": 1, "passes": []})
    out, found = speculate(ready, NGramDraft(7), **arguments)
    assert torch.equal(out, expected)
    assert (found.rounds, found.tokens) == (sum(after > 0 for after in ends), sum(ends))


def test_of_equal_siblings_the_first_counts(model: Any, plain: Tensor) -> None:
    """Two children of the root propose the right token. The first leads nowhere, what the second does is not seen."""
    parents = [-1, 0, 0, 1, 2, 4]
    for wrong, length in (((3,), 2), ((), 3), ((1,), 4), ((1, 4), 2), ((1, 2), 1)):
        out, found = speculate(model, Fixed(plain, parents, wrong), **PADDED, **FREE)
        assert torch.equal(out, plain)
        assert found.rounds == 2 * -(-19 // length)


@pytest.mark.parametrize(
    "how",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 12, "eos_token_id": list(range(2, 40)), "pad_token_id": 0},
        {"bad_words_ids": [[5, 6], [7]]},
    ],
    ids=lambda how: ", ".join(how),
)
@pytest.mark.parametrize("kind", ["static", "eagle2"])
def test_processors_see_each_node_s_own_prefix(model: Any, how: dict[str, Any], kind: str) -> None:
    arguments = {**PADDED, "max_new_tokens": 16, "eos_token_id": None, **how}
    expected = families.make("llama").generate(**arguments)
    out, found = speculate(model, ModelDraft(draft_model("right"), KINDS[kind]), **arguments)
    assert torch.equal(out, expected)
    assert found.acceptance_length > 1.2


def test_a_criterion_that_sees_the_text_ends_inside_a_tree(model: Any, plain: Tensor) -> None:
    pair = plain[1, 11 + 5 : 11 + 7].tolist()

    def after_pair(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return (input_ids[:, -2:] == torch.tensor(pair)).all(1)

    one = {"input_ids": PADDED["input_ids"][1:], **FREE, "stopping_criteria": [after_pair]}
    out, _ = speculate(model, ModelDraft(draft_model("right"), chain(6)), **one)
    assert torch.equal(out, families.make("llama").generate(**one))
    assert out.shape[1] == 18


#: Each node of the right path comes second of its siblings, behind a wrong one and before one that proposes the same.
SECOND = [-1, 0, 0, 0, 2, 2, 2, 5, 5, 5], (1, 4, 7)


@pytest.mark.parametrize(
    ("draft", "least"),
    [
        (lambda plain: Fixed(plain, *SECOND), 24),  # 3 nodes of each row's 4 rounds before the last one
        (lambda _: ModelDraft(draft_model("right"), KINDS["static"]), 16),  # 2 of 3: the first is in its place
        (lambda _: ModelDraft(draft_model("right"), Eagle2(6, 3, 12)), 8),
    ],
    ids=["siblings", "static", "eagle2"],
)
def test_what_was_moved_is_what_would_be_computed(
    model: Any, plain: Tensor, draft: Any, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys and values of accepted nodes, moved behind each row's prefix, against those of the whole text at once."""
    moved, commit = 0, TreeCache.commit

    def counting(self: TreeCache, path: Tensor, taken: Tensor) -> None:
        nonlocal moved
        step = torch.arange(path.shape[1])
        moved += int(((path != step) & (step < taken[:, None])).sum())
        commit(self, path, taken)

    monkeypatch.setattr(TreeCache, "commit", counting)
    speculator = Speculator(model.effpass_engine, draft(plain), switches=False)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    type(model).generate(model, **PADDED, **FREE, custom_generate=loop)
    assert moved >= least
    (found,) = speculator._free.values()
    cache, given = found.target.cache, families.make("llama")
    # The last tokens of a row that has ended are not moved: nothing comes behind them.
    lengths = cache.lengths.tolist()
    assert all(11 + 16 <= length < 11 + 20 for length in lengths)
    mask = torch.cat((PADDED["attention_mask"], torch.ones(2, 20, dtype=torch.long)), 1)
    theirs = given(input_ids=plain, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
    for row, length in enumerate(lengths):
        first = 3 if row == 0 else 0
        positions = cache.slots.positions[row, first:length]
        assert positions.tolist() == list(range(length - first))
        for index in range(len(cache)):
            ours = cache.buffers(index)
            for a, b in ((ours.keys, theirs.layers[index].keys), (ours.values, theirs.layers[index].values)):
                torch.testing.assert_close(a[row, :, first:length], b[row, :, first:length], rtol=1e-4, atol=1e-5)


def test_a_streamer_gets_every_token_once(model: Any, plain: Tensor) -> None:
    class Collect:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value)

        def end(self) -> None:
            self.seen.append(torch.zeros(0))

    draft = draft_model("random")
    one, both = Collect(), Collect()
    out = model.generate(
        input_ids=PADDED["input_ids"][1:], **FREE, draft=draft, tree=Static((4, 2)), streamer=one
    )  # fmt: skip
    assert torch.equal(one.seen[0], PADDED["input_ids"][1:])
    assert [int(t) for t in one.seen[1:-1]] == out[0, 11:].tolist()
    assert one.seen[-1].numel() == 0
    ends = [int(plain[0, 11 + 4])]  # the first row ends, and is padded
    out = model.generate(
        **PADDED, max_new_tokens=12, eos_token_id=ends, pad_token_id=0, draft=draft, tree="eagle2", streamer=both
    )  # fmt: skip
    assert torch.equal(torch.stack(both.seen[1:-1], 1), out[:, 11:])


def test_stop_strings_end_inside_a_tree(tmp_path: Any) -> None:
    from tiny_checkpoint import make_checkpoint

    loaded = effpass.load_model(make_checkpoint(tmp_path / "tiny"))
    tokenizer = loaded.tokenizer
    inputs = tokenizer("abc", return_tensors="pt")
    free = loaded.model.generate(**inputs, max_new_tokens=16, eos_token_id=None)
    stop = tokenizer.decode(free[0, 3 + 5 : 3 + 8])
    arguments = {**inputs, "max_new_tokens": 16, "eos_token_id": None, "stop_strings": [stop], "tokenizer": tokenizer}
    expected = loaded.model.generate(**arguments)
    assert expected.shape[1] < 19
    ready = effpass.prepare(effpass.load_model(tmp_path / "tiny").model, {"version": 1, "passes": []})
    assert torch.equal(ready.generate(**arguments, draft=tmp_path / "tiny", tree="static"), expected)


# -- the faces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("draft", "tree"),
    [("ngram", "chain:4"), ("layers:0", "eagle2:nodes=9"), ("layers:0,1", "static:2,1"), (draft_model("random"), None)],
    ids=["ngram", "one layer", "all layers", "another model"],
)
def test_generate_takes_a_draft(model: Any, plain: Tensor, draft: Any, tree: Any) -> None:
    assert torch.equal(model.generate(**PADDED, **FREE, draft=draft, tree=tree), plain)
    kept = dict(model.effpass_engine.speculators)
    assert torch.equal(model.generate(**PADDED, **FREE, draft=draft, tree=tree), plain)
    assert model.effpass_engine.speculators == kept  # buffers stay from call to call
    out = model.generate(**PADDED, **FREE, draft=draft, tree=tree, return_dict_in_generate=True)
    assert torch.equal(out.sequences, plain)
    assert torch.equal(model.generate(**PADDED, **FREE), plain)


def test_an_unprepared_model_takes_a_draft_too(plain: Tensor) -> None:
    model = families.make("llama")
    how = {**PADDED, **FREE, "custom_generate": effpass.custom_generate}
    assert torch.equal(model.generate(**how, draft=draft_model("random"), tree="static"), plain)
    (speculator, _), *_ = model.effpass_engine.speculators.values()
    assert speculator.last.tokens == 38
    model.effpass_engine.release()
    assert not model.effpass_engine.speculators


def test_skipped_layers_share_the_weights() -> None:
    model = families.make("gemma3")
    small = skip_layers(model, [1])
    assert small.config.layer_types == ["full_attention"]
    assert small.model.layers[0].self_attn.layer_idx == 0
    assert small.model.layers[0].mlp.up_proj.weight is model.model.layers[1].mlp.up_proj.weight
    assert len(model.model.layers) == model.config.num_hidden_layers == 2


@pytest.mark.parametrize("tree", [None, "static:3,2", "eagle2"])
def test_the_model_pruned_and_saved_is_a_draft(model: Any, plain: Tensor, tree: str | None, tmp_path: Path) -> None:
    """Without one of two groups of heads in each layer, and without a tenth of the channels."""
    channels = [list(range(0, 86)), list(range(10, 96))]
    make_keep_artifact(families.make("llama"), tmp_path / "keep", kv_groups=[[1], [0]], ffn_channels=channels)
    recipe = {"version": 1, "passes": [{"structured_pruning": {"artifact": str(tmp_path / "keep")}}]}
    pruned = effpass.prepare(families.make("llama"), recipe)
    save_pruned(pruned, tmp_path / "pruned")
    assert torch.equal(model.generate(**PADDED, **FREE, draft=tmp_path / "pruned", tree=tree), plain)
    speculator, _ = model.effpass_engine.speculators.popitem()[1]
    assert speculator.draft.model.config.num_key_value_heads == 1
    out, found = speculate(model, ModelDraft(speculator.draft.model, Static((3, 2))), **PADDED, **FREE)
    assert torch.equal(out, plain)
    assert found.acceptance_length > 1.3


def test_a_longer_prompt_and_another_batch_in_the_same_speculator(model: Any) -> None:
    draft, reference = draft_model("random"), families.make("llama")
    for length, rows in ((8, 2), (40, 1), (9, 2), (200, 2)):
        ids = families.batch(length, seed=length)["input_ids"][:rows]
        out = model.generate(input_ids=ids, max_new_tokens=8, eos_token_id=None, draft=draft, tree="static")
        assert torch.equal(out, reference.generate(input_ids=ids, max_new_tokens=8, eos_token_id=None))


def test_to_the_model_s_last_position(model: Any) -> None:
    """Nodes behind the last position are proposed, and never come to count."""
    ids = families.batch(240)["input_ids"]
    for family in ("llama", "gpt2"):
        ready, reference = prepared(family), families.make(family)
        out = ready.generate(input_ids=ids, max_new_tokens=16, eos_token_id=None, draft="layers:0,1", tree="static")
        assert torch.equal(out, reference.generate(input_ids=ids, max_new_tokens=16, eos_token_id=None))


@pytest.mark.parametrize("vocabulary", [90, 104])
def test_a_vocabulary_that_is_padded_otherwise(model: Any, plain: Tensor, vocabulary: int) -> None:
    """As in families whose small and large models round it up to other numbers."""
    draft = families.make("llama", vocab_size=vocabulary)
    assert int(plain.max()) < 96
    with torch.no_grad():  # the tokens that both know are the target's
        for ours, theirs in zip(draft.parameters(), model.parameters(), strict=True):
            shared = min(len(ours), len(theirs))
            ours[:shared] = theirs[:shared]
    out, found = speculate(model, ModelDraft(draft, Static((2, 2)), same_tokens=True), **PADDED, **FREE)
    assert torch.equal(out, plain)
    assert found.acceptance_length > 1.5
    torch.manual_seed(0)
    sampled = {**PADDED, **FREE, "do_sample": True}
    first, _ = speculate(model, ModelDraft(draft, Static((2, 2)), same_tokens=True), **sampled)
    torch.manual_seed(0)
    assert torch.equal(first, speculate(model, NGramDraft(2), **sampled)[0])
