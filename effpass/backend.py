"""The `torch.compile` backend: ``torch.compile(model, backend="effpass", options={...})``.

The graph from Dynamo is retraced into the dialect that passes understand (:mod:`effpass.core.program`), rewritten by
the passes, and compiled by an inner backend (Inductor unless `options["inner"]` names another). Without options, every
exact pass that needs no artifact runs. A graph that no pass changes is passed to the inner backend exactly as Dynamo
wrote it, so it compiles and runs as it would without effpass.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import InvalidBackend
from torch.fx import GraphModule

from effpass.core import registry
from effpass.core.alone import alone
from effpass.core.derived import DerivedArguments, derived_bytes
from effpass.core.dynamo import NotRetraceableError, program_from_dynamo, weight_names
from effpass.core.errors import RecipeError, did_you_mean
from effpass.core.manager import PassManager, Planned
from effpass.core.model import inner_model
from effpass.core.plan import default_passes
from effpass.core.report import Report
from effpass.lowering import regions  # noqa: F401  (registers the inner backend of decode steps)

__all__ = ["BackendOptions", "DecodeBackend", "effpass", "inner_backend", "reports"]

log = logging.getLogger("effpass")

#: Reports of the graphs compiled in this process, oldest first; see :func:`effpass.inspect` for a whole model.
reports: list[Report] = []

#: Passes that reduce the kernel launches of a decoder layer; the decode engine applies them to its steps.
DECODE_PASSES = ("fuse_linears", "fuse_rope_attention", "fuse_rotary_table", "moe_gemm", "fuse_routing")

_said: set[str] = set()


@dataclass(frozen=True)
class BackendOptions:
    """The options of the backend: the keys of `options` in `torch.compile`.

    Attributes:
        recipe: path of a recipe file, or a recipe as a mapping; None if `passes` is given, or for the default passes.
        passes: the `passes` list of a recipe alone; ``[]`` disables every pass. Exclusive with `recipe`.
        inner: name of the registered backend that compiles the rewritten graph.
        inner_options: options of the inner backend (config patches for Inductor).
        prefix: name in the model of the compiled submodule, such as `model.layers.0`; empty when the whole model is
            compiled. Passes match weights by their full names.
        check_weights: compare checksums of the originals of derived weights at every call. This is slow, but finds
            writes that can't be detected otherwise.
    """

    recipe: Any = None
    passes: Sequence[Any] | None = None
    inner: str = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    check_weights: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> BackendOptions:
        """Validate the mapping given to `torch.compile`.

        Raises:
            RecipeError: an unknown key, a value of the wrong type, or both `recipe` and `passes`.
        """
        options = dict(options or {})
        expected: dict[str, tuple[type, ...]] = {
            "recipe": (str, Path, dict),
            "passes": (list, tuple),
            "inner": (str,),
            "inner_options": (dict,),
            "prefix": (str,),
            "check_weights": (bool,),
        }
        for key, value in options.items():
            if key not in expected:
                raise RecipeError(
                    f"options[{key!r}]: unknown option{did_you_mean(key, expected)}",
                    hint="options of the inner backend go into options['inner_options']",
                )
            if not isinstance(value, expected[key]):
                names = " or ".join(t.__name__ for t in expected[key])
                raise RecipeError(f"options[{key!r}]: expected {names}, got {value!r}")
        if "recipe" in options and "passes" in options:
            raise RecipeError("options has both 'recipe' and 'passes'", hint="give one of them")
        return cls(**options)

    def planned(self) -> list[Planned]:
        """The passes to run, in order: those of the options, or the default passes."""
        from effpass.core.recipe import Recipe

        if self.passes is not None:
            recipe = Recipe.parse(
                {"version": 1, "passes": list(self.passes)}, base=Path.cwd(), source="options['passes']"
            )
        elif isinstance(self.recipe, dict):
            recipe = Recipe.parse(self.recipe, base=Path.cwd(), source="options['recipe']")
        elif self.recipe is not None:
            recipe = Recipe.load(Path(self.recipe))
        else:
            return [p for p in default_passes() if "backend" in p.pass_.entrances]
        return PassManager.from_recipe(recipe).planned

    @property
    def is_default(self) -> bool:
        return self.recipe is None and self.passes is None


def effpass(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    **_: Any,
) -> Callable[..., Any]:
    """Compile one graph. Dynamo calls this for every graph of a model compiled with ``backend="effpass"``.

    Args:
        gm: graph module from Dynamo.
        example_inputs: inputs of the graph in this call.
        options: options by name; see :class:`BackendOptions`.
        mode: an Inductor mode, forwarded to Inductor; None for the default.

    Returns:
        The compiled graph: a function of the graph's inputs.

    Raises:
        EffpassError: the options are not valid, a pass can't act, or a rewrite failed.
    """
    parsed = BackendOptions.parse(options)
    inner = inner_backend(parsed, mode)
    planned = parsed.planned()
    names = weight_names(gm, parsed.prefix)
    if parsed.is_default:
        planned = [p for p in planned if p.require or p.pass_.could_act(names) or p.pass_.could_refuse(gm)]
    if not planned:
        return inner(gm, example_inputs)
    try:
        program = program_from_dynamo(gm, example_inputs, parsed.prefix)
    except NotRetraceableError as reason:
        _record(Report("backend", unrewritten=str(reason)), parsed)
        return inner(gm, example_inputs)
    report = PassManager(planned).run(program)
    for entry in report.passes:
        entry.derived_bytes = derived_bytes(program.derived, entry.name)
    if not report.hits:
        compiled = inner(gm, example_inputs)
    else:
        compiled = inner(program.gm, program.inputs)
        if program.derived:
            compiled = DerivedArguments(compiled, program.derived, parsed.check_weights)
    _record(report, parsed)  # last, so that a compilation that Dynamo restarts is not recorded
    return compiled


@dataclass(frozen=True)
class DecodeBackend:
    """The backend that compiles the steps of the decode engine.

    Attributes:
        passes: recipe items that run before the fusions of `DECODE_PASSES`.
        inner: inner backend. The fusions leave few operators in most models, which CUDA graphs capture as they are;
            the default compiles the runs of small operators that are left in the others.
    """

    passes: tuple[Any, ...] = ()
    inner: str = "effpass_regions"

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        named = {item if isinstance(item, str) else next(iter(item)) for item in self.passes}
        fusions = [name for name in DECODE_PASSES if name not in named]
        return effpass(gm, example_inputs, options={"passes": [*self.passes, *fusions], "inner": self.inner})


def inner_backend(
    options: BackendOptions, mode: str | None
) -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
    """Return the function that compiles a rewritten graph.

    Args:
        options: options of the effpass backend.
        mode: a mode of Inductor; None for the default.

    Raises:
        RecipeError: the inner backend is not registered, or it has no such mode.
    """
    if options.inner == "inductor":
        from torch._inductor import list_mode_options
        from torch._inductor.compile_fx import compile_fx

        try:
            patches = {**(list_mode_options(mode) if mode else {}), **options.inner_options}
        except RuntimeError as error:  # an unknown one
            known = ", ".join(list_mode_options())
            raise RecipeError(f"mode={mode!r} is no mode of Inductor", hint=f"modes: {known}") from error
        return lambda gm, inputs: compile_fx(gm, list(inputs), config_patches=patches or None)  # type: ignore[return-value]
    if mode is not None:
        raise RecipeError(f"mode={mode!r} is a mode of Inductor, and options['inner'] is {options.inner!r}")
    backend = _registered(options.inner)
    keywords = {"options": dict(options.inner_options)} if options.inner_options else {}
    return lambda gm, inputs: backend(gm, list(inputs), **keywords)


def _registered(name: str) -> Callable[..., Any]:
    """The backend registered with Dynamo under this name; Torch-TensorRT is imported first, which registers it."""
    if name in ("torch_tensorrt", "tensorrt") and find_spec("torch_tensorrt") is not None:
        importlib.import_module("torch_tensorrt")
    try:
        return lookup_backend(name)
    except InvalidBackend:
        known = torch._dynamo.list_backends(exclude_tags=())
        hint = "some packages make their backend known when they are imported: import it first"
        if name == "torch_tensorrt":
            hint = "pip install torch-tensorrt, where there is one for this version of torch"
        raise RecipeError(
            f"options['inner']: no backend {name!r} is registered{did_you_mean(name, known)}", hint=hint
        ) from None


def _record(report: Report, options: BackendOptions) -> None:
    reports.append(report)
    lines = report.lines()
    if options.is_default:
        more = [i.name for i in registry.describe() if i.error is None and (not i.exact or i.needs_artifact)]
        lines = ["; ".join(lines) + (f". A recipe can add: {', '.join(more)}" if more else "")]
    for line in lines:
        if line not in _said:
            _said.add(line)
            log.warning("effpass: %s", line)


def _let_generate_run_compiled() -> None:
    """Make ``torch.compile(model, backend="effpass").generate(...)`` run the compiled model.

    `OptimizedModule` forwards `generate` to the original module, which then calls itself uncompiled, so that compiling
    would have no effect on generation. Importing this module, which naming the backend does, gives `OptimizedModule` a
    `generate` that compiles the calls of the original module for the duration of the generation. Models compiled with
    other backends behave as before.
    """
    from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        original = self._orig_mod
        backend = innermost_backend(self.dynamo_ctx.callback)
        if getattr(backend, "compiler_fn", backend) is not effpass:
            return original.generate(*args, **kwargs)
        # PeftModel.generate calls generate of the inner model.
        runs = inner_model(original)
        with alone(runs):
            before = runs._compiled_call_impl
            runs._compiled_call_impl = self.dynamo_ctx(runs._call_impl)
            try:
                return original.generate(*args, **kwargs)
            finally:
                runs._compiled_call_impl = before

    if not hasattr(OptimizedModule, "generate"):
        OptimizedModule.generate = generate  # type: ignore[attr-defined]


def _say_where_peft_generates() -> None:
    """Warn once when `generate` of a PeftModel that was compiled in place would run uncompiled.

    ``peft_model.compile(...)`` compiles the forward of the PeftModel, but `PeftModel.generate` calls the inner model.
    ``torch.compile(peft_model, backend="effpass").generate(...)`` is handled by :func:`_let_generate_run_compiled`.
    """
    peft = sys.modules.get("peft")
    if peft is None:  # without peft imported, there is no PeftModel yet
        return
    for cls in (peft.PeftModel, peft.PeftModelForCausalLM):
        original = cls.__dict__.get("generate")
        if original is None or hasattr(original, "_effpass"):
            continue

        @functools.wraps(original)
        def generate(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            if self._compiled_call_impl is not None and self.get_base_model()._compiled_call_impl is None:
                line = (
                    "PeftModel.generate runs the model inside, which compile() left as it was;"
                    " compile that one: model.get_base_model().compile(backend='effpass')"
                )
                if line not in _said:
                    _said.add(line)
                    log.warning("effpass: %s", line)
            return original(self, *args, **kwargs)

        generate._effpass = True  # type: ignore[attr-defined]
        cls.generate = generate


_let_generate_run_compiled()
_say_where_peft_generates()
