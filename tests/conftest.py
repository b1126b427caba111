from __future__ import annotations

import gc

import pytest
import torch

# Ends of names of files that make one thing for long and then ask it many questions.
LONG = ("kernels", "parallel", "ranks", "search", "targets", "tree_ops")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those first: a worker that has nothing left takes from the end of another's list, and would make it again."""
    items.sort(key=lambda item: not item.path.stem.endswith(LONG))


def pytest_collection_finish() -> None:
    """Compilers make objects by the million: what is imported by now stays, and nobody looks through it each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """No test sees graphs, counters or thread settings of another."""
    torch.set_num_threads(1)
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def toy_passes(monkeypatch: pytest.MonkeyPatch):
    """The toy passes, registered by name for one test."""
    import toy_passes as toys

    from effpass.core import registry

    monkeypatch.setattr(registry, "BUILTIN", {**registry.BUILTIN, **toys.TOYS})
    return toys
