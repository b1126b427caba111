"""The ONNX target: an exported program as a file of standard ONNX operators, checked with onnxruntime.

Names, layout and axes follow Optimum. Weights of more than 2 GB are stored next to the file, in ``{file}.data``.
:func:`export_onnx` also writes programs that are not decode graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.export import ExportedProgram

from effpass.core.errors import ExportError
from effpass.lowering.targets.decode_graph import DecodeGraph, Step
from effpass.lowering.targets.limits import Limits
from effpass.lowering.targets.manifest import PREFIX, digest_of
from effpass.lowering.targets.publish import check_output, published, sha256
from effpass.lowering.targets.target import Target

__all__ = ["OnnxTarget", "export_onnx", "onnx_step"]


@dataclass(frozen=True)
class OnnxTarget(Target):
    """Writes ONNX files; see the module docstring.

    Attributes:
        external_data: whether weights are stored in ``{file}.data``; None stores them there if they exceed 2 GB.
    """

    name: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    extra: ClassVar[str] = "onnx"
    # onnxruntime's CPU kernels lack bfloat16.
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.float32, torch.float16)
    checked_by: ClassVar[str] = "onnxruntime on the CPU"

    external_data: bool | None = None

    def limits(self, model: Any, max_batch: int | None, max_length: int | None) -> Limits:
        return Limits(max_batch, max_length)  # the file accepts any size; the model's own limit is left to the caller

    def memory(self, dtype: torch.dtype) -> float:
        # onnxruntime has few CPU kernels for float16 and computes with float32 copies instead.
        return 1.3 if dtype == torch.float32 else 3.5

    def write(self, graph: DecodeGraph, file: Path, limits: Limits) -> Limits:
        write_onnx(
            graph.program,
            file,
            input_names=graph.input_names,
            output_names=graph.output_names,
            axes=graph.axes,
        )
        return limits

    def load_written(self, file: Path, device: torch.device) -> Step:
        """Load the file while its weights are still external, so that onnxruntime maps instead of copying them."""
        return onnx_step(file, as_stored=True)

    def finish(self, file: Path, limits: Limits) -> None:
        from effpass.lowering.targets import onnx_file

        onnx_file.embed(file, data_file(file), external_data=self.external_data)

    def stamp(self, file: Path, metadata: Mapping[str, str]) -> None:
        from effpass.lowering.targets import onnx_file

        onnx_file.append_metadata(file, metadata)

    def load(self, file: Path, device: torch.device) -> Step:
        return onnx_step(file)

    def read(self, file: Path) -> dict[str, str]:
        from effpass.lowering.targets import onnx_file

        try:
            return onnx_file.metadata(file)
        except (ValueError, OSError) as error:
            raise ExportError(f"{file.name} is no whole ONNX file: {error}", hint="copy or export it again") from error
        except Exception as error:  # protobuf's DecodeError has no public base class
            raise ExportError(f"{file.name} is no ONNX file: {error}") from error

    def digest(self, file: Path) -> str:
        from effpass.lowering.targets import onnx_file

        parts = [onnx_file.digest(file, PREFIX)]
        for data in self.beside(file):
            if data.exists():
                with data.open("rb") as stream:
                    parts.append(sha256(stream))
        return digest_of(parts)

    def beside(self, file: Path) -> list[Path]:
        return [data_file(file)]


def write_onnx(
    program: ExportedProgram,
    file: Path,
    *,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    axes: Mapping[str, Mapping[int, str]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write `program` to `file`, with its weights in ``{file}.data``.

    Args:
        program: the program, from ``torch.export``, not decomposed.
        file: path of the .onnx file.
        input_names: names of the inputs, in order; None keeps the program's.
        output_names: names of the outputs, in order; None keeps the program's.
        axes: names of dynamic dimensions by input name and dimension; None keeps the program's symbols.
        metadata: metadata to store in the file.
    """
    from effpass.lowering.targets import onnx_file
    from effpass.lowering.targets.onnx_translate import translate

    model = translate(program, input_names, output_names, axes or {})
    model.metadata_props.update(metadata or {})
    onnx_file.save(model, file, data_file(file))


def export_onnx(
    program: ExportedProgram,
    path: Path,
    *,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    external_data: bool | None = None,
) -> None:
    """Write any exported program as an ONNX file, atomically and without checking its outputs.

    Args:
        program: the program, from ``torch.export``, rewritten or not, but not decomposed.
        path: path of the .onnx file.
        metadata: metadata to store in the file.
        overwrite: whether to replace an existing file.
        external_data: whether weights are stored in ``{path}.data``; None stores them there if they exceed 2 GB.

    Raises:
        ExportError: if an operator has no ONNX translation (the message names operator and node), or `path` can't be
            written.
    """
    path = Path(path).absolute()
    target = OnnxTarget(external_data)
    target.require()
    check_output(path, target, overwrite=overwrite)
    with published(path, target) as file:
        write_onnx(program, file, metadata=metadata)
        target.finish(file, Limits())


def onnx_step(path: Path, *, as_stored: bool = False) -> Step:
    """Load an exported decoder as a function ``(input_ids, attention_mask, position_ids, *past) -> outputs``.

    Args:
        path: path of the .onnx file.
        as_stored: whether to compute with the stored weights, without the copies in a faster layout that onnxruntime
            otherwise makes (prepacking).

    Raises:
        ExportError: if onnxruntime can't load the file.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    if as_stored:
        options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} can't load {path.name}: {' '.join(str(error).split())}"
        ) from error
    names = [i.name for i in session.get_inputs()]

    def step(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: t.contiguous().numpy() for name, t in zip(names, inputs, strict=True)}
        try:
            return [torch.from_numpy(array) for array in session.run(None, feeds)]
        except Exception as error:  # onnxruntime's errors share no base class
            raise ExportError(f"onnxruntime can't run {path.name}: {' '.join(str(error).split())}") from error

    return step


def data_file(path: Path) -> Path:
    """Return the path of the external weights of the ONNX file `path`."""
    return path.with_name(f"{path.name}.data")
