"""The TensorRT target: an engine of the whole decode graph, built from an ONNX file that onnxruntime has checked.

The target uses TensorRT if it is installed, which needs a GPU, and otherwise TensorRT for RTX, which builds engines on
a machine without a GPU. The engine itself is not executed: the check runs the ONNX file that the engine is built from,
and the record next to the engine, ``{file}.json``, says so.

An engine has two optimization profiles. Both accept batch sizes B up to the largest batch; L is the largest length:

======= ============ ============== ========================================
profile T            P              used for
======= ============ ============== ========================================
0       1 to L       0              prefill
1       1 to 16      0 to L - 16    decode steps and verification of drafts
======= ============ ============== ========================================
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch

from effpass.core.errors import ExportError
from effpass.core.strict_json import parse_json
from effpass.lowering.targets.decode_graph import DecodeGraph, Step
from effpass.lowering.targets.device import CPU
from effpass.lowering.targets.limits import Limits, model_length
from effpass.lowering.targets.onnx import OnnxTarget
from effpass.lowering.targets.publish import sha256
from effpass.lowering.targets.target import Target

__all__ = ["TensorRTTarget", "build_engine"]

# Modules of TensorRT, of TensorRT for RTX, and of the latter's wheels for one CUDA version, in order of preference.
_MODULES = ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings")

# Compute capabilities to build for, Ampere to Blackwell. TensorRT for RTX is not made for Hopper and other data-centre
# GPUs.
_CAPABILITIES = ("SM80", "SM86", "SM89", "SM120")

# Default batch size and length. They are small because an engine reserves activation memory for its largest sizes.
_BATCH, _LENGTH = 1, 2048
_DRAFT = 16  # largest number of new tokens of the decode profile


class TensorRTTarget(Target):
    """Builds TensorRT engines; see the module docstring."""

    name: ClassVar[str] = "tensorrt"
    suffix: ClassVar[str] = ".engine"
    extra: ClassVar[str] = "onnx,tensorrt"
    dtypes: ClassVar[tuple[torch.dtype, ...]] = OnnxTarget.dtypes
    native: ClassVar[bool] = True
    executes: ClassVar[bool] = False
    checked_by: ClassVar[str] = "onnxruntime, as the ONNX file that the engine is built from; the engine is not run"

    def require_installed(self, device: str) -> None:
        if not any(find_spec(name) for name in _MODULES):
            raise ExportError(
                "exporting to tensorrt needs tensorrt or tensorrt_rtx, not installed here",
                hint=f"pip install 'effpass[{self.extra}]'",
            )
        OnnxTarget().require()

    def limits(self, model: Any, max_batch: int | None, max_length: int | None) -> Limits:
        return Limits(max_batch or _BATCH, max_length or min(_LENGTH, model_length(model) or _LENGTH))

    def machine(self, device: torch.device = CPU) -> dict[str, str]:
        trt = _tensorrt()
        capabilities = ",".join(_CAPABILITIES) if _for_rtx(trt) else "of the building machine"
        return {trt.__name__.removesuffix("_bindings"): trt.__version__, "compute capabilities": capabilities}

    def memory(self, dtype: torch.dtype) -> float:
        return OnnxTarget().memory(dtype) + 2.2

    def write(self, graph: DecodeGraph, file: Path, limits: Limits) -> Limits:
        return OnnxTarget().write(graph, _source(file), limits)

    def load_written(self, file: Path, device: torch.device) -> Step:
        return OnnxTarget().load_written(_source(file), device)

    def finish(self, file: Path, limits: Limits) -> None:
        engine = build_engine(_source(file), limits)
        with file.open("wb") as out:
            out.write(engine)

    def load(self, file: Path, device: torch.device) -> Step:
        raise ExportError(
            f"effpass does not run TensorRT engines such as {file.name}",
            hint="run it with TensorRT on a GPU of a compute capability that it was built for",
        )

    def stamp(self, file: Path, metadata: Mapping[str, str]) -> None:
        (record,) = self.beside(file)
        record.write_text(json.dumps(dict(metadata), indent=1), encoding="utf-8")

    def read(self, file: Path) -> dict[str, str]:
        (record,) = self.beside(file)
        try:
            content = parse_json(record.read_bytes())
        except (OSError, ValueError) as error:
            raise ExportError(
                f"{record} can't be read: {error}", hint="keep it beside its engine: it holds what was checked"
            ) from error
        if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
            raise ExportError(f"{record} is no record of an export")
        return content

    def digest(self, file: Path) -> str:
        with file.open("rb") as stream:
            return sha256(stream)

    def beside(self, file: Path) -> list[Path]:
        return [file.with_name(f"{file.name}.json")]


def _source(file: Path) -> Path:
    """Return the path of the ONNX file that the engine `file` is built from."""
    return file.with_suffix(".onnx")


def _tensorrt() -> Any:
    installed = [name for name in _MODULES if find_spec(name)]
    if not torch.cuda.is_available():
        installed.sort(key="tensorrt".__eq__)  # last, since it builds on a GPU only
    return importlib.import_module(installed[0])


def _for_rtx(trt: Any) -> bool:
    return hasattr(trt.IBuilderConfig, "set_compute_capability")


def build_engine(source: Path, limits: Limits) -> Any:
    """Build an engine and return it as a serialized buffer.

    Args:
        source: path of the ONNX file of a decode graph.
        limits: sizes that the engine must accept; where they are None, one sequence and 2048 positions.

    Raises:
        ExportError: if TensorRT can't read the graph, support the sizes, or build the engine.
    """
    trt = _tensorrt()
    errors: list[str] = []

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                errors.append(message)

    log = Log()
    builder = trt.Builder(log)
    if builder is None or not hasattr(builder, "create_network"):
        raise ExportError(f"TensorRT can't start: {'; '.join(errors)}")
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        error = parser.get_error(0)
        raise ExportError(
            f"TensorRT can't read the graph: {error.desc()} (node {error.node_name()}, {error.node_operator()})",
            hint="export to ONNX instead, or leave out the pass that brings the operator in",
        )
    config = builder.create_builder_config()
    if _for_rtx(trt):
        config.num_compute_capabilities = len(_CAPABILITIES)
        for index, name in enumerate(_CAPABILITIES):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    batch, length = limits.batch or _BATCH, limits.length or _LENGTH
    drafted = min(_DRAFT, length - 1)
    half = (length - drafted) // 2
    for tokens, past in (((1, length // 2, length), (0, 0, 0)), ((1, 1, drafted), (0, half, length - drafted))):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            shapes = []
            for b, t, p in zip((1, 1, batch), tokens, past, strict=True):
                shape = list(tensor.shape)
                axis = {"attention_mask": (1, p + t), "input_ids": (1, t), "position_ids": (1, t)}
                dim, size = axis.get(tensor.name, (2, p))
                shape[0] = b
                if shape[dim] == -1:  # not in the state of linear attention, which has no past
                    shape[dim] = size
                shapes.append(shape)
            profile.set_shape(tensor.name, *shapes)
        if config.add_optimization_profile(profile) < 0:
            raise ExportError(f"TensorRT refuses a batch of {batch} and a length of {length}: {'; '.join(errors)}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(
            f"TensorRT can't build the engine: {'; '.join(errors)[:500] or 'it does not say why'}",
            hint="a smaller max_batch or max_length (--max-batch, --max-length) needs less memory",
        )
    return engine
