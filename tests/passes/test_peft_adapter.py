"""The reader of PEFT folders: every folder is read right or refused in one clear error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from effpass.core.errors import ArtifactError
from effpass.passes.weights.peft_adapter import read_adapter

CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
MODULE = "base_model.model.model.layers.0.self_attn.q_proj"


def tensors(**changed: torch.Tensor | None) -> dict[str, torch.Tensor]:
    parts = {"lora_A.weight": torch.ones(4, 6), "lora_B.weight": torch.ones(8, 4), **changed}
    return {f"{MODULE}.{name}": t for name, t in parts.items() if t is not None}


def write(folder: Path, config: Any = CONFIG, content: dict[str, torch.Tensor] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    save_file(tensors() if content is None else content, folder / "adapter_model.safetensors")
    return folder


def test_what_is_read(tmp_path: Path) -> None:
    config = {**CONFIG, "use_dora": True, "modules_to_save": ["lm_head"], "base_model_name_or_path": "some/model"}
    content = {
        **tensors(lora_magnitude_vector=torch.ones(8)),
        "base_model.model.lm_head.weight": torch.zeros(3, 2),
        f"{MODULE}.base_layer.bias": torch.zeros(8),
        "base_model.model.model.embed_tokens.weight": torch.zeros(5, 2),
    }
    adapter = read_adapter(write(tmp_path, config, content))
    (update,) = adapter.updates.values()
    assert adapter.updates.keys() == {"model.layers.0.self_attn.q_proj"}
    assert (update.a.shape, update.b.shape, update.scale) == ((4, 6), (8, 4), 2.0)
    assert update.magnitude is not None
    assert not update.embedding
    assert adapter.modules.keys() == {"lm_head.weight"}
    assert adapter.base.keys() == {"model.layers.0.self_attn.q_proj.bias", "model.embed_tokens.weight"}
    assert adapter.base_model == "some/model"


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({}, 4, 2.0),
        ({"use_rslora": True}, 4, 8 / math.sqrt(4)),
        ({"rank_pattern": {"q_proj": 2}}, 2, 4.0),
        ({"rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 2}, "use_rslora": True}, 2, 8 / math.sqrt(2)),
        ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 3}}, 4, 0.75),
        ({"alpha_pattern": {"k_proj": 1, "layers.0.self_attn.q_proj": 5, "q_proj": 7}}, 4, 1.25),
        ({"lora_alpha": 1.5}, 4, 0.375),
    ],
)
def test_rank_and_scale(config: dict, rank: int, scale: float, tmp_path: Path) -> None:
    content = tensors(**{"lora_A.weight": torch.ones(rank, 6), "lora_B.weight": torch.ones(8, rank)})
    adapter = read_adapter(write(tmp_path, {**CONFIG, **config}, content))
    (update,) = adapter.updates.values()
    assert update.scale == scale


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA', only 'LORA' is merged"),
        ({"peft_type": None}, "peft_type is None"),
        ({"alora_invocation_tokens": [1]}, "it uses aLoRA"),
        ({"use_qalora": True}, "it uses QALoRA"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "LoRA on bare parameters"),
        ({"trainable_token_indices": [3]}, "trainable tokens"),
        ({"layer_replication": [[0, 4]]}, "layer replication"),
        ({"kasa_config": {"rank": 1}}, "KaSA"),
        ({"use_next_years_lora": True}, "sets 'use_next_years_lora', which is not known here"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', which changes the base"),
        ({"init_lora_weights": "olora"}, "'olora', which changes the base"),
        ({"r": 0}, "r is 0, expected a positive integer"),
        ({"r": True}, "r is True, expected a positive integer"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', expected a number"),
        ({"rank_pattern": {"q(proj": 2}}, "expected patterns with positive integers"),
        ({"rank_pattern": {"(a+)+b": 2}}, "expected patterns"),
        ({"rank_pattern": {"a*a*a*a*b": 2}}, "expected patterns"),
        ({"rank_pattern": {"q_proj": -1}}, "expected patterns with positive integers"),
        ({"alpha_pattern": [1]}, "expected patterns with numbers"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', expected a list of names"),
        ({"r": 8}, r"A is \(4, 6\) and B is \(8, 4\), expected \[8, in\] and \[out, 8\]"),
        ({"use_dora": True}, "has lora_A, lora_B but no lora_magnitude_vector"),
    ],
)
def test_configs_that_are_refused(config: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message) as error:
        read_adapter(write(tmp_path, {**CONFIG, **config}))
    assert str(tmp_path) in error.value.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "it holds no tensor"),
        (tensors(**{"lora_B.weight": None}), "has lora_A but no lora_B"),
        (tensors(**{"lora_A.weight": torch.ones(4)}), r"A is \(4,\)"),
        (tensors(**{"lora_A.weight": torch.ones(4, 0)}), r"A is \(4, 0\)"),
        (tensors(**{"lora_A.weight": torch.ones(4, 6, 1, 1)}), "a convolution's adapter"),
        (tensors(**{"lora_B.weight": torch.ones(8, 3)}), r"B is \(8, 3\)"),
        (tensors(**{"lora_A.weight": torch.ones(4, 6, dtype=torch.int64)}), "is of type torch.int64"),
        (tensors(**{"lora_A.weight": torch.full((4, 6), math.nan)}), "holds NaN or infinite"),
        (tensors(lora_magnitude_vector=torch.ones(8)), "has lora_magnitude_vector, which its config does not announce"),
        (tensors(**{"lora_B.bias": torch.ones(7)}), r"lora_B.bias is \(7,\), expected \(8,\)"),
        (tensors(**{"x" * 200 + ".lora_A.weight": torch.ones(4, 6)}), "name is 2.. characters long"),
        (tensors(lora_C=torch.ones(1)), "is of no kind that is known here"),
        (tensors(**{"token_adapter.trainable_tokens_delta": torch.ones(1)}), "is of no kind that is known here"),
        (tensors(**{"base_layer.lora_A.weight": torch.ones(4, 6)}), "is of no kind that is known here"),
        ({"model.layers.0.q_proj.lora_A.weight": torch.ones(4, 6)}, "does not start with 'base_model.model.'"),
    ],
)
def test_tensors_that_are_refused(content: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_adapter(write(tmp_path, CONFIG, content))


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder") as error:
        read_adapter(tmp_path / "user" / "adapter")
    assert "hf download" in str(error.value)
    write(tmp_path / "run" / "checkpoint-5")
    with pytest.raises(ArtifactError, match=r"no adapter_config.json\n.*subfolders: checkpoint-5"):
        read_adapter(tmp_path / "run")
    folder = write(tmp_path / "pickle")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ArtifactError, match=r"adapter_model\.bin is a pickle"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ArtifactError, match=r"no adapter_model\.safetensors"):
        read_adapter(folder)
    for text in ("", "{", "[1]", '{"r": 1, "r": 2}', "\x00", "[" * 100_000):
        with pytest.raises(ArtifactError, match=r"adapter_config\.json"):
            read_adapter(write(tmp_path / "bad", text))


# -- fuzz -----------------------------------------------------------------------------------------------------------

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
KEYS = [
    *CONFIG,
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "init_lora_weights",
    "bias",
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def read_or_refuse(folder: Path) -> None:
    """Either it reads, and then A and B fit together, or there is one ArtifactError."""
    refusal = None
    try:
        adapter = read_adapter(folder)
    except ArtifactError as error:
        refusal = error
    if refusal is not None:
        assert str(folder) in refusal.message
        return
    for update in adapter.updates.values():
        assert update.a.shape[0] == update.b.shape[1]
        assert math.isfinite(update.scale)


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), JSON, max_size=6))
def test_any_config(tmp_path: Path, changes: dict) -> None:
    read_or_refuse(write(tmp_path / "fuzz", {**CONFIG, **changes}))


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(["lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_magnitude_vector", "lora_B.bias"])
        | st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=12),
        st.lists(st.integers(0, 5), max_size=4),
        max_size=4,
    )
)
def test_any_tensors(tmp_path: Path, shapes: dict) -> None:
    content = {f"{MODULE}.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    read_or_refuse(write(tmp_path / "fuzz", CONFIG, content))


@FUZZ
@given(st.data())
def test_any_damage(tmp_path: Path, data: st.DataObject) -> None:
    """Bytes of either file changed, cut off or added."""
    folder = write(tmp_path / "fuzz")
    path = folder / data.draw(st.sampled_from(["adapter_model.safetensors", "adapter_config.json"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=8))
    path.write_bytes(content)
    read_or_refuse(folder)
