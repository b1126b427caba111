"""The cached home of derived weights: one copy for all compiled variants, recomputed when an original changed.

A derived tensor is recomputed when one of its originals has another address, layout or version counter than before,
when its :class:`Slot` was swapped, after an optimiser step anywhere in the process (fused steps move no version), and
after :func:`refresh`, which is for writes that can't be seen: through `.data`, NumPy or a foreign kernel.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd import _unsafe_preserve_version_counter

from effpass.core.checksum import checksum
from effpass.core.errors import ArtifactError

__all__ = ["Entry", "Slot", "compute_exactly", "lock", "refresh", "slots_of", "tokens"]

# Guards everything in this module. Not reentrant: a garbage collection that starts in a guarded block must find it
# taken (see effpass.core.derived_arguments).
lock = threading.Lock()


class _Tokens:
    """Compared by identity, and replaced by a new list: two threads can't lose an update, as they can of a counter.

    A list, because Dynamo traces its creation inside a compiled optimiser step without a guard on the old one.

    Attributes:
        change: replaced whenever a derived tensor might be stale for a reason that is not looked for in each call.
        step: replaced after an optimiser step.
    """

    def __init__(self) -> None:
        self.change: list[Any] = []
        self.step: list[Any] = []


tokens = _Tokens()


def _storage_died(_: Any) -> None:
    tokens.change = []


class Slot:
    """Artifact tensors that derived weights are computed from, replaceable at run time.

    Args:
        key: identity of what the tensors are; slots are shared by key, so that every compiled variant of a model
            reads one copy and a swap reaches all of them.
        tensors: name → tensor.

    Attributes:
        in_graph: a compiled graph takes the tensors themselves as inputs.
    """

    _shared: ClassVar[weakref.WeakValueDictionary[Any, Slot]] = weakref.WeakValueDictionary()

    def __init__(self, key: Any, tensors: Mapping[str, Tensor]) -> None:
        self.key = key
        self.tensors = dict(tensors)
        self.version = object()
        self.in_graph = False

    @classmethod
    def shared(cls, key: Any, load: Callable[[], Mapping[str, Tensor]]) -> Slot:
        """The live slot with this key, or a new one filled by ``load()``."""
        with lock:
            slot = cls._shared.get(key)
            if slot is None:
                slot = cls._shared[key] = cls(key, load())
            return slot

    def check_fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise :class:`ArtifactError` unless :meth:`swap` would take `tensors`."""
        if set(tensors) != set(self.tensors):
            raise ArtifactError(f"{self.key}: expected the tensors {sorted(self.tensors)}, got {sorted(tensors)}")
        for name, old in self.tensors.items():
            new = tensors[name]
            if self.in_graph and (new.shape, new.dtype) != (old.shape, old.dtype):
                raise ArtifactError(
                    f"{self.key}: a compiled graph takes {name} as an input of {tuple(old.shape)} {old.dtype},"
                    f" got {tuple(new.shape)} {new.dtype}",
                    hint="call torch._dynamo.reset(), so that the model is compiled again for other shapes",
                )
        for entry in list(Entry.live.values()):
            if entry.slot is self:
                entry.check_fit(tensors)

    def swap(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors; every derived weight that reads them is recomputed at its next call.

        Shapes may change (an adapter of another rank) where the derived weights keep theirs, except of tensors that
        are inputs of a compiled graph.

        Raises:
            ArtifactError: other names, or shapes that do not fit; the tensors in place stay.
        """
        with lock:
            self.check_fit(tensors)
            if self.in_graph:  # in place: the graph, and a CUDA graph around it, keep their inputs
                with torch.inference_mode(False), torch.no_grad():
                    for name, old in self.tensors.items():
                        old.copy_(tensors[name])
            else:
                self.tensors = {name: tensors[name].detach().to(old.device) for name, old in self.tensors.items()}
            self.version = object()
            tokens.change = []


class Entry:
    """One derived tensor, and the state of its originals when it was computed.

    Holds its originals strongly, so that an id stays theirs while the entry lives: a weak reference to a tensor would
    make `torch.utils.swap_tensors` refuse it.
    """

    live: ClassVar[weakref.WeakValueDictionary[Any, Entry]] = weakref.WeakValueDictionary()

    def __init__(self, compute: Callable[..., Tensor], originals: tuple[Tensor, ...], slot: Slot | None) -> None:
        self.compute = compute
        self.originals = originals
        self.slot = slot
        self.value: Tensor | None = None
        self.visible: Any = None  # see _visible; None: recompute
        # Weak, for a storage shall not outlive its weight. Once it is gone, other content may come to its address.
        self.storages: list[Any] = []
        self.step: Any = None
        self.checksums: list[int] | None = None

    @classmethod
    def shared(
        cls, owner: str, compute: Callable[..., Tensor], originals: tuple[Tensor, ...], slot: Slot | None
    ) -> Entry:
        """The live entry for these tensors, or a new one. The caller holds the lock."""
        key = (owner, tuple(map(id, originals)), id(slot))
        entry = cls.live.get(key)
        if entry is None:
            entry = cls.live[key] = cls(compute, originals, slot)
        return entry

    def current(self, *, check: bool = False, blind: bool = False) -> Tensor:
        """The derived tensor, recomputed where needed. The caller holds the lock.

        Args:
            check: compare checksums of the originals with those at the last computation.
            blind: writes can't be seen now: recompute in any case.
        """
        # The state is taken before the value, so that a write in between is seen at the next call.
        step, visible, storages = tokens.step, self._visible(), [t.untyped_storage() for t in self.originals]
        checksums = [checksum(t) for t in self.originals] if check else None
        moved = [r() for r in self.storages] != storages
        written = self.visible is not None and (moved or visible != self.visible)
        if self.value is None or self.visible is None or written or step is not self.step or blind:
            self._recompute(written)
        elif checksums is not None and self.checksums is not None and checksums != self.checksums:
            warnings.warn(
                "a weight was written in a way that can't be seen (.data, NumPy or a foreign kernel); what is derived"
                " from it was recomputed. Call effpass.refresh(model) after such a write.",
                stacklevel=2,
            )
            self._recompute(written)
        self.visible, self.step, self.checksums = visible, step, checksums
        if moved:
            self.storages = [weakref.ref(s, _storage_died) for s in storages]
        assert self.value is not None
        return self.value

    def _visible(self) -> Any:
        return (
            self.slot and self.slot.version,
            *(
                (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device, None if t.is_inference() else t._version)
                for t in self.originals
            ),
        )

    def _recompute(self, written: bool) -> None:
        constants = self.slot.tensors if self.slot is not None else {}
        with torch.inference_mode(False), torch.no_grad(), compute_exactly(self.originals[0].device):
            new = self.compute(*(t.detach() for t in self.originals), **constants)
            old = self.value
            if old is None or (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
                self.value = new.clone(memory_format=torch.contiguous_format)
            else:  # into the same buffer: CUDA graphs hold its address
                # A pending backward refuses a tensor whose version moved. It shall where the original's version moved
                # too, and shall not because some other model's optimiser took a step.
                with nullcontext() if written else _unsafe_preserve_version_counter(old):
                    old.copy_(new)
        tokens.change = []  # other compiled variants, which saw the originals in another state, read this buffer

    def check_fit(self, constants: Mapping[str, Tensor]) -> None:
        """Raise unless `constants` give a derived tensor of the same shape."""
        assert self.value is not None
        originals = (t.detach().to("meta") for t in self.originals)
        try:
            got = self.compute(*originals, **{name: t.detach().to("meta") for name, t in constants.items()}).shape
        except RuntimeError as error:
            raise ArtifactError(f"the tensors do not fit the weight that they change: {error}") from error
        if got != self.value.shape:
            raise ArtifactError(f"the tensors give a weight of {tuple(got)}, expected {tuple(self.value.shape)}")


@contextmanager
def compute_exactly(device: torch.device) -> Iterator[None]:
    """Compute in the precision that is written down, whatever autocast surrounds the call."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def _entries_of(model: torch.nn.Module | None) -> list[Entry]:
    entries = list(Entry.live.values())
    if model is None:
        return entries
    mine = {id(t) for t in (*model.parameters(), *model.buffers())}
    return [e for e in entries if any(id(t) in mine for t in e.originals)]


def refresh(model: torch.nn.Module | None = None) -> int:
    """Recompute derived weights at their next use, after writes that can't be seen.

    Args:
        model: only weights derived from this model's parameters and buffers; None means all.

    Returns:
        The number of derived weights marked.
    """
    with lock:
        entries = _entries_of(model)
        for entry in entries:
            entry.visible = None
        tokens.change = []
        return len(entries)


def slots_of(model: torch.nn.Module) -> list[Slot]:
    """The slots that weights derived from `model` read."""
    with lock:
        return list({id(e.slot): e.slot for e in _entries_of(model) if e.slot is not None}.values())
