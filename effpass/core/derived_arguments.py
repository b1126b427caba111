"""The wrapper around a compiled function that passes it up-to-date derived weights.

This is the run-time part of the home ``cached`` of derived weights (:mod:`effpass.core.derived`). At every call it
checks that each original is the same object, at the same address, with the same version counter; before torch 2.13 also
that it has the same strides. These checks are loops that run in C, because they are the whole cost of derived weights
when nothing changed (benchmark area ``backend``, metric ``derived_check``). Every other event that can make a derived
weight stale replaces ``tokens.change`` (:mod:`effpass.core.live_weights`).

A CUDA graph that the user captures *around* the compiled function is replayed without these checks and must be captured
again after the weights have changed. (Inductor's own CUDA graphs are inside the compiled function.)
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, is_, itemgetter
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from effpass.core.live_weights import Entry, Slot, lock, tokens

__all__ = ["DerivedArguments", "Spec", "derived_bytes", "process_group_is_up"]

_version = attrgetter("_version")
_data_ptr = Tensor.data_ptr
# Later versions of torch compile again when the strides of a weight change (`weight.data = weight.data.T`).
_STRIDES_ARE_GUARDED = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
# Collectives write to weights without changing an address or a version counter.
process_group_is_up = torch.distributed.is_initialized if torch.distributed.is_available() else bool


class Spec:
    """Specification of one derived argument: the positional arguments that it is computed from, and the function.

    Args:
        owner: as in :meth:`effpass.core.program.Program.derive`.
        positions: positions of the originals among the arguments of the compiled function.
        originals: values of the originals in this call; the derived tensor is computed from them at once.
        compute: as in `derive`.
        slot: as in `derive`.

    Attributes:
        first: entry with the derived tensor of this call; None after a :class:`DerivedArguments` has taken it over.
        nbytes: bytes of the derived tensor.
    """

    def __init__(
        self,
        owner: str,
        positions: Sequence[int],
        originals: Sequence[Tensor],
        compute: Callable[..., Tensor],
        slot: Slot | None,
    ) -> None:
        self.owner = owner
        self.positions = tuple(positions)
        self.compute = compute
        self.slot = slot
        with lock:
            self.first: Entry | None = self.entry(tuple(originals))
            self.nbytes = self.first.current().nbytes

    def entry(self, originals: tuple[Tensor, ...]) -> Entry:
        return Entry.shared(self.owner, self.compute, originals, self.slot)


def derived_bytes(specs: Iterable[Any], pass_name: str) -> int:
    """Bytes of the cached derived tensors of one pass, which are held in addition to their originals."""
    return sum(s.nbytes for s in specs if isinstance(s, Spec) and s.owner.partition(":")[0] == pass_name)


class _Seen(NamedTuple):
    """State of a set of originals when its derived tensors were last up to date."""

    change: list[Any]
    versions: list[int]
    pointers: list[int]
    strides: list[tuple[int, ...]]
    values: tuple[Tensor, ...]


class _Binding:
    """One set of originals that the compiled function is called with; each module that shares its code has its own."""

    def __init__(self, originals: tuple[Tensor, ...], supplies: list[Any]) -> None:
        self.originals = originals
        self.supplies = supplies  # per derived argument, an Entry or a pair (slot, name)
        self.seen: _Seen | None = None


class DerivedArguments:
    """Appends derived tensors to the arguments of a compiled function.

    Args:
        function: compiled function that takes the original arguments of the program, followed by the derived ones.
        specs: one entry per derived argument, in order. A ``(slot, name)`` pair stands for an artifact tensor that the
            graph itself takes as an input.
        check_weights: compare checksums of the originals at every call. This is slow, but finds writes that can't be
            detected otherwise.

    Attributes:
        live: all instances that are alive.
    """

    live: ClassVar[weakref.WeakSet[DerivedArguments]] = weakref.WeakSet()

    def __init__(self, function: Callable[..., Any], specs: Sequence[Any], check_weights: bool = False) -> None:
        self.function = function
        self.specs = list(specs)
        self.check_weights = check_weights
        derived = [s for s in specs if isinstance(s, Spec)]
        first = {p: t for s in derived if s.first for p, t in zip(s.positions, s.first.originals, strict=True)}
        self.positions = sorted(first)
        self._pick: Callable[[Any], tuple[Tensor, ...]] = _picker(self.positions)
        self._bindings: dict[tuple[int, ...], _Binding] = {}
        self._recent: dict[Any, _Binding] = {}  # by the id of the first original only
        _watch()
        with lock:
            self._bind(tuple(first[p] for p in self.positions))
            self.live.add(self)
        for spec in derived:
            spec.first = None

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, *self.values(args))

    def values(self, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """The derived arguments for a call with `args`, recomputed where an original changed."""
        originals = self._pick(args)
        binding = self._recent.get(originals and id(originals[0]))
        if (
            binding is not None
            and (seen := binding.seen) is not None
            and seen.change is tokens.change
            and all(map(is_, originals, binding.originals))
            and list(map(_version, originals)) == seen.versions
            and list(map(_data_ptr, originals)) == seen.pointers
            and (_STRIDES_ARE_GUARDED or list(map(Tensor.stride, originals)) == seen.strides)
            and not process_group_is_up()
        ):
            return seen.values
        with lock:
            return self._renew(originals)

    def _renew(self, originals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        change = tokens.change  # read first, so that any later event is noticed at the next call
        binding = self._recent[originals and id(originals[0])] = self._bind(originals)
        blind = any(t.is_inference() for t in originals)
        if process_group_is_up():
            blind = True
            warnings.warn(
                "a process group came up after compilation, and its collectives write weights in a way that can't be"
                " seen: derived weights are recomputed at every call. Call torch._dynamo.reset(), so that the model is"
                " compiled again with them in the graph.",
                stacklevel=3,
            )
        if blind or self.check_weights:
            binding.seen = None
            return self._supply(binding, blind)
        versions, pointers = list(map(_version, originals)), list(map(_data_ptr, originals))
        strides = list(map(Tensor.stride, originals))
        values = self._supply(binding, blind)
        binding.seen = _Seen(change, versions, pointers, strides, values)  # in one assignment, for other threads
        return values

    def _supply(self, binding: _Binding, blind: bool) -> tuple[Tensor, ...]:
        return tuple(
            s.current(check=self.check_weights, blind=blind) if isinstance(s, Entry) else s[0].tensors[s[1]]
            for s in binding.supplies
        )

    def _bind(self, originals: tuple[Tensor, ...]) -> _Binding:
        key = tuple(map(id, originals))
        binding = self._bindings.get(key)
        if binding is None:
            _let_go()
            at = dict(zip(self.positions, originals, strict=True))
            supplies = [s.entry(tuple(at[p] for p in s.positions)) if isinstance(s, Spec) else s for s in self.specs]
            binding = self._bindings[key] = _Binding(originals, supplies)
        return binding

    def held(self) -> list[tuple[Tensor, ...]]:
        """The sets of originals that this object keeps alive."""
        return [b.originals for b in self._bindings.values()]

    def forget(self, ids: set[int]) -> None:
        """Release the sets of originals that contain a tensor with one of these ids."""
        for known in (self._bindings, self._recent):
            for key in [k for k, b in known.items() if not ids.isdisjoint(map(id, b.originals))]:
                del known[key]  # type: ignore[arg-type]


def _picker(positions: Sequence[int]) -> Callable[[Any], tuple[Tensor, ...]]:
    if len(positions) > 1:
        return itemgetter(*positions)
    start = positions[0] if positions else 0
    return itemgetter(slice(start, start + len(positions)))  # itemgetter returns no tuple for a single index


# -- events that are not checked at each call ------------------------------------------------------------------------


def _after_step(*_: Any) -> None:
    tokens.step = []
    tokens.change = []


def _after_collection(phase: str, info: Mapping[str, int]) -> None:
    """After a full collection (``del model; gc.collect()``), release originals that only this module still holds."""
    if phase == "stop" and info["generation"] == 2 and lock.acquire(blocking=False):
        try:
            _let_go()
        finally:
            lock.release()


_watching: list[Any] = []


def _watch() -> None:
    if not _watching:
        _watching.append(register_optimizer_step_post_hook(_after_step))
        gc.callbacks.append(torch.compiler.disable(_after_collection))


def _references(holder: Sequence[Any], position: int) -> int:
    return sys.getrefcount(holder[position])


_BY_THE_CALL = _references((object(),), 0) - 1


def _let_go() -> None:
    """Release derived tensors whose originals nothing else references. The caller must hold the lock."""
    arguments = list(DerivedArguments.live)
    holders = [h for a in arguments for h in a.held()] + [e.originals for e in list(Entry.live.values())]
    held = Counter(id(t) for originals in holders for t in originals)
    orphans = {
        id(originals[i])
        for originals in holders
        for i in range(len(originals))
        if _references(originals, i) - _BY_THE_CALL <= held[id(originals[i])]
    }
    if orphans:
        for a in arguments:
            a.forget(orphans)
