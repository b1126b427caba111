"""The Inductor target: the rewritten graph and its weights in one ``.safetensors`` file, compiled when it is loaded.

The file contains no code and runs on any machine with PyTorch and a compiler. Weights are stored under the model's own
names, so that other tools can read them, and the graph is stored as text in the file's metadata
(:mod:`effpass.lowering.targets.graph_text`).
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing

from effpass.core.errors import ArtifactError, ExportError
from effpass.core.strict_json import parse_json
from effpass.core.tensor_file import check_safetensors, read_safetensors
from effpass.lowering.targets.assumptions import any_size
from effpass.lowering.targets.cache_layers import CacheLayer
from effpass.lowering.targets.decode_graph import DecodeGraph, Step
from effpass.lowering.targets.device import DEVICES
from effpass.lowering.targets.graph_text import graph_from_text, graph_to_text
from effpass.lowering.targets.limits import Limits, check_indices
from effpass.lowering.targets.manifest import PREFIX, digest_of
from effpass.lowering.targets.publish import sha256
from effpass.lowering.targets.target import Target, compile_error
from effpass.lowering.targets.tolerance import require_cpp_compiler, require_triton
from effpass.lowering.targets.tracing import plain_attention, relate_sizes, trace

__all__ = ["InductorTarget"]

_GRAPH = "graph"
_ALIGNMENT = 64  # bytes; the alignment of PyTorch's allocator, which its int8 matrix products on the CPU rely on


class InductorTarget(Target):
    """Writes graph and weights into a safetensors file; see the module docstring."""

    name: ClassVar[str] = "inductor"
    suffix: ClassVar[str] = ".safetensors"
    devices: ClassVar[tuple[str, ...]] = DEVICES
    checked_by: ClassVar[str] = "Inductor"

    def require_installed(self, device: str) -> None:
        if device == "cpu":
            require_cpp_compiler(self.name)
        require_triton(self.name, device)

    def memory(self, dtype: torch.dtype) -> float:
        return 1.3

    def write(self, graph: DecodeGraph, file: Path, limits: Limits) -> Limits:
        from safetensors.torch import save_file

        text, tensors = graph_to_text(graph.program)
        text["cache"] = [layer.to_json() for layer in graph.layers]
        text["dtype"] = str(graph.dtype).removeprefix("torch.")
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, file, metadata={_GRAPH: json.dumps(text)})
        return limits  # 32-bit index limits are only known after compilation, in `load`

    def load(self, file: Path, device: torch.device) -> Step:
        """Load and compile a file, which takes seconds for a small model and minutes for a large one.

        See :meth:`Target.load`.
        """
        metadata = _header(file)[0]
        if _GRAPH not in metadata:
            raise ExportError(f"{file.name} holds weights only, no graph", hint="`effpass export` writes both")
        try:
            tensors = {name: _aligned(tensor.to(device)) for name, tensor in read_safetensors(file).items()}
            text = parse_json(metadata[_GRAPH].encode())
            layers = [CacheLayer(*map(int, sizes)) for sizes in text["cache"]]
            dtype = getattr(torch, text["dtype"])
            module = graph_from_text(text, tensors)
        except (ArtifactError, ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{file.name}: its graph can't be read: {error}") from error
        try:
            return _compiled(module, text["inputs"], layers, dtype, device, file.name)
        except ExportError:
            raise
        except Exception as error:  # Inductor raises exceptions of any type
            raise compile_error("Inductor", error) from error

    def stamp(self, file: Path, metadata: Mapping[str, str]) -> None:
        """Rewrite the header with the metadata added, and copy the weights unchanged."""
        old, header, start = _header(file)
        header["__metadata__"] = {**old, **metadata}
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNMENT)  # most tensors stay aligned and need no copy in `load`
        stamped = file.with_name(f"{file.name}.stamped")
        with file.open("rb") as source, stamped.open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            source.seek(start)
            shutil.copyfileobj(source, out, 1 << 24)
        stamped.replace(file)

    def read(self, file: Path) -> dict[str, str]:
        return _header(file)[0]

    def digest(self, file: Path) -> str:
        metadata, header, start = _header(file)
        del header["__metadata__"]
        other = {k: v for k, v in metadata.items() if not k.startswith(PREFIX)}
        with file.open("rb") as stream:
            stream.seek(start)
            return digest_of([json.dumps([header, other], sort_keys=True), sha256(stream)])


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor


def _header(file: Path) -> tuple[dict[str, str], dict[str, Any], int]:
    """Return the metadata, the whole header, and the byte offset of the tensors.

    Raises:
        ExportError: if `file` is no complete safetensors file.
    """
    try:
        header, start = check_safetensors(file)
    except ArtifactError as error:
        raise ExportError(error.message, hint=error.hint) from error
    return header.setdefault("__metadata__", {}), header, start


def _compiled(
    module: torch.nn.Module,
    names: Sequence[str],
    layers: Sequence[CacheLayer],
    dtype: torch.dtype,
    device: torch.device,
    what: str,
) -> Step:
    """Compile `module` once for all sizes; `torch.compile` would compile it again for sizes of 0 and 1."""

    def forward(*inputs: Tensor) -> Any:
        relate_sizes(layers, *inputs)
        return type(module).forward(module, *inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
    module.forward = forward  # type: ignore[assignment]
    program = trace(module, names, layers, dtype, device)
    weights = [
        program.state_dict.get(str(spec.target), program.constants.get(str(spec.target)))
        for spec in program.graph_signature.input_specs
        if spec.target is not None
    ]
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    # By default Inductor replaces the size symbols of an exported graph, which hides guards on them from `any_size`.
    same_sizes = tracing(TracingContext(values[0].fake_mode))
    with torch.no_grad(), any_size(program, "Inductor") as indices, plain_attention(device), same_sizes:
        compiled = torch._inductor.standalone_compile(
            program.graph_module, values, dynamic_shapes="from_tracing_context"
        )

    def step(*inputs: Tensor) -> Sequence[Tensor]:
        (batch, tokens), past = inputs[0].shape, inputs[3].shape[2]
        check_indices(indices, batch, tokens, past, what)
        with torch.no_grad():
            return compiled(*weights, *inputs)

    return step
