"""Sparse attention in the decode engine: when it is used, that its index follows the cache, and what it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import families
import pytest
import torch

import effpass
from effpass.core.errors import EffpassError, ModelError, PassRefusedError
from effpass.passes.runtime.sparse_attention import SparseAttention, SparseAttentionOptions, recall
from effpass.runtime.attention import reading_cache
from effpass.runtime.cache import full_layers
from effpass.runtime.session import Session
from effpass.runtime.sparse_attention import SparseReader, SparseSettings

#: Budgets beyond every length here: what comes out is dense attention.
WIDE = {"tokens": 128, "blocks": 16, "block": 16, "dense_below": 1}
NARROW = {"tokens": 16, "blocks": 4, "block": 16, "recent": 1, "dense_below": 1}
WITH_CACHE = [name for name in families.FAMILIES if name != "mistral"]  # all of whose layers slide


def prepared(model: Any, *passes: Any) -> Any:
    return effpass.prepare(copy.deepcopy(model), {"version": 1, "passes": list(passes)})


def generate(model: Any, given: dict[str, torch.Tensor], new: int = 8, **more: Any) -> Any:
    return model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize("family", WITH_CACHE)
def test_a_budget_of_the_whole_context_changes_nothing(family: str) -> None:
    """Padding and batches included: the first row is padded on the left."""
    model, given = families.make(family), families.batch(40)
    expected = generate(prepared(model), given)
    ready = prepared(model, {"sparse_attention": WIDE})
    got = generate(ready, given)
    assert ready.effpass_report.hits == len(full_layers(model.config)[0])
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        # The same sums in another order: 1e-6 of the logits' size.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_small_budget_attends_to_what_it_chose(family: str) -> None:
    model, given = families.make(family), families.batch(60)
    ready = prepared(model, {"sparse_attention": {**NARROW, "audit": True}})
    dense, sparse = generate(prepared(model), given), generate(ready, given)
    torch.testing.assert_close(dense.logits[0], sparse.logits[0], rtol=1e-4, atol=1e-5)  # of the prompt
    assert not torch.allclose(dense.logits[3], sparse.logits[3], atol=1e-3)
    found = recall(ready)
    assert sorted(found) == [0, 1]
    for share, mass in found.values():
        assert 0.5 < share <= 1  # four of five blocks are looked at
        assert 0.2 < mass < 0.6  # 16 of 60 tokens, nearly alike in a random model


def test_the_index_is_that_of_the_cache_after_every_step() -> None:
    """Over borders of blocks, a second prompt in the same session, and one that goes on."""
    ready = prepared(families.make("llama"), {"sparse_attention": NARROW})
    for length in (40, 25):
        first = generate(ready, families.batch(length), new=20, max_length=None)
        check_index(first.past_key_values)
    more = torch.ones(2, 28, dtype=torch.long)
    longer = {
        "input_ids": torch.cat((first.sequences, families.batch(8)["input_ids"]), 1),
        "attention_mask": torch.cat((families.batch(25)["attention_mask"], more), 1),
    }
    check_index(generate(ready, longer, new=4, past_key_values=first.past_key_values).past_key_values)


def check_index(cache: Any) -> None:
    """What the steps made is what one pass over the keys makes."""
    reader = cache.reader
    assert isinstance(reader, SparseReader)
    for number, state in reader.layers.items():
        layer, slots = cache.buffers(number), cache.slots
        length = slots.length + 1  # the last token was cropped; the index has it still
        fresh = copy.deepcopy(state.index)
        fresh.statistics.zero_()
        fresh.seen.zero_()
        begin = torch.zeros_like(slots.filled)
        fresh.add(layer.keys, slots.positions, begin, slots.filled, slots.length)
        known = slots.length // 16  # whole blocks
        assert length > known * 16
        assert torch.equal(state.index.statistics[:, :, :known], fresh.statistics[:, :, :known])
        assert torch.equal(state.index.seen[:, :, :known], fresh.seen[:, :, :known])
        assert torch.equal(state.index.labels[:, :, : slots.length], fresh.labels[:, :, : slots.length])


@pytest.mark.parametrize(("family", "how"), [("llama", NARROW), ("qwen3", WIDE), ("deepseek_v3", NARROW)])
@pytest.mark.parametrize("pipelined", [False, True])
def test_a_recorded_step_is_a_step(family: str, how: dict[str, Any], pipelined: bool) -> None:
    """Compiled whole, as for a CUDA graph, where the host's numbers say nothing."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    given = families.batch(43)
    model = prepared(families.make(family), {"sparse_attention": {**how, "pipelined": pipelined}})
    with torch.no_grad(), reading_cache(model):
        ours, plain = (Session(model, 4, 96, backend) for _ in range(2))
        for session in (ours, plain):
            session.begin(2)
            session.prefill(given["input_ids"], given["attention_mask"].bool(), 20)
        compiled = ours._compile()
        for _ in range(6):  # over a border of blocks
            token = plain.logits.argmax(-1, keepdim=True)
            ours.tokens.copy_(token)
            plain.tokens.copy_(token)
            plain.step()
            ours.cache.ready()
            with ours._recording():
                ours._move()
                ours.cache.append(ours._position)
                ours._forward(compiled, None)
            ours.cache.advance(1)
            torch.testing.assert_close(ours.logits[:2], plain.logits[:2], rtol=1e-5, atol=2e-6)
    torch._dynamo.reset()
    assert len(graphs) == 1
    chosen = [n for n in graphs[0].graph.nodes if "two_level_attention" in str(n.target)]
    assert len(chosen) == model.config.num_hidden_layers


def test_a_recorded_step_is_audited() -> None:
    """As often as it is replayed: the steps that are tried before it is recorded leave the sums as they were."""
    given = families.batch(60)
    found = []
    for backend in (None, lambda gm, inputs: gm.forward):
        model = prepared(families.make("llama"), {"sparse_attention": {**NARROW, "audit": True}})
        with torch.no_grad(), reading_cache(model):
            session = Session(model, 2, 96, backend)
            session.begin(2)
            session.prefill(given["input_ids"], given["attention_mask"].bool(), 60)
            compiled = model if backend is None else session._compile()
            for _ in range(3):
                session.cache.ready()
                sums = session.cache.reader.state()
                assert all(any(t is s for t in session.cache.state()) for s in sums)
                assert len(sums) == 2
                with session._recording():
                    session._move()
                    session.cache.append(session._position)
                    session._forward(compiled, None)
                session.cache.advance(1)
        found.append(recall(model))
        assert [float(t[2]) for t in sums] == [3 * 2 * 2] * 2  # steps, rows and key-value heads
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer, expected in found[0].items():
        assert found[1][layer] == pytest.approx(expected, rel=1e-4)


def test_a_pipeline_begins_with_the_query_of_latents() -> None:
    """A prompt of expanded latents hands on its last query as steps ask it."""
    model = families.make("deepseek_v3", kv_lora_rank=64, qk_rope_head_dim=32)
    given = families.batch(60)
    expected = generate(prepared(model, "mla_absorption"), given)
    got = generate(prepared(model, {"sparse_attention": {**WIDE, "pipelined": True}}), given)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    narrow = prepared(model, {"sparse_attention": {**NARROW, "pipelined": True, "audit": True}})
    generate(narrow, given)
    assert min(share for share, _ in recall(narrow).values()) > 0.5


def test_prompts_are_sparse_from_the_given_length_on() -> None:
    """Without one, decode steps alone are dense as long as that is faster."""
    model = families.make("llama")
    options = {"prefill_density": 0.5}
    for below, expected in ((None, 0), (24, 24)):
        ready = prepared(model, {"sparse_attention": {**options, **({} if below is None else {"dense_below": below})}})
        settings = ready.effpass_reader
        assert settings.prefill_below == expected
        assert settings.dense_below == 24 if below else settings.dense_below > 2048


def test_short_contexts_are_dense_and_the_switch_is_seen() -> None:
    model, given = families.make("llama"), families.batch(20)
    ready = prepared(model, {"sparse_attention": {**NARROW, "dense_below": 24}})
    with torch.no_grad(), reading_cache(ready):
        session = Session(ready, 2, 64, None)
        session.begin(2)
        session.prefill(given["input_ids"], None, 64)
        plans = []
        for _ in range(8):
            session.tokens.fill_(5)
            plans.append(session.cache.ready())
            session.step()
    assert plans == [(False, False)] * 4 + [(True, True)] * 4
    expected = generate(prepared(model), given)
    got = generate(ready, given)
    for index in range(5):
        assert torch.equal(got.logits[index], expected.logits[index])
    assert not torch.equal(got.logits[6], expected.logits[6])


def test_prompts_attend_to_blocks_where_asked() -> None:
    model, given = families.make("llama", max_position_embeddings=2048), families.batch(1500)
    whole = {"sparse_attention": {**WIDE, "tokens": 2048, "blocks": 128, "prefill_threshold": 1.0}}
    part = {"sparse_attention": {**WIDE, "tokens": 2048, "blocks": 128, "prefill_density": 0.3}}
    expected, same, other = (generate(prepared(model, *p), given, 1) for p in ([], [whole], [part]))
    torch.testing.assert_close(same.logits[0], expected.logits[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other.logits[0], expected.logits[0], atol=1e-4)


def test_beside_a_budget_of_the_cache() -> None:
    """prefix_kv drops and moves tokens; what is left is indexed anew."""
    model, given = families.make("llama"), families.batch(90)
    budget = {"prefix_kv": {"budget": 48, "recent": 8, "sink": 2}}
    expected = generate(prepared(model, budget), given, 12)
    got = generate(prepared(model, budget, {"sparse_attention": WIDE}), given, 12)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_first", [True, False])
def test_keys_that_are_stored_in_other_types_are_refused(is_first: bool) -> None:
    passes = [{"prefix_kv": {"budget": 48, "kv_cache_dtype": "int8"}}, {"sparse_attention": WIDE}]
    model = families.make("llama")
    with pytest.raises(PassRefusedError, match="stores keys as int8, and sparse_attention reads them as they are"):
        prepared(model, *(passes if is_first else passes[::-1]))
    assert not hasattr(model, "effpass_reader")
    twice = prepared(prepared(model, passes[0]), passes[1])
    with pytest.raises(ModelError, match=r"stores its keys in another type \(Int8Layer\)"):
        generate(twice, families.batch(90))


def test_a_model_whose_layers_all_slide_has_nothing_to_choose() -> None:
    report = prepared(families.make("mistral"), {"sparse_attention": WIDE}).effpass_report
    assert report.hits == 0
    assert report.passes[0].refusals[0].reason == "it sees 8 positions only, and stays as it is"


def test_copies_choose_for_themselves() -> None:
    ready = prepared(families.make("llama"), {"sparse_attention": NARROW})
    twin = copy.deepcopy(ready)
    given = families.batch(50)
    assert torch.equal(generate(ready, given).sequences, generate(twin, given).sequences)
    assert isinstance(twin.effpass_reader, SparseSettings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"blocks": 400}, "25600 candidates"),
        ({"levels": "tokens", "tokens": 8192}, "at most 4096"),
        ({"prefill_density": 0.1, "prefill_threshold": 0.9}, "two ways to say it"),
        ({"prefill_density": 1.5}, "density is 1.5"),
        ({"dense_below": 0}, "dense_below: got 0"),
        ({"train_budget": 256}, "a budget of 256 keys is less than the two blocks of 256"),
        ({"train_budget": 256, "train_block": 100}, "blocks of 100 keys"),
        ({"train_budget": 512, "tokens": 64}, "tokens and train_budget"),
    ],
)
def test_bad_options_are_refused_in_the_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EffpassError, match=message):
        prepared(families.make("llama"), {"sparse_attention": options})


def test_layers_without_kernels_are_refused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is changed; with enough channels the same model is taken."""
    from effpass.passes.runtime import sparse_attention as module

    on_gpu = (torch.device("cuda", 0), torch.bfloat16)
    monkeypatch.setattr(module, "device_and_dtype", lambda model: on_gpu)
    narrow, wide = families.make("llama"), families.make("llama", head_dim=32)
    with pytest.raises(
        ModelError, match=r"layer 0: there are no kernels for 4 query heads of 16 channels over 2"
    ) as told:
        effpass.prepare(narrow, {"version": 1, "passes": [{"sparse_attention": WIDE}]})
    assert "labels of 32 channels or more" in str(told.value)
    assert not hasattr(narrow, "effpass_reader")
    SparseAttention(SparseAttentionOptions(**WIDE)).check_model(wide)


def test_the_length_from_which_on_it_pays_follows_from_the_ceilings() -> None:
    from effpass.core.roofline import known
    from effpass.runtime.sparse_cost import break_even, step_bytes

    how = SparseAttentionOptions().selection
    dense, sparse = step_bytes(how, 98304, 8, 128, 128, 32, 2, False)
    assert dense == 98304 * 4096
    # 1536 blocks of two vectors and a count; 8192 labels of 20 bytes; 2048 keys and values.
    assert sparse == 8 * (1536 * (512 + 4) + 8192 * 20 + 2048 * 512)
    pays = break_even(how, 8, 128, 128, 32, 2, False, known("h100"))
    latent = break_even(how, 1, 576, 512, 128, 2, True, known("h100"))
    assert 2048 < pays < 24576 < latent < 98304
    assert SparseAttention().options.selection.blocks == 128
