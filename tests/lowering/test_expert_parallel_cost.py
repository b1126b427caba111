"""How long layers on several ranks should take: at known sizes, event by event, and what follows for stages."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from effpass.core.errors import EffpassError
from effpass.lowering.ops import expert_parallel_choice as choice
from effpass.lowering.ops.expert_parallel_cost import (
    STAGE_KERNELS,
    Link,
    best_kernel,
    best_stages,
    divisors,
    exchange,
    predict,
    seconds,
)
from effpass.lowering.ops.expert_parallel_exchange import Ranks
from effpass.lowering.ops.expert_parallel_fit import measure_link
from effpass.lowering.ops.expert_parallel_simulator import random_counts, simulate
from effpass.lowering.ops.moe_ffn_choice import DEFAULT
from effpass.lowering.ops.moe_ffn_cost import Shape

QWEN = Shape(8, 128, 2048, 768)
DEEPSEEK = Shape(6, 160, 5120, 1536)
LINK = Link(start=20e-6, rate=300e9, around=250e-6, stage=50e-6, sharing=1.1)
NOTHING = Link(start=1e-12, rate=1e18, around=1e-12, stage=1e-12, sharing=1.0)


def test_without_a_link_the_experts_are_what_counts():
    pairs, met = 4096 * 8, 32 * (1 - (1 - 8 / 128) ** (4096 * 4))
    experts = best_kernel(pairs, met, QWEN, DEFAULT, STAGE_KERNELS)[1]
    assert predict(4096, QWEN, 4, 1, NOTHING, DEFAULT) == pytest.approx(experts)


def test_one_stage_is_one_after_the_other():
    """A token of 8 experts goes to 4 · (1 - ¾⁸) ranks, three of four of them others."""
    rows = 4096 * 3 * (1 - 0.75**8)
    experts = predict(4096, QWEN, 4, 1, NOTHING, DEFAULT)
    expected = LINK.around + 2 * exchange(rows, QWEN, LINK) + experts
    assert predict(4096, QWEN, 4, 1, LINK, DEFAULT) == pytest.approx(expected)


def test_two_stages_hide_what_is_not_at_an_end():
    """Only the first stage's rows, tokens with an expert among 1/8 of all, and the last stage's sums are waited for."""
    ends = exchange(4096 * 3 * (1 - (7 / 8) ** 8), QWEN, LINK)
    alone = replace(LINK, sharing=1.0)
    experts = predict(4096, QWEN, 4, 2, NOTHING, DEFAULT)
    expected = LINK.around + 2 * ends + experts
    assert predict(4096, QWEN, 4, 2, alone, DEFAULT) == pytest.approx(expected)
    assert predict(4096, QWEN, 4, 2, LINK, DEFAULT) > expected  # and the experts are slower meanwhile


def test_a_slow_link_and_a_slow_host_hold_everything_up():
    slow = replace(LINK, rate=3e9, sharing=1.0)
    every = 2 * (4 * slow.start + 4096 * 3 * (1 - 0.75**8) * 4096 / slow.rate)
    experts = predict(4096, QWEN, 4, 4, NOTHING, DEFAULT)
    assert predict(4096, QWEN, 4, 4, slow, DEFAULT) == pytest.approx(LINK.around + every + experts / 4)
    assert predict(64, QWEN, 4, 8, LINK, DEFAULT) == pytest.approx(LINK.around + 8 * LINK.stage)


def test_the_model_is_over_its_symbols():
    for replicated in (False, True):
        free = {str(symbol) for symbol in seconds(replicated).free_symbols}
        assert free == {"T", "k", "W", "N", "D", "b", "C", "start", "rate", "around", "stage", "sharing"}


@pytest.mark.parametrize("replicated", [False, True])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("shape", [QWEN, DEEPSEEK])
def test_event_by_event_it_is_the_same(shape, ranks, replicated):
    """Where experts are alike. The rest is that the fullest rank has a tile more than the mean one, which counts under
    memory too: 15 % at most."""
    for tokens in (1024, 4096):
        counts = random_counts(tokens, shape, ranks)
        for stages in (n for n in divisors(shape.experts // ranks) if n <= 8):
            of = (shape, stages, LINK, DEFAULT)
            simulated = simulate(counts, *of, replicated=replicated)
            every = tokens * (ranks if replicated else 1)
            expected = predict(every, shape, ranks, stages, LINK, DEFAULT, replicated=replicated)
            assert simulated.seconds == pytest.approx(expected, rel=0.16)


def test_a_timeline():
    """Durations that are known: two ranks, one of which has all the work, three stages."""
    shape = Shape(1, 6, 1024, 512)
    counts = torch.zeros(2, 3, 2, 3).long().numpy()
    counts[0, :, 1] = [[1000, 1000, 1000]] * 3  # rank 0 sends a thousand tokens to each expert of rank 1
    link = Link(start=1e-3, rate=1e18, around=5e-3, stage=1e-9, sharing=2.0)
    work = best_kernel(1000, 1, shape, DEFAULT, STAGE_KERNELS)[1]
    assert work < 1e-3
    found = simulate(counts, shape, 3, link, DEFAULT)
    at = {(e.what, e.stage, e.rank): (e.begin, e.end) for e in found.events}
    order = [(e.what, e.stage) for e in found.events if e.rank < 0]
    assert order == [("dispatch", 0), ("dispatch", 1), ("combine", 0), ("dispatch", 2), ("combine", 1), ("combine", 2)]
    assert at["experts", 0, 1] == pytest.approx((1e-3, 1e-3 + 2 * work))  # the next rows are on the link all the while
    assert at["experts", 0, 0] == pytest.approx((1e-3, 1e-3))
    assert at["combine", 0, -1] == pytest.approx((2e-3, 3e-3))
    assert at["experts", 2, 1] == pytest.approx((4e-3, 4e-3 + 2 * work))
    assert found.seconds == pytest.approx(5e-3 + 6e-3)
    assert found.hidden == 0.0  # rank 0 has nothing to compute meanwhile


def test_skewed_routing_is_simulated_with_the_fullest_rank():
    even, skewed = (simulate(random_counts(2048, QWEN, 4, skew=s), QWEN, 2, LINK, DEFAULT).seconds for s in (0, 1))
    assert skewed > 1.1 * even


@pytest.mark.parametrize("ranks", [2, 8])
def test_few_tokens_have_one_stage_and_many_have_more_where_the_link_is_slow(ranks):
    slow = replace(LINK, rate=50e9)
    assert best_stages(64, DEEPSEEK, ranks, slow, DEFAULT) == 1
    many = best_stages(8192, DEEPSEEK, ranks, slow, DEFAULT)
    assert 1 < many < 160 // ranks
    taken = {n: predict(8192, DEEPSEEK, ranks, n, slow, DEFAULT) for n in divisors(160 // ranks)}
    assert taken[many] == min(taken.values())


def test_few_replicated_tokens_have_no_stages():
    assert best_stages(16, QWEN, 8, LINK, DEFAULT, replicated=True) == 0
    assert best_stages(8 * 8192, QWEN, 8, replace(LINK, rate=100e9), DEFAULT, replicated=True) > 1


# -- what is known of the link ----------------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path))
    return tmp_path


def test_what_was_measured_is_kept(cache, caplog):
    device = torch.device("cpu")
    file = choice.keep_link(LINK, device, 4)
    assert file is not None
    assert file.parent.parent == cache
    assert choice._read(choice._file(device, 4)) == LINK
    assert choice._read(choice._file(device, 2)) is None
    for broken in ("", "{}", file.read_text().replace("1.1", "-1"), file.read_text().replace("1.1", '"fast"')):
        file.write_text(broken)
        assert choice._read(file) is None
    with caplog.at_level(logging.WARNING, "effpass"):
        cache.joinpath("experts").rename(cache / "other")
        cache.joinpath("experts").touch()
        assert choice.keep_link(LINK, device, 4) is None
    assert "can't be kept" in caplog.text


def test_a_cpu_has_one_stage():
    ranks = Ranks(None, "none", 4, 0)
    assert choice.stages_of(8192, QWEN, ranks, False, torch.device("cpu"), torch.bfloat16) == 1


def test_a_stage_is_computed_by_the_kernel_for_its_load():
    loads = {n: choice.kernel_of(n, 32, QWEN, torch.device("cpu"), torch.float32, STAGE_KERNELS) for n in (40, 20000)}
    assert loads[40] == "grouped16"
    assert loads[20000] in ("grouped128", "library", "by_expert")


@pytest.mark.parametrize(("device", "size"), [("cpu", 4), ("cuda", 1)])
def test_a_link_is_between_gpus(device, size):
    with pytest.raises(EffpassError, match="there is no link to measure"):
        measure_link(Ranks(None, "none", size, 0), torch.device(device), torch.bfloat16)


def test_the_command_keeps_what_it_measured_between_ranks(cache, monkeypatch, capsys):
    """Of a group of four that is there in name alone."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from effpass.cli.calibrate_moe import _link
    from effpass.lowering.ops import expert_parallel_fit as fit

    slow, device = replace(LINK, rate=100e9), torch.device("cpu")
    monkeypatch.setattr(fit, "measure_link", lambda ranks, device, dtype: slow)
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        _link(device, torch.bfloat16)
    finally:
        dist.destroy_process_group()
    assert choice._read(choice._file(device, 4)) == slow
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("DeepSeek-V2, stages on 4 ranks: from 64 tokens a rank 1, from ")
    assert len([line for line in lines if "stages on 4 ranks" in line]) == 4
