"""Recording of CUDA graphs for decode steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["record"]


def record(
    step: Callable[[], None], *, warm_up: Callable[[], None] | None = None, pool: Any = None
) -> torch.cuda.CUDAGraph:
    """Record `step` as a CUDA graph without executing its kernels.

    Args:
        step: function that launches kernels on tensors of fixed address and does not synchronize.
        warm_up: function that is called first, on the stream of the recording, to trigger compilation; it must restore
            all state that it changes. None for no warm-up.
        pool: memory pool from :func:`torch.cuda.graph_pool_handle` for the tensors that `step` creates, shared with
            other graphs, which then overwrite them; None for a pool of its own.

    Returns:
        The recorded graph.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    if warm_up is not None:
        with torch.cuda.stream(stream):
            warm_up()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Return the stream for all recordings; cuBLAS keeps a workspace of 32 MiB for every stream that it has seen."""
    return torch.cuda.Stream(device)
