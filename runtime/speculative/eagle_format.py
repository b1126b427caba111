"""EAGLE-3 heads as folders in the `speculators` format, which vLLM loads (https://github.com/vllm-project/speculators).

``config.json`` describes the head and names the model that it was trained for. ``model.safetensors`` holds its tensors,
without the embeddings, which the head shares with the model.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from effpass.core.errors import ArtifactError, EffpassError
from effpass.core.strict_json import parse_json
from effpass.core.tensor_file import read_safetensors
from effpass.runtime.speculative.eagle_head import EagleHead, HeadConfig

__all__ = ["is_head", "read_head", "write_head"]

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_FLAGS = ("norm_before_residual", "norm_before_fc", "norm_output")
_EMBEDDING = "embed_tokens.weight"
_VERSION = "0.9.0"  # version of the format that is written


def is_head(folder: Path) -> bool:
    """Return whether `folder` holds a speculator of any kind."""
    try:
        return "speculators_model_type" in parse_json((folder / _CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def read_head(folder: Path, layers: int | None = None) -> EagleHead:
    """Load a head.

    If the file holds no embeddings, the head has none until :meth:`EagleHead.share` is called.

    Args:
        folder: folder of the head.
        layers: number of layers of the model; if the config names no taps, they are layers 2, `layers // 2` and
            `layers - 3`. None to require taps in the config.

    Raises:
        ArtifactError: if the folder is damaged, or holds a speculator of another kind.
    """
    config, verifier = _read_config(folder, layers)
    found = read_safetensors(folder / _WEIGHTS)
    tensors = {name: tensor for name, tensor in found.items() if not name.startswith("verifier_")}
    dtype = tensors["fc.weight"].dtype if "fc.weight" in tensors else None
    if not 1 <= config.layer.num_hidden_layers <= len(tensors):  # each layer has at least one
        raise ArtifactError(f"{folder / _CONFIG}: {config.layer.num_hidden_layers} layers of {len(tensors)} tensors")
    with torch.device("meta"):  # check shapes first: sizes in a damaged config must not allocate memory
        shape = _made(config, dtype, folder)
    expected = {name: tuple(tensor.shape) for name, tensor in shape.state_dict().items()}
    missing = sorted(expected.keys() - tensors.keys() - {_EMBEDDING})
    unknown = sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        which = f"lacks {missing[0]}" if missing else f"has an unknown tensor {unknown[0]}"
        raise ArtifactError(f"{folder / _WEIGHTS} {which}", hint="it does not belong to the config.json beside it")
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise ArtifactError(
                f"{folder / _WEIGHTS}: {name} is {tuple(tensor.shape)}, and config.json makes it {expected[name]}"
            )
    head = _made(config, dtype, folder)
    head.verifier = verifier
    head.load_state_dict(tensors, strict=False, assign=True)
    if head.d2t is not None:
        known = head.d2t + head.d2t.new_ones(len(head.d2t)).cumsum(0) - 1
        if int(known.min()) < 0 or int(known.max()) >= config.layer.vocab_size:
            raise ArtifactError(f"{folder / _WEIGHTS}: d2t names tokens that the model does not have")
    return head.eval().requires_grad_(False)


def _made(config: HeadConfig, dtype: torch.dtype | None, folder: Path) -> EagleHead:
    try:
        return EagleHead(config).to(dtype)
    except Exception as error:  # any error that transformers and PyTorch raise for such sizes and dtypes
        raise ArtifactError(f"{folder / _CONFIG} makes no head: {_line(error)}") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _layer_config(layer: dict[str, Any]) -> Any:
    from transformers import LlamaConfig

    try:
        return LlamaConfig(**layer)
    except Exception as error:  # transformers' validation raises its own error class
        raise ValueError(f"transformer_layer_config: {_line(error)}") from error


def _read_config(folder: Path, layers: int | None) -> tuple[HeadConfig, str | None]:
    """Read the config of a head, and the name of the model that it was trained for, if it has one."""
    path = folder / _CONFIG
    try:
        content: Any = parse_json(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        kind, layer = content.get("speculators_model_type"), content["transformer_layer_config"]
        if kind != "eagle3" or layer["model_type"] != "llama" or content.get("fc_norm"):
            what = f"{kind} of {layer['model_type']} layers" + (", fc_norm" if content.get("fc_norm") else "")
            raise ArtifactError(f"{path}: a speculator of kind {what}", hint="effpass runs eagle3 of llama layers")
        taps, vocabulary = content.get("eagle_aux_hidden_state_layer_ids"), content["draft_vocab_size"]
        if taps is None and layers is not None:
            taps = [2, layers // 2, layers - 3]
        if not isinstance(taps, list) or not taps or any(type(tap) is not int or tap < 0 for tap in taps):
            raise ValueError(f"eagle_aux_hidden_state_layer_ids {taps!r}")
        if type(vocabulary) is not int or vocabulary < 1:
            raise ValueError(f"draft_vocab_size {vocabulary!r}")
        if content.get("target_hidden_size") not in (None, layer["hidden_size"]):
            raise ValueError("target_hidden_size is not the head's own")
        flags = {name: bool(content.get(name)) for name in _FLAGS}
        return HeadConfig(_layer_config(layer), vocabulary, tuple(taps), **flags), _verifier(content)
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror or error}") from error
    except KeyError as error:
        raise ArtifactError(f"{path}: no {error}") from error
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: {' '.join(str(error).split())[:300]}") from error


def _verifier(content: Any) -> str | None:
    for key in ("speculators_config", "verifier", "name_or_path"):
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, str) else None


def write_head(head: EagleHead, folder: Path, *, verifier: str, architecture: str, tokens: int) -> Path:
    """Write a head to a folder atomically, and return the folder.

    Args:
        head: head to write, without its embeddings, which are the model's.
        folder: folder to create.
        verifier: name or path of the model that the head was trained for.
        architecture: name of the model's class.
        tokens: default number of tokens to propose, as a chain.

    Raises:
        EffpassError: if `folder` exists.
    """
    from safetensors.torch import save_file

    if folder.exists():
        raise EffpassError(f"{folder} exists", hint="give another folder, or remove it")
    config = head.head_config
    method = {"proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    content = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": _VERSION,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": verifier, "architectures": [architecture]},
        },
        "draft_vocab_size": config.draft_vocabulary,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        **{name: getattr(config, name) for name in _FLAGS},
        "target_hidden_size": None,
        "dtype": str(head.fc.weight.dtype).removeprefix("torch."),
        "transformer_layer_config": _layer_json(config.layer),
    }
    tensors = {k: t.detach().cpu().contiguous() for k, t in head.state_dict().items() if k != _EMBEDDING}
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        save_file(tensors, temporary / _WEIGHTS, metadata={"format": "pt"})
        (temporary / _CONFIG).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _layer_json(layer: Any) -> dict[str, Any]:
    """Return the layers' config as JSON with its model type, without private keys and local paths."""
    content = {**layer.to_diff_dict(), "model_type": "llama", "vocab_size": layer.vocab_size}
    return {key: value for key, value in content.items() if not key.startswith("_") and key != "transformers_version"}
