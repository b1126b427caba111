"""The parts of a search: texts, choices, legal recipes, predictions, and what is measured."""

from __future__ import annotations

import json

import pytest
import torch
from families import make
from torch import nn

import effpass
from effpass.core import registry
from effpass.core.errors import EffpassError
from effpass.search.choices import Choice, choices, given_choice
from effpass.search.measure import held_bytes, losses_of, measure, prepared, try_out
from effpass.search.predict import trace
from effpass.search.recipes import DENSE, Candidate, legal_recipes
from effpass.search.texts import Texts, builtin_text
from effpass.search.workload import Workload, parse_share

WORKLOAD = Workload(prompt=128, new_tokens=8, sequences=4)

# -- what is asked --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "share"), [("1%", 0.01), (" 0.5% ", 0.005), ("0.02", 0.02), ("0", 0.0)])
def test_shares(given, share):
    assert parse_share("--quality-loss", given) == pytest.approx(share)


@pytest.mark.parametrize("given", ["", "x", "-1%", "100%", "1", "nan", "inf%"])
def test_what_is_no_share(given):
    with pytest.raises(EffpassError, match=r"--quality-loss: got .* such as 1%"):
        parse_share("--quality-loss", given)


@pytest.mark.parametrize("bad", [{"batch": 0}, {"prompt": 0}, {"new_tokens": 3}, {"sequences": 1}])
def test_workloads_that_are_none(bad):
    (name,) = bad
    with pytest.raises(EffpassError, match=f"{name} is {bad[name]}"):
        Workload(**bad)


class Letters:
    """A tokenizer: a token for each character."""

    bos_token_id: int | None = None

    def __call__(self, text: str, **options: object) -> dict[str, torch.Tensor]:
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return {"input_ids": torch.tensor([start + [ord(c) for c in text]])}


def test_the_three_texts_share_no_token():
    workload = Workload(prompt=6, new_tokens=4, sequences=3)
    text = "".join(chr(1000 + i) for i in range(200))
    texts = Texts.of(text, None, Letters(), workload)
    assert texts.calibration.shape == (1, 100)
    assert texts.selection.shape == texts.confirmation.shape == (3, 10)
    parts = [set(part.flatten().tolist()) for part in (texts.calibration, texts.selection, texts.confirmation)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]


def test_each_piece_begins_as_a_text_does():
    tokenizer = Letters()
    tokenizer.bos_token_id = 7
    texts = Texts.of("x" * 50, "y" * 50, tokenizer, Workload(prompt=6, new_tokens=4, sequences=2))
    assert texts.selection[:, 0].tolist() == [7, 7]
    assert set(texts.selection[:, 1:].flatten().tolist()) == {ord("y")}


def test_a_text_that_is_too_short():
    with pytest.raises(EffpassError, match=r"has 39 tokens, and 4 sequences of 10 take 40\n.*--validation"):
        Texts.of("x", "y" * 39, Letters(), Workload(prompt=6, new_tokens=4, sequences=8))


def test_there_is_a_text_on_every_machine():
    assert len(builtin_text()) > 100_000


# -- choices and recipes ----------------------------------------------------------------------------------------------


def test_every_pass_is_a_choice_or_left_out_with_a_reason():
    found, left_out = choices(make("llama"), "latency", WORKLOAD)
    assert {choice.name for choice in found} | set(left_out) == set(registry.names())
    assert not {choice.name for choice in found} & set(left_out)
    assert all(left_out.values())
    assert len({choice.label for choice in found}) == len(found)


def test_a_third_party_pass_takes_part(toy_passes):
    found, left_out = choices(make("llama"), "latency", WORKLOAD)
    toys = set(toy_passes.TOYS)
    assert toys & {choice.name for choice in found}
    assert toys <= {choice.name for choice in found} | set(left_out)


def test_memory_is_not_what_an_index_saves():
    memory, left_out = choices(make("llama"), "memory", WORKLOAD)
    assert "sparse_attention" in left_out
    assert any("int8" in choice.label for choice in memory)
    assert not any("int8" in choice.label for choice in choices(make("llama"), "latency", WORKLOAD)[0])


def test_an_artifact_that_is_given(tmp_path):
    from effpass.passes.weights.keep_indices import make_keep_artifact

    make_keep_artifact(make("llama"), tmp_path / "kept", kv_groups=[[0], [1]])
    choice = given_choice(tmp_path / "kept")
    assert (choice.name, choice.label) == ("structured_pruning", f"structured_pruning {tmp_path / 'kept'}")
    assert choice.options == {"artifact": str(tmp_path / "kept")}
    found, _ = choices(make("llama"), "memory", WORKLOAD, [choice])
    assert choice in found
    with pytest.raises(EffpassError, match=r"--artifact .*nothing: is no artifact"):
        given_choice(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "effpass.json").write_text(json.dumps({"pass": "kv_offload"}))
    with pytest.raises(EffpassError, match="is for kv_offload, whose options name no artifact"):
        given_choice(tmp_path / "other")


def test_legal_recipes():
    prune = Choice("structured_pruning", "prune", {"artifact": "/nowhere"})
    half, tenth = Choice("prefix_kv", "half", {"budget": 0.5}), Choice("prefix_kv", "tenth", {"budget": 0.1})
    sparse, offload = Choice("sparse_attention", "sparse", {}), Choice("kv_offload", "offload", {})
    keys = {candidate.key for candidate in legal_recipes([offload, sparse, tenth, half, prune], 3)}
    # Weights stand first, no pass stands twice, and kv_offload stands behind sparse_attention.
    assert keys == {
        "dense", "prune", "half", "tenth", "sparse", "prune + half", "prune + tenth", "prune + sparse", "sparse + half",
        "sparse + tenth", "sparse + offload", "prune + sparse + half", "prune + sparse + tenth",
        "prune + sparse + offload", "sparse + offload + half", "sparse + offload + tenth",
    }  # fmt: skip
    assert [len(legal_recipes([sparse, half, prune], most)) for most in (1, 2)] == [4, 7]


# -- predictions ------------------------------------------------------------------------------------------------------


def test_predicted_bytes_are_those_that_are_held():
    """But for slots beyond the tokens, positions, and what layers may keep more of."""
    items = {
        "dense": [],
        "half": [{"prefix_kv": {"budget": 0.5}}],
        "int8": [{"prefix_kv": {"budget": 1.0, "kv_cache_dtype": "int8"}}],
    }
    workload = Workload(prompt=1200, new_tokens=8, sequences=2)

    def load() -> nn.Module:
        return make("llama", max_position_embeddings=2048)

    traced = trace(prepared(load, DENSE), workload)
    ids = torch.randint(3, 96, (2, workload.length))
    predicted, held = {}, {}
    for name, passes in items.items():
        recipe = effpass.Recipe.parse({"passes": passes})
        predicted[name] = traced.with_passes(recipe.build()).bytes - traced.weight_bytes
        trial = measure(effpass.prepare(load(), recipe), ids, workload)
        assert trial.weight_bytes == traced.weight_bytes
        held[name] = trial.cache_bytes
    for name in ("half", "int8"):
        assert predicted[name] / predicted["dense"] == pytest.approx(held[name] / held["dense"], rel=0.15)
    assert held["dense"] == pytest.approx(predicted["dense"], rel=0.15)


def test_a_step_reads_less_of_what_is_kept_or_chosen():
    workload = Workload(prompt=4096, new_tokens=8)
    traced = trace(make("llama", max_position_embeddings=8192), workload)

    def seconds(*passes: object) -> float:
        return traced.with_passes(effpass.Recipe.parse({"passes": list(passes)}).build()).seconds

    kept, chosen = {"prefix_kv": {"budget": 0.1}}, {"sparse_attention": {"tokens": 256, "blocks": 8, "dense_below": 1}}
    assert seconds(kept) < seconds()
    assert seconds(kept, {"sparse_attention": {"tokens": 2048}}) == seconds(kept)  # fewer are left than it reads
    without = traced.with_passes(effpass.Recipe.parse({"passes": [chosen]}).build())
    assert without.bytes > traced.with_passes([]).bytes  # the index
    launches = traced.layers * 2 * traced.at.latency["attention"]
    assert without.seconds - launches < seconds()


# -- measuring --------------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_plain_model(load, texts):
    plain = load()
    ids = texts.selection
    with torch.no_grad():
        logits = plain(ids).logits[:, WORKLOAD.prompt - 1 : -1]
    expected = nn.functional.cross_entropy(logits.mT, ids[:, WORKLOAD.prompt :], reduction="none").mean(1)
    found = losses_of(prepared(load, DENSE), ids, WORKLOAD)
    torch.testing.assert_close(torch.tensor(found), expected.double().float(), atol=1e-5, rtol=1e-5)


def test_what_is_dropped_is_in_the_loss(load, texts):
    dense = losses_of(prepared(load, DENSE), texts.selection, WORKLOAD)
    for options in ({"budget": 0.3}, {"budget": 1.0, "kv_cache_dtype": "int4"}):
        dropped = Candidate((Choice("prefix_kv", "dropped", options),))
        assert losses_of(prepared(load, dropped), texts.selection, WORKLOAD) != dense
    everything = Candidate((Choice("prefix_kv", "everything", {"budget": 1.0}),))
    found = losses_of(prepared(load, everything), texts.selection, WORKLOAD)
    assert found == pytest.approx(dense, abs=1e-5)


def test_held_bytes_counts_each_storage_once():
    x = torch.zeros(10)
    assert held_bytes({"a": [x, x[:3], x.view(2, 5)], "b": (torch.zeros(2), "text")}, x.device) == 48
    assert held_bytes(nn.Linear(2, 2), x.device) == 0  # whoever holds a model does not hold a cache


def test_what_goes_wrong_is_a_result(load, texts, monkeypatch):
    refused = try_out(load, Candidate((Choice("mla_absorption", "mla", {}),)), texts.selection, WORKLOAD)
    assert (refused.status, refused.losses) == ("refused", [])
    assert "has no latent attention" in refused.reason
    idle = try_out(load, Candidate((Choice("merge_lora", "merge", {}),)), texts.selection, WORKLOAD)
    assert (idle.status, idle.reason) == ("refused", "merge_lora found nothing to rewrite")

    def fail(*args: object) -> None:
        raise RuntimeError("no memory\nand more")

    with monkeypatch.context() as broken:
        broken.setattr("torch.nn.functional.cross_entropy", lambda *_, **__: torch.full((), float("nan")))
        lost = try_out(load, DENSE, texts.selection, WORKLOAD)
    assert (lost.status, lost.reason, lost.losses) == ("failed", "its losses are not finite", [])
    monkeypatch.setattr("effpass.search.measure.measure", fail)
    failed = try_out(load, DENSE, texts.selection, WORKLOAD)
    assert (failed.status, failed.reason) == ("failed", "RuntimeError: no memory")
    monkeypatch.setattr("effpass.search.measure.measure", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        try_out(load, DENSE, texts.selection, WORKLOAD)
