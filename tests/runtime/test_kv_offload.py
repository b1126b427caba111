"""Keys and values in host memory: the same bits as on the device, whatever is evicted; and what is refused or fails."""

from __future__ import annotations

import copy
import functools
import gc
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import families
import pytest
import torch

import effpass
from effpass.core.errors import EffpassError, HostMemoryError, ModelError, PassRefusedError
from effpass.passes.runtime.kv_offload import counters
from effpass.runtime import host_memory
from effpass.runtime.attention import reading_cache
from effpass.runtime.cache import full_layers
from effpass.runtime.kv_offload import OffloadedCache
from effpass.runtime.session import Session

SPARSE = {"tokens": 32, "blocks": 4, "block": 16, "recent": 1, "dense_below": 1}
LENGTH, NEW = 170, 24
WITH_CACHE = ["llama", "qwen3", "gemma3", "gpt2", "deepseek_v3"]


def prepared(family: str, *passes: Any) -> Any:
    return effpass.prepare(families.make(family), {"version": 1, "passes": list(passes)})


@functools.cache
def _resident(family: str, passes: str) -> Any:
    return prepared(family, *json.loads(passes))


def pair(family: str, offload: dict[str, Any] | None = None, *others: Any, **sparse: Any) -> tuple[Any, Any]:
    """The model with sparse attention over keys on the device, and in host memory."""
    passes = [*others, {"sparse_attention": {**SPARSE, **sparse}}]
    offloaded = prepared(family, *passes, {"kv_offload": {"pool": 5} if offload is None else offload})
    return _resident(family, json.dumps(passes)), offloaded


def generate(model: Any, given: dict[str, torch.Tensor], new: int = NEW, **more: Any) -> Any:
    return model.generate(
        input_ids=given["input_ids"], attention_mask=given["attention_mask"], max_new_tokens=new, do_sample=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture
def evicting(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Before every step somebody evicts half of the pages, at random, and leaves NaN in them."""
    evicted, ready = [0], OffloadedCache.ready

    def evict(cache: OffloadedCache) -> Any:
        for pool in cache.pools():
            gone = torch.rand(pool.owner.shape) < 0.5
            for b, g, page in (gone & (pool.owner >= 0)).nonzero().tolist():
                pool.block_table[b, g, pool.owner[b, g, page]] = -1
                pool.pages.view(*pool.owner.shape, *pool.pages.shape[1:])[b, g, page] = torch.nan
                evicted[0] += 1
            pool.owner[gone] = pool.age[gone] = -1
        return ready(cache)

    monkeypatch.setattr(OffloadedCache, "ready", evict)
    return evicted


# -- the same as on the device ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", WITH_CACHE)
def test_it_is_sparse_attention_bit_for_bit(family: str) -> None:
    """Padding and batches included; blocks are evicted because the pool is small."""
    resident, offloaded = pair(family)
    given = families.batch(LENGTH)
    assert_same(generate(offloaded, given), generate(resident, given))
    assert offloaded.effpass_report.passes[-1].hits == len(full_layers(resident.config)[0])
    found = counters(offloaded)
    assert 0 < found.missing_tokens < found.tokens
    assert found.copied > 0


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
@pytest.mark.parametrize("how", [{}, {"pipelined": True}, {"levels": "blocks", "tokens": 64}])
def test_whatever_is_evicted(family: str, how: dict[str, Any], evicting: list[int]) -> None:
    resident, offloaded = pair(family, **how)
    given = families.batch(LENGTH)
    assert_same(generate(offloaded, given), generate(resident, given))
    assert evicting[0] > 100


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_prompts_in_pieces_and_conversations(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in host memory comes back for the next piece of a prompt, and for the next turn."""
    results = []
    for model in pair(family):
        monkeypatch.setattr(model.effpass_engine, "prefill_tokens", 2 * 41)
        first = generate(model, families.batch(LENGTH), 12, max_length=None)
        more = torch.ones(2, 12 + 9, dtype=torch.long)
        longer = {
            "input_ids": torch.cat((first.sequences, families.batch(9)["input_ids"]), 1),
            "attention_mask": torch.cat((families.batch(LENGTH)["attention_mask"], more), 1),
        }
        results.append((first, generate(model, longer, 12, past_key_values=first.past_key_values)))
    for ours, theirs in zip(*results, strict=True):
        assert_same(ours, theirs)


def test_a_session_is_used_again_for_other_prompts() -> None:
    resident, offloaded = pair("llama")
    plain = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for length in (LENGTH, 60, 150):
        given = families.batch(length)
        assert torch.equal(offloaded.generate(**given, **plain), resident.generate(**given, **plain))
    assert len(offloaded.effpass_offload.caches) == 1


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_beside_a_budget_of_the_cache(family: str, evicting: list[int]) -> None:
    """prefix_kv drops tokens and moves others, in host memory as on the device."""
    resident, offloaded = pair(family, None, {"prefix_kv": {"budget": 110, "recent": 8, "sink": 2}})
    given = families.batch(LENGTH)
    got = generate(offloaded, given, 80)
    assert_same(got, generate(resident, given, 80))
    kept = [got.past_key_values.buffers(i).slots.length for i in range(2)]
    assert sum(kept) < 2 * (110 + 64) < 2 * LENGTH + 2 * 79
    assert evicting[0] > 100


def test_beside_absorbed_latents_nothing_is_expanded() -> None:
    resident, offloaded = pair("deepseek_v3", None, "mla_absorption")
    given = families.batch(LENGTH)
    got = generate(offloaded, given)
    assert_same(got, generate(resident, given))
    of_blocks = [pool.host.shape for pool in got.past_key_values.pools()]
    assert of_blocks == [(2, 1, 16, 16, 24)] * 2  # one head of 16 + 8 numbers


def test_copies_of_a_model_have_their_own_caches() -> None:
    _, offloaded = pair("llama")
    given = families.batch(LENGTH)
    twin = copy.deepcopy(offloaded)
    assert_same(generate(offloaded, given), generate(twin, given))
    assert twin.effpass_offload.memory is offloaded.effpass_offload.memory
    (cache,) = twin.effpass_offload.caches
    assert twin.effpass_offload.memory.used == 2 * sum(pool.host.nbytes for pool in cache.pools())


@pytest.mark.parametrize(("family", "pipelined"), [("llama", False), ("qwen3", True), ("deepseek_v3", False)])
def test_a_recorded_step_is_a_step(family: str, pipelined: bool) -> None:
    """Compiled whole, as for a CUDA graph, where the host's numbers say nothing."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    _, model = pair(family, pipelined=pipelined)
    given = families.batch(123)
    with torch.no_grad(), reading_cache(model):
        ours, plain = (Session(model, 4, 192, backend) for _ in range(2))
        for session in (ours, plain):
            session.begin(2)
            session.prefill(given["input_ids"], given["attention_mask"].bool(), 50)
        compiled = ours._compile()
        for _ in range(20):  # over a border of blocks
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
    called = [str(n.target) for n in graphs[0].graph.nodes if n.op == "call_function"]
    for name in ("page_write", "two_level_attention", "fetch_blocks"):
        assert sum(name in target for target in called) == model.config.num_hidden_layers
    assert not any("effpass.cache_write" in target for target in called)


# -- counters ---------------------------------------------------------------------------------------------------------


def test_counters_of_a_pool_that_holds_everything() -> None:
    """Each block is missing once: when it is first read."""
    _, offloaded = pair("llama", {"pool": 20, "prefetch": 20})
    generate(offloaded, families.batch(LENGTH))
    found = counters(offloaded)
    (cache,) = offloaded.effpass_offload.caches
    held = sum(int((pool.block_table >= 0).sum()) for pool in cache.pools())
    steps, layers, rows, groups = NEW - 1, 2, 2, 2
    assert found.tokens == 32 * steps * layers * rows * groups
    assert found.copied == held
    assert found.copied_bytes == held * 16 * 32 * 4  # 16 slots of a key and a value of 16 numbers each
    assert found.read_bytes == found.missing_tokens * 32 * 4
    assert found.missing_blocks <= held
    assert found.hit_rate > 0.9
    assert found.token_hit_rate == 1 - found.missing_tokens / found.tokens
    assert found.waited == 0


def test_a_larger_pool_misses_less_and_without_copies_everything_comes_through_the_bus() -> None:
    rates = []
    for pool, prefetch in ((5, 16), (9, 16), (9, 0)):
        _, offloaded = pair("llama", {"pool": pool, "prefetch": prefetch})
        generate(offloaded, families.batch(LENGTH))
        rates.append(counters(offloaded).token_hit_rate)
    assert rates[0] < rates[1]
    assert rates[2] < 0.3  # but for blocks of the answer


# -- what is refused, and what fails ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (["kv_offload"], "kv_offload needs sparse_attention before it in the recipe"),
        (["kv_offload", {"sparse_attention": SPARSE}], "kv_offload needs sparse_attention before it"),
        (
            [{"sparse_attention": {**SPARSE, "levels": "tokens"}}, "kv_offload"],
            "sparse_attention with levels: tokens chooses none",
        ),
        ([{"sparse_attention": SPARSE}, {"kv_offload": {"pool": 4}}], "pool: 4 blocks, and a step wants 5"),
    ],
)
def test_what_has_no_place_beside_it_is_refused(passes: list[Any], message: str) -> None:
    model = families.make("llama")
    with pytest.raises(PassRefusedError, match=message):
        effpass.prepare(model, {"version": 1, "passes": passes})
    assert not hasattr(model, "effpass_reader")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 1}, "pool: got 1, expected blocks"),
        ({"prefetch": -1}, "prefetch: got -1"),
        ({"host_memory": "much"}, "host_memory: got 'much', expected bytes such as '512 MiB'"),
    ],
)
def test_bad_options_are_refused_in_the_recipe(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EffpassError, match=message):
        pair("llama", options)


def test_keys_of_another_type_are_refused() -> None:
    with pytest.raises(PassRefusedError, match="prefix_kv stores keys as int8"):
        pair("llama", None, {"prefix_kv": {"budget": 120, "kv_cache_dtype": "int8"}})
    _, model = pair("llama")
    effpass.prepare(model, {"version": 1, "passes": [{"prefix_kv": {"budget": 120, "kv_cache_dtype": "int8"}}]})
    with pytest.raises(EffpassError, match="kv_cache_dtype: int8 in prefix_kv, and kv_offload holds keys"):
        generate(model, families.batch(LENGTH))


def test_layers_that_slide_stay_on_the_device() -> None:
    _, model = pair("gemma3")
    (refusal,) = model.effpass_report.passes[-1].refusals
    assert refusal.reason == "it sees 8 positions only, and stays on the device"
    generate(model, families.batch(LENGTH), 2)
    (cache,) = model.effpass_offload.caches
    assert [layer.pool is None for layer in cache.layers] == [True, False]


def test_a_limit_of_host_memory_is_checked_before_anything_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, model = pair("llama", {"pool": 5, "host_memory": "256 KB"})
    taken: list[Any] = []
    take = host_memory.HostMemory.take
    monkeypatch.setattr(host_memory.HostMemory, "take", lambda self, *a: (taken.append(a), take(self, *a))[1])
    # 2 rows of 256 slots, 2 layers of 2 heads, a key and a value of 16 float32.
    with pytest.raises(HostMemoryError, match=r"other caches, and the limit is 0\.00 GB\n  → raise host_memory"):
        generate(model, families.batch(LENGTH))
    assert not taken
    given = {name: x[:1] for name, x in families.batch(LENGTH).items()}
    assert_same(generate(model, given), generate(resident, given))  # one row fits
    assert model.effpass_offload.memory.used == 256 * 2 * 2 * 32 * 4


def test_a_host_without_room_is_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = pair("llama")
    monkeypatch.setattr(host_memory, "available_memory", lambda: 280_000)
    with pytest.raises(HostMemoryError, match=r"0\.00 GB are available\n  → lower the batch"):
        generate(model, families.batch(LENGTH))
    assert model.effpass_offload.memory.used == 0


def test_memory_that_can_not_be_pinned_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second layer's: the first one's is freed, and a later call begins anew."""
    resident, model = pair("llama")
    take, calls = host_memory.HostMemory.take, []

    def fail(self: Any, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise HostMemoryError("CUDA can't pin 1.00 GB of host memory (error 2)")
        return take(self, *args)

    monkeypatch.setattr(host_memory.HostMemory, "take", fail)
    given = families.batch(LENGTH)
    with pytest.raises(HostMemoryError, match="can't pin"):
        generate(model, given)
    gc.collect()
    assert model.effpass_offload.memory.used == 0
    assert_same(generate(model, given), generate(resident, given))


def test_pinning_fails_with_the_error_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_memory, "_register", lambda flat, device: 2)
    memory = host_memory.HostMemory()
    with pytest.raises(HostMemoryError, match=r"can't pin 0\.00 GB of host memory \(error 2\)\n  → .*ulimit -l"):
        memory.take((4, 4), torch.float32, torch.device("cuda"))
    assert memory.used == 0


class _Stop(Exception):
    pass


@pytest.mark.parametrize("when", ["prompt", "answer"])
def test_a_cancelled_request_leaves_the_next_one_right(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resident, model = pair("llama")
    given = families.batch(LENGTH)
    plain = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(**families.batch(130), **plain)
    used = model.effpass_offload.memory.used

    class Cancel:
        tokens = 0

        def put(self, value: torch.Tensor) -> None:
            self.tokens += 1
            if self.tokens == 9:
                raise _Stop

        def end(self) -> None:
            pass

    if when == "answer":
        with pytest.raises(_Stop):
            model.generate(**given, **plain, streamer=Cancel())
    else:
        broken = model.model.layers[1].mlp
        handle = broken.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(_Stop()))
        with pytest.raises(_Stop):
            model.generate(**given, **plain)
        handle.remove()
    assert torch.equal(model.generate(**given, **plain), resident.generate(**given, **plain))
    assert model.effpass_offload.memory.used == used
    model.effpass_engine.release()
    assert model.effpass_offload.memory.used == 0


def test_counters_need_the_pass() -> None:
    with pytest.raises(ModelError, match="no cache is in host memory"):
        counters(prepared("llama", {"sparse_attention": SPARSE}))


# -- for long ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [200, pytest.param(6000, marks=pytest.mark.slow)])
def test_soak(steps: int) -> None:
    """Prompts of any length, turns, crops and thousands of steps in one session: always the same bits."""
    resident, offloaded = pair("llama", {"pool": 6, "prefetch": 2})
    generator = torch.Generator().manual_seed(steps)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    done = 0
    with torch.no_grad(), reading_cache(resident), reading_cache(offloaded):
        sessions = [Session(model, 3, 256, None) for model in (resident, offloaded)]
        while done < steps:
            rows, length = draw(1, 4), draw(2, 160)
            ids = torch.randint(3, 96, (rows, length), generator=generator)
            is_token = torch.arange(length) >= torch.randint(0, length, (rows, 1), generator=generator)
            for session in sessions:
                session.begin(rows)
                session.prefill(ids, is_token, draw(30, 31))
            for _ in range(draw(1, 3)):
                for _ in range(min(draw(5, 60), 250 - sessions[0].length)):
                    token = sessions[0].logits[:rows].argmax(-1, keepdim=True)
                    for session in sessions:
                        session.tokens[:rows] = token
                        session.step()
                    done += 1
                    assert torch.equal(sessions[0].logits[:rows], sessions[1].logits[:rows])
                back = draw(0, 4)
                for session in sessions:
                    session.crop(session.length - back)
                more = torch.randint(3, 96, (rows, draw(1, 8)), generator=generator)
                if sessions[0].length + more.shape[1] < 200:
                    for session in sessions:
                        session.prefill(more, None, 30)
    assert sessions[1].cache.pools()[0].counts[..., 3].sum() > steps / 10
