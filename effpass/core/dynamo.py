"""Front end one: a Dynamo graph, retraced into the dialect.

Dynamo hands its backend a graph of torch-level calls. It is run once through ``make_fx(pre_dispatch=True)`` on fake
tensors, which yields pre-dispatch ATen. Five things must survive that, each learned from a failure:

* higher-order operators stay whole (executed, `autograd_function_apply` loses gradients silently);
* a Python float that Dynamo lifted (``dynamic=True``) keeps the SymFloat Dynamo recorded for its ``.item()``;
* the metadata that makes weights *static* inputs is carried over (without it CUDA graphs copy them at each replay);
* the retrace has a fake mode of its own, so that in-place writes it traces do not age the one AOTAutograd uses;
* `TensorifyScalarRestartAnalysis` is Dynamo's control flow, not an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, make_fx, track_tensor_tree
from torch.fx.traceback import preserve_node_meta

from effpass.core.errors import RewriteError
from effpass.core.normalize import normalize
from effpass.core.program import Program, Weight

__all__ = ["NotRetraceableError", "program_from_dynamo", "source_name", "weight_names"]

# Transforms whose state lives outside the graph: running the nodes under a tracer would nest or lose their levels.
_FUNCTORCH = re.compile(
    r"vmap_(in|de)crement|_add_batch_dim|_remove_batch_dim|(grad|jvp)_(in|de)crement|_wrap_for_grad"
)

# Operators with a body that computes the model itself, so passes look inside. Bodies of other operators (a custom
# autograd.Function, a flex_attention score function) are somebody's definition of an operation and stay untouched.
_TRANSPARENT = ("tag_activation_checkpoint", "wrap", "wrap_activation_checkpoint", "invoke_subgraph")


class NotRetraceableError(Exception):
    """The graph uses a transform that can't be traced again; it goes on as it is."""


def program_from_dynamo(gm: GraphModule, example_inputs: Sequence[Any], prefix: str = "") -> Program:
    """Retrace Dynamo's `gm` into the dialect. `gm` itself is not changed.

    Args:
        gm: the graph module that Dynamo passes to a backend.
        example_inputs: its inputs: real tensors, SymInts, ints.
        prefix: name of the compiled submodule in the whole model, with a trailing dot; weights are named relative to
            what was compiled.

    Raises:
        NotRetraceableError: the graph holds functorch levels (vmap, func.grad).
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
            traced, bodies = _retrace(gm, fakes, fake_mode)
    except TensorifyScalarRestartAnalysis:
        raise
    except Exception as error:
        raise RewriteError(
            f"the graph could not be retraced: {type(error).__name__}: {error}",
            hint="compile with options={'passes': []} to run it unrewritten, and report this graph",
        ) from error
    _carry_metadata(gm, traced)
    weights = _weights(traced, example_inputs, prefix)
    program = Program(traced, "dynamo", weights, list(example_inputs), torch.is_grad_enabled(), prefix=prefix)
    program.bodies = [_body_program(program, node, position) for node, position in bodies]
    normalize(program)
    return program


@contextmanager
def _own_fake_mode() -> Iterator[FakeTensorMode]:
    """A fresh fake mode over the current ShapeEnv, for the length of one retrace."""
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
    """Fake tensors with the symbols that Dynamo chose for the same input."""
    if not isinstance(x, torch.Tensor):
        return x
    if isinstance(x, FakeTensor):
        return x if x.fake_mode is fake_mode else _like(fake_mode, x)
    context = TracingContext.try_get()
    symbolic = context.tensor_to_context.get(x) if context is not None else None
    if symbolic is None:
        return fake_mode.from_tensor(x, static_shapes=True)
    return fake_mode.from_tensor(x, symbolic_context=symbolic, source=symbolic.tensor_source, trace=False)


def _like(fake_mode: FakeTensorMode, value: torch.Tensor) -> torch.Tensor:
    """A fake tensor with the metadata of `value`, which belongs to another fake mode over the same symbols."""
    with fake_mode, torch.no_grad():
        fake = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    if not value.requires_grad:
        return fake
    fake.requires_grad_()
    with fake_mode, torch.enable_grad():  # not a leaf: the graph may write into it
        return fake.view_as(fake)


class _Retrace(Interpreter):
    """Runs Dynamo's graph under `make_fx`; emits by hand the nodes that must not be run."""

    def __init__(self, gm: GraphModule, fake_mode: FakeTensorMode) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.fake_mode = fake_mode
        self.whole: list[tuple[str, int]] = []  # (name of the transparent operator's node, position of its body)

    def run_node(self, n: Node) -> Any:
        if n.op == "call_function" and isinstance(n.target, torch._ops.HigherOrderOperator):
            return self._emit(n, n.target)
        if n.op == "call_method" and n.target == "item" and "example_value" in n.meta:
            return self._emit(n, torch.ops.aten.item.default)
        return super().run_node(n)

    def _emit(self, n: Node, target: Any) -> Any:
        """Put `n` into the new graph as it is, and go on with fake values like those that Dynamo recorded for it."""
        mode = get_proxy_mode()
        assert mode is not None
        tracer = mode.tracer
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        proxied = pytree.tree_map(lambda a: self._as_operand(tracer, n, a), (args, kwargs))
        with self._set_current_node(n):
            proxy = tracer.create_proxy("call_function", target, *proxied, name=n.name)
        with torch._C.DisableTorchFunction(), disable_proxy_modes_tracing():
            value = pytree.tree_map_only(torch.Tensor, lambda v: _like(self.fake_mode, v), n.meta["example_value"])
        track_tensor_tree(value, proxy, constant=None, tracer=tracer)
        if getattr(target, "__name__", "") in _TRANSPARENT or getattr(target, "_name", "") in _TRANSPARENT:
            position = next(i for i, a in enumerate(args) if isinstance(a, GraphModule))
            self.whole.append((proxy.node.name, position))
        return value

    def _as_operand(self, tracer: Any, n: Node, value: Any) -> Any:
        if not isinstance(value, torch.nn.Module):
            return tracer.unwrap_proxy(value)
        names = {id(module): name for name, module in tracer.root.named_children()}
        name = names.get(id(value))
        if name is None:
            name = next(a.target for a in n.all_input_nodes if a.op == "get_attr" and self._resolve(a.target) is value)
            name = str(name).replace(".", "_")
            tracer.root.add_module(name, value)
        return tracer.create_proxy("get_attr", name, (), {})

    def _resolve(self, target: Any) -> Any:
        value: Any = self.module
        for atom in str(target).split("."):
            value = getattr(value, atom)
        return value


def _retrace(
    gm: GraphModule, fakes: Sequence[Any], fake_mode: FakeTensorMode
) -> tuple[GraphModule, list[tuple[Node, int]]]:
    interpreter = _Retrace(gm, fake_mode)
    with preserve_node_meta(), fake_mode:
        traced = make_fx(
            lambda *args: interpreter.run(*args, enable_io_processing=False),
            pre_dispatch=True,
            _allow_non_fake_inputs=True,
        )(*fakes)
    by_name = {node.name: node for node in traced.graph.nodes}
    bodies = []
    for name, position in interpreter.whole:
        node = by_name[name]
        operand = node.args[position]
        assert isinstance(operand, Node)
        body = getattr(traced, str(operand.target))
        values = [a.meta["val"] if isinstance(a, Node) else a for a in node.args[position + 1 :]]
        takes = [n for n in body.graph.nodes if n.op == "placeholder"]
        if len(values) < len(takes):
            continue  # an operator with a calling convention we don't know: its body stays as Dynamo wrote it
        new_body, inner = _retrace(body, values[-len(takes) :], fake_mode)
        if inner:
            continue  # nested checkpoints keep the torch-level body
        _copy_placeholders(body, new_body)
        setattr(traced, str(operand.target), new_body)
        bodies.append((node, position))
    return traced, bodies


def _copy_placeholders(old: GraphModule, new: GraphModule) -> None:
    """Give the new placeholders the names and metadata of the old ones."""
    before = [n for n in old.graph.nodes if n.op == "placeholder"]
    after = [n for n in new.graph.nodes if n.op == "placeholder"]
    for b, a in zip(before, after, strict=True):
        a.meta = {**b.meta, "val": a.meta.get("val")}
        a._rename(b.name)
        a.target = b.target
        if hasattr(b, "_dynamo_source"):
            a._dynamo_source = b._dynamo_source


def _carry_metadata(old: GraphModule, new: GraphModule) -> None:
    _copy_placeholders(old, new)
    new.meta.update(old.meta)
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(old, name):
            setattr(new, name, getattr(old, name))
    new.recompile()


# -- names ----------------------------------------------------------------------------------------------------------

_ATOM = re.compile(
    r"\._(?:modules|parameters|buffers)\[(?P<quote>['\"])(?P<key>.*?)(?P=quote)\]|\.(?P<attr>\w+)|\[(?P<index>\d+)\]"
)


def source_name(source: str) -> str | None:
    """The fully qualified weight name in a Dynamo source, relative to the compiled callable.

    >>> source_name("L['self']._modules['model']._modules['norm']._parameters['weight']")
    'model.norm.weight'

    Returns None for a source that is not a module's parameter or buffer.
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
    """Names of the parameters and buffers that Dynamo's `gm` reads, without retracing it."""
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
    """The body of a transparent operator as a program of its own; its weights are those of its operands."""
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
