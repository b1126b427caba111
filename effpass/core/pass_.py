"""The contract of a pass: its options, its two stages, and what they may touch.

A pass has up to two *stages*. In the model stage, :meth:`Pass.prepare` works on the model before anything is traced: it
swaps modules, folds weights, or sets an attention implementation. In the graph stage, :meth:`Pass.find` and
:meth:`Pass.rewrite` work on the traced :class:`~effpass.core.program.Program`. An *entrance* is a way by which a model
reaches the passes: as a model (:func:`effpass.prepare`), as a program of ``torch.export``, or through the backend of
``torch.compile``. Which entrances a pass serves follows from its kind. Where a pass lacks the stage that an entrance
needs, the :class:`~effpass.core.manager.PassManager` refuses, and says which call to make instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from effpass.core.report import Refusal

if TYPE_CHECKING:
    import torch

    from effpass.core.artifact import Artifact
    from effpass.core.program import Program

__all__ = ["Entrance", "GraphPass", "Match", "NoOptions", "Pass", "RuntimePass", "WeightsPass"]

Entrance = Literal["model", "program", "backend"]


@dataclass(frozen=True)
class NoOptions:
    """Options of a pass that has none."""


@dataclass
class Match:
    """One place that a pass will rewrite.

    Attributes:
        anchor: the node whose value the rewrite replaces; named in reports.
        nodes: the pass's own names for the other nodes and values it needs in :meth:`Pass.rewrite`.
    """

    anchor: torch.fx.Node
    nodes: dict[str, Any]


class Pass:
    """One rewrite. Subclass :class:`WeightsPass`, :class:`GraphPass` or :class:`RuntimePass`, not this.

    Class attributes:
        name: registry key, the same as the entry point's name.
        exact: True when the rewritten model means the same up to rounding. Approximate passes run only when a recipe
            names them.
        needs_artifact: True when the pass can't act without something learned or downloaded.
        Options: a frozen dataclass; its field names are the recipe's keys.
        entrances: where the pass can act.
        changes: of a pass on weights, what of them: values, sizes, or whole layers. Its artifact was learned for the
            model as it was loaded, so that it stands behind no pass that changes more; None leaves that to the pass.

    Args:
        options: an instance of `Options`, already validated.

    A pass holds no state between matches: what `rewrite` needs travels in the :class:`Match`.
    """

    name: ClassVar[str]
    exact: ClassVar[bool]
    needs_artifact: ClassVar[bool] = False
    Options: ClassVar[type] = NoOptions
    kind: ClassVar[Literal["weights", "graph", "runtime"]]
    entrances: ClassVar[tuple[Entrance, ...]]
    changes: ClassVar[Literal["values", "sizes", "layers"] | None] = None

    def __init__(self, options: Any = None) -> None:
        self.options = self.Options() if options is None else options

    # -- model stage ------------------------------------------------------------------------------------------------

    def check_beside(self, before: Sequence[Pass], behind: Sequence[Pass]) -> None:
        """Raise an :class:`~effpass.core.errors.EffpassError` when this pass can't act between these.

        Called with the passes that stand in front of it in the recipe and those behind it, before any pass checks the
        model.
        """

    def check_model(self, model: torch.nn.Module) -> None:
        """Raise an :class:`~effpass.core.errors.EffpassError` when this pass can't act on `model`.

        Called for *every* pass of a recipe before the first one changes anything.
        """

    def prepare(self, model: torch.nn.Module) -> tuple[int, list[Refusal]]:
        """Rewrite `model` in place before tracing.

        Returns:
            The number of places rewritten and the candidates left alone. The default does nothing;
            :attr:`rewrites_model` tells whether a pass overrides it.
        """
        return 0, []

    @property
    def rewrites_model(self) -> bool:
        return type(self).prepare is not Pass.prepare

    def could_act(self, weight_names: Sequence[str]) -> bool:
        """False when the names of a graph's weights already rule this pass out.

        Asked before the graph is retraced, for passes that no recipe named, so that a graph nobody will change costs
        nothing.
        """
        return True

    # -- graph stage ------------------------------------------------------------------------------------------------

    def find(self, program: Program) -> Iterator[Match | Refusal]:
        """Yield every candidate: a :class:`Match` to rewrite, or a :class:`Refusal` that says why not.

        The default matches :meth:`pattern` (see :mod:`effpass.core.pattern`) where a subclass has one.
        """
        from effpass.core.pattern import find_pattern

        yield from find_pattern(self, program)

    def check(self, program: Program, match: Match) -> Refusal | None:
        """Return a :class:`Refusal` when a match must be left alone; called before each rewrite."""
        return None

    def rewrite(self, program: Program, match: Match) -> None:
        """Replace one match in `program.graph`. The default inlines :meth:`replacement` for a pattern match."""
        from effpass.core.pattern import inline_replacement

        inline_replacement(self, program, match)

    def pattern(self, *args: Any) -> Any:
        """The computation to look for, written as plain PyTorch. Optional: override this or :meth:`find`."""
        raise TypeError(f"{type(self).__name__} has neither find nor pattern")

    def replacement(self, *args: Any) -> Any:
        """What stands in its place, over the same arguments. A pass with a pattern has this or :meth:`rewrite`."""
        raise TypeError(f"{type(self).__name__} has neither rewrite nor replacement")

    def example_inputs(self) -> Sequence[torch.Tensor]:
        """Arguments to trace :meth:`pattern` and :meth:`replacement` with. Any small shapes of the right rank do."""
        raise TypeError(f"{type(self).__name__} has a pattern, and no example_inputs to trace it with")

    @property
    def rewrites_graph(self) -> bool:
        cls = type(self)
        return cls.find is not Pass.find or cls.pattern is not Pass.pattern

    # -- identity ---------------------------------------------------------------------------------------------------

    @property
    def keeps_outputs(self) -> bool:
        """Whether the model as it was given computes the same afterwards, up to rounding.

        False for an approximate pass, and for an exact one that brings weights of its own: merging an adapter that was
        not attached before is exact for the adapted model and changes the given one.
        """
        return self.exact

    @property
    def over_ranks(self) -> bool:
        """Whether the prepared model is one process's part, which no file can hold."""
        return False

    @property
    def artifact(self) -> Artifact | None:
        """The artifact this pass applies, for provenance; None when it has none."""
        return None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options!r})"


class WeightsPass(Pass):
    """A pass that changes weights (merge, prune, absorb)."""

    kind = "weights"
    entrances = ("model", "program", "backend")


class GraphPass(Pass):
    """A pass that changes the graph."""

    kind = "graph"
    entrances = ("program", "backend")


class RuntimePass(Pass):
    """A pass that needs a cache or a loop which effpass owns; it acts through :func:`effpass.prepare`."""

    kind = "runtime"
    entrances = ("model",)
