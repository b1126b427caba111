"""The cached home of derived weights: one copy for all compiled variants, recomputed when an original changed.

What can be seen from outside: another tensor object, another storage, a moved version counter, an optimiser step
anywhere in the process (fused steps move no version), a swapped :class:`Slot`. What can't: writes through `.data`,
NumPy or a collective; :func:`refresh` is for those.
"""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["DerivedArguments", "Slot", "Spec", "derived_bytes", "refresh", "slots_of"]

_lock = threading.RLock()


class Slot:
    """Artifact tensors that derived weights are computed from, replaceable at run time.

    Args:
        key: identity of what the tensors are; slots are shared by key, so that every compiled variant of a model
            reads one copy and a swap reaches all of them.
        tensors: name → tensor.
    """

    _shared: ClassVar[weakref.WeakValueDictionary[Any, Slot]] = weakref.WeakValueDictionary()

    def __init__(self, key: Any, tensors: Mapping[str, Tensor]) -> None:
        self.key = key
        self.tensors = dict(tensors)
        self.version = 0
        self.in_graph = False

    @classmethod
    def shared(cls, key: Any, load: Callable[[], Mapping[str, Tensor]]) -> Slot:
        """The live slot with this key, or a new one filled by ``load()``."""
        with _lock:
            slot = cls._shared.get(key)
            if slot is None:
                slot = cls._shared[key] = cls(key, load())
            return slot

    def swap(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors; every derived weight that reads them is recomputed at its next call.

        Raises:
            ValueError: other names, or, where the tensors are inputs of a compiled graph, other shapes or dtypes.
        """
        if set(tensors) != set(self.tensors):
            raise ValueError(f"slot {self.key}: expected tensors {sorted(self.tensors)}, got {sorted(tensors)}")
        if self.in_graph:
            for name, old in self.tensors.items():
                new = tensors[name]
                if (new.shape, new.dtype) != (old.shape, old.dtype):
                    raise ValueError(
                        f"slot {self.key}: {name} is a graph input of {tuple(old.shape)} {old.dtype},"
                        f" got {tuple(new.shape)} {new.dtype}; recompile for another shape"
                    )
        device = next(iter(self.tensors.values())).device if self.tensors else None
        with _lock:
            self.tensors = {name: t.to(device) for name, t in tensors.items()}
            self.version += 1
            _state.epoch += 1


# -- what changed ---------------------------------------------------------------------------------------------------


class _State:
    """One counter that moves whenever any derived weight in the process might be stale for an unseen reason."""

    def __init__(self) -> None:
        self.epoch = 0
        self.refreshed = 0
        self.steps = 0
        self.hooked = False

    def watch_optimisers(self) -> None:
        if not self.hooked:
            self.hooked = True
            register_optimizer_step_post_hook(self._after_step)

    def _after_step(self, *_: Any) -> None:
        self.steps += 1
        self.epoch += 1


_state = _State()


class _Original:
    """One strong reference to an original weight, shared by all derived weights computed from it.

    Strong, because a weak one would make `torch.utils.swap_tensors` refuse; counted, so that a weight which nobody
    else holds any more can be let go.
    """

    live: ClassVar[weakref.WeakValueDictionary[int, _Original]] = weakref.WeakValueDictionary()

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def of(cls, tensor: Tensor) -> _Original:
        original = cls.live.get(id(tensor))
        if original is None:
            original = cls.live[id(tensor)] = cls(tensor)
        return original

    @property
    def orphaned(self) -> bool:
        return sys.getrefcount(self.tensor) <= 2  # this attribute and getrefcount's own argument


class _Entry:
    """One derived tensor and the state of its originals when it was computed."""

    live: ClassVar[weakref.WeakValueDictionary[Any, _Entry]] = weakref.WeakValueDictionary()

    def __init__(self, compute: Callable[..., Tensor], originals: Sequence[_Original], slot: Slot | None) -> None:
        self.compute = compute
        self.originals = tuple(originals)
        self.slot = slot
        self.value: Tensor | None = None
        self.seen: Any = None
        self.checksums: tuple[float, ...] | None = None

    def state(self) -> Any:
        return (
            _state.steps,
            _state.refreshed,
            self.slot.version if self.slot is not None else 0,
            *((t.tensor._version, t.tensor.data_ptr(), t.tensor.dtype, t.tensor.device) for t in self.originals),
        )

    def current(self, check: bool = False) -> Tensor:
        state = self.state()
        if self.value is None or state != self.seen:
            self._recompute()
        elif check and self._sums() != self.checksums:
            warnings.warn(
                "a weight was written in a way that can't be seen (.data, NumPy or a collective); what was derived was"
                " recomputed. Call effpass.refresh(model) after such a write.",
                stacklevel=2,
            )
            self._recompute()
        self.seen = state
        if check and self.checksums is None:
            self.checksums = self._sums()
        assert self.value is not None
        return self.value

    def _recompute(self) -> None:
        constants = self.slot.tensors if self.slot is not None else {}
        with torch.inference_mode(False), torch.no_grad():
            new = self.compute(*(o.tensor.detach() for o in self.originals), **constants)
            old = self.value
            if old is not None and (old.shape, old.dtype, old.device) == (new.shape, new.dtype, new.device):
                old.copy_(new)
            else:
                self.value = new.detach().clone(memory_format=torch.contiguous_format)
        self.checksums = None

    def _sums(self) -> tuple[float, ...]:
        return tuple(_checksum(o.tensor.detach()) for o in self.originals)


def _checksum(t: Tensor) -> float:
    flat = t.flatten().double()
    ramp = torch.arange(flat.numel(), device=flat.device, dtype=torch.float64).remainder_(1009.0)
    return float((flat * (ramp + 1)).sum())


def refresh(model: torch.nn.Module | None = None) -> int:
    """Recompute derived weights at their next use, after writes that can't be seen.

    Args:
        model: only weights derived from this model's parameters and buffers; None means all.

    Returns:
        The number of derived weights marked.
    """
    with _lock:
        _drop_orphans()
        _state.refreshed += 1
        _state.epoch += 1
        entries = list(_Entry.live.values())
        if model is None:
            return len(entries)
        mine = {id(t) for t in (*model.parameters(), *model.buffers())}
        return sum(any(id(o.tensor) in mine for o in e.originals) for e in entries)


def slots_of(model: torch.nn.Module) -> list[Slot]:
    """The slots that weights derived from `model` read."""
    mine = {id(t) for t in (*model.parameters(), *model.buffers())}
    slots = {
        id(e.slot): e.slot
        for e in list(_Entry.live.values())
        if e.slot is not None and any(id(o.tensor) in mine for o in e.originals)
    }
    return list(slots.values())


def _drop_orphans() -> None:
    dead = {key for key, original in list(_Original.live.items()) if original.orphaned}
    if dead:
        for arguments in list(DerivedArguments.live):
            arguments.forget(dead)


# -- the wrapper around a compiled function -------------------------------------------------------------------------


class Spec:
    """How to compute one derived argument: from which positional arguments, by which function."""

    def __init__(
        self, owner: str, positions: tuple[int, ...], compute: Callable[..., Tensor], slot: Slot | None
    ) -> None:
        self.owner = owner
        self.positions = positions
        self.compute = compute
        self.slot = slot

    def entry(self, args: Sequence[Any]) -> _Entry:
        tensors = [args[i] for i in self.positions]
        key = (self.owner, tuple(map(id, tensors)), id(self.slot))
        entry = _Entry.live.get(key)
        if entry is None:
            entry = _Entry(self.compute, [_Original.of(t) for t in tensors], self.slot)
            _Entry.live[key] = entry
        return entry


class _Binding:
    """The derived tensors for one set of original tensors, with the state they were checked in."""

    def __init__(self, key: list[int], entries: list[Any]) -> None:
        self.key = key  # ids of the originals, which the entries keep alive
        self.entries = entries
        self.epoch = -1
        self.versions: list[int] = []
        self.pointers: list[int] = []
        self.values: tuple[Tensor, ...] = ()


_version = attrgetter("_version")


class DerivedArguments:
    """Appends derived tensors to the arguments of a compiled function.

    Called once per forward, so the check that nothing changed is a few C-level passes over the originals
    (benchmark area ``backend``, metric ``derived_check``).

    Args:
        function: the compiled function; takes the program's original arguments and then the derived ones.
        specs: one per derived argument, in order; a ``(slot, name)`` pair stands for an artifact tensor that is an
            input of the graph itself.
        check_weights: compare checksums at every call; slow, finds writes that can't be seen.
    """

    live: ClassVar[weakref.WeakSet[DerivedArguments]] = weakref.WeakSet()

    def __init__(self, function: Callable[..., Any], specs: Sequence[Any], check_weights: bool = False) -> None:
        self.function = function
        self.specs = list(specs)
        self.check_weights = check_weights
        positions = sorted({i for s in self.specs if isinstance(s, Spec) for i in s.positions})
        self._pick: Callable[[Any], Any] = (
            itemgetter(*positions) if len(positions) > 1 else lambda args: tuple(args[i] for i in positions)
        )
        self._last: _Binding | None = None
        self._bindings: dict[tuple[int, ...], _Binding] = {}
        self.live.add(self)
        _state.watch_optimisers()

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, *self.values(args))

    def values(self, args: Sequence[Any]) -> tuple[Tensor, ...]:
        originals: tuple[Tensor, ...] = self._pick(args)
        last = self._last
        if (
            last is not None
            and last.epoch == _state.epoch
            and not self.check_weights
            and list(map(id, originals)) == last.key
            and list(map(_version, originals)) == last.versions
            and list(map(Tensor.data_ptr, originals)) == last.pointers
        ):
            return last.values
        with _lock:
            return self._renew(args, originals)

    def _renew(self, args: Sequence[Any], originals: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        ids = list(map(id, originals))
        key = tuple(ids)
        binding = self._bindings.get(key)
        if binding is None:
            _drop_orphans()
            entries = [s.entry(args) if isinstance(s, Spec) else s for s in self.specs]
            binding = self._bindings[key] = _Binding(ids, entries)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            refresh()  # collectives write weights unseen: compiled after init_process_group the value is in the graph
        binding.epoch = _state.epoch
        binding.versions = list(map(_version, originals))
        binding.pointers = list(map(Tensor.data_ptr, originals))
        binding.values = tuple(
            e.current(self.check_weights) if isinstance(e, _Entry) else e[0].tensors[e[1]] for e in binding.entries
        )
        self._last = binding
        return binding.values

    def forget(self, dead: set[int]) -> None:
        """Let go of bindings to original tensors that nobody else holds (their ids in `dead`)."""
        for key in [k for k in self._bindings if not dead.isdisjoint(k)]:
            if self._bindings.pop(key) is self._last:
                self._last = None


def derived_bytes(specs: Iterable[Any], inputs: Sequence[Any], pass_name: str) -> int:
    """Bytes that the cached derived tensors of one pass hold beside their originals."""
    mine = [s for s in specs if isinstance(s, Spec) and s.owner.partition(":")[0] == pass_name]
    values = [s.entry(inputs).value for s in mine]
    return sum(v.numel() * v.element_size() for v in values if v is not None)
