"""`effpass export` refuses what can be known from a config, before weights are read."""

from __future__ import annotations

import pytest
import torch

from effpass.lowering.targets import host_memory


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_model_too_large_for_the_machine(refused, recipe_file, tiny_model, out, monkeypatch):
    arguments = ("export", tiny_model, "-r", recipe_file("- merge_lora"), "-o", out.with_suffix(".onnx"))
    monkeypatch.setattr(host_memory, "available_memory", lambda: 10_000)
    message = refused(*arguments)
    assert "exporting to onnx takes 1.3 times the weights in host memory" in message
    assert not out.with_suffix(".onnx").exists()
    message = refused(*arguments, "--dtype", "float16")
    assert "exporting to onnx takes 3.5 times the weights in host memory" in message


@pytest.mark.usefixtures("nothing_is_loaded")
def test_a_7b_shape_in_24_gigabytes(refused, recipe_file, out, tmp_path, monkeypatch):
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000}
    LlamaConfig(**shape, num_attention_heads=32, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "7b")
    save_file({}, tmp_path / "7b" / "model.safetensors")
    monkeypatch.setattr(host_memory, "available_memory", lambda: 24 * 2**30)
    monkeypatch.setattr("effpass.lowering.targets.publish.shutil.disk_usage", lambda _: type("", (), {"free": 10**12}))
    start = ("export", tmp_path / "7b", "-r", recipe_file("- merge_lora"), "--dtype", "float16", "-o")
    # 6.74e9 weights of 2 bytes
    message = refused(*start, out.with_suffix(".onnx"))
    assert "takes 3.5 times the weights in host memory: 47.2 GB more than now, and 25.8 GB are available" in message
    message = refused(*start, out.with_suffix(".pt2"), "--target", "aoti")
    assert "takes 2.3 times the weights in host memory: 31.0 GB more than now, and 25.8 GB are available" in message
    # 1.3 times go, and loading begins
    assert "weights were loaded" in refused(*start, out.with_suffix(".safetensors"), "--target", "inductor")


@pytest.mark.usefixtures("nothing_is_loaded")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(refused, recipe_file, tiny_model, out):
    start = ("export", tiny_model, "-r", recipe_file("- merge_lora"), "--device", "cuda", "-o")
    message = refused(*start, out.with_suffix(".onnx"))
    assert "onnx files are written from a model on cpu, not on cuda" in message
    assert "--device cpu" in message
    message = refused(*start, out.with_suffix(".safetensors"), "--target", "inductor")
    assert "needs triton" in message or "device 'cuda' can't be used" in message
