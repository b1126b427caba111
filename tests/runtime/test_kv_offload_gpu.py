"""Host memory that a GPU sees, and offloaded caches in recorded decode steps."""

from __future__ import annotations

import gc
from typing import Any

import families
import pytest
import torch

import effpass
from effpass.lowering.ops.block_pool import BlockPool, join, side_stream
from effpass.passes.runtime.kv_offload import counters
from effpass.runtime import host_memory
from effpass.runtime.attention import reading_cache
from effpass.runtime.host_memory import HostMemory
from effpass.runtime.kv_offload import OffloadedCache
from effpass.runtime.session import Session

pytestmark = pytest.mark.gpu
SIZES = {
    "llama": {"head_dim": 32},
    "qwen3": {"head_dim": 64},
    "deepseek_v3": {"kv_lora_rank": 64, "qk_rope_head_dim": 32},
}
SPARSE = {"tokens": 32, "blocks": 4, "block": 16, "recent": 1, "dense_below": 1}
LENGTH, NEW = 170, 40


def prepared(family: str, *passes: Any) -> Any:
    return effpass.prepare(families.make(family, **SIZES[family]).cuda(), {"version": 1, "passes": list(passes)})


def generate(model: Any, length: int = LENGTH, new: int = NEW, **more: Any) -> Any:
    given = families.batch(length)
    return model.generate(
        input_ids=given["input_ids"].cuda(), attention_mask=given["attention_mask"].cuda(), max_new_tokens=new,
        do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


def assert_same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    for ours, theirs in zip(got.logits, expected.logits, strict=True):
        assert torch.equal(ours, theirs)


# -- host memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_sides_see_the_same_memory(dtype: torch.dtype) -> None:
    memory = HostMemory()
    slab = memory.take((3, 4, 64, 256), dtype, torch.device("cuda", 0))
    assert slab.seen.is_cuda
    assert slab.tensor.is_pinned()
    assert slab.seen.data_ptr() == slab.tensor.data_ptr()
    slab.tensor[1, 2] = 5
    assert float(slab.seen[1, 2].sum()) == 5 * 64 * 256
    slab.seen[0, 1, 3:7, :100] = 2  # a kernel that writes through the bus
    torch.cuda.synchronize()
    assert float(slab.tensor.float().sum()) == 5 * 64 * 256 + 2 * 400
    assert memory.used == slab.tensor.nbytes
    del slab
    assert memory.used == 0


def test_memory_that_can_not_be_pinned_leaves_no_error_behind() -> None:
    flat, device = torch.zeros(1 << 20, dtype=torch.uint8), torch.device("cuda", 0)
    assert host_memory._register(flat, device) == 0
    assert host_memory._register(flat, device) != 0  # it is already
    assert float(torch.ones(8, device=device).sum()) == 8
    host_memory._unregister(flat, device)
    assert not flat.is_pinned()


@pytest.mark.parametrize(("key_size", "value_size"), [(128, 128), (512, 64)])
def test_blocks_are_copied_through_the_bus(key_size: int, value_size: int) -> None:
    from effpass.lowering.kernels.block_pool import copy_blocks

    memory, device, blocks, width = HostMemory(), torch.device("cuda", 0), 200, key_size + value_size
    slab = memory.take((2, 3, blocks, 64, width), torch.bfloat16, device)
    slab.tensor.copy_(torch.randn(slab.tensor.shape, dtype=torch.bfloat16))
    pool = BlockPool.empty(slab.seen, 100, 60, 60)
    pool.pages.fill_(torch.nan)
    chosen = torch.stack([torch.randperm(blocks)[:61] for _ in range(6)])
    places = torch.stack([torch.randperm(100)[:61] for _ in range(6)]) + 100 * torch.arange(6)[:, None]
    pool.moves.copy_(torch.stack((chosen, places), -1).view(2, 3, 61, 2))
    pool.moved.copy_(torch.tensor([[61, 0, 17], [1, 60, 33]]))
    copy_blocks(slab.seen, pool.pages, pool.moves, pool.moved)
    torch.cuda.synchronize()
    expected = torch.full(pool.pages.shape, torch.nan, dtype=torch.bfloat16)
    for head, count in enumerate([61, 0, 17, 1, 60, 33]):
        for n, page in zip(chosen[head, :count].tolist(), places[head, :count].tolist(), strict=True):
            expected[page] = slab.tensor[head // 3, head % 3, n]
    assert torch.equal(pool.pages.cpu().view(torch.int16), expected.view(torch.int16))


def test_waiting_for_copies_is_timed() -> None:
    times = torch.zeros(3, dtype=torch.int64, device="cuda")
    side = side_stream(torch.device("cuda", 0))
    for _ in range(3):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)
        join(times)
    torch.cuda.synchronize()
    slept = int(times[2])
    assert int(times[0]) == 0
    assert 3e6 < slept < 3e9  # 60 million cycles of up to 2 GHz
    for _ in range(3):  # the copies are there first
        side.wait_stream(torch.cuda.current_stream())
        torch.cuda._sleep(20_000_000)
        join(times)
    torch.cuda.synchronize()
    assert int(times[2]) - slept < 1e6


# -- decoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize("how", [{}, {"pipelined": True}, {"levels": "blocks", "tokens": 64}])
def test_recorded_steps_are_those_of_keys_on_the_device(family: str, how: dict[str, Any]) -> None:
    options = {"sparse_attention": {**SPARSE, **how}}
    expected = generate(prepared(family, options))
    model = prepared(family, options, {"kv_offload": {"pool": 6, "prefetch": 3}})
    assert_same(generate(model), expected)
    found = counters(model)
    assert 0 < found.missing_tokens < found.tokens
    assert found.copied > 0
    assert found.waited >= 0
    steps, layers, groups = NEW - 1, 2, 1 if family == "deepseek_v3" else 2
    if not how:
        assert found.tokens == 32 * steps * layers * groups * 2  # trial steps are not counted


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_whatever_is_evicted(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between replays, on the device."""
    expected = generate(prepared(family, {"sparse_attention": SPARSE}))
    ready, evicted = OffloadedCache.ready, []

    def evict(cache: OffloadedCache) -> Any:
        for pool in cache.pools():
            owned = pool.owner >= 0
            gone = (torch.rand(pool.owner.shape, device="cuda") < 0.5) & owned
            of_blocks = torch.zeros_like(pool.block_table, dtype=torch.bool)
            b, g, page = gone.nonzero(as_tuple=True)
            of_blocks[b, g, pool.owner[b, g, page].long()] = True
            pool.block_table.masked_fill_(of_blocks, -1)
            pool.pages.view(*pool.owner.shape, *pool.pages.shape[1:])[gone] = torch.nan
            pool.owner.masked_fill_(gone, -1)
            pool.age.masked_fill_(gone, -1)
            evicted.append(int(gone.sum()))
        return ready(cache)

    monkeypatch.setattr(OffloadedCache, "ready", evict)
    model = prepared(family, {"sparse_attention": SPARSE}, {"kv_offload": {"pool": 6}})
    assert_same(generate(model), expected)
    assert sum(evicted) > 100


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_prompts_in_pieces_and_conversations(family: str) -> None:
    results = []
    for offload in ([], [{"kv_offload": {"pool": 6}}]):
        model = prepared(family, {"sparse_attention": SPARSE}, *offload)
        model.effpass_engine.prefill_tokens = 2 * 41
        first = generate(model, new=12, max_length=None)
        given, extra = families.batch(LENGTH), families.batch(9)
        longer = {
            "input_ids": torch.cat((first.sequences, extra["input_ids"].cuda()), 1),
            "attention_mask": torch.cat((given["attention_mask"], torch.ones(2, 21, dtype=torch.long)), 1).cuda(),
        }
        second = model.generate(
            **longer, past_key_values=first.past_key_values, max_new_tokens=12, do_sample=False, eos_token_id=None,
            pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        results.append((first, second))
    for ours, theirs in zip(*results, strict=True):
        for a, b in zip(ours.logits, theirs.logits, strict=True):
            # A prompt attends to other buffers, where a library may choose another kernel.
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_beside_a_budget_of_the_cache() -> None:
    budget = {"prefix_kv": {"budget": 110, "recent": 8, "sink": 2}}
    expected = generate(prepared("llama", budget, {"sparse_attention": SPARSE}), new=80)
    assert_same(generate(prepared("llama", budget, {"sparse_attention": SPARSE}, "kv_offload"), new=80), expected)


def test_memory_goes_with_the_session() -> None:
    model = prepared("llama", {"sparse_attention": SPARSE}, {"kv_offload": {"pool": 6}})
    given = {name: x.cuda() for name, x in families.batch(60).items() if name != "position_ids"}
    model.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert model.effpass_offload.memory.used > 0
    model.effpass_engine.release()
    gc.collect()
    assert model.effpass_offload.memory.used == 0


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_soak(family: str) -> None:
    """2000 steps of one recorded graph, over prompts, crops and evictions: always the same bits."""
    resident = prepared(family, {"sparse_attention": SPARSE})
    offloaded = prepared(family, {"sparse_attention": SPARSE}, {"kv_offload": {"pool": 6, "prefetch": 2}})
    generator = torch.Generator().manual_seed(0)
    differences = torch.zeros((), dtype=torch.int64, device="cuda")
    with torch.no_grad(), reading_cache(resident), reading_cache(offloaded):
        sessions = [Session(m, 2, 256, m.effpass_engine.backend) for m in (resident, offloaded)]
        done = 0
        while done < 2000:
            length = int(torch.randint(20, 160, (1,), generator=generator))
            ids = torch.randint(3, 96, (2, length), generator=generator).cuda()
            for session in sessions:
                session.begin(2)
                session.prefill(ids, None, 1 << 15)
            for _ in range(2):
                for _ in range(40):
                    token = sessions[0].logits.argmax(-1, keepdim=True)
                    for session in sessions:
                        session.tokens.copy_(token)
                        session.step()
                    differences += (sessions[0].logits != sessions[1].logits).sum()
                    done += 1
                for session in sessions:
                    session.crop(session.length - 3)
    assert int(differences) == 0
    assert sum(int(pool.counts[..., 3].sum()) for pool in sessions[1].cache.pools()) > 1000
