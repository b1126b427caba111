"""The home ``cached`` of derived weights: one copy for all compiled variants, recomputed when an original has changed.

A derived tensor (see :mod:`effpass.core.derived`) is recomputed when one of its originals has another address, layout
or version counter than before, when its :class:`Slot` was swapped, after an optimizer step anywhere in the process
(fused steps do not change version counters), and after :func:`refresh`. The latter is for writes that can't be
detected: through `.data`, NumPy or a foreign kernel.
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

# Protects all state of this module. It is not reentrant on purpose: a garbage collection that starts while the lock is
# held must not acquire it (see _after_collection in effpass.core.derived_arguments).
lock = threading.Lock()


class _Tokens:
    """Tokens that signal events. A token is compared by identity and is replaced by a new object for each event.

    Unlike the increments of a counter, updates from two threads can't be lost. The tokens are lists because Dynamo
    traces the creation of a list inside a compiled optimizer step without a guard on the old one.

    Attributes:
        change: replaced when a derived tensor may be stale for a reason that is not checked at each call.
        step: replaced after every optimizer step.
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
        key: identity of the contents. Slots are shared by key, so that all compiled variants of a model read one copy,
            and a swap reaches all of them.
        tensors: name → tensor.

    Attributes:
        version: object that is replaced at each swap.
        in_graph: whether a compiled graph takes the tensors themselves as inputs.
    """

    _shared: ClassVar[weakref.WeakValueDictionary[Any, Slot]] = weakref.WeakValueDictionary()

    def __init__(self, key: Any, tensors: Mapping[str, Tensor]) -> None:
        self.key = key
        self.tensors = dict(tensors)
        self.version = object()
        self.in_graph = False

    @classmethod
    def shared(cls, key: Any, load: Callable[[], Mapping[str, Tensor]]) -> Slot:
        """The slot with this key if one is alive, else a new one filled by ``load()``."""
        with lock:
            slot = cls._shared.get(key)
            if slot is None:
                slot = cls._shared[key] = cls(key, load())
            return slot

    def check_fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise an :class:`ArtifactError` unless :meth:`swap` can accept `tensors`."""
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
        """Replace the tensors. Every derived weight that is computed from them is recomputed at its next use.

        Shapes may change (an adapter of another rank) if the derived weights keep theirs. Tensors that are inputs of a
        compiled graph must keep shape and dtype.

        Raises:
            ArtifactError: the names or shapes do not fit, in which case the current tensors stay.
        """
        with lock:
            self.check_fit(tensors)
            if self.in_graph:  # in place, since CUDA graphs hold their addresses
                with torch.inference_mode(False), torch.no_grad():
                    for name, old in self.tensors.items():
                        old.copy_(tensors[name])
            else:
                self.tensors = {name: tensors[name].detach().to(old.device) for name, old in self.tensors.items()}
            self.version = object()
            tokens.change = []


class Entry:
    """One derived tensor, with the state of its originals when it was computed.

    An entry holds strong references to its originals, so that their ids stay valid while it lives. Weak references
    would make `torch.utils.swap_tensors` refuse the tensors.
    """

    live: ClassVar[weakref.WeakValueDictionary[Any, Entry]] = weakref.WeakValueDictionary()

    def __init__(self, compute: Callable[..., Tensor], originals: tuple[Tensor, ...], slot: Slot | None) -> None:
        self.compute = compute
        self.originals = originals
        self.slot = slot
        self.value: Tensor | None = None
        self.visible: Any = None  # result of _visible() at the last use; None forces recomputation
        # Weak references, so that a storage does not outlive its weight. Another one may later have the same address.
        self.storages: list[Any] = []
        self.step: Any = None
        self.checksums: list[int] | None = None

    @classmethod
    def shared(
        cls, owner: str, compute: Callable[..., Tensor], originals: tuple[Tensor, ...], slot: Slot | None
    ) -> Entry:
        """The entry for these tensors if one is alive, else a new one. The caller must hold the lock."""
        key = (owner, tuple(map(id, originals)), id(slot))
        entry = cls.live.get(key)
        if entry is None:
            entry = cls.live[key] = cls(compute, originals, slot)
        return entry

    def current(self, *, check: bool = False, blind: bool = False) -> Tensor:
        """The derived tensor, recomputed if necessary. The caller must hold the lock.

        Args:
            check: also compare checksums of the originals with those of the previous call.
            blind: recompute in any case, because writes can't be detected.
        """
        # The state is read before the value is computed, so that a write in between is noticed at the next call.
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
            else:  # into the same buffer, since CUDA graphs hold its address
                # A pending backward raises if the version of a saved tensor has changed. That is right when an original
                # was written, but not when only an unrelated optimizer took a step.
                with nullcontext() if written else _unsafe_preserve_version_counter(old):
                    old.copy_(new)
        tokens.change = []  # other compiled variants read this buffer, and last saw the originals in another state

    def check_fit(self, constants: Mapping[str, Tensor]) -> None:
        """Raise an :class:`ArtifactError` unless `constants` give a derived tensor of the same shape."""
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
    """Disable autocast, so that a computation uses the dtypes in which it is written."""
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
    """Mark derived weights to be recomputed at their next use, after writes that can't be detected.

    Args:
        model: model whose parameters and buffers were written; None marks all derived weights.

    Returns:
        The number of derived weights that were marked.
    """
    with lock:
        entries = _entries_of(model)
        for entry in entries:
            entry.visible = None
        tokens.change = []
        return len(entries)


def slots_of(model: torch.nn.Module) -> list[Slot]:
    """The slots that the weights derived from `model` are computed from."""
    with lock:
        return list({id(e.slot): e.slot for e in _entries_of(model) if e.slot is not None}.values())
