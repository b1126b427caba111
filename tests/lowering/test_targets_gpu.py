"""Files for a GPU, on one; what can be asked without one stands in test_targets_devices.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch

import effpass
from effpass.core.errors import ExportError
from effpass.lowering.targets import export
from effpass.lowering.targets.target import find_target
from effpass.lowering.targets.validation import DecodeCase, record_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# One layer, logits of about 0.5: hundreds of roundings of float32, a dozen of bfloat16's 4e-3.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
LENGTH = 48


def small(dtype: torch.dtype = torch.float32) -> Any:
    return families.make("llama", num_hidden_layers=1).to("cuda", dtype)


def empty(batch: int, past: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(batch, 2, past, 16, device="cuda", dtype=dtype)] * 2


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, torch.dtype], Path]:
    """Export the one-layer Llama, once each; the tolerance is measured."""
    from effpass.lowering.targets.tolerance import measure_tolerance

    folder = tmp_path_factory.mktemp("exported")

    def make(name: str, dtype: torch.dtype = torch.float32) -> Path:
        target = find_target(name)
        out = folder / f"{str(dtype).removeprefix('torch.')}{target.suffix}"
        if not out.exists():
            with pytest.MonkeyPatch.context() as patch:  # here: the fixed one is set before each test
                patch.setattr(export, "measure_tolerance", measure_tolerance)
                result = export.export_decoder(small(dtype), None, [], out, target=target, max_length=LENGTH)
                assert max(c.export_error for c in result.checks) < ROUNDING[dtype]
                assert "without" not in result.tolerance.why
        return out

    return make


FILES = [("aoti", torch.float32), ("aoti", torch.bfloat16), ("inductor", torch.float32)]


@pytest.mark.parametrize(("name", "dtype"), FILES)
def test_a_file_validates_and_says_where_it_runs(
    name: str, dtype: torch.dtype, exported: Callable[[str, torch.dtype], Path]
) -> None:
    path = exported(name, dtype)
    found = effpass.validate(path, allow_native=True)
    assert found.ok
    assert len(found.cases) == 5
    said = find_target(name).read(path)
    assert said["effpass.device"] == "cuda"
    if name == "aoti":
        machine = json.loads(said["effpass.machine"])
        major, minor = torch.cuda.get_device_capability()
        assert (machine["gpu"], machine["compute capability"]) == (torch.cuda.get_device_name(), f"{major}.{minor}")
        assert json.loads(said["effpass.limits"])["indices"], "Inductor counts small tensors with 32 bits"


@pytest.mark.parametrize(("name", "dtype"), FILES)
def test_a_file_computes_what_the_model_computes_at_other_sizes(
    name: str, dtype: torch.dtype, exported: Callable[[str, torch.dtype], Path]
) -> None:
    step = effpass.load_exported(exported(name, dtype), allow_native=True)
    for size, length in ((1, 1), (1, 40), (5, 13)):
        tokens = torch.randint(3, 96, (size, length))
        (right,) = record_model(small(dtype), [DecodeCase("", tokens, torch.ones_like(tokens), (length,))])
        ids = tokens.cuda()
        # A strided view: compiled code reads memory as if it were packed.
        positions = torch.arange(length, device="cuda").expand(size, -1)
        logits, *present = step(ids, torch.ones_like(ids), positions, *empty(size, dtype=dtype))
        assert {t.device for t in (logits, *present)} == {torch.device("cuda", torch.cuda.current_device())}
        assert float((logits.flatten(0, 1).float().cpu() - right.logits).abs().max()) < ROUNDING[dtype]


@pytest.mark.parametrize("name", ["aoti", "inductor"])
def test_a_file_generates_what_the_model_generates(name: str, exported: Callable[[str, torch.dtype], Path]) -> None:
    batch = {k: v.cuda() for k, v in families.batch(7).items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = small().generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    step, past, tokens = effpass.load_exported(exported(name, torch.float32), allow_native=True), empty(len(ids)), ids
    for _ in range(8):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits, *past = step(tokens, mask, positions, *past)
        tokens = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    assert torch.equal(ids, expected)


@pytest.mark.parametrize("name", ["aoti", "inductor"])
def test_a_step_can_be_captured_in_a_cuda_graph(name: str, exported: Callable[[str, torch.dtype], Path]) -> None:
    step = effpass.load_exported(exported(name, torch.float32), allow_native=True)
    ids, mask = torch.tensor([[5]], device="cuda"), torch.ones(1, 8, dtype=torch.long, device="cuda")
    past = [torch.randn(1, 2, 7, 16, device="cuda") for _ in range(2)]
    inputs = (ids, mask, torch.tensor([[7]], device="cuda"), *past)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(*inputs)[0]
    for token in (9, 11):
        ids.fill_(token)
        right = step(*inputs)[0].clone()
        graph.replay()
        assert torch.equal(logits, right)


def test_what_is_not_for_this_gpu_is_refused(
    exported: Callable[[str, torch.dtype], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = exported("aoti", torch.float32)
    step = effpass.load_exported(path, allow_native=True)
    one = torch.ones(1, 1, dtype=torch.long)
    with pytest.raises(ExportError, match=r"float32\.pt2 runs on cuda:0, and input_ids is on cpu\n.*device='cuda:0'"):
        step(one, one.cuda(), one.cuda(), *empty(1))
    with pytest.raises(ExportError, match="onnx files are written from a model on cpu, not on cuda"):
        effpass.export(small(), {"passes": []}, tmp_path / "m.onnx")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ExportError, match=r"made for GPUs of compute capability \d+\.\d+ .*; this one has 8\.0"):
        effpass.load_exported(path, allow_native=True)
