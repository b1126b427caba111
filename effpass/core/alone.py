"""Mutual exclusion of threads that run one model while its configuration is changed for the time of the run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

__all__ = ["alone"]

# Not attributes of the models, since locks can be neither copied nor pickled.
_locks: WeakKeyDictionary[Any, threading.RLock] = WeakKeyDictionary()
_guard = threading.Lock()


@contextmanager
def alone(*models: Any) -> Iterator[None]:
    """Context manager that one thread at a time can be in, per model object; others wait. It can be nested.

    Several models are taken in an order that is the same in every thread, so that two threads can't wait for each
    other.
    """
    with ExitStack() as stack:
        for model in sorted(models, key=id):
            with _guard:
                lock = _locks.setdefault(model, threading.RLock())
            stack.enter_context(lock)
        yield
