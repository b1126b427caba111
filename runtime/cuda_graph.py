"""Recording CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

__all__ = ["record"]


def record(step: Callable[[], None], *, warm_up: Callable[[], None] | None = None) -> torch.cuda.CUDAGraph:
    """`step` as a CUDA graph; it is not run.

    Args:
        step: launches kernels on tensors that stay where they are, and waits for nothing.
        warm_up: run before, on the stream of the recording: compiles what has to be, and leaves no trace.
    """
    graph, stream = torch.cuda.CUDAGraph(), _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    if warm_up is not None:
        with torch.cuda.stream(stream):
            warm_up()
    with torch.cuda.graph(graph, stream=stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One stream for all recordings: cuBLAS keeps a workspace of 32 MiB for every stream that it has seen."""
    return torch.cuda.Stream(device)
