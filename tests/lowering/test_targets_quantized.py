"""Models with quantized weights in files: few bytes, no quantization package to run them, and the model stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import batch, make, quantized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import effpass
from effpass.core.errors import ExportError
from effpass.core.tensor_file import read_safetensors
from effpass.lowering.targets.plain_tensors import plain_tensors

pytest.importorskip("torchao")

SCHEMES = {"int8": torch.int8, "float8": torch.float8_e4m3fn}
NOTHING = {"version": 1, "passes": []}
SUFFIXES = {"onnx": ".onnx", "inductor": ".safetensors", "aoti": ".pt2"}


def made(scheme: str, dtype: torch.dtype) -> Any:
    return quantized(make("llama", num_hidden_layers=1).to(dtype), scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("target", ["onnx", "inductor", pytest.param("aoti", marks=pytest.mark.slow)])
def test_a_file_of_a_quantized_model(target: str, scheme: str, tmp_path: Path) -> None:
    model = made(scheme, torch.float32 if target == "onnx" else torch.bfloat16)
    weights = dict(model.named_parameters())
    file = tmp_path / f"model{SUFFIXES[target]}"
    exported = effpass.export(model, NOTHING, file, target=target)
    assert {check.export_error <= check.tolerance for check in exported.checks} == {True}
    assert all(new is weights[name] for name, new in model.named_parameters())
    assert {type(m).__name__ for m in model.modules() if "Linear" in type(m).__name__} == {"Linear"}
    if target == "inductor":
        kinds = [tensor.dtype for tensor in read_safetensors(file).values()]
        assert kinds.count(SCHEMES[scheme]) == 7 + 1


def test_the_model_is_as_it_was_when_a_capture_fails() -> None:
    model = quantized(make("qwen3", attention_bias=True).to(torch.bfloat16), "int8")  # biases stand behind weights
    expected, weights = model(**batch(9)).logits, dict(model.named_parameters())

    def fail() -> None:
        with plain_tensors(model):
            assert not any(is_traceable_wrapper_subclass(p) for p in model.parameters())
            torch.testing.assert_close(model(**batch(9)).logits, expected)
            raise ExportError("stop")

    with pytest.raises(ExportError, match="stop"):
        fail()
    assert all(new is weights[name] for name, new in model.named_parameters())
    assert [name for name, _ in model.named_parameters()] == list(weights)
    assert torch.equal(model(**batch(9)).logits, expected)
