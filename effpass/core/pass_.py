"""Interface of a pass: its options, its stages, and the entrances at which it can act.

A pass is one rewrite of a model. A recipe (:mod:`effpass.core.recipe`) selects it by name, and the
:class:`~effpass.core.manager.PassManager` runs it. A pass implements up to two *stages*:

* The model stage, :meth:`Pass.prepare`, changes the ``nn.Module`` before anything is traced: it swaps modules, folds
  weights, or sets an attention implementation.
* The graph stage, :meth:`Pass.find` and :meth:`Pass.rewrite`, changes the traced
  :class:`~effpass.core.program.Program`.

An *entrance* is the form in which a model reaches the passes: ``"model"`` (a module given to :func:`effpass.prepare`),
``"program"`` (a program of ``torch.export``) or ``"backend"`` (a graph that ``torch.compile`` passes to the effpass
backend). The kind of a pass determines the entrances at which it can act, unless the pass overrides them. At any other
entrance the manager raises an error that says where the pass can act; a pass that a recipe names is never skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effpass.core.report import Refusal

if TYPE_CHECKING:
    import torch

    from effpass.core.artifact import Artifact
    from effpass.core.program import Program

__all__ = ["Entrance", "GraphPass", "Match", "NoOptions", "Pass", "RuntimePass", "Setting", "WeightsPass"]

Entrance = Literal["model", "program", "backend"]


@dataclass(frozen=True)
class NoOptions:
    """Options of a pass that has none."""


@dataclass
class Match:
    """One place in a program that a pass will rewrite.

    Attributes:
        anchor: node whose value the rewrite replaces; reports name it.
        nodes: the other nodes and values that :meth:`Pass.rewrite` needs, under names that the pass chooses.
    """

    anchor: torch.fx.Node
    nodes: dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A setting of a model that a pass changed so that it recognizes the model's graphs.

    Attributes:
        line: what was changed, for reports.
        undo: changes it back.
    """

    line: str
    undo: Callable[[], None]


class Pass:
    """Base class of all passes. Subclass :class:`WeightsPass`, :class:`GraphPass` or :class:`RuntimePass` instead.

    A pass holds no state between matches: everything that :meth:`rewrite` needs is stored in the :class:`Match`.

    Class attributes:
        name: registry key, identical to the name of the pass's entry point.
        exact: True when the rewritten model computes the same function up to rounding. Approximate passes run only
            when a recipe names them.
        needs_artifact: True when the pass can't act without data that was learned or downloaded for it.
        Options: frozen dataclass of the pass's options; its field names are the option keys in a recipe.
        kind: ``"weights"``, ``"graph"`` or ``"runtime"``; set by the three subclasses.
        entrances: entrances at which the pass can act.
        changes: for a pass on weights, the extent of the change: the values of weights, their sizes, or whole layers.
            The artifact of such a pass was learned for the model as it was loaded, so the pass can't follow one that
            changes more. None disables this check.
        follows: names of passes whose results this one rewrites, so that it can act only behind them.

    Args:
        options: validated instance of `Options`; None stands for the defaults.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    needs_artifact: ClassVar[bool] = False
    Options: ClassVar[type] = NoOptions
    kind: ClassVar[Literal["weights", "graph", "runtime"]]
    entrances: ClassVar[tuple[Entrance, ...]]
    changes: ClassVar[Literal["values", "sizes", "layers"] | None] = None
    follows: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    # -- model stage ------------------------------------------------------------------------------------------------

    def check_beside(self, before: Sequence[Pass], behind: Sequence[Pass]) -> None:
        """Check this pass against the other passes of its recipe.

        Called when the manager is created, before any pass checks the model.

        Args:
            before: passes that precede this one, in order.
            behind: passes that follow this one, in order.

        Raises:
            EffpassError: this pass can't be combined with the others in this order.
        """

    def check_model(self, model: torch.nn.Module) -> None:
        """Check that this pass can act on `model`.

        Called for *every* pass of a recipe before the first one changes anything.

        Raises:
            EffpassError: this pass can't act on `model`.
        """

    def prepare(self, model: torch.nn.Module) -> tuple[int, list[Refusal]]:
        """Rewrite `model` in place, before it is traced.

        The default implementation does nothing; :attr:`rewrites_model` tells whether a pass overrides it.

        Returns:
            The number of places rewritten, and a refusal for each candidate that was left alone.
        """
        return 0, []

    @property
    def rewrites_model(self) -> bool:
        """Whether this pass has a model stage."""
        return type(self).prepare is not Pass.prepare

    def make_ready(self, model: torch.nn.Module) -> Setting | None:
        """Change the setting of `model` without which the graph stage would not recognize its graphs.

        Called when a model is prepared whose graphs this pass will rewrite, after the model stage of other passes.

        Returns:
            What was changed; None for nothing.
        """
        return None

    def note_on_cache(self, cache: Any, batch: int) -> str:
        """What preparing the model would make of its cache, for :func:`effpass.inspect`; empty for nothing to say.

        Args:
            cache: a `StaticCache` of the model as it is, with the tensors of all layers.
            batch: number of sequences of the cache.
        """
        return ""

    def could_act(self, weight_names: Sequence[str]) -> bool:
        """Whether this pass may find something in a graph that reads the weights `weight_names`.

        The backend of `torch.compile` calls this before it retraces a graph, and only for passes that no recipe
        named. A graph on which no pass could act is not retraced.
        """
        return True

    def could_refuse(self, gm: torch.fx.GraphModule) -> bool:
        """Whether this pass may have a refusal for a graph of Dynamo that reads none of the weights it looks for.

        Called like :meth:`could_act`, where that is False.
        """
        return False

    # -- graph stage ------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        """Yield every candidate: a :class:`Match` to rewrite, or a :class:`Refusal` with the reason to leave it alone.

        All candidates of a program are collected before the first one is rewritten. The default implementation looks
        for :meth:`pattern` (see :mod:`effpass.core.pattern`).
        """
        from effpass.core.pattern import find_pattern

        yield from find_pattern(self, program)

    def check(self, program: Program, match: Match) -> Refusal | None:
        """Return a :class:`Refusal` when `match` must be left alone, else None; called before each rewrite."""
        return None

    def rewrite(self, program: Program, match: Match) -> None:
        """Rewrite one match in `program.graph`. The default implementation inlines :meth:`replacement`."""
        from effpass.core.pattern import inline_replacement

        inline_replacement(self, program, match)

    def pattern(self, *args: Any) -> Any:
        """The computation to look for, written in plain PyTorch. A graph stage overrides this or :meth:`find`."""
        raise TypeError(f"{type(self).__name__} has neither find nor pattern")

    def replacement(self, *args: Any) -> Any:
        """What replaces :meth:`pattern`, over the same arguments. A pass with a pattern has this or :meth:`rewrite`."""
        raise TypeError(f"{type(self).__name__} has neither rewrite nor replacement")

    def example_inputs(self) -> Sequence[torch.Tensor]:
        """Tensors to trace :meth:`pattern` with, one per argument. Any small shapes of the right rank will do."""
        raise TypeError(f"{type(self).__name__} has a pattern, and no example_inputs to trace it with")

    def note(self, program: Program) -> str:
        """What else a reader must know about the places that were rewritten in `program`; empty for nothing."""
        return ""

    @property
    def rewrites_graph(self) -> bool:
        """Whether this pass has a graph stage."""
        cls = type(self)
        return cls.find is not Pass.find or cls.pattern is not Pass.pattern

    # -- identity ---------------------------------------------------------------------------------------------------

    @property
    def keeps_outputs(self) -> bool:
        """Whether the given model computes the same outputs after this pass, up to rounding.

        False for an approximate pass, and for an exact one that adds weights: merging an adapter that was not attached
        before is exact with respect to the adapted model, but changes the outputs of the given one.
        """
        return self.exact

    @property
    def over_ranks(self) -> bool:
        """Whether preparation leaves each rank with only its part of the model, which can't be exported to a file."""
        return False

    @property
    def artifact(self) -> Artifact | None:
        """The artifact that this pass applies, for provenance; None when the pass has none."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options!r})"


class WeightsPass(Pass):
    """A pass that changes weights, such as merging, pruning or absorbing them."""

    kind = "weights"
    entrances = ("model", "program", "backend")


class GraphPass(Pass):
    """A pass that changes the graph."""

    kind = "graph"
    entrances = ("program", "backend")


class RuntimePass(Pass):
    """A pass that needs a cache or a generation loop owned by effpass; it acts through :func:`effpass.prepare` only."""

    kind = "runtime"
    entrances = ("model",)
