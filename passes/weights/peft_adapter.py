"""Reader of standard PEFT adapter folders, with `adapter_config.json` and `adapter_model.safetensors`.

Supported are LoRA, rsLoRA and DoRA on linear layers, GPT-2's Conv1D and embeddings, together with the other parameters
that PEFT saves: trained biases, embeddings and `modules_to_save`. All other methods of PEFT raise an error that names
the method. The adapted modules are determined from the names of the tensors, so that `target_modules`,
`layers_to_transform` and `exclude_modules` need not be interpreted. `merge_lora` merges the adapters read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effpass.core.artifact import read_safetensors
from effpass.core.errors import ArtifactError, did_you_mean
from effpass.core.strict_json import parse_json

__all__ = ["LowRank", "PeftAdapter", "read_adapter"]

_PREFIX = "base_model.model."
_MAX_CONFIG = 1 << 20
_MAX_NAME = 200  # together with at most three repetitions per pattern, bounds the matching time

# Options of LoraConfig with which an adapter does not compute W + s·B A, each with the name of the method in PEFT.
_OTHER_FUNCTIONS = {
    "alora_invocation_tokens": "aLoRA (activated by tokens of the prompt)",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron layers",
    "monteclora_config": "MonteCLoRA",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trainable tokens",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}
# Options that only affect training, that are read here, or that are redundant with the names of the tensors.
_READ_OR_IRRELEVANT = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip
# Initializations that change the base weight when PEFT attaches the adapter. Adapters that were converted to plain LoRA
# are saved with init_lora_weights: true.
_MUTATES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_SUFFIX = re.compile(r"^(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A"
                     r"|lora_embedding_B|lora_magnitude_vector)(?:(?<=vector)\.weight)?$")  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """Low-rank update of a weight W: `W + scale · B A`, or for DoRA `m · (W + scale · B A) / ‖W + scale · B A‖`.

    W has the shape `[out, in]`, although embeddings and GPT-2's Conv1D store its transpose. The norm is over `in`.

    Attributes:
        a: factor A, `[r, in]`.
        b: factor B, `[out, r]`.
        scale: alpha / r, or alpha / √r for rsLoRA.
        magnitude: DoRA's m, `[out]`; None for LoRA and rsLoRA.
        bias: bias of B (`lora_bias`), `[out]`; merging adds `scale · bias` to the bias of the layer. None without one.
        embedding: whether the module is an embedding (in = vocabulary size, out = embedding size).
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    embedding: bool = False


@dataclass(frozen=True)
class PeftAdapter:
    """Contents of an adapter folder.

    Attributes:
        folder: folder from which the adapter was read.
        updates: module name → low-rank update.
        modules: parameter name → replacement of the parameter in that module only (`modules_to_save`); other modules
            that share the weight keep the original.
        base: parameter name → replacement of the parameter in all modules that share it (trained biases, and embeddings
            that were saved with the adapter).
        keeps_ties: whether the adapters of tied weights are tied as well (`ensure_weight_tying`).
        base_model: `base_model_name_or_path` of the config, for error messages; empty if not recorded.
    """

    folder: Path
    updates: dict[str, LowRank]
    modules: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, Tensor] = field(default_factory=dict)
    keeps_ties: bool = False
    base_model: str = ""

    def check_fit(self, shapes: Mapping[str, tuple[int, ...]], stored_transposed: frozenset[str] = frozenset()) -> None:
        """Check that every tensor of the adapter fits a model with the given parameters.

        Args:
            shapes: parameter name → shape, for all parameters of the model, including aliases of tied weights.
            stored_transposed: names of modules that store their weight as `[in, out]` (embeddings, GPT-2's Conv1D).

        Raises:
            ArtifactError: the model lacks a parameter, or one has another shape.
        """
        for module, update in self.updates.items():
            shape = self._shape_of(f"{module}.weight", shapes)
            wanted = (update.b.shape[0], update.a.shape[1])
            if module in stored_transposed:
                wanted = wanted[::-1]
            if shape != wanted:
                raise ArtifactError(
                    f"adapter {self.folder}: the update of {module} is for a weight of shape {wanted},"
                    f" the model's is {shape}",
                    hint=self._other_model(),
                )
            if update.bias is not None and shapes.get(f"{module}.bias") != tuple(update.bias.shape):
                raise ArtifactError(
                    f"adapter {self.folder}: lora_bias was trained for {module}, which has no bias of shape"
                    f" {tuple(update.bias.shape)} to add it to",
                    hint="such an adapter can't be merged; load it with PEFT and leave it attached",
                )
        for name, tensor in (*self.modules.items(), *self.base.items()):
            shape = self._shape_of(name, shapes)
            if shape != tuple(tensor.shape):
                resized = len(shape) == 2 and shape[1:] == tuple(tensor.shape[1:])
                resize = f"call model.resize_token_embeddings({tensor.shape[0]}) first"
                raise ArtifactError(
                    f"adapter {self.folder}: it replaces {name} by a tensor of shape {tuple(tensor.shape)},"
                    f" the model's is {shape}",
                    hint=resize if resized else self._other_model(),
                )

    def _shape_of(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        shape = shapes.get(name)
        if shape is None:
            missing = [m for m in self.updates if f"{m}.weight" not in shapes] + [
                n for n in (*self.modules, *self.base) if n not in shapes
            ]
            more = f" ({len(missing)} such names)" if len(missing) > 1 else ""
            close = did_you_mean(name, shapes)
            raise ArtifactError(
                f"adapter {self.folder}: the model has no parameter {name!r}{more}"
                + (close if "did you mean" in close else ""),
                hint=self._other_model(),
            )
        return tuple(shape)

    def _other_model(self) -> str:
        recorded = f"; the adapter was trained on {self.base_model!r}" if self.base_model else ""
        return f"use the base model that the adapter was trained on{recorded}"


def read_adapter(folder: str | Path) -> PeftAdapter:
    """Read a folder written by `PeftModel.save_pretrained`. Nothing is unpickled.

    Raises:
        ArtifactError: the folder, its config or its tensors can't be read, or the adapter uses a PEFT method other than
            LoRA, rsLoRA and DoRA.
    """
    folder = Path(folder)
    config = _read_config(folder)
    _refuse_other_methods(folder, config)
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        if (folder / "adapter_model.bin").is_file():
            raise ArtifactError(
                f"adapter {folder}: adapter_model.bin is a pickle, which can run any code when loaded",
                hint="if you trust it, convert it: PeftModel.from_pretrained(model, folder).save_pretrained(folder)",
            )
        raise ArtifactError(f"adapter {folder}: there is no adapter_model.safetensors", hint="save it with PEFT")
    return _assemble(folder, config, read_safetensors(path))


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    if not folder.is_dir():
        raise ArtifactError(
            f"adapter {folder}: there is no such folder",
            hint="an adapter on the Hub is fetched with: hf download NAME --local-dir FOLDER",
        )
    if not path.is_file():
        inside = sorted(p.parent.name for p in folder.glob("*/adapter_config.json"))
        raise ArtifactError(
            f"adapter {folder}: there is no adapter_config.json",
            hint=f"name one of its subfolders: {', '.join(inside)}" if inside else "save it with save_pretrained",
        )
    try:
        with open(path, "rb") as file:
            config = parse_json(file.read(_MAX_CONFIG))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"adapter {folder}: adapter_config.json can't be read: {error}") from None
    if not isinstance(config, dict):
        raise ArtifactError(f"adapter {folder}: adapter_config.json holds {type(config).__name__}, expected an object")
    return config


def _refuse_other_methods(folder: Path, config: dict[str, Any]) -> None:
    where = f"adapter {folder}"
    way_out = "attach it with PEFT and leave it unmerged"
    if config.get("peft_type") != "LORA":
        raise ArtifactError(f"{where}: peft_type is {config.get('peft_type')!r}, only 'LORA' is merged", hint=way_out)
    if isinstance(unfinished := config.get("effpass_afa"), dict):
        raise ArtifactError(
            f"{where}: it was saved while its activation was annealed (AFA-LoRA, β = {unfinished.get('beta')!r}),"
            " and is no product of two matrices yet",
            hint="train it to β = 0; AfaLora.save writes the finished adapter",
        )
    for key, called in _OTHER_FUNCTIONS.items():
        if config.get(key):
            raise ArtifactError(f"{where}: it uses {called} ({key}: {config[key]!r})", hint=way_out)
    unknown = sorted(k for k, v in config.items() if v and k not in _READ_OR_IRRELEVANT and k not in _OTHER_FUNCTIONS)
    if unknown:
        raise ArtifactError(f"{where}: adapter_config.json sets {unknown[0]!r}, which is not known here", hint=way_out)
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MUTATES_BASE):
        raise ArtifactError(
            f"{where}: init_lora_weights is {init!r}, which changes the base weights when the adapter is attached",
            hint="convert it to plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...),"
            " or attach it with PEFT and merge what is attached",
        )
    for key, check, expected in (
        ("r", lambda v: _is_count(v), "a positive integer"),
        ("lora_alpha", _is_number, "a number"),
        ("rank_pattern", lambda v: _is_pattern(v, _is_count), "patterns with positive integers"),
        ("alpha_pattern", lambda v: _is_pattern(v, _is_number), "patterns with numbers"),
        ("modules_to_save", lambda v: isinstance(v, list) and all(isinstance(m, str) for m in v), "a list of names"),
        ("base_model_name_or_path", lambda v: isinstance(v, str), "a string"),
    ):
        value = config.get(key)
        if not (value is None and key not in ("r", "lora_alpha")) and not check(value):
            raise ArtifactError(f"{where}: {key} is {value!r}, expected {expected}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_pattern(value: Any, check: Any) -> bool:
    """Whether `value` maps simple regular expressions to valid values; complex ones could take too long to match."""
    if not isinstance(value, dict) or not all(check(v) for v in value.values()):
        return False
    if any(len(re.findall(r"[*+{]", key)) > 3 or re.search(r"\)[*+{]", key) for key in value):
        return False
    try:
        return all(re.compile(rf"(.*\.)?({key})$") for key in value)
    except (re.error, OverflowError, RecursionError):
        return False


def _assemble(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> PeftAdapter:
    parts: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    saved = tuple(config.get("modules_to_save") or ())
    for key, tensor in tensors.items():
        where = f"adapter {folder}: tensor {key!r}"
        if not key.startswith(_PREFIX):
            raise ArtifactError(f"{where} does not start with {_PREFIX!r} as PEFT's do")
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise ArtifactError(f"{where} is of type {tensor.dtype}, expected a floating point type")
        if not torch.isfinite(tensor).all():
            raise ArtifactError(f"{where} holds NaN or infinite values", hint="the training of this adapter diverged")
        name = key.removeprefix(_PREFIX)
        if len(name) > _MAX_NAME:
            raise ArtifactError(f"adapter {folder}: a tensor's name is {len(name)} characters long")
        found = _SUFFIX.match(name)
        if found and ".base_layer" not in found["module"]:
            parts.setdefault(found["module"], {})[found["part"].removesuffix(".weight")] = tensor
        elif ".lora_" in name or "_adapter." in name or "." not in name:
            raise ArtifactError(
                f"{where} is of no kind that is known here", hint="attach the adapter with PEFT instead"
            )
        elif name.count(".base_layer.") or not _is_saved_module(name, saved):
            base[name.replace(".base_layer.", ".")] = tensor
        else:
            modules[name] = tensor
    updates = {module: _low_rank(folder, config, module, found) for module, found in parts.items()}
    if not (updates or modules or base):
        raise ArtifactError(f"adapter {folder}: it holds no tensor")
    keeps_ties = bool(config.get("ensure_weight_tying"))
    return PeftAdapter(folder, updates, modules, base, keeps_ties, config.get("base_model_name_or_path") or "")


def _is_saved_module(name: str, saved: tuple[str, ...]) -> bool:
    """Whether a parameter lies in a module whose name ends with an entry of `modules_to_save`, as PEFT matches them."""
    return any(f".{s}." in f".{name}" for s in saved)


def _low_rank(folder: Path, config: dict[str, Any], module: str, parts: dict[str, Tensor]) -> LowRank:
    where = f"adapter {folder}: module {module}"
    embedding = any(p.startswith("lora_embedding") for p in parts)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    dora = ("lora_magnitude_vector",) if config.get("use_dora") else ()
    wanted = {*names, *dora}
    if missing := sorted(wanted - set(parts)):
        raise ArtifactError(f"{where} has {', '.join(sorted(parts))} but no {missing[0]}")
    if extra := sorted(set(parts) - wanted - {"lora_B.bias"}):
        raise ArtifactError(f"{where} has {extra[0]}, which its config does not announce (use_dora is off)")
    a, b = parts[names[0]], parts[names[1]]
    rank, alpha = (
        _from_pattern(config.get(pattern) or {}, module, config[default])
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or a.shape[0] != rank or 0 in (*a.shape, *b.shape):
        raise ArtifactError(
            f"{where}: A is {tuple(a.shape)} and B is {tuple(b.shape)}, expected [{rank}, in] and [out, {rank}]",
            hint="a shard saved without gathering looks like this; a convolution's adapter is not merged here",
        )
    for name in ("lora_magnitude_vector", "lora_B.bias"):
        if name in parts and parts[name].shape != b.shape[:1]:
            raise ArtifactError(f"{where}: {name} is {tuple(parts[name].shape)}, expected {(b.shape[0],)}")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LowRank(a, b, scale, parts.get("lora_magnitude_vector"), parts.get("lora_B.bias"), embedding)


def _from_pattern(pattern: dict[str, Any], module: str, default: Any) -> Any:
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", module)), default)
