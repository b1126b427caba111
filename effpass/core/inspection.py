"""Finds out what a recipe would do to a model and what it would gain, by tracing alone: nothing is compiled or changed.

Two workloads are traced. *Prefill* is one forward over prompts, with batch and tokens as symbols: it is traced at a
small size and evaluated at the requested one. *Decode* is a step of one token per sequence over a static KV cache.
:func:`effpass.inspect` calls :func:`inspect_model`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import sympy
import torch

from effpass.core.breakdown import LayerView, Part, Row, breakdown, layer_view, outline, parts
from effpass.core.cache_name import cache_name
from effpass.core.cost import uncounted
from effpass.core.derived import derived_bytes
from effpass.core.dynamo import NotRetraceableError, program_from_dynamo
from effpass.core.errors import EffpassError, ModelError, PassRefusedError
from effpass.core.manager import PassManager, Planned
from effpass.core.program import Program
from effpass.core.report import PassReport, Report
from effpass.core.roofline import Ceilings, bound, device_and_dtype

__all__ = ["Inspection", "Memory", "Stage", "Workload", "decode_parts", "inspect_model"]


@dataclass(frozen=True)
class Stage:
    """Costs of one call of a workload after a pass.

    Attributes:
        name: name of the pass; ``"as loaded"`` for the model before the first one.
        hits: number of places that the pass rewrote.
        flops: number of floating-point operations.
        weight_bytes: bytes of weights read.
        cache_bytes: bytes of the KV cache read.
        activation_bytes: bytes of everything else read and written between kernels.
        kernels: number of kernels.
        seconds: predicted time.
        bound_seconds: lower bound of the time for any schedule of these kernels.
    """

    name: str
    hits: int
    flops: int
    weight_bytes: int
    cache_bytes: int
    activation_bytes: int
    kernels: int
    seconds: float
    bound_seconds: float


@dataclass
class Workload:
    """One call of the model, with its costs.

    Attributes:
        name: ``"prefill"`` or ``"decode"``.
        batch: number of sequences B.
        tokens: number of tokens T per sequence that the call computes.
        cache_length: number of positions of the KV cache that the call reads.
        stages: costs as loaded and after each pass.
        flops_formula: FLOPs after the last pass as a formula of the sizes that stayed symbols.
        bytes_formula: bytes moved after the last pass, as such a formula.
        before: kernels as loaded, summed over layers, longest time first.
        after: the same after the last pass.
        outline: names of the model's modules in order, with each stack of layers once.
        layer: one layer before and after; None when the model has no stack of layers.
        uncounted: operators without a FLOP formula.
        missing: reasons why the workload or a graph of it could not be counted; empty when everything was.
    """

    name: str
    batch: int
    tokens: int
    cache_length: int
    stages: list[Stage] = field(default_factory=list)
    flops_formula: str = ""
    bytes_formula: str = ""
    before: list[Row] = field(default_factory=list)
    after: list[Row] = field(default_factory=list)
    outline: list[str] = field(default_factory=list)
    layer: LayerView | None = None
    uncounted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Memory:
    """Bytes of device memory.

    Attributes:
        weights: bytes of the model's parameters.
        derived: additional bytes of derived weights under `torch.compile`; 0 with `effpass.prepare`.
        cache_per_token: bytes of the KV cache per additional position of one sequence; None when no cache was made.
        cache: bytes of the KV cache of `batch` sequences at `cache_length` positions; None when no cache was made.
        batch: number of sequences.
        cache_length: number of positions.
    """

    weights: int
    derived: int
    cache_per_token: int | None
    cache: int | None
    batch: int
    cache_length: int


@dataclass
class Inspection:
    """What a recipe would do to a model.

    Attributes:
        graphs: number of graphs that Dynamo makes of one forward: of the prefill if it was traced, else of the decode
            step.
        reports: what each pass did on each of these graphs.
        decode_reports: what each pass did on each graph of the decode step.
        prepared: reports of the passes that act only through `effpass.prepare` and were not run; empty but for a note
            on the cache.
        ops_before: operator counts over all graphs, as loaded.
        ops_after: operator counts over all graphs, after the passes.
        weight_bytes: bytes of the model's parameters.
        derived_bytes: additional bytes of derived weights under `torch.compile`; 0 with `effpass.prepare` or export.
        unmet: names of passes that are required and would rewrite nothing.
        changed: settings that `effpass.prepare` would change so that the passes recognize the model's graphs.
        workloads: costs and predicted times.
        memory: use of device memory.
        ceilings: measured ceilings of the device that the predictions are based on.
        dtype: dtype of most of the model's weights.
    """

    graphs: int = 0
    reports: list[Report] = field(default_factory=list)
    decode_reports: list[Report] = field(default_factory=list)
    prepared: list[PassReport] = field(default_factory=list)
    ops_before: dict[str, int] = field(default_factory=dict)
    ops_after: dict[str, int] = field(default_factory=dict)
    weight_bytes: int = 0
    derived_bytes: int = 0
    unmet: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    workloads: list[Workload] = field(default_factory=list)
    memory: Memory | None = None
    ceilings: Ceilings | None = None
    dtype: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self)}


def inspect_model(
    model: torch.nn.Module,
    planned: Sequence[Planned],
    at: Ceilings,
    *,
    input_ids: torch.Tensor | None,
    batch: int,
    tokens: int,
    cache_length: int,
) -> Inspection:
    """Trace prefill and decode of `model`, run the passes on the traced graphs, and count costs.

    Args:
        model: a transformers causal LM or PeftModel.
        planned: passes to run.
        at: ceilings of the device to predict for.
        input_ids: token ids `[B, T]` of the prefill; None traces 2 x 16 tokens as symbols, for the sizes below.
        batch: number of sequences B.
        tokens: number of tokens T per sequence of the prefill; 0 leaves it out.
        cache_length: number of positions of the decode step's KV cache.
    """
    here = [p for p in planned if "backend" in p.pass_.entrances and p.pass_.rewrites_graph]
    result = Inspection(weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()), ceilings=at)
    for p in planned:
        p.pass_.check_model(model)
        if p not in here:
            result.prepared.append(PassReport(p.pass_.name, p.pass_.exact))
    device, dtype = device_and_dtype(model)
    result.dtype = str(dtype).removeprefix("torch.")
    prefill = None
    if input_ids is not None:
        ids = input_ids.to(device)
        prefill = _Counting(Workload("prefill", ids.shape[0], ids.shape[1], 0), here, at, {})
    elif tokens:
        ids = torch.zeros(2, 16, dtype=torch.long, device=device)
        torch._dynamo.maybe_mark_dynamic(ids, [0, 1])
        prefill = _Counting(Workload("prefill", batch, tokens, 0), here, at, {2: batch, 16: tokens})
    if prefill is not None:
        _trace(model, prefill, {"input_ids": ids, "use_cache": False})
    decode = _Counting(Workload("decode", batch, 1, cache_length), here, at, {})
    cache = None
    try:
        cache = _filled_cache(model, batch, cache_length, device)
        step = torch.full((batch, 1), 0, device=device)
        _trace(model, decode, {"input_ids": step, cache_name(): cache})
    except (PassRefusedError, ModelError) as refusal:  # the model, or a pass, has another cache than the traced step
        if prefill is None:
            raise
        decode = _Counting(decode.workload, here, at, {})
        decode.workload.missing.append(refusal.message)
    except EffpassError:
        raise
    except Exception as reason:  # the model may not support static caches, but its prefill can be reported
        decode = _Counting(decode.workload, here, at, {})
        decode.workload.missing.append(f"{type(reason).__name__}: {str(reason).partition(chr(10))[0]}")
    counted = [workload for workload in (prefill, decode) if workload is not None]
    for graph in counted[0].graphs:
        result.reports.append(graph.report)
        _add(result.ops_before, graph.ops_before)
        _add(result.ops_after, graph.ops_after)
        result.derived_bytes += sum(e.derived_bytes for e in graph.report.passes)
    result.graphs = len(counted[0].graphs)
    result.decode_reports = [graph.report for graph in decode.graphs]
    result.workloads = [workload.finish() for workload in counted]
    if cache is not None:
        by_name = {p.pass_.name: p.pass_ for p in planned}
        for entry in result.prepared:
            entry.note = by_name[entry.name].note_on_cache(cache, batch)
    per_token, whole = (None, None) if cache is None else _cache_bytes(cache, batch, cache_length)
    result.memory = Memory(result.weight_bytes, result.derived_bytes, per_token, whole, batch, cache_length)
    for p in here:
        every = (*result.reports, *result.decode_reports)
        hits = sum(e.hits for r in every for e in r.passes if e.name == p.pass_.name)
        if p.require and not hits:
            result.unmet.append(p.pass_.name)
    return result


def decode_parts(model: torch.nn.Module, at: Ceilings, batch: int, cache_length: int) -> list[Part]:
    """The kernels, with their costs, of a decode step of `batch` sequences over a static cache, without any pass.

    Raises:
        EffpassError: a graph of the step can't be counted.
    """
    step = _Counting(Workload("decode", batch, 1, cache_length), [], at, {})
    device, _ = device_and_dtype(model)
    cache = _filled_cache(model, batch, cache_length, device)
    _trace(model, step, {"input_ids": torch.zeros(batch, 1, dtype=torch.long, device=device), cache_name(): cache})
    if step.workload.missing:
        raise EffpassError(f"a decode step of {type(model).__name__}: {step.workload.missing[0]}")
    return [part for graph in step.graphs for part in graph.stages[0]]


# -- tracing --------------------------------------------------------------------------------------------------------


def _trace(model: torch.nn.Module, backend: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
    """Run one forward compiled with `backend`, which observes the graphs and returns them unchanged."""
    with _eval_and_no_grad(model):
        try:
            torch.compile(model, backend=backend)(**inputs)
        except torch._dynamo.exc.BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, EffpassError):
                raise failure.inner_exception from None
            raise


@contextmanager
def _eval_and_no_grad(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            model.eval()
            yield
    finally:
        model.train(training)
        torch._dynamo.reset()


def _filled_cache(model: torch.nn.Module, batch: int, length: int, device: torch.device) -> Any:
    """A static cache after one token, by which all layers have allocated their tensors."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=length)  # type: ignore[arg-type]
    with _eval_and_no_grad(model):
        model(input_ids=torch.zeros(batch, 1, dtype=torch.long, device=device), **{cache_name(): cache})
    return cache


def _cache_bytes(cache: Any, batch: int, length: int) -> tuple[int, int]:
    """Bytes per additional position of one sequence (none for full sliding layers), and of the whole cache."""
    per_token = whole = 0
    for layer in cache.layers:
        for tensor in (layer.keys, layer.values):
            size = tensor.numel() * tensor.element_size()
            whole += size
            per_token += size // (batch * length) if tensor.shape[-2] == length else 0
    return per_token, whole


# -- counting -------------------------------------------------------------------------------------------------------


@dataclass
class _Graph:
    """One graph of a workload, as loaded and after each pass."""

    report: Report
    ops_before: Mapping[str, int]
    ops_after: Mapping[str, int]
    stages: list[list[Part]]


class _Counting:
    """A backend for :func:`_trace` that counts instead of compiling.

    Args:
        workload: workload that receives the counts.
        passes: passes to run on each graph.
        at: ceilings of the device to predict for.
        sizes: traced size → size to evaluate at, for dimensions that are symbols.
    """

    def __init__(self, workload: Workload, passes: Sequence[Planned], at: Ceilings, sizes: Mapping[int, int]) -> None:
        self.workload = workload
        self.passes = [Planned(p.pass_) for p in passes]
        self.at = at
        self.sizes = sizes
        self.graphs: list[_Graph] = []
        self.values: dict[sympy.Symbol, int] = {}
        self.names: dict[sympy.Symbol, str] = {}

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            program = program_from_dynamo(gm, inputs)
        except NotRetraceableError as reason:
            self.graphs.append(_Graph(Report("backend", unrewritten=str(reason)), {}, {}, []))
            self.workload.missing.append(f"a graph could not be counted: {reason}")
            return gm.forward
        values = self._values(program)
        before = program.op_counts()
        stages = [parts(program, self.at, values)]
        report = Report("backend")
        for planned in self.passes:
            (entry,) = PassManager([planned]).run(program).passes
            entry.derived_bytes = derived_bytes(program.derived, entry.name)
            report.passes.append(entry)
            stages.append(parts(program, self.at, values) if entry.hits else stages[-1])
        self.workload.uncounted += sorted(uncounted(program) - set(self.workload.uncounted))
        self.graphs.append(_Graph(report, before, program.op_counts(), stages))
        return gm.forward

    def _values(self, program: Program) -> dict[Any, int]:
        """The size to evaluate each symbol of the graph at, identified by the size it was traced with."""
        hints: dict[sympy.Symbol, int] = {}
        for node in program.graph.find_nodes(op="placeholder"):
            value = node.meta.get("val")
            for dimension in value.shape if isinstance(value, torch.Tensor) else (value,):
                if isinstance(dimension, torch.SymInt) and isinstance(dimension.node.expr, sympy.Symbol):
                    hints[dimension.node.expr] = int(dimension.node.hint)
        values = {symbol: self.sizes.get(hint, hint) for symbol, hint in hints.items()}
        names = dict(zip(self.sizes, ("batch", "tokens"), strict=False))
        self.values |= values
        self.names |= {symbol: names.get(hint, str(symbol)) for symbol, hint in hints.items()}
        return values

    def finish(self) -> Workload:
        """Sum up the costs of all graphs, and return the workload."""
        work = self.workload
        counted = [g for g in self.graphs if g.stages]
        if not counted:
            return work
        names = ["as loaded", *(p.pass_.name for p in self.passes)]
        for index, name in enumerate(names):
            every = [part for graph in counted for part in graph.stages[index]]
            hits = 0 if index == 0 else sum(graph.report.passes[index - 1].hits for graph in counted)
            work.stages.append(self._stage(name, hits, every))
        first = [part for graph in counted for part in graph.stages[0]]
        last = [part for graph in counted for part in graph.stages[-1]]
        work.before, work.after = breakdown(first), breakdown(last)
        work.outline, work.layer = outline(first), layer_view(first, last)
        work.flops_formula = self._formula(part.kernel.flops for part in last)
        work.bytes_formula = self._formula(part.kernel.bytes for part in last)
        if not self.names and self.sizes:
            traced = " x ".join(map(str, self.sizes))
            work.missing.append(f"the sizes are fixed in this model's graph; costs are those of {traced} tokens")
        return work

    def _stage(self, name: str, hits: int, every: Sequence[Part]) -> Stage:
        return Stage(
            name,
            hits,
            sum(p.flops for p in every),
            sum(p.weight_bytes for p in every),
            sum(p.cache_bytes for p in every),
            sum(p.activation_bytes for p in every),
            len(every),
            sum(p.seconds for p in every),
            bound([p.kernel for p in every], self.at, self.values),
        )

    def _formula(self, terms: Iterator[Any]) -> str:
        total = sympy.Add(*terms)
        named = {symbol: sympy.Symbol(name, positive=True, integer=True) for symbol, name in self.names.items()}
        return str(sympy.expand(total.subs(named)))


def _add(total: dict[str, int], counts: Mapping[str, int]) -> None:
    for op, count in counts.items():
        total[op] = total.get(op, 0) + count
