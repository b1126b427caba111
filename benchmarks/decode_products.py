"""Area `decode`, case `products`: the matrix products of a decoder layer with few tokens, against cuBLAS.

Ours are fused with norm, activation or residual; cuBLAS has the products alone. Several copies of the weights in turn,
in one CUDA graph a side, so that no cache holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.rows import Row, bandwidth, measure_pair, row
from effpass.lowering.ops import fused_linear as operators  # noqa: F401  (registers the operators)
from effpass.runtime.cuda_graph import record

AREA = "decode"


class Product(NamedTuple):
    """Products that read the same tokens."""

    inner: int
    outputs: tuple[int, ...]
    norm: bool = False
    residual: bool = False
    gated: bool = False


OF_8B = {
    "q, k, v": Product(4096, (4096, 1024, 1024), norm=True),
    "o": Product(4096, (4096,), residual=True),
    "gate, up": Product(4096, (14336, 14336), norm=True, gated=True),
    "down": Product(14336, (4096,), residual=True),
    "head": Product(4096, (128256,), norm=True),
}
OF_SMOLLM2 = {
    "q, k, v": Product(576, (576, 192, 192), norm=True),
    "o": Product(576, (576,), residual=True),
    "gate, up": Product(576, (1536, 1536), norm=True, gated=True),
    "down": Product(1536, (576,), residual=True),
    "head": Product(576, (49152,), norm=True),
}
TINY = {"gate, up": Product(64, (96, 96), norm=True, gated=True), "down": Product(96, (64,), residual=True)}


def products(device: str, smoke: bool) -> Iterator[Row]:
    """Time of each product of a layer by the number of tokens."""
    small = smoke or device == "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = {"a small model": TINY} if small else {"Llama 3.1 8B": OF_8B, "SmolLM2-135M": OF_SMOLLM2}
    for model, name, product in ((model, *of) for model, products in shapes.items() for of in products.items()):
        moved = sum(product.outputs) * product.inner * dtype.itemsize
        copies = 2 if small else max(2, min(256, 1 + 400_000_000 // moved))
        of = {"device": device, "dtype": dtype}
        weights = [[torch.randn(n, product.inner, **of) * 0.02 for n in product.outputs] for _ in range(copies)]
        norm = torch.rand(product.inner, **of) if product.norm else None
        for rows in (1, 8, 32, 64):
            x = torch.randn(rows, product.inner, **of)
            residual = torch.randn(rows, product.outputs[0], **of) if product.residual else None

            def ours(w: list[Tensor], x: Tensor = x, norm: Any = norm, residual: Any = residual,
                     gated: bool = product.gated) -> Any:  # fmt: skip
                if gated:
                    return torch.ops.effpass.gated_linear(x, *w, norm, 1e-5, 0.0, "silu")
                return torch.ops.effpass.fused_linear(x, w, [None] * len(w), norm, 1e-5, 0.0, residual)

            def library(w: list[Tensor], x: Tensor = x) -> Any:
                return [linear(x, one) for one in w]

            calls = [_all(run, weights, device) for run in (ours, library)]
            times = measure_pair(*calls, device, runs=3 if small else 15, inner=1 if small else 3)
            yield row(
                AREA, f"{name} of {model}, {rows} tokens", "products of a layer",
                times[0].median / copies * 1e6, "us", device=device, peer=times[1].median / copies * 1e6,
                peer_name="cuBLAS, without norm, activation and residual", bound=moved / bandwidth(device) * 1e6,
                runs=times[0].runs,
            )  # fmt: skip


def _all(run: Callable[[list[Tensor]], Any], weights: list[list[Tensor]], device: str) -> Callable[[], Any]:
    def call() -> None:
        for w in weights:
            run(w)

    return call if device == "cpu" else record(call, warm_up=call).replay
