"""The cost model of expert kernels: what it says at known sizes, what it finds in timings, and what is kept of that."""

from __future__ import annotations

import itertools
import json
import logging
from dataclasses import asdict, replace

import pytest
import torch

from effpass.core.errors import EffpassError
from effpass.lowering.ops import moe_ffn_choice as choice
from effpass.lowering.ops import moe_ffn_cost as cost
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
    # 64 tiles across in the first product, 32 in the second: (1 + ½) · 64 tiles are two waves, and so on.
    waves = [
        (4 * 128 * 128 * 2 + 2 * 128 * 256 * 1) * 8192 * 64 / 1e15,
        (3 * 4 * 128 * 128 + 2 * 2 * 128 * 256) * 8192 * 64 / 1e15,
    ]
    assert tiles[0][1] == pytest.approx(waves[0], rel=1e-6)
    assert tiles[1][1] == pytest.approx(waves[1], rel=1e-6)
    assert predict("grouped128", 1, shape, constants, 64) == pytest.approx(
        predict("grouped128", 64, shape, constants, 64)  # both fill one tile
    )


def test_the_library_computes_pairs_of_tiles():
    """One expert, so that its rows are certain: pairs of tiles of 128 rows, also where the second has none."""
    shape, constants = Shape(1, 1, 8192, 8192), replace(PERFECT, bandwidth=1e18)

    def waves(first: int, second: int) -> float:
        return (first * 4 * 128 * 128 + second * 2 * 128 * 256) * 8192 * 64 / 1e15

    # 64 tiles across in the first product, 32 in the second, on 64 multiprocessors.
    for rows, first, second in ((256, 2, 1), (512, 4, 2), (257, 4, 2), (384, 4, 2)):
        assert predict("library", rows, shape, constants, 64) == pytest.approx(waves(first, second), rel=1e-6)
    # Up to 128 rows in the mean, tiles have 64 rows and 64 (of gate and of up each) or 128 columns.
    small = (2 * 2 * 4 * 64 * 64 + 2 * 2 * 64 * 128) * 8192 * 64 / 1e15
    assert predict("library", 128, shape, constants, 64) == pytest.approx(small, rel=1e-6)


@pytest.mark.parametrize("rows", [16, 128, 256])
@pytest.mark.parametrize("mean", [3.0, 100.0, 256.0, 307.2, 4000.0])
def test_tiles_of_an_expert_are_those_of_a_binomial_distribution(mean, rows):
    tokens, share = 8192, mean / 8192
    variance = mean * (1 - share)
    drawn = torch.distributions.Binomial(tokens, torch.tensor(share, dtype=torch.float64)).sample((20000,))
    expected = float((drawn / rows).ceil().clamp(min=1).mean())
    assert cost._tiles_of_an_expert(mean, variance, rows, 0) == pytest.approx(expected, rel=0.02)
    assert cost._tiles_of_an_expert(mean, 0.0, rows, 0) == max(1, -(-mean // rows))
    expected = float(((drawn / rows).ceil() * (drawn > 96)).mean())
    assert cost._tiles_of_an_expert(mean, variance, rows, 96) == pytest.approx(expected, rel=0.02, abs=1e-6)
    assert cost._tiles_of_an_expert(mean, 0.0, rows, 96) == (-(-mean // rows) if mean > 96 else 0)


def test_passes_of_the_library_are_not_hidden_by_computation():
    """Gather reads and writes D per pair, the gate 3F, the weighted sum D per pair and per token."""
    shape, slow = Shape(2, 2, 64, 128), replace(PERFECT, rate=1e9)
    tokens, faster = 4096, replace(slow, bandwidth=6e12)
    passes = (2 * tokens * (2 * 64 + 3 * 128 + 64) + tokens * 64) * 2
    saved = predict("library", tokens, shape, slow, 132) - predict("library", tokens, shape, faster, 132)
    assert saved == pytest.approx(passes / 3e12 - passes / 6e12, rel=1e-3)


def test_the_library_is_for_whole_pairs_of_tiles():
    """Chosen between it and single tiles of 128 rows; both with the rates that each has on an H200."""
    constants = Constants(start=4e-5, call=4e-8, bandwidth=3.6e12, rate=6.2e14)
    kernels = {"grouped128": constants, "library": replace(constants, rate=7.6e14)}
    fitted = Fit("a GPU", "bfloat16", "", 132, kernels)
    deepseek = Shape(6, 160, 5120, 1536)
    assert best(8192, deepseek, fitted, kernels) == "grouped128"  # 307 rows: a second pair, mostly empty
    assert best(4096, MIXTRAL, fitted, kernels) == "library"  # 1024 rows, and little to gather for its width


def test_mixed_kernels_compute_few_and_many_rows_in_turn():
    """Two experts with the same rows for certain: low tiles alone, or high ones; of eight experts, some take either."""
    shape, constants = Shape(2, 2, 4096, 4096), Constants(start=1e-12, call=1e-15, bandwidth=1e18, rate=1e14)
    low, high = (6 * 4096**2 * rows * 2 / 64 * 64 / constants.rate for rows in (32, 64))
    assert predict("mixed64", 20, shape, constants, 64) == pytest.approx(low, rel=1e-3)
    assert predict("mixed64", 40, shape, constants, 64) == pytest.approx(high, rel=1e-3)
    assert predict("mixed64", 70, shape, constants, 64) == pytest.approx(2 * high, rel=1e-3)
    several = [predict("mixed64", 4 * n, Shape(2, 8, 4096, 4096), constants, 64) / 4 for n in (10, 32, 48)]
    assert several[0] == pytest.approx(low, rel=0.01)
    assert low < several[1] < high
    assert several[2] == pytest.approx(high, rel=0.01)


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
    timings = {"rows": [(4, QWEN, 3e-5)]}
    fitted = Fit("a GPU", "bfloat16", torch.__version__, 7, kernels, timings)
    file = choice.keep(fitted)
    assert file is not None
    assert file.parent.parent == cache
    assert json.loads(file.read_text())["timings"] == {"rows": [[4, asdict(QWEN), 3e-5]]}
    assert choice.fitted(torch.device("cpu"), torch.bfloat16) == fitted
    served = choice.serving(torch.device("cpu"), torch.bfloat16)
    assert served == f"kernels are chosen by constants fitted to a GPU in bfloat16 ({file})"
    choice.fitted.cache_clear()
    file.write_text(json.dumps({**json.loads(file.read_text()), "multiprocessors": "seven"}))
    assert choice.fitted(torch.device("cpu"), torch.bfloat16) is choice.DEFAULT
    served = choice.serving(torch.device("cpu"), torch.bfloat16)
    assert served.startswith("kernels are chosen by the shipped constants of NVIDIA H100 80GB HBM3 in bfloat16;")
    assert served.endswith("; `effpass calibrate moe` fits a GPU in bfloat16")


def test_the_command_needs_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from effpass.cli.calibrate_moe import moe

    with pytest.raises(EffpassError, match="no CUDA device"):
        moe()
    with pytest.raises(EffpassError, match="did you mean 'bfloat16'"):
        moe(dtype="bfloat")
