"""Front end for `torch.compile`: turns a graph from Dynamo into a program.

Dynamo passes its backend a graph of torch-level calls. :mod:`effpass.core.retrace` translates them to pre-dispatch ATen
on fake tensors. Six properties must be preserved, each of which was once violated:

* Higher-order operators are not decomposed (executing `autograd_function_apply` silently loses gradients).
* A Python float that Dynamo lifted to an input (``dynamic=True``) keeps the SymFloat that Dynamo recorded for its
  ``.item()``.
* The metadata that makes weights *static* inputs is carried over (without it, CUDA graphs copy them at each replay).
* Autocast regions are recorded and also entered while tracing (if only recorded, the dtypes inside them are wrong).
* The retrace has its own fake mode, so that the in-place writes it traces do not affect the one that AOTAutograd uses.
* `TensorifyScalarRestartAnalysis` is control flow of Dynamo, not an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.source import ConstantSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Node

from effpass.core.errors import RewriteError
from effpass.core.normalize import normalize
from effpass.core.program import Program, Weight
from effpass.core.retrace import copy_placeholders, like, retrace

__all__ = ["NotRetraceableError", "program_from_dynamo", "source_name", "weight_names"]

# Transforms that keep their state outside the graph: executing these nodes under a tracer would nest or lose levels.
_FUNCTORCH = re.compile(
    r"vmap_(in|de)crement|_add_batch_dim|_remove_batch_dim|(grad|jvp)_(in|de)crement|_wrap_for_grad"
)


class NotRetraceableError(Exception):
    """The graph uses a transform that can't be retraced; the caller compiles it unchanged."""


def program_from_dynamo(gm: GraphModule, example_inputs: Sequence[Any], prefix: str = "") -> Program:
    """Retrace a graph from Dynamo into the dialect. `gm` itself is not changed.

    Args:
        gm: graph module that Dynamo passes to a backend.
        example_inputs: inputs of the graph in this call: real tensors, SymInts and ints.
        prefix: prefix of weight names, prepended to names relative to the compiled module. For a submodule, its name
            in the whole model with a trailing dot.

    Raises:
        NotRetraceableError: the graph contains functorch levels (vmap, func.grad).
        RewriteError: the retrace failed for another reason.
    """
    for node in gm.graph.nodes:
        if node.op == "call_function" and _FUNCTORCH.search(getattr(node.target, "__name__", "")):
            raise NotRetraceableError(
                f"it uses {node.target.__name__} (torch.vmap or torch.func), which can't be retraced"
            )
    try:
        with _own_fake_mode() as fake_mode:
            fakes = [_fakeify(fake_mode, x) for x in example_inputs]
            retraced = retrace(gm, fakes, fake_mode)
        # Dynamo does the same with its fake mode: torch.utils.swap_tensors refuses tensors with weak references.
        fake_mode.fake_tensor_converter.meta_converter.describer.lookup_tensor.clear()
    except TensorifyScalarRestartAnalysis:
        raise
    except Exception as error:
        raise RewriteError(
            f"the graph could not be retraced: {type(error).__name__}: {error}",
            hint="compile with options={'passes': []} to run it unrewritten, and report this graph",
        ) from error
    _carry_metadata(gm, retraced.gm)
    weights = _weights(retraced.gm, example_inputs, prefix)
    program = Program(retraced.gm, "dynamo", weights, list(example_inputs), torch.is_grad_enabled(), prefix=prefix)
    program.bodies = [_body_program(program, node, position) for node, position in retraced.bodies]
    normalize(program)
    return program


@contextmanager
def _own_fake_mode() -> Iterator[FakeTensorMode]:
    """Use a fresh fake mode over the current ShapeEnv for the duration of one retrace."""
    context = TracingContext.try_get()
    outer = context.fake_mode if context is not None else None
    fake_mode = FakeTensorMode(shape_env=outer.shape_env if outer is not None else None, allow_non_fake_inputs=True)
    if context is None:
        yield fake_mode
        return
    context.fake_mode = fake_mode
    try:
        yield fake_mode
    finally:
        context.fake_mode = outer


def _fakeify(fake_mode: FakeTensorMode, x: Any) -> Any:
    """The fake value of an input, with the symbols that Dynamo chose for the same input."""
    if not isinstance(x, torch.Tensor):
        return x
    if isinstance(x, FakeTensor):
        return x if x.fake_mode is fake_mode else like(fake_mode, x)
    context = TracingContext.try_get()
    symbolic = context.tensor_to_context.get(x) if context is not None else None
    if symbolic is None:
        return fake_mode.from_tensor(x, static_shapes=True)
    return fake_mode.from_tensor(x, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)


def _carry_metadata(old: GraphModule, new: GraphModule) -> None:
    copy_placeholders(old, new)
    new.meta.update(old.meta)
    if hasattr(old, "_backend_id"):
        new._backend_id = old._backend_id
    # AOTAutograd needs a source for each tensor attribute of the graph module. Attributes from Dynamo keep theirs, and
    # constants created by the retrace (`torch.tensor([])` in an empty cache) get a new one.
    sources = dict(getattr(old, "_param_name_to_source", {}))
    held = {id(t): sources.get(name) for name, t in (*old.named_parameters(), *old.named_buffers())}
    for name, tensor in (*new.named_parameters(), *new.named_buffers()):
        if name not in sources:
            sources[name] = held.get(id(tensor)) or ConstantSource(name)
    new._param_name_to_source = sources  # type: ignore[assignment]
    new.recompile()


# -- names ----------------------------------------------------------------------------------------------------------

_ATOM = re.compile(
    r"\._(?:modules|parameters|buffers)\[(?P<quote>['\"])(?P<key>.*?)(?P=quote)\]|\.(?P<attr>\w+)|\[(?P<index>\d+)\]"
)


def source_name(source: str) -> str | None:
    """The fully qualified name of a weight from its Dynamo source, relative to the compiled module.

    >>> source_name("L['self']._modules['model']._modules['norm']._parameters['weight']")
    'model.norm.weight'

    Returns None for a source that is not a parameter or buffer of a module.
    """
    if "_parameters[" not in source and "_buffers[" not in source:
        return None
    start = source.find("._modules[")
    direct = min(i for i in (source.find("._parameters["), source.find("._buffers[")) if i >= 0)
    start = direct if start < 0 else min(start, direct)
    atoms = [m.group("key") or m.group("attr") or m.group("index") for m in _ATOM.finditer(source, start)]
    return ".".join(atoms)


def _name_of(placeholder: Node, prefix: str) -> str | None:
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    name = source_name(source.name if isinstance(source.name, str) else source.name())
    return None if name is None else prefix + name.replace("_orig_mod.", "")


def weight_names(gm: GraphModule, prefix: str = "") -> list[str]:
    """Names of the parameters and buffers that are inputs of the Dynamo graph `gm`, without retracing it."""
    names = (_name_of(n, prefix) for n in gm.graph.find_nodes(op="placeholder"))
    return [name for name in names if name is not None]


def _weights(gm: GraphModule, example_inputs: Sequence[Any], prefix: str) -> dict[Node, Weight]:
    weights: dict[Node, Weight] = {}
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        name = _name_of(node, prefix)
        if name is not None and isinstance(value, torch.Tensor):
            weights[node] = Weight(name, node, value)
    return weights


def _body_program(program: Program, node: Node, position: int) -> Program:
    """The body of a transparent higher-order operator as a program; its weights are those among the operands."""
    operand = node.args[position]
    assert isinstance(operand, Node)
    body: GraphModule = getattr(program.gm, str(operand.target))
    takes = [n for n in body.graph.nodes if n.op == "placeholder"]
    operands = list(node.args[position + 1 :])[-len(takes) :]
    weights = {}
    for inner, outer in zip(takes, operands, strict=True):
        weight = program.weight_of(outer)
        if weight is not None:
            weights[inner] = Weight(weight.name, inner, weight.tensor, weight.aliases)
    return Program(
        body, "dynamo", weights, [], program.grad_enabled, prefix=program.prefix, parent=program, caller=node
    )
