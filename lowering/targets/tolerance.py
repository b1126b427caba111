"""The tolerance of an export check, measured as four times the spread between correct evaluations of the program.

An exported file is compared with a recording of the rewritten program (:mod:`effpass.lowering.targets.validation`). The
*spread* of a test case is the largest difference between this recording and three other evaluations of the same
program, with the same inputs and dtype. It is measured at each export, per test case, since a model amplifies rounding
errors at some tokens and not at others, and the resulting tolerance is stored with the file. The evaluations, which run
all cases as one batch, are:

* PyTorch's operators, all tokens at once;
* PyTorch's operators, one token at a time;
* Inductor's kernels, all tokens at once. The program is compiled layer by layer, and equal layers share one compiled
  function, so that thirty layers cost the compilation of one. Only fusion across layer boundaries is lost.

The first two are needed because Inductor and PyTorch call the same matrix products and therefore share their rounding
errors, which other runtimes do not.

The tolerance is bounded on both sides. It is at least :data:`FLOOR` rounding errors per layer, because the spread of a
small model may be 0 by chance. It is at most :data:`~effpass.lowering.targets.validation.TOLERANCE`, because a spread
of more than a quarter of this value does not come from rounding. Without a C++ compiler Inductor can't generate CPU
kernels, and the spread is that of the first two evaluations.
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

# Tolerance as a multiple of the spread.
FACTOR = 4

# Smallest tolerance per layer, in units of the dtype's epsilon times the largest value. It grows with the number of
# layers, since rounding errors accumulate over them.
FLOOR = 4

_LAYER = re.compile(r"\.(\d+)(?:\.|$)")


def measure_tolerance(graph: DecodeGraph, cases: Sequence[DecodeCase], rewritten: Sequence[Recording]) -> Tolerance:
    """Measure the tolerance for exports of `graph`, per test case.

    Args:
        graph: the rewritten graph.
        cases: test cases of the export check.
        rewritten: recordings of `graph` on `cases`, which the exported file is compared with.
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
    """Return one recording per case for each alternative evaluation, and a remark on an evaluation that is missing."""
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
        except Exception as error:  # Inductor raises exceptions of any type
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
    """Combine all sequences of all cases into one left-padded batch, so that Inductor compiles for one set of sizes."""
    length = max(case.input_ids.shape[1] for case in cases)

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (length - tensor.shape[1], 0))

    ids = torch.cat([padded(case.input_ids) for case in cases])
    mask = torch.cat([padded(case.attention_mask) for case in cases])
    return DecodeCase("all cases", ids, mask, (length,))


def require_cpp_compiler(target: str) -> None:
    """Raise an :class:`ExportError` if there is no compiler for the C++ code that Inductor generates for `target`."""
    if not has_cpp_compiler():
        raise ExportError(
            f"exporting to {target} needs a C++ compiler, and Inductor finds none here",
            hint="install g++ or clang, or name one in the environment variable CXX",
        )


def require_shared_cpp_runtime(target: str) -> None:
    """Raise an :class:`ExportError` if the C++ compiler links libstdc++ statically into shared libraries.

    PyTorch has already loaded a shared libstdc++, and a library with a second copy crashes the process that loads it.
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
        command = [compiler, "-shared", "-fPIC", str(source), "-o", str(library), "-Wl,-t"]  # -t: print linked files
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode == 0 and "libstdc++.a" in done.stdout + done.stderr


def require_triton(target: str, device: str) -> None:
    """Raise an :class:`ExportError` if `device` is a GPU and Triton, which compiles Inductor's kernels, is missing."""
    if device != "cpu" and find_spec("triton") is None:
        raise ExportError(
            f"exporting to {target} on a GPU needs triton, not installed here",
            hint="pip install triton, the version that this version of torch asks for; or --device cpu",
        )


def has_cpp_compiler() -> bool:
    """Whether Inductor finds the C++ compiler that its CPU kernels need."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError, RuntimeError):
        return False
    return True


def layers_compiled(module: Any) -> Callable[..., Sequence[Tensor]]:
    """Split `module` at its layer boundaries, and compile each distinct part with Inductor on its first call."""
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
        self.call = [function]  # in a list, so that it is not registered as a submodule a second time

    def forward(self, *args: Any) -> Any:
        return self.call[0](*args)


def _structure(graph: fx.Graph) -> Any:
    """Return a key that is equal for graphs that differ in names only; graphs that hold weights are never equal."""
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
