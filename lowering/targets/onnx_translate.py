"""Translation of a `torch.export` program into an ONNX model in memory.

:func:`translate` runs PyTorch's exporter with the additional translations and the clean-up of
:mod:`effpass.lowering.targets.onnx_ops`. This module imports onnxscript, an optional dependency, so import it lazily.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir
import torch
from torch.export import ExportedProgram

from effpass.core.errors import ExportError
from effpass.lowering.targets import onnx_ops

__all__ = ["OPSET", "translate"]

# The oldest opset that the exporter's translations support; runtimes of recent years have all of its operators.
OPSET = 18

# Namespaces whose operators the exporter translates or decomposes; others need an entry in `onnx_ops.translations`.
_KNOWN_NAMESPACES = ("aten", "prims", "onnx", "onnx_symbolic", "quantized_decomposed")

# Hints for operators that no pass brings in, by name; others get a general one.
_HINTS = {
    "effpass.gated_delta_rule_step.default": "it writes its state in place, and ONNX has no such operators: call"
    " gated_delta_rule, which returns the new state, for one token too",
}


def translate(
    program: ExportedProgram,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
    axes: Mapping[str, Mapping[int, str]],
) -> onnx_ir.Model:
    """Translate `program` into an ONNX model whose weights are still PyTorch tensors.

    Args:
        program: the program, from ``torch.export``, rewritten or not, but not decomposed.
        input_names: names of the user inputs, in order; None keeps the program's.
        output_names: names of the outputs, in order; None keeps the program's.
        axes: names of dynamic dimensions by input name and dimension, which replace the program's symbols everywhere.

    Raises:
        ExportError: if an operator has no ONNX translation; the message names operator and node.
    """
    table = onnx_ops.translations()
    _refuse_untranslatable(program, table)
    try:
        with _quiet():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,  # onnx_ops.tidy does it
                custom_translation_table=table,
                input_names=input_names,
                output_names=output_names,
                verbose=False,
            )
            assert exported is not None
            onnx_ops.tidy(exported.model)
    except torch.onnx.errors.OnnxExporterError as error:
        raise _translation_error(error) from error
    _name_axes(exported.model, axes)
    return exported.model


def _refuse_untranslatable(program: ExportedProgram, table: Mapping[Any, Any]) -> None:
    """Raise an :class:`ExportError` for an operator without translation, which the exporter would find in minutes."""
    implicit = torch._C.DispatchKey.CompositeImplicitAutograd
    for module in program.graph_module.modules():
        for node in getattr(getattr(module, "graph", None), "nodes", ()):
            target = node.target
            if not isinstance(target, torch._ops.OpOverload) or target in table:
                continue
            if target.namespace not in _KNOWN_NAMESPACES and not target.has_kernel_for_dispatch_key(implicit):
                raise _no_translation(str(target), node.name)


def _no_translation(operator: str, node: str) -> ExportError:
    return ExportError(
        f"the operator {operator} (node {node}) has no ONNX translation",
        hint=_HINTS.get(operator, "leave out the pass that brings it in, or use torch.compile(backend='effpass')"),
    )


def _translation_error(error: BaseException) -> ExportError:
    """Summarize the exporter's chain of exceptions in one sentence."""
    node, operator, text = "", "", str(error)
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if found := re.search(r"translating node %(\S+) : .*?target=([^\]]+)\]", text):
            node, operator = found.groups()
        if found := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>", text):
            return _no_translation(".".join(found.groups()), node)
        cause = cause.__cause__
    where = f" {operator} (node {node})" if node else ""
    return ExportError(f"the exporter can't translate{where}: {' '.join(text.split())[:500]}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Context manager that silences the exporter's warnings, none of which a user could act on.

    They are about optional packages and about the exporter's own code.
    """
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_axes(model: onnx_ir.Model, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Replace symbols such as s17 by the names given to the inputs' dimensions, in all shapes."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in axes.get(value.name or "", {}).items():
            symbol = None if value.shape is None else getattr(value.shape[axis], "value", None)
            if isinstance(symbol, str) and symbol.isidentifier():
                names[symbol] = name

    def named(dim: Any) -> Any:
        text = getattr(dim, "value", None)
        return re.sub(r"\bs\d+\b", lambda m: names.get(m[0], m[0]), text) if isinstance(text, str) else dim

    values = [*model.graph.inputs, *(v for node in model.graph.all_nodes() for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([named(d) for d in value.shape])
