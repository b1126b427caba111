"""A prepared model's `generate` against transformers' own, token for token, at float32 on the CPU."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria, TextStreamer

import effpass
from effpass.core.errors import EffpassError, ModelError
from effpass.runtime.attach import attach
from effpass.runtime.engine import Engine
from effpass.runtime.session import Session

NO_PASSES: dict[str, Any] = {"version": 1, "passes": []}


def prepared(family: str = "llama", **overrides: Any) -> Any:
    return effpass.prepare(families.make(family, **overrides), NO_PASSES)


def both(family: str, seed: int = 0, **arguments: Any) -> tuple[Any, Any]:
    """What transformers and a prepared model make of the same call."""
    answers = []
    for model in (families.make(family), prepared(family)):
        torch.manual_seed(seed)
        answers.append(model.generate(**arguments))
    return answers[0], answers[1]


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("rows", ["padded batch", "one"])
def test_greedy_is_transformers_greedy(family: str, rows: str) -> None:
    given = families.batch(11)
    inputs = {k: given[k] if rows == "padded batch" else given[k][1:] for k in ("input_ids", "attention_mask")}
    theirs, ours = both(family, **inputs, max_new_tokens=24, eos_token_id=None)
    assert theirs.shape == ours.shape == (len(inputs["input_ids"]), 35)
    assert torch.equal(theirs, ours)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_sequences_end_one_by_one(family: str) -> None:
    given = families.batch(9)
    inputs = {k: given[k] for k in ("input_ids", "attention_mask")}
    free = families.make(family).generate(**inputs, max_new_tokens=20, eos_token_id=None)
    first, later = int(free[0, 9 + 3]), int(free[1, 9 + 9])
    theirs, ours = both(family, **inputs, max_new_tokens=20, eos_token_id=[first, later], pad_token_id=0)
    assert torch.equal(theirs, ours)
    assert ours.shape[1] < 29  # all had ended before the longest length
    assert (ours == 0).any()  # and one before the other


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9},
        {"do_sample": True, "repetition_penalty": 1.3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"min_new_tokens": 12},
    ],
    ids=lambda how: ", ".join(how),
)
def test_processors_are_transformers_own(how: dict[str, Any]) -> None:
    given = families.batch(7)
    theirs, ours = both(
        "llama", seed=5, input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=16, **how
    )
    assert torch.equal(theirs, ours)


def test_scores_and_logits_come_back() -> None:
    ids = families.batch(7)["input_ids"]
    how = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "temperature": 0.5}
    theirs, ours = both("llama", seed=1, input_ids=ids, max_new_tokens=5, do_sample=True, **how)
    assert torch.equal(theirs.sequences, ours.sequences)
    assert len(ours.scores) == len(ours.logits) == 5
    for name in ("scores", "logits"):
        for a, b in zip(theirs[name], ours[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "deepseek_v3"])
def test_two_turns_are_one_long_prompt(family: str) -> None:
    model, rest = prepared(family), families.batch(6, seed=9)["input_ids"]
    given = families.batch(8)
    mask = given["attention_mask"]
    first = model.generate(
        input_ids=given["input_ids"],
        attention_mask=mask,
        max_length=40,
        max_new_tokens=None,
        eos_token_id=None,
        return_dict_in_generate=True,
        stopping_criteria=[_After(13)],
    )
    assert first.sequences.shape[1] == 13
    whole = torch.cat([first.sequences, rest], dim=1)
    whole_mask = torch.cat([mask, torch.ones(2, whole.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
    going_on = {"input_ids": whole, "attention_mask": whole_mask, "max_new_tokens": 10, "eos_token_id": None}
    second = model.generate(**going_on, past_key_values=first.past_key_values)
    assert torch.equal(second, families.make(family).generate(**going_on))


class _After(StoppingCriteria):
    """Stops all sequences at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_a_cache_that_was_returned_is_not_written_again() -> None:
    model, ids = prepared(), families.batch(8)["input_ids"]
    kept = model.generate(input_ids=ids, max_new_tokens=4, return_dict_in_generate=True).past_key_values
    before = [kept.buffers(i).keys.clone() for i in range(len(kept))]
    model.generate(input_ids=ids.flip(1), max_new_tokens=4)
    assert all(torch.equal(kept.buffers(i).keys, keys) for i, keys in enumerate(before))


def test_a_long_prompt_in_pieces_is_the_same_prompt() -> None:
    given = families.batch(40, padding=5)
    inputs = {k: given[k] for k in ("input_ids", "attention_mask")}
    for family in ("llama", "gemma3"):
        model = families.make(family)
        whole = model.generate(**inputs, max_new_tokens=8)
        attach(model).prefill_tokens = 2 * 7
        assert torch.equal(model.generate(**inputs, max_new_tokens=8), whole)


def test_custom_generate_of_an_unprepared_model() -> None:
    ids, model = families.batch(8)["input_ids"], families.make("llama")
    theirs = model.generate(input_ids=ids, max_new_tokens=6)
    seen: list[Tensor] = []
    streamer = _Collect(seen)
    ours = model.generate(
        input_ids=ids, max_new_tokens=6, custom_generate=effpass.custom_generate, token_streamer=streamer
    )
    assert torch.equal(theirs, ours)
    assert torch.equal(torch.stack(seen, dim=1), ours[:, 8:])


class _Collect(TextStreamer):
    def __init__(self, seen: list[Tensor]) -> None:
        self.seen = seen

    def put(self, value: Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        pass


def test_a_streamer_gets_the_prompt_and_every_token() -> None:
    ids, seen = families.batch(8)["input_ids"][:1], []
    out = prepared().generate(input_ids=ids, max_new_tokens=6, streamer=_Collect(seen))
    assert torch.equal(seen[0], ids)
    assert [int(t) for t in seen[1:]] == out[0, 8:].tolist()


def test_assisted_generation_stays_transformers() -> None:
    ids = families.batch(8)["input_ids"][:1]
    model = prepared()
    theirs = families.make("llama").generate(input_ids=ids, max_new_tokens=8, prompt_lookup_num_tokens=2)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, prompt_lookup_num_tokens=2), theirs)


def test_the_model_is_still_an_ordinary_one() -> None:
    given, model = families.batch(9), prepared()
    before = families.make("llama")(**given).logits
    model.generate(input_ids=given["input_ids"], max_new_tokens=3)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(**given).logits, before)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.neg_()
    ids = given["input_ids"][:1]
    assert torch.equal(twin.effpass_engine.model.lm_head.weight, twin.lm_head.weight)
    assert not torch.equal(
        twin.generate(input_ids=ids, max_new_tokens=6), model.generate(input_ids=ids, max_new_tokens=6)
    )
    torch.save(model.state_dict(), io.BytesIO())


def test_generation_under_inference_mode_and_without_it() -> None:
    ids, model = families.batch(9)["input_ids"], prepared()
    with torch.inference_mode():
        first = model.generate(input_ids=ids, max_new_tokens=5)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=5), first)


def test_a_step_costs_no_memory_that_stays() -> None:
    model = prepared(max_position_embeddings=1024)
    ids = families.batch(8)["input_ids"]

    class Watch(StoppingCriteria):
        counts: tuple[int, ...] = ()

        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if input_ids.shape[1] % 80 == 0:
                gc.collect()
                self.counts += (sum(isinstance(o, torch.Tensor) for o in gc.get_objects()),)
            return torch.zeros(len(input_ids), dtype=torch.bool)

    watch = Watch()
    model.generate(input_ids=ids, max_new_tokens=400, eos_token_id=None, stopping_criteria=[watch])
    assert len(watch.counts) == 5
    assert list(watch.counts) == sorted(watch.counts, reverse=True)  # what earlier tests left may still be going


def test_buffers_are_kept_from_call_to_call_and_freed_on_request() -> None:
    model, ids = prepared(max_position_embeddings=1024), families.batch(8)["input_ids"]
    engine: Engine = model.effpass_engine
    model.generate(input_ids=ids, max_new_tokens=4)
    (session,) = engine._free.values()
    assert isinstance(session, Session)
    model.generate(input_ids=ids, max_new_tokens=20)
    assert list(engine._free.values()) == [session]
    model.generate(input_ids=ids, max_new_tokens=400, eos_token_id=None)
    (larger,) = engine._free.values()
    assert larger is not session
    assert larger.capacity == 512
    engine.release()
    assert not engine._free


def test_a_failure_inside_gives_the_buffers_back() -> None:
    class Failing(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            raise KeyError("stop")

    model, ids = prepared(), families.batch(8)["input_ids"]
    expected = model.generate(input_ids=ids, max_new_tokens=6)
    kept = list(model.effpass_engine._free.values())
    with pytest.raises(KeyError):
        model.generate(input_ids=ids, max_new_tokens=6, stopping_criteria=[Failing()])
    assert list(model.effpass_engine._free.values()) == kept
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=6), expected)


def test_a_prompt_whose_last_piece_is_one_token() -> None:
    """It is no decode step: what an earlier request has left behind is not read."""
    sparse = {"sparse_attention": {"tokens": 32, "blocks": 4, "block": 16, "dense_below": 1}}
    answers = []
    for earlier in (False, True):
        model = effpass.prepare(families.make("llama"), {"version": 1, "passes": [sparse]})
        model.effpass_engine.prefill_tokens = 40
        if earlier:
            model.generate(input_ids=families.batch(81, seed=5)["input_ids"][:1], max_new_tokens=3, eos_token_id=None)
        ids = families.batch(81)["input_ids"][:1]
        answers.append(model.generate(input_ids=ids, max_new_tokens=8, eos_token_id=None))
    assert torch.equal(*answers)
    longer = families.make("llama").generate(input_ids=ids, max_new_tokens=1, eos_token_id=None)
    assert torch.equal(answers[0][:, : longer.shape[1]], longer)  # the prompt itself is dense


def test_one_new_token_continues_a_pipelined_selection() -> None:
    sparse = {"sparse_attention": {"tokens": 32, "blocks": 4, "block": 16, "dense_below": 1, "pipelined": True}}
    model = effpass.prepare(families.make("llama"), {"version": 1, "passes": [sparse]})
    ids = families.batch(60)["input_ids"][:1]
    how = {"eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(input_ids=ids, max_length=100, stopping_criteria=[_After(70)], **how)
    again = model.generate(first.sequences, max_new_tokens=4, past_key_values=first.past_key_values, **how)
    assert again.sequences.shape[1] == 74


class _After:
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= self.length)


def test_rows_that_ended_early_are_not_hidden_silently() -> None:
    """Their padding is in the cache; a mask over it is refused, and the cache can be left out."""
    given = families.batch(11)
    inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
    free = families.make("llama").generate(**inputs, max_new_tokens=12, eos_token_id=None)
    model, end = prepared(), int(free[0, 11 + 2])
    how = {"return_dict_in_generate": True, "pad_token_id": 0, "max_length": 60, "stopping_criteria": [_After(20)]}
    first = model.generate(**inputs, eos_token_id=end, **how)
    whole = torch.cat([first.sequences, families.batch(5, seed=3)["input_ids"]], 1)
    mask = torch.cat([inputs["attention_mask"], (whole[:, 11:] != 0).long()], 1)
    with pytest.raises(EffpassError, match="a sequence that ended early was padded in the cache"):
        model.generate(input_ids=whole, attention_mask=mask, max_new_tokens=4, past_key_values=first.past_key_values)


def test_a_call_that_fails_takes_its_cache_with_it() -> None:
    ids, model = families.batch(9)["input_ids"][:1], prepared()
    how = {"eos_token_id": None, "return_dict_in_generate": True, "max_length": 60, "stopping_criteria": [_After(14)]}
    first = model.generate(input_ids=ids, **how)
    whole = torch.cat([first.sequences, ids], 1)

    class Broken:
        def put(self, value: Any) -> None:
            if value.ndim == 1:
                raise RuntimeError("the connection is closed")

        def end(self) -> None: ...

    given = {"max_new_tokens": 4, "past_key_values": first.past_key_values, "eos_token_id": None}
    with pytest.raises(RuntimeError, match="the connection is closed"):
        model.generate(input_ids=whole, streamer=Broken(), **given)
    with pytest.raises(EffpassError, match="failed or was cancelled, and left some of its tokens in it"):
        model.generate(input_ids=whole, **given)


def test_what_the_engine_does_not_compute_is_refused() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, Llama4TextConfig, Phi3Config

    from effpass.runtime.cache import layer_windows
    from effpass.runtime.engine import check_decodable

    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_head=4, n_layer=2, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = effpass.prepare(GPT2LMHeadModel(config).eval(), NO_PASSES)
    ids = families.batch(9)["input_ids"][:1]
    for name, value in (("token_type_ids", torch.ones_like(ids)), ("position_ids", torch.arange(20, 29)[None])):
        with pytest.raises(EffpassError, match=name):
            model.generate(input_ids=ids, max_new_tokens=3, **{name: value})
    with pytest.raises(ModelError, match="attends within chunks"):
        layer_windows(Llama4TextConfig(num_hidden_layers=4))
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    long = Phi3Config(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, intermediate_size=32,
        vocab_size=96, max_position_embeddings=256, original_max_position_embeddings=64, rope_scaling=rope,
        pad_token_id=0,
    )  # fmt: skip
    from transformers import Phi3ForCausalLM

    with pytest.raises(ModelError, match="longrope"):
        check_decodable(Phi3ForCausalLM(long))
