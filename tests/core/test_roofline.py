"""The roofline: its equation, what is measured, and the file that keeps it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from effpass.core import roofline
from effpass.core.errors import EffpassError
from effpass.core.kernels import Kernel
from effpass.core.roofline import Ceilings, bound, ceilings, known, measure, predict

AT = Ceilings(
    "a device", "float32", torch.__version__, peak=1e12, attention_peak=1e11, bandwidth=1e10, matvec_bandwidth=5e9,
    latency={"matmul": 1e-6, "attention": 2e-6, "fused": 3e-6, "other": 4e-6},
)  # fmt: skip


def kernel(kind: str, flops: int = 0, weights: int = 0, cache: int = 0, read: int = 0, written: int = 0) -> Kernel:
    return Kernel(kind, (), flops, weights, cache, read, written)


@pytest.mark.parametrize(
    ("made", "seconds"),
    [
        (kernel("matmul", flops=2_000_000_000), 1e-6 + 2e-3),  # at peak
        (kernel("matmul", flops=10, weights=5_000_000), 1e-6 + 1e-3),  # reads as a matrix-vector product
        (kernel("attention", flops=100_000_000, cache=10), 2e-6 + 1e-3),
        (kernel("fused", read=6_000_000, written=4_000_000), 3e-6 + 1e-3),
        (kernel("other"), 4e-6),
    ],
)
def test_the_equation(made, seconds):
    assert predict(made, AT) == pytest.approx(seconds, rel=1e-12)


def test_the_bound_counts_no_latency_and_no_activations():
    made = [kernel("matmul", flops=10**9, weights=10**7, read=10**9), kernel("attention", cache=10**7, written=10**9)]
    assert bound(made, AT) == pytest.approx(2e-3)
    assert bound([kernel("matmul", flops=10**10), kernel("attention", flops=10**9)], AT) == pytest.approx(2e-2)


def test_measured_on_this_cpu():
    found = measure("cpu", torch.float32)
    assert found.dtype == "float32"
    assert found.torch == torch.__version__
    # Between a toy and a supercomputer: wrong units or a forgotten factor fall outside.
    for rate, low, high in (
        (found.peak, 1e9, 1e14),
        (found.attention_peak, 1e8, 1e14),
        (found.bandwidth, 1e8, 1e13),
        (found.matvec_bandwidth, 1e8, 1e13),
    ):
        assert low < rate < high
    assert set(found.latency) == {"matmul", "attention", "fused", "other"}
    assert all(1e-8 < seconds < 1e-2 for seconds in found.latency.values())


def test_a_device_that_cannot_be_measured_is_refused():
    with pytest.raises(EffpassError, match="a meta device can't be measured"):
        measure("meta", torch.float32)


def test_known_devices():
    assert known("h100").device.startswith("NVIDIA H100")
    with pytest.raises(EffpassError, match=r"no ceilings are known for 'h10', did you mean 'h100'\?"):
        known("h10")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[torch.dtype]:
    """Ceilings at once, in a cache of their own; what was measured."""
    done: list[torch.dtype] = []

    def fake(device: torch.device, dtype: torch.dtype) -> Ceilings:
        done.append(dtype)
        name = str(dtype).removeprefix("torch.")
        return Ceilings(roofline.device_name(device), name, torch.__version__, 1.0, 2.0, 3.0, 4.0, AT.latency)

    monkeypatch.setattr(roofline, "measure", fake)
    monkeypatch.setattr(roofline, "cache_dir", lambda: tmp_path / "cache")
    return done


def test_ceilings_are_measured_once_per_dtype_and_thread_count(measured, tmp_path):
    first = ceilings("cpu", torch.float32)
    assert ceilings("cpu", torch.float32) == first
    assert measured == [torch.float32]
    ceilings("cpu", torch.bfloat16)
    torch.set_num_threads(2)
    ceilings("cpu", torch.float32)
    assert measured == [torch.float32, torch.bfloat16, torch.float32]
    files = sorted((tmp_path / "cache" / "ceilings").iterdir())
    assert len(files) == 3
    assert all(f.suffix == ".json" and not f.name.startswith(".") for f in files)


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _lacking(text: str) -> str:
    return json.dumps({k: v for k, v in json.loads(text).items() if k != "peak"})


def _negative(text: str) -> str:
    return json.dumps({**json.loads(text), "bandwidth": -1})


def _other_version(text: str) -> str:
    return json.dumps({**json.loads(text), "torch": "0.1"})


def _no_latency(text: str) -> str:
    return json.dumps({**json.loads(text), "latency": []})


@pytest.mark.parametrize("spoil", [_cut, _lacking, _negative, _other_version, _no_latency, lambda text: ""])
def test_a_spoilt_file_is_measured_again(measured, tmp_path, spoil):
    good = ceilings("cpu", torch.float32)
    (file,) = (tmp_path / "cache" / "ceilings").iterdir()
    whole = file.read_text()
    file.write_text(spoil(whole))
    assert ceilings("cpu", torch.float32) == good
    assert len(measured) == 2
    assert file.read_text() == whole


def test_a_cache_that_cannot_be_written_is_said_and_does_without(measured, tmp_path, caplog):
    (tmp_path / "cache").write_text("no folder")
    with caplog.at_level(logging.WARNING, "effpass"):
        ceilings("cpu", torch.float32)
        ceilings("cpu", torch.float32)
    assert len(measured) == 2
    assert "the measured ceilings can't be kept in" in caplog.text
