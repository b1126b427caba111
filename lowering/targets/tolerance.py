"""What an export may differ: four times the spread between right evaluations of the same program.

The *spread* of a case is the largest difference to the recording that exports are compared with, for the same inputs
and dtype. It is measured at each export and stored with the file. Three more evaluations are made, of all cases as one
batch:

* PyTorch's operators, all tokens at once;
* PyTorch's operators, one token at a time;
* Inductor's kernels, all tokens at once. Inductor compiles the program layer by layer: layers that are alike are
  compiled once and run in turn, so that thirty layers cost the compilation of one. What is lost is fusion across the
  border of two layers.

The first two are there because Inductor and PyTorch call the same matrix product and share its roundings; other
runtimes do not. And the spread is each case's own because a model amplifies roundings at some tokens and not at others.

The tolerance lies between two bounds. *At least* :data:`FLOOR` roundings a layer: the spread of a small model may be 0
by chance. *At most* :data:`~effpass.lowering.targets.validation.TOLERANCE`: a spread above a quarter of it does not
come from rounding. Without a C++ compiler Inductor makes no kernels for the CPU, and the spread is that of the first
two.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from effpass.core.errors import ExportError
from effpass.lowering.targets.decode_graph import DecodeGraph, Step
from effpass.lowering.targets.validation import (
    TOLERANCE,
    DecodeCase,
    Recording,
    Tolerance,
    largest_difference,
    largest_value,
    record_step,
)

__all__ = [
    "FACTOR",
    "FLOOR",
    "layers_compiled",
    "measure_tolerance",
    "one_batch",
    "require_cpp_compiler",
    "require_shared_cpp_runtime",
    "require_triton",
]

FACTOR = 4

# In roundings of the largest value a layer: each adds its own to those of the layers before.
FLOOR = 4

_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


def measure_tolerance(graph: DecodeGraph, cases: Sequence[DecodeCase], rewritten: Sequence[Recording]) -> Tolerance:
    """The tolerance for exports of `graph`, case by case.

    Args:
        graph: the rewritten graph.
        cases: what exports are checked with.
        rewritten: recordings of `graph` on them, which exports are compared with.
    """
    others, missing = _other_evaluations(graph, cases)
    most = TOLERANCE[graph.dtype]
    least = min(FLOOR * len(graph.layers) * torch.finfo(graph.dtype).eps, most)
    logits, cache = [], []
    for index, reference in enumerate(rewritten):
        same = [evaluation[index] for evaluation in others]
        spread = max(largest_difference([other.logits], [reference.logits]) for other in same)
        scale = largest_value([reference.logits])
        logits.append(min(max(FACTOR * spread, least * scale), most * scale))
        spread = max(largest_difference(other.cache, reference.cache) for other in same)
        scale = largest_value(reference.cache)
        cache.append(min(max(FACTOR * spread, least * scale), most * scale))
    why = f"{FACTOR} times the spread of right evaluations, {least:.1e} to {most:.0e} of the largest value"
    return Tolerance(tuple(logits), tuple(cache), why + missing)


def _other_evaluations(graph: DecodeGraph, cases: Sequence[DecodeCase]) -> tuple[list[list[Recording]], str]:
    """Recordings of all cases by each other way to evaluate, and what is missing."""
    at_once = one_batch(cases)
    one_by_one = replace(at_once, chunks=(1,) * sum(at_once.chunks))
    eager = graph.module()

    def record(step: Step, case: DecodeCase) -> Recording:
        return record_step(step, graph.layers, graph.dtype, [case], graph.device)[0]

    found = [record(eager, case) for case in (at_once, one_by_one)]
    missing = ""
    if graph.device.type == "cpu" and not has_cpp_compiler():
        missing = "; without Inductor: there is no C++ compiler"
    else:
        try:
            found.append(record(layers_compiled(eager), at_once))
        except Exception as error:  # Inductor raises whatever its parts do
            missing = f"; without Inductor, which can't compile the program: {type(error).__name__}"
    sizes = [int(case.attention_mask.sum()) for case in cases]
    rows = [len(case.input_ids) for case in cases]
    kinds = [layer for layer in graph.layers for _ in layer.parts]
    logits = [recording.logits.split(sizes) for recording in found]
    caches = [
        [tensor.split(sizes if of.grows else rows) for of, tensor in zip(kinds, recording.cache, strict=True)]
        for recording in found
    ]
    return [
        [Recording(part, [tensor[i] for tensor in cache]) for i, part in enumerate(parts)]
        for parts, cache in zip(logits, caches, strict=True)
    ], missing


def one_batch(cases: Sequence[DecodeCase]) -> DecodeCase:
    """All sequences of all cases in one call, padded on the left: one set of sizes to compile for."""
    length = max(case.input_ids.shape[1] for case in cases)

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (length - tensor.shape[1], 0))

    ids = torch.cat([padded(case.input_ids) for case in cases])
    mask = torch.cat([padded(case.attention_mask) for case in cases])
    return DecodeCase("all cases", ids, mask, (length,))


def require_cpp_compiler(target: str) -> None:
    """Raise an :class:`ExportError` when there is no compiler for the C++ that Inductor writes for `target`."""
    if not has_cpp_compiler():
        raise ExportError(
            f"exporting to {target} needs a C++ compiler, and Inductor finds none here",
            hint="install g++ or clang, or name one in the environment variable CXX",
        )


def require_shared_cpp_runtime(target: str) -> None:
    """Raise an :class:`ExportError` when the C++ compiler puts its own copy of libstdc++ into a library.

    Beside torch's, which is in the process already, such a file crashes the process that loads it.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    compiler = get_cpp_compiler()
    if _links_a_copy(compiler):
        raise ExportError(
            f"{compiler} links libstdc++ statically, and {target} files so linked crash when they are loaded",
            hint="name a compiler with a shared libstdc++ in the environment variable CXX, such as /usr/bin/g++",
        )


@functools.cache
def _links_a_copy(compiler: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "a.cpp", Path(folder) / "a.so"
        source.write_text("#include <locale>\nbool f() { return std::has_facet<std::collate<char>>(std::locale()); }\n")
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library), "-Wl,-t"]  # -t: say what is linked
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and "libstdc++.a" in done.stdout + done.stderr


def require_triton(target: str, device: str) -> None:
    """Raise an :class:`ExportError` when `device` is a GPU and Triton, which compiles its kernels, is missing."""
    if device != "cpu" and find_spec("triton") is None:
        raise ExportError(
            f"exporting to {target} on a GPU needs triton, not installed here",
            hint="pip install triton, the version that this version of torch asks for; or --device cpu",
        )


def has_cpp_compiler() -> bool:
    """Whether Inductor finds the compiler that its CPU kernels need."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError, RuntimeError):
        return False
    return True


def layers_compiled(module: Any) -> Callable[..., Sequence[Tensor]]:
    """`module` split between its layers, each distinct one compiled by Inductor when it is first called."""
    from torch.fx.passes.split_module import split_module

    part, last = 0, ""

    def part_of(node: fx.Node) -> int:
        nonlocal part, last
        stack = node.meta.get("nn_module_stack")
        if node.op == "call_function" and stack:
            found = _LAYER.search(list(stack.values())[-1][0])
            layer = found[1] if found else ""
            if layer != last:
                part, last = part + 1, layer
        return part

    split = split_module(module, None, part_of, keep_original_order=True)  # type: ignore[arg-type]
    compiled: dict[Any, Callable[..., Any]] = {}
    for name, child in split.named_children():
        if not isinstance(child, fx.GraphModule):
            continue
        key = _structure(child.graph)
        if key not in compiled:
            compiled[key] = torch.compile(child, dynamic=False, fullgraph=True)
        setattr(split, name, _Call(compiled[key]))
    return split


class _Call(torch.nn.Module):
    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.call = [function]  # in a list: no submodule, so that its weights have one place

    def forward(self, *args: Any) -> Any:
        return self.call[0](*args)


def _structure(graph: fx.Graph) -> Any:
    """Equal for graphs that differ in names only; a graph with weights of its own equals itself alone."""
    place = {node: index for index, node in enumerate(graph.nodes)}
    if any(node.op == "get_attr" for node in graph.nodes):
        return id(graph)
    return tuple(
        (
            node.op,
            str(node.target) if node.op == "call_function" else "",
            str(fx.node.map_arg((node.args, node.kwargs), lambda n: f"%{place[n]}")),
        )
        for node in graph.nodes
    )
