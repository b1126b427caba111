"""The decode engine on a GPU: CUDA graphs, fused kernels, nothing that waits for the device."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from torch import Tensor

import effpass
from effpass.runtime.attention import reading_cache

pytestmark = pytest.mark.gpu

NO_PASSES: dict[str, Any] = {"version": 1, "passes": []}


def make(family: str, **overrides: Any) -> Any:
    return families.make(family, **overrides).cuda()


def inputs(length: int = 11) -> dict[str, Tensor]:
    given = families.batch(length)
    return {k: given[k].cuda() for k in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_greedy_is_transformers_greedy(family: str) -> None:
    model, given = make(family), inputs()
    how = {"max_new_tokens": 24, "eos_token_id": None}
    theirs = model.generate(**given, **how)
    alone = model.generate(input_ids=given["input_ids"][1:], **how)
    ready = effpass.prepare(model, NO_PASSES)
    assert torch.equal(ready.generate(**given, **how), theirs)
    assert torch.equal(ready.generate(input_ids=given["input_ids"][1:], **how), alone)
    assert sorted(ready.effpass_engine._free) == [1, 2]
    assert all(s._graph is not None for s in ready.effpass_engine._free.values())


def test_three_sequences_share_the_graph_of_four() -> None:
    model = make("llama")
    ids = families.batch(9)["input_ids"].cuda()
    ids = torch.cat([ids, ids[:1].flip(1)])
    theirs = model.generate(input_ids=ids, max_new_tokens=12, eos_token_id=None)
    ready = effpass.prepare(model, NO_PASSES)
    assert torch.equal(ready.generate(input_ids=ids, max_new_tokens=12, eos_token_id=None), theirs)
    assert list(ready.effpass_engine._free) == [4]


def test_sequences_end_one_by_one_and_stop_the_loop() -> None:
    model, given = make("qwen3"), inputs(9)
    free = model.generate(**given, max_new_tokens=40, eos_token_id=None)
    ends = [int(free[0, 12]), int(free[1, 18])]
    theirs = model.generate(**given, max_new_tokens=40, eos_token_id=ends, pad_token_id=0)
    ready = effpass.prepare(model, NO_PASSES)
    ours = ready.generate(**given, max_new_tokens=40, eos_token_id=ends, pad_token_id=0)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("how", [{"temperature": 0.7, "top_k": 20, "top_p": 0.9}, {"repetition_penalty": 1.2}])
def test_sampling_follows_the_seed(how: dict[str, Any]) -> None:
    ready, given = effpass.prepare(make("llama"), NO_PASSES), inputs()
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(ready.generate(**given, max_new_tokens=32, do_sample=True, eos_token_id=None, **how))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_each_way_to_choose_records_its_own_step() -> None:
    ready, given = effpass.prepare(make("llama"), NO_PASSES), inputs()

    def generate(**how: Any) -> Tensor:
        torch.manual_seed(0)
        return ready.generate(**given, max_new_tokens=16, eos_token_id=None, **how)

    ways = [{}, {"do_sample": True}, {"do_sample": True, "temperature": 0.3}, {"repetition_penalty": 1.5}]
    once = [generate(**how) for how in ways]
    assert all(torch.equal(a, generate(**how)) for a, how in zip(once, ways, strict=True))
    assert all(not torch.equal(a, once[0]) for a in once[1:])


def test_sampled_tokens_have_the_model_s_distribution() -> None:
    model = make("llama", vocab_size=97)
    ids = families.batch(7)["input_ids"][1:].cuda()
    expected = torch.softmax(model(ids).logits[0, -1], -1)
    ready = effpass.prepare(model, NO_PASSES)
    how = {"num_return_sequences": 4096, "max_new_tokens": 1, "do_sample": True, "top_k": 0, "eos_token_id": None}
    torch.manual_seed(0)
    drawn = ready.generate(input_ids=ids, **how)[:, -1].bincount(minlength=97) / 4096
    # 4096 draws: a frequency of p is off by at most 5 √(p / 4096) but for one case in a million.
    assert ((drawn - expected).abs() <= 5 * (expected / 4096).sqrt()).all()


def test_two_turns_are_one_long_prompt() -> None:
    model, given = make("mistral"), inputs(8)
    ready = effpass.prepare(model, NO_PASSES)
    first = ready.generate(**given, max_length=60, eos_token_id=None, return_dict_in_generate=True,
                           stopping_criteria=[_After(14)])  # fmt: skip
    assert first.sequences.shape[1] == 14
    rest = families.batch(6, seed=9)["input_ids"].cuda()
    whole = torch.cat([first.sequences, rest], dim=1)
    mask = torch.cat([given["attention_mask"], given["attention_mask"].new_ones(2, whole.shape[1] - 8)], dim=1)
    how = {"input_ids": whole, "attention_mask": mask, "max_new_tokens": 10, "eos_token_id": None}
    second = ready.generate(**how, past_key_values=first.past_key_values)
    assert torch.equal(second, type(model).generate(model, **how))


class _After:
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def test_steps_do_not_wait_for_the_device() -> None:
    ready, given = effpass.prepare(make("llama"), NO_PASSES), inputs()
    ready.generate(**given, max_new_tokens=8, eos_token_id=None)
    session = ready.effpass_engine._free[2]
    with torch.no_grad(), reading_cache(ready):
        session.step()  # records it without the choice of a token
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                session.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_stream_gets_every_token_in_order() -> None:
    ready, seen = effpass.prepare(make("llama"), NO_PASSES), []

    class Streamer:
        def put(self, value: Tensor) -> None:
            seen.append(value)

        def end(self) -> None:
            seen.append(None)

    ids = families.batch(8)["input_ids"][1:].cuda()
    out = ready.generate(input_ids=ids, max_new_tokens=50, eos_token_id=None, streamer=Streamer())
    assert [int(t) for t in seen[1:-1]] == out[0, 8:].tolist()
    assert seen[-1] is None


def test_ten_thousand_tokens_take_no_more_memory() -> None:
    ready = effpass.prepare(make("llama", max_position_embeddings=10240), NO_PASSES)
    used: list[int] = []

    class Watch:
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            if input_ids.shape[1] % 1000 == 0:
                torch.cuda.synchronize()
                used.append(torch.cuda.memory_allocated())
            return torch.zeros(len(input_ids), dtype=torch.bool, device="cuda")

    ids = families.batch(8)["input_ids"].cuda()
    out = ready.generate(input_ids=ids, max_new_tokens=10_000, eos_token_id=None, stopping_criteria=[Watch()])
    assert out.shape[1] == 10_008
    assert len(used) == 10
    assert max(used) - min(used) < 2**20


def test_new_weights_are_read() -> None:
    ready, given = effpass.prepare(make("llama"), NO_PASSES), inputs()
    how = {"max_new_tokens": 8, "eos_token_id": None}
    before = ready.generate(**given, **how)
    ready.load_state_dict(make("llama", seed=1).state_dict(), assign=True)  # other tensors, at other addresses
    after = ready.generate(**given, **how)
    assert not torch.equal(before, after)
    assert torch.equal(after, type(ready).generate(ready, **given, **how))


def test_release_frees_the_buffers() -> None:
    model, given = make("llama"), inputs()
    ready = effpass.prepare(model, NO_PASSES)
    ready.generate(**given, max_new_tokens=8)  # what is made once stays: kernels, workspaces
    ready.effpass_engine.release()
    before = torch.cuda.memory_allocated()
    ready.generate(**given, max_new_tokens=8)
    assert torch.cuda.memory_allocated() > before
    ready.effpass_engine.release()
    assert torch.cuda.memory_allocated() <= before + 2**16


def test_no_room_says_what_to_lower() -> None:
    from effpass.core.errors import EffpassError

    ready = effpass.prepare(make("llama", max_position_embeddings=2**30), NO_PASSES)
    ids = families.batch(8)["input_ids"].cuda()
    with pytest.raises(EffpassError, match="no room on cuda:0 for 2 sequences of") as caught:
        ready.generate(input_ids=ids, max_new_tokens=2**28)
    assert "lower the batch" in str(caught.value)
    assert ready.generate(input_ids=ids, max_new_tokens=4).shape[0] == 2
