"""The cost model of expert kernels: what it says at known sizes, what it finds in timings, and what is kept of that."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import replace

import pytest
import torch

from effpass.core.errors import EffpassError
from effpass.lowering.ops import moe_ffn_choice as choice
from effpass.lowering.ops.moe_ffn_cost import KERNELS, Constants, Fit, Shape, best, fit, predict, seconds, thresholds

QWEN = Shape(8, 128, 2048, 768)
MIXTRAL = Shape(2, 8, 4096, 14336)
PERFECT = Constants(start=1e-12, call=1e-12, bandwidth=3e12, rate=1e15)


def test_one_token_reads_its_experts_once():
    """8 experts of 3 · 2048 · 768 numbers in bfloat16; rows and grouped kernels read the same, but for activations."""
    expected = 8 * 3 * 2048 * 768 * 2 / 3e12
    assert predict("rows", 1, QWEN, PERFECT, 132) == pytest.approx(expected, rel=1e-6)
    assert predict("grouped16", 1, QWEN, PERFECT, 132) == pytest.approx(expected, rel=2e-3)


def test_experts_that_are_met():
    """16 tokens meet 128 · (1 - (1 - 8/128)^16) = 82.4 experts; a kernel that reads by pair reads 128."""
    shared = predict("grouped16", 16, QWEN, PERFECT, 132)
    assert shared / predict("grouped16", 1, QWEN, PERFECT, 132) == pytest.approx(82.42 / 8, rel=1e-3)
    assert predict("rows", 16, QWEN, PERFECT, 132) / shared == pytest.approx(128 / 82.42, rel=3e-3)


def test_waves_and_padding():
    """A compute-bound layer: tiles of 128 rows, and 132 multiprocessors that finish together or do not."""
    shape, constants = Shape(1, 1, 8192, 8192), replace(PERFECT, bandwidth=1e18)
    tiles = [(128 * n, predict("grouped128", 128 * n, shape, constants, 64)) for n in (1, 2, 3)]
    # One expert has all rows. 64 tiles across in the first product are a wave; 32 in the second are half a wave.
    waves = [
        (n * 4 * 128 * 128 + seconds * 2 * 128 * 256) * 8192 * 64 / 1e15 for n, seconds in ((1, 1), (2, 1), (3, 2))
    ]
    assert [t for _, t in tiles] == pytest.approx(waves, rel=1e-6)
    assert predict("grouped128", 1, shape, constants, 64) == pytest.approx(
        predict("grouped128", 64, shape, constants, 64)  # both fill one tile
    )


def test_rows_of_an_expert_are_distributed():
    """The mean of ⌈rows / 128⌉ over random routings, where most experts need one tile more or less than others."""
    torch.manual_seed(0)
    shape, constants = Shape(8, 32, 8192, 8192), replace(PERFECT, bandwidth=1e18)
    for tokens, runs in ((64, 200), (496, 200), (512, 200), (600, 200), (1024, 200), (10000, 10)):
        chosen = torch.rand(runs, tokens, 32).topk(8, dim=-1).indices.reshape(runs, -1)
        rows = torch.zeros(runs, 32).scatter_add_(1, chosen, torch.ones(1).expand_as(chosen))
        tiles = (rows / 128).ceil().sum(-1).mean().item()
        of_one = predict("grouped128", tokens, shape, constants, 1)
        assert of_one * 1e15 / (64 * 4 * 128 * 128 + 32 * 2 * 128 * 256) / 8192 == pytest.approx(tiles, rel=0.02), (
            tokens
        )


def test_the_library_computes_pairs_of_tiles():
    """Two multiprocessors share the tiles of an expert: 129 rows cost as much as 256, and 257 as much as 512."""
    shape, constants = Shape(1, 1, 8192, 8192), replace(PERFECT, bandwidth=1e18)
    times = [predict("library", rows, shape, constants, 2) for rows in (129, 256, 257, 512)]
    assert times[0] == pytest.approx(times[1], rel=1e-6)
    assert times[2] == pytest.approx(times[3], rel=1e-6)
    assert times[2] == pytest.approx(2 * times[0], rel=1e-6)
    small = predict("library", 64, shape, constants, 2)
    assert small == pytest.approx(times[0] / 2, rel=1e-6)  # the smaller tile, twice 64 rows


def test_passes_are_not_hidden_by_computation():
    """What the library gathers, gates and adds up takes its time, however long the products take."""
    slow = replace(PERFECT, rate=1e12, bandwidth=1e18)
    times = [predict("library", 4096, QWEN, replace(slow, bandwidth=b), 132) for b in (1e18, 1e11)]
    pairs, width, inner = 8 * 4096, 2048, 768
    assert times[1] - times[0] >= 2 * (pairs * (3 * width + 3 * inner) + 4096 * width) / 1e11


def test_the_host_queues_while_the_device_computes():
    """One product per expert: whichever of host and device takes longer counts, not their sum."""
    host = replace(PERFECT, call=1e-3)
    of_host = predict("by_expert", 4096, QWEN, host, 132)
    of_device = predict("by_expert", 4096, QWEN, PERFECT, 132)
    assert 128e-3 < of_host < 128e-3 + of_device / 2


#: µs on an H200 (`benchmarks/results/moe.jsonl`), equally likely experts: the library's products, and grouped128.
MEASURED = {
    ("qwen3", 1024): (452, 381), ("qwen3", 8192): (1500, 1429), ("mixtral", 128): (1008, 857),
    ("mixtral", 1024): (1472, 1518), ("mixtral", 8192): (8691, 9345), ("lite", 1024): (398, 348),
    ("lite", 8192): (1663, 1585),
}  # fmt: skip


def test_a_wide_layer_is_predicted_from_others():
    """DeepSeek-V2, 8192 tokens: 307 rows per expert are two pairs of the library's tiles, 1.7 times the work."""
    shapes = {"qwen3": QWEN, "mixtral": MIXTRAL, "lite": Shape(6, 64, 2048, 1408)}
    library, ours = (
        fit(name, [(n, shapes[layer], t[i] * 1e-6) for (layer, n), t in MEASURED.items()], 132,
            choice.DEFAULT.kernels[name])
        for i, name in enumerate(("library", "grouped128"))
    )  # fmt: skip
    layer = Shape(6, 160, 5120, 1536)
    assert predict("library", 8192, layer, library, 132) == pytest.approx(5692e-6, rel=0.1)
    assert predict("grouped128", 8192, layer, ours, 132) == pytest.approx(5004e-6, rel=0.1)
    assert best(8192, layer, Fit("H200", "bfloat16", "", 132, {"library": library, "grouped128": ours}),
                ["library", "grouped128"]) == "grouped128"  # fmt: skip


def test_every_kernel_has_a_model_over_the_same_symbols():
    for name in KERNELS:
        free = {str(symbol) for symbol in seconds(name).free_symbols}
        assert {"T", "k", "E", "D", "F", "bandwidth", "rate", "start", "call"} <= free


def test_thresholds_are_where_the_best_kernel_changes():
    found = thresholds(QWEN, choice.DEFAULT, list(KERNELS))
    assert found[0] == (1, "rows")
    assert [name for _, name in found][-1] in ("grouped128", "library", "by_expert")
    for (_, before), (tokens, after) in itertools.pairwise(found):
        assert best(tokens - 1, QWEN, choice.DEFAULT, KERNELS) == before
        assert best(tokens, QWEN, choice.DEFAULT, KERNELS) == after
    assert {name for _, name in thresholds(QWEN, choice.DEFAULT, ["grouped16"])} == {"grouped16"}


def test_wide_experts_change_to_large_tiles_at_fewer_tokens():
    """The paper's crossover falls as the width of an expert grows: what counts is the work of an expert, not tokens."""

    def first(shape: Shape) -> int:
        return next(tokens for tokens, name in thresholds(shape, choice.DEFAULT, list(KERNELS)) if "128" in name)

    assert first(MIXTRAL) < first(QWEN)


def test_a_fit_finds_the_constants_behind_timings():
    true = Constants(start=9e-6, call=4e-8, bandwidth=2.2e12, rate=3.5e14)
    loads = [(tokens, shape) for shape in (QWEN, MIXTRAL) for tokens in (1, 4, 16, 64, 256, 1024, 4096)]
    timings = [
        (n, s, predict("grouped64", n, s, true, 132) * (1.02 if i % 2 else 0.98)) for i, (n, s) in enumerate(loads)
    ]
    found = fit("grouped64", timings, 132, choice.DEFAULT.kernels["grouped64"])
    assert found.bandwidth == pytest.approx(true.bandwidth, rel=0.03)
    assert found.rate == pytest.approx(true.rate, rel=0.03)
    assert all(predict("grouped64", n, s, found, 132) == pytest.approx(t, rel=0.05) for n, s, t in timings)


@pytest.mark.parametrize("timings", [[(1, QWEN, 1e-5)] * 3, [(1, QWEN, 1e-5)] * 3 + [(1, QWEN, 0.0)]])
def test_a_fit_needs_timings(timings):
    with pytest.raises(EffpassError, match="timings of rows"):
        fit("rows", timings, 132, PERFECT)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path))
    choice.fitted.cache_clear()
    choice._chosen.cache_clear()
    yield tmp_path
    choice.fitted.cache_clear()
    choice._chosen.cache_clear()


def test_a_device_that_nobody_fitted_says_so_once(cache, caplog):
    with caplog.at_level(logging.WARNING, "effpass"):
        for _ in range(2):
            assert choice.fitted(torch.device("cpu"), torch.float32) is choice.DEFAULT
    assert len(caplog.records) == 1
    assert "chosen by what was fitted to NVIDIA H100 80GB HBM3 in bfloat16" in caplog.text
    assert "`effpass calibrate moe`" in caplog.text


def test_what_was_fitted_is_kept(cache, monkeypatch):
    monkeypatch.setattr(choice, "device_name", lambda device: "a GPU")
    kernels = {name: replace(PERFECT, rate=1e13 * (i + 1)) for i, name in enumerate(KERNELS)}
    fitted = Fit("a GPU", "bfloat16", torch.__version__, 7, kernels)
    file = choice.keep(fitted)
    assert file is not None
    assert file.parent.parent == cache
    assert choice.fitted(torch.device("cpu"), torch.bfloat16) == fitted
    choice.fitted.cache_clear()
    file.write_text(json.dumps({**json.loads(file.read_text()), "multiprocessors": "seven"}))
    assert choice.fitted(torch.device("cpu"), torch.bfloat16) is choice.DEFAULT


def test_the_command_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from effpass.cli.calibrate_moe import moe

    with pytest.raises(EffpassError, match="no CUDA device"):
        moe()
    with pytest.raises(EffpassError, match="did you mean 'bfloat16'"):
        moe(dtype="bfloat")
