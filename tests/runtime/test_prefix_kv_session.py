"""Caches with a budget: exact where nothing has to go, and otherwise equal to attention over what was kept."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import families
import pytest
import torch
from tiny_vision import PATCHES, make_llava
from torch import Tensor
from transformers import AttentionInterface, StoppingCriteria

import effpass
from effpass.core.errors import EffpassError
from effpass.runtime.attach import attach
from effpass.runtime.attention import reading_cache
from effpass.runtime.prefix_kv.budget import Budget
from effpass.runtime.prefix_kv.peers.global_top_k import GlobalTopK
from effpass.runtime.prefix_kv.peers.h2o import H2O
from effpass.runtime.prefix_kv.peers.pyramid_kv import PyramidKV
from effpass.runtime.prefix_kv.peers.snap_kv import SnapKV
from effpass.runtime.prefix_kv.peers.streaming_llm import StreamingLLM
from effpass.runtime.prefix_kv.peers.uniform import Uniform
from effpass.runtime.prefix_kv.plan import Settings
from effpass.runtime.prefix_kv.policy import Policy
from effpass.runtime.prefix_kv.prefix import PrefixKV
from effpass.runtime.prefix_kv.session import BudgetSession
from effpass.runtime.prefix_kv.staging import StagedLayer
from effpass.runtime.session import Session

POLICIES = [Policy, Uniform, StreamingLLM, H2O, SnapKV, PyramidKV, GlobalTopK]


class Fixed(Policy):
    """Shares that are known beforehand."""

    name = "fixed"

    def shares(self, ratio: float, layers: int) -> Sequence[float]:
        return [float(layers - i) for i in range(layers)]


def settings(policy: Policy, budget: float | str, **more: Any) -> Settings:
    return Settings(policy, Budget.parse(budget), **{"sink": 2, "recent": 4, "page": 1, "every": 4, **more})


def budgeted(model: Any, chosen: Settings) -> Any:
    attach(model).new_session = lambda *arguments: BudgetSession(*arguments, settings=chosen)
    return model


def session_of(model: Any) -> BudgetSession:
    (session,) = model.effpass_engine._free.values()
    assert isinstance(session, BudgetSession)
    return session


def lengths(session: BudgetSession) -> list[int]:
    return [session._kept(i).slots.length for i in range(len(session.cache))]


def inputs(length: int = 30, padding: int = 3) -> dict[str, Tensor]:
    given = families.batch(length, padding=padding)
    return {k: given[k] for k in ("input_ids", "attention_mask")}


# -- everything is kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("rows", ["padded batch", "one"])
def test_a_budget_of_everything_changes_no_token(family: str, rows: str) -> None:
    given = {k: v if rows == "padded batch" else v[1:] for k, v in inputs(21).items()}
    how = {"max_new_tokens": 24, "eos_token_id": None}
    model = families.make(family)
    theirs = model.generate(**given, **how)
    effpass.prepare(model, {"passes": [{"prefix_kv": {"budget": 1.0}}]})
    assert torch.equal(model.generate(**given, **how), theirs)
    assert isinstance(*model.effpass_engine._free.values(), Session if family == "mistral" else BudgetSession)
    assert torch.equal(model.generate(**given, **how), theirs)  # in the buffers of the first call
    model.effpass_engine.prefill_tokens = 2 * 7
    assert torch.equal(model.generate(**given, **how), theirs)  # in pieces


@pytest.mark.parametrize("dtype", ["int8", "fp8", "int4"])
def test_few_bits_are_close(dtype: str) -> None:
    given, model = inputs(21), families.make("qwen3")
    how = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True, "eos_token_id": None}
    theirs = model.generate(**given, **how).logits
    budgeted(model, settings(Policy(), 1.0, kv_cache_dtype=dtype))
    ours = model.generate(**given, **how).logits
    # The prompt attends to what it computed: its logits are those of 32 bits. Keys and values rounded to 1/254, 1/16 or
    # 1/30 of their range move the later ones.
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    error = (ours[1] - theirs[1]).abs().max() / theirs[1].abs().max()
    assert 0 < error < {"int8": 0.01, "fp8": 0.06, "int4": 0.2}[dtype]


# -- how much is kept --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("budget", [0.4, 17])
def test_a_prompt_keeps_the_budget_exactly(policy: type[Policy], budget: float) -> None:
    given, model = (
        inputs(40, padding=0),
        budgeted(families.make("llama", num_hidden_layers=3), settings(policy(), budget)),
    )
    model.generate(**given, max_new_tokens=1)
    session = session_of(model)
    assert sum(lengths(session)) == round(3 * (0.4 * 40 if budget == 0.4 else 17))
    assert min(lengths(session)) >= 6
    for index in range(3):
        positions = session._kept(index).slots.positions[:, : lengths(session)[index]]
        assert positions.sort(1).values.tolist() == positions.tolist()
        assert {0, 1, 36, 37, 38, 39} <= set(positions[0].tolist())
        assert session._kept(index).keys.shape[2] == session._kept(index).slots.positions.shape[1]
    if policy is PyramidKV:
        assert lengths(session) == sorted(lengths(session), reverse=True) != [lengths(session)[0]] * 3


def test_bytes_are_those_of_all_sequences_and_layers() -> None:
    model = budgeted(families.make("llama"), settings(Uniform(), "20480 B"))
    model.generate(**inputs(60, padding=0), max_new_tokens=1)
    # 2 layers x 2 rows x 2 heads x 16 x 4 bytes x (keys, values) = 1024 bytes a token
    assert lengths(session_of(model)) == [20, 20]


@pytest.mark.parametrize("policy", [Fixed, Policy, StreamingLLM])
def test_decoding_falls_back_to_the_share(policy: type[Policy]) -> None:
    model = budgeted(families.make("llama"), settings(policy(), 0.5))
    steps: list[tuple[int, int]] = []
    with torch.no_grad(), reading_cache(model):
        session = BudgetSession(model, 2, 200, None, settings(policy(), 0.5))
        session.begin(2)
        session.prefill(inputs(40, padding=0)["input_ids"], None, 64)
        buffers = [session._kept(i).keys for i in range(2)]
        for _ in range(60):
            session.tokens.copy_(session.logits.argmax(-1, keepdim=True))
            session.step()
            steps.append((session.length, sum(lengths(session))))
            for index in range(2):
                positions = session._kept(index).slots.positions
                newest = range(session.length - 4, session.length)
                assert all({0, 1, *newest} <= set(row) for row in positions.tolist())
        assert [session._kept(i).keys is buffers[i] for i in range(2)] == [True, True]
    # Twice half of the length, and in each of two layers at most the steps since the last round.
    assert all(length - 2 <= kept <= length + 2 * 4 for length, kept in steps)
    if policy is StreamingLLM:
        for row in session._kept(0).slots.positions.tolist():
            newest = sorted(p for p in row if p >= 2)
            assert newest == list(range(newest[0], 100))


def test_rows_of_different_lengths_each_keep_their_share_and_do_not_disturb_each_other() -> None:
    given, how = inputs(40, padding=16), {"max_new_tokens": 20, "eos_token_id": None}
    model = budgeted(families.make("llama"), settings(Fixed(), 0.5))
    both = model.generate(**given, **how)
    session = session_of(model)
    table = session._kept(1).slots.positions
    assert (table >= 0).sum(1).tolist()[0] < (table >= 0).sum(1).tolist()[1]
    alone = budgeted(families.make("llama"), settings(Fixed(), 0.5)).generate(input_ids=given["input_ids"][1:], **how)
    assert torch.equal(both[1:], alone)
    model = budgeted(families.make("llama"), settings(Fixed(), 0.5))
    for padding in (16, 0):
        model.generate(**inputs(40, padding=padding), max_new_tokens=1)
        kept = [(session_of(model)._kept(i).slots.positions >= 0).sum(1).tolist() for i in range(2)]
        # 27 and 13 of 40; of 24 in proportion, rounded up
        assert kept == ([[17, 27], [8, 13]] if padding else [[27, 27], [13, 13]])


def test_sliding_layers_stay_outside_the_budget() -> None:
    model = budgeted(families.make("gemma3"), settings(Policy(), 0.5))
    model.generate(**inputs(40, padding=0), max_new_tokens=1)
    assert lengths(session_of(model)) == [40, 20]


def test_tokens_to_keep() -> None:
    given = inputs(60, padding=5)
    keep = torch.zeros(2, 60, dtype=torch.bool)
    keep[:, 20:26] = True
    model = budgeted(families.make("llama"), settings(Policy(), 0.4))
    first = model.generate(**given, max_length=200, max_new_tokens=None, eos_token_id=None, keep_tokens=keep,
                           return_dict_in_generate=True, stopping_criteria=[After(100)])  # fmt: skip
    tables = [layer.slots.positions for layer in first.past_key_values.layers]
    assert all(set(range(15, 21)) <= set(table[0].tolist()) for table in tables)
    assert all(set(range(20, 26)) <= set(table[1].tolist()) for table in tables)
    second = turn(first, given["attention_mask"])
    model.generate(**second, max_new_tokens=30, eos_token_id=None, past_key_values=first.past_key_values)
    tables = [layer.slots.positions for layer in first.past_key_values.layers]
    assert all(set(range(20, 26)) <= set(table[1].tolist()) for table in tables)


# -- images ------------------------------------------------------------------------------------------------------------


def test_a_vision_language_model() -> None:
    ids = torch.randint(3, 250, (2, 60), generator=torch.Generator().manual_seed(0))
    ids[:, 10 : 10 + PATCHES] = 257
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 28, 28)}
    given["input_ids"][0, :5], given["attention_mask"][0, :5] = 0, 0
    how = {"max_new_tokens": 12, "eos_token_id": None}
    model = make_llava()
    theirs = model.generate(**given, **how)
    attach(model).prefill_tokens = 16  # a prompt with images is run in one piece whatever this says
    assert torch.equal(model.generate(**given, **how), theirs)
    vision = model.model.vision_tower.config
    assert (model.config.text_config._attn_implementation, vision._attn_implementation) == ("sdpa", "sdpa")
    budgeted(model, settings(Fixed(), 1.0))
    assert torch.equal(model.generate(**given, **how), theirs)
    budgeted(model, settings(Fixed(), 0.5))
    blind = {**given, "pixel_values": torch.zeros(2, 3, 28, 28)}
    assert not torch.equal(model.generate(**given, **how), model.generate(**blind, **how))
    assert sum(lengths(session_of(model))) <= 72 + 2 * 4
    assert model.generate(input_ids=ids[:, 30:], **how).shape == (2, 42)


# -- when layers give up ----------------------------------------------------------------------------------------------


def staged_at_once(model: Any, policy: Policy, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many layers hold all of a prompt at the same time, at most."""
    held, most = set(), [0]
    make, free = StagedLayer.lazy_initialization, StagedLayer.free

    def made(self: StagedLayer, *arguments: Any) -> None:
        make(self, *arguments)
        held.add(self)
        most[0] = max(most[0], len(held))

    def freed(self: StagedLayer) -> None:
        free(self)
        assert self.keys is None
        held.discard(self)

    monkeypatch.setattr(StagedLayer, "lazy_initialization", made)
    monkeypatch.setattr(StagedLayer, "free", freed)
    budgeted(model, settings(policy, 0.5)).generate(**inputs(40, padding=0), max_new_tokens=1)
    assert not held
    return most[0]


def test_known_shares_hold_one_layer_at_a_time_and_searched_ones_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert staged_at_once(families.make("llama", num_hidden_layers=4), Fixed(), monkeypatch) == 1
    assert staged_at_once(families.make("llama", num_hidden_layers=4), Policy(), monkeypatch) == 4


@pytest.mark.parametrize("policy", [Fixed, SnapKV, Policy])
def test_pieces_and_groups_of_a_prompt_choose_the_same(policy: type[Policy]) -> None:
    given, how = inputs(80, padding=9), {"max_new_tokens": 12, "eos_token_id": None}
    model = budgeted(families.make("llama"), settings(policy(), 0.4))
    whole = model.generate(**given, **how)
    tables = [session_of(model)._kept(i).slots.positions.clone() for i in range(2)]
    for at_once in (100, 2 * 13):  # one row after the other; in pieces of 26 or 13 tokens
        model.effpass_engine.prefill_tokens = at_once
        assert torch.equal(model.generate(**given, **how), whole)
        assert all(torch.equal(session_of(model)._kept(i).slots.positions, t) for i, t in enumerate(tables))


# -- conversations ----------------------------------------------------------------------------------------------------


class After(StoppingCriteria):
    """Stops all sequences at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def turn(first: Any, mask: Tensor, length: int = 12) -> dict[str, Tensor]:
    """The conversation so far and a next prompt."""
    whole = torch.cat([first.sequences, families.batch(length, seed=9)["input_ids"]], 1)
    return {
        "input_ids": whole,
        "attention_mask": torch.nn.functional.pad(mask, (0, whole.shape[1] - mask.shape[1]), value=1),
    }


class KeptOnly:
    """transformers' own cache and attention, with a mask for each layer of what a budgeted session has kept."""

    def __init__(self, family: str, padding: Sequence[int], tokens: int) -> None:
        AttentionInterface.register("kept_only", self.attend)
        self.model = families.make(family)
        self.model.set_attn_implementation("kept_only")
        self.padding, self.cache = padding, None
        self.kept = torch.ones(self.model.config.num_hidden_layers, len(padding), tokens, dtype=torch.bool)

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: Any = None, **_: Any
    ) -> Any:
        tokens, there = query.shape[2], key.shape[2]
        of_queries = torch.arange(there - tokens, there)
        visible = torch.arange(there) <= of_queries[:, None]
        visible = visible & self.kept[module.layer_idx][:, None, :there]
        for row, padding in enumerate(self.padding):
            visible[row, :, :padding] = False
        repeat = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeat, 1) for x in (key, value))
        score = (query @ key.mT * scaling).masked_fill(~visible[:, None], float("-inf"))
        return (score.softmax(-1).nan_to_num(0) @ value).transpose(1, 2), None

    def see(self, session: BudgetSession) -> None:
        """From now on only what the session holds, and what is new, is visible."""
        self.kept[:, :, : session.length] = False
        for index in range(len(session.cache)):
            for row, padding in enumerate(self.padding):
                table = session._kept(index).slots.positions[row].long()
                self.kept[index, row, table[table >= 0] + padding] = True

    def run(self, ids: Tensor) -> Tensor:
        """Logits of the next tokens, the last of each row."""
        past = 0 if self.cache is None else self.cache.get_seq_length()
        places = torch.arange(past, past + ids.shape[1]) - torch.tensor(self.padding)[:, None]
        out = self.model(input_ids=ids, position_ids=places.clamp(min=0), past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[:, -1]


@pytest.mark.parametrize(
    ("family", "policy"), [("llama", Policy), ("llama", Fixed), ("deepseek_v3", SnapKV), ("gemma3", H2O)]
)
@pytest.mark.parametrize("padding", [0, 7])
def test_two_turns_are_a_recomputation_with_the_same_kept_set(family: str, policy: type[Policy], padding: int) -> None:
    prompt, chosen = inputs(40, padding=padding), settings(policy(), 0.4)
    model = families.make(family, **({"sliding_window": 128} if family == "gemma3" else {}))
    is_token = prompt["attention_mask"].bool() if padding else None
    with torch.no_grad(), reading_cache(model):
        session = BudgetSession(model, 2, 120, None, chosen)
        reference = KeptOnly(family, [padding, 0], 120)
        if family == "gemma3":
            reference.model = families.make(family, sliding_window=128)
            reference.model.set_attn_implementation("kept_only")
        session.begin(2)
        next_ids = prompt["input_ids"]
        for _turn in range(2):
            session.prefill(next_ids, is_token, 64)
            torch.testing.assert_close(session.logits, reference.run(next_ids), rtol=1e-5, atol=1e-5)
            reference.see(session)
            for _ in range(11):
                token = session.logits.argmax(-1, keepdim=True)
                session.tokens.copy_(token)
                if session.length - session._settled_at >= chosen.every:  # what the step is about to give up
                    session._give_up()
                    reference.see(session)
                session.step()
                torch.testing.assert_close(session.logits, reference.run(token), rtol=1e-5, atol=1e-5)
            session.crop(session.length - 2)
            reference.cache.crop(-2)
            next_ids, is_token = families.batch(12, seed=9)["input_ids"], None
            assert session.cache.get_seq_length() == session.length == reference.cache.get_seq_length()
            kept = [lengths(session)[i] for i in session.full]
            assert sum(kept) < 0.75 * session.length * len(kept)


def test_a_second_call_goes_on_with_a_cache_that_was_returned() -> None:
    given = inputs(40)
    model = budgeted(families.make("llama"), settings(Policy(), 0.5))
    how = {"eos_token_id": None, "return_dict_in_generate": True}
    first = model.generate(**given, max_length=120, max_new_tokens=None, stopping_criteria=[After(60)], **how)
    second = turn(first, given["attention_mask"])
    answer = model.generate(**second, max_new_tokens=20, past_key_values=first.past_key_values, **how)
    assert answer.sequences.shape == (2, 92)
    assert answer.past_key_values is first.past_key_values
    held = [layer.slots.length for layer in first.past_key_values.layers]
    assert sum(held) <= 91 + 2 * 4
    again = model.generate(**given, max_length=120, max_new_tokens=None, stopping_criteria=[After(60)], **how)
    assert torch.equal(again.sequences, first.sequences)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("padding", [0, 5])
def test_a_second_turn_under_a_budget_of_everything_is_transformers(family: str, padding: int) -> None:
    """What was decoded since the last eviction counts too when the next prompt is budgeted."""
    given = inputs(41, padding=padding)
    how = {"eos_token_id": None, "return_dict_in_generate": True, "max_length": 160}
    model = budgeted(families.make(family), settings(Policy(), "1 GiB"))
    first = model.generate(**given, max_new_tokens=None, stopping_criteria=[After(41 + 38)], **how)
    second = turn(first, given["attention_mask"], 7)
    answer = model.generate(**second, max_new_tokens=20, past_key_values=first.past_key_values, eos_token_id=None)
    theirs = families.make(family).generate(**second, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(answer, theirs)


# -- as it is recorded -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "int8"), ("llama", "fp8"), ("llama", "int4"), ("gemma3", "auto"), ("deepseek_v3", "auto")],
)
def test_a_recorded_step_is_a_step(family: str, dtype: str) -> None:
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    given, model = families.batch(30), families.make(family)
    with torch.no_grad(), reading_cache(model):
        ours, plain = (
            BudgetSession(model, 4, 64, backend, settings(Policy(), 0.5, kv_cache_dtype=dtype)) for _ in "ab"
        )
        for session in (ours, plain):
            session.begin(2)
            session.prefill(given["input_ids"], given["attention_mask"].bool(), 64)
        compiled = ours._compile()
        for _ in range(6):
            for session in (ours, plain):
                session.tokens.copy_(plain.logits.argmax(-1, keepdim=True))
            plain.step()
            if ours.length - ours._settled_at >= 4:
                ours._give_up()
            with ours._recording():
                ours._move()
                ours.cache.append(ours._position)
                ours._forward(compiled, None)
            ours.cache.advance(1)
            ours.length += 1
            torch.testing.assert_close(ours.logits[:2], plain.logits[:2], rtol=1e-5, atol=1e-5)
            assert lengths(ours) == lengths(plain)
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_a_copy_of_the_model_keeps_its_budget() -> None:
    model = budgeted(families.make("llama"), settings(Fixed(), 0.5))
    twin = copy.deepcopy(model)
    given = inputs(40)
    assert torch.equal(twin.generate(**given, max_new_tokens=8), model.generate(**given, max_new_tokens=8))
    assert isinstance(session_of(twin), BudgetSession)
    assert session_of(twin).model is twin


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_tokens_to_keep_that_make_no_sense() -> None:
    given = inputs(40)
    plain = families.make("llama")
    attach(plain)
    keep = torch.ones(2, 40, dtype=torch.bool)
    with pytest.raises(EffpassError, match=r"this model's cache gives up no tokens\n.*put prefix_kv into the recipe"):
        plain.generate(**given, max_new_tokens=2, keep_tokens=keep)
    model = budgeted(families.make("llama"), settings(Policy(), 0.5))
    with pytest.raises(EffpassError, match=r"keep_tokens is torch.int64 \(2, 40\), and input_ids \(2, 40\)"):
        model.generate(**given, max_new_tokens=2, keep_tokens=keep.long())
    with pytest.raises(
        EffpassError, match="fewer than the protected ones: 2 first, 4 last, and 40 that keep_tokens asks"
    ):
        model.generate(**given, max_new_tokens=2, keep_tokens=keep)
    assert model.generate(**given, max_new_tokens=2).shape == (2, 42)


def test_the_usual_refusals() -> None:
    model = budgeted(families.make("llama"), settings(PrefixKV(), 0.5))
    given = inputs(40)
    with pytest.raises(EffpassError, match="row 1 of the batch holds no token"):
        model.generate(
            input_ids=given["input_ids"], attention_mask=torch.tensor([[1] * 40, [0] * 40]), max_new_tokens=2
        )
    with pytest.raises(EffpassError, match="the prompt has 280 tokens, and the model 256 positions"):
        model.generate(input_ids=given["input_ids"].repeat(1, 7), max_new_tokens=2)


def test_out_of_memory_says_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    model = budgeted(families.make("llama"), settings(PrefixKV(), 0.5))
    monkeypatch.setattr("effpass.runtime.prefix_kv.layer.EvictingLayer.fit", full)
    with pytest.raises(EffpassError, match="no room on cpu for 2 sequences of 42 tokens") as caught:
        model.generate(**inputs(40), max_new_tokens=2)
    assert "lower the batch, max_new_tokens" in str(caught.value)
    assert not model.effpass_engine._free
