"""Mutual exclusion of threads that run one model while its configuration is changed for the time of the run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["alone"]

# Not attributes of the models, since locks can be neither copied nor pickled.
_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def alone(model: Any) -> Iterator[None]:
    """Context manager that one thread at a time can be in, per model object; others wait. It can be nested."""
    with _guard:
        lock = _locks.setdefault(model, threading.RLock())
    with lock:
        yield
