"""Kernels of the decode operators against naive sums in float64: on a GPU, or, run as a program, without one.

`python kernel_cases.py interpret` computes float32 cases through Triton's interpreter; `python kernel_cases.py compile`
compiles kernels for a GPU that is not there, which finds what the interpreter lets pass. Both print JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from offline_kernels import compile_instead
from torch import Tensor
from triton_interpreter import set_up

KERNELS = ("_one_row", "_whole_rows", "_few_rows", "_attend", "_spans", "_table", "_append", "_best", "_logsumexp",
           "_received")  # fmt: skip
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    x = x.double()
    if weight is None:
        return x
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (offset + weight.double())


def activation(x: Tensor, name: str) -> Tensor:
    if name == "silu":
        return x * torch.sigmoid(x)
    if name == "gelu":
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))
    if name == "gelu_tanh":
        return x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x.clamp(min=0)


def attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_positions: Tensor,
    query_positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """[B, T, H, V] by a loop over queries, each with the slots it sees gathered."""
    (batch, heads, tokens, _), repeat = query.shape, query.shape[1] // keys.shape[1]
    out = torch.zeros(batch, tokens, heads, values.shape[-1], dtype=torch.float64, device=query.device)
    for b in range(batch):
        for t in range(tokens):
            position = int(query_positions[b, t])
            seen = (key_positions[b] >= 0) & (key_positions[b] <= position)
            if window:
                seen &= key_positions[b] > position - window
            if not seen.any():
                continue
            k, v = (x[b, :, seen].double().repeat_interleave(repeat, 0) for x in (keys, values))
            score = torch.einsum("hk,hsk->hs", query[b, :, t].double(), k) * scale
            if softcap:
                score = softcap * torch.tanh(score / softcap)
            out[b, t] = torch.einsum("hs,hsv->hv", score.softmax(-1), v)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, T, H, K], feature i of the first R turned with feature i + R/2, one by one."""
    out, half = x.double().clone(), cos.shape[-1] // 2
    for i in range(half):
        a, b = x[..., i].double(), x[..., i + half].double()
        out[..., i] = a * cos[..., i, None].double() - b * sin[..., i, None].double()
        out[..., i + half] = b * cos[..., i + half, None].double() + a * sin[..., i + half, None].double()
    return out


def error(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; NaN where `got` has one."""
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


# -- cases ------------------------------------------------------------------------------------------------------------


def linear_errors(
    kernels: Any, rows: int, inner: int, norm: bool, offset: float, room: int | None = None, **of: Any
) -> dict[str, float]:
    """Errors of `fused_linear` with three weights and with a residual, and of `gated_linear`.

    `room` is the number of multiprocessors by which tiles are chosen, if kernels are tested.
    """
    if room is not None and hasattr(kernels, "multiprocessors"):
        with mock.patch.object(kernels, "multiprocessors", return_value=room):
            return linear_errors(kernels, rows, inner, norm, offset, **of)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, **of)

    torch.manual_seed(rows * inner)
    # The first alone has more tiles than an interpreted GPU has multiprocessors.
    x, sizes, eps = some(rows, inner) * 3, (70 if inner < 2048 else 326, 33, 5), 1e-6
    weights = [some(size, inner) * inner**-0.5 for size in sizes]
    biases = [None, some(33), some(5)]
    norm_weight = some(inner) if norm else None
    n = rms_norm(x, norm_weight, eps, offset)
    products = [n @ w.double().T + (0 if b is None else b.double()) for w, b in zip(weights, biases, strict=True)]
    got = kernels.fused_linear(x, weights, biases, norm_weight, eps, offset, None)
    found = {f"product {i}": error(g, p) for i, (g, p) in enumerate(zip(got, products, strict=True))}
    residual = some(rows, sizes[0])
    (one,) = kernels.fused_linear(x, weights[:1], [None], norm_weight, eps, offset, residual)
    found["residual"] = error(one, products[0] + residual.double())
    up, name = some(sizes[0], inner) * inner**-0.5, ACTIVATIONS[(rows + inner) % 4]
    gated = kernels.gated_linear(x, weights[0], up, norm_weight, eps, offset, name)
    found[name] = error(gated, activation(products[0], name) * (n @ up.double().T))
    return found


def cache(B: int, S: int, T: int, filled: int, padding: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of slots and of the last T tokens; row 0 is padded on the left."""
    slots = torch.full((B, S), -1, dtype=torch.int32)
    slots[:, :filled] = torch.arange(filled)
    slots[0, :filled] = (slots[0, :filled] - padding).clamp(min=-1)
    return (
        slots.to(device),
        slots[:, filled - T : filled].to(device),
        torch.tensor([filled], dtype=torch.int32).to(device),
    )


def attention_errors(
    kernels: Any, B: int, H: int, G: int, T: int, S: int, K: int, V: int, filled: int, window: int, softcap: float,
    padding: int, shuffled: bool = False, **of: Any,
) -> dict[str, float]:  # fmt: skip
    """Errors of `cached_attention` with a query whose strides are those of a projection."""
    torch.manual_seed(S + T)
    query = torch.randn(B, T, H, K, **of).transpose(1, 2)
    keys, values = torch.randn(B, G, S, K, **of), torch.randn(B, G, S, V, **of)
    of_keys, of_queries, end = cache(B, S, T, filled, padding, of["device"])
    if shuffled:
        of_keys[:, :filled] = of_keys[:, torch.randperm(filled)]
    got = kernels.cached_attention(query, keys, values, of_keys, of_queries, end, K**-0.5, window, softcap)
    expected = attention(query, keys, values, of_keys, of_queries, K**-0.5, window, softcap)
    unseen = (expected == 0).all(-1)
    return {"attention": error(got, expected), "unseen": float(got[unseen].abs().sum())}


def rope_errors(
    kernels: Any, B: int, H: int, G: int, T: int, S: int, K: int, V: int, filled: int, window: int, softcap: float,
    padding: int, rotated: int, norm: bool, **of: Any,
) -> dict[str, float]:  # fmt: skip
    """Errors of `rope_cached_attention`: of its output, and of what it left in the cache."""
    torch.manual_seed(S + T)
    projected = torch.randn(B, T, H * K + G * K + G * V, **of)
    query, key, value = projected.split([H * K, G * K, G * V], -1)
    query, key, value = query.view(B, T, H, K), key.view(B, T, G, K), value.view(B, T, G, V)
    keys, values = torch.randn(B, G, S, K, **of), torch.randn(B, G, S, V, **of)
    angles = torch.rand(1, T, rotated // 2, **of) * 6
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
    query_norm, key_norm = (torch.randn(K, **of), torch.randn(K, **of)) if norm else (None, None)
    of_keys, of_queries, end = cache(B, S, T, filled, padding, of["device"])

    new_keys = rotate(rms_norm(key, key_norm, 1e-6, 1.0), cos, sin).transpose(1, 2)
    turned = rotate(rms_norm(query, query_norm, 1e-6, 1.0), cos, sin).transpose(1, 2)
    expected_keys, expected_values = keys.double(), values.double()
    expected_keys[:, :, filled - T : filled] = new_keys
    expected_values[:, :, filled - T : filled] = value.double().transpose(1, 2)
    expected = attention(turned, expected_keys, expected_values, of_keys, of_queries, K**-0.5, window, softcap)

    before = keys.clone()
    got = kernels.rope_cached_attention(
        query, key, value, cos, sin, query_norm, key_norm, 1e-6, 1.0, keys, values, of_keys, of_queries, end - T,
        K**-0.5, window, softcap,
    )  # fmt: skip
    others = torch.ones(S, dtype=torch.bool)
    others[filled - T : filled] = False
    return {
        "attention": error(got, expected),
        "keys": error(keys, expected_keys),
        "values": error(values, expected_values),
        "other slots": float((keys - before)[:, :, others].abs().sum()),
    }


def table_errors(kernels: Any, B: int, T: int, half: int, scaling: float, **of: Any) -> dict[str, float]:
    """Errors of `rotary_table` at angles of up to some thousand turns, and bits that differ from those of given angles.

    An angle is given as the frequency of position 1.
    """
    torch.manual_seed(half)
    frequencies = torch.rand(half, device=of["device"])
    worst = {"cos": 0.0, "sin": 0.0, "differing": 0.0}
    for kind in (torch.int32, torch.int64):  # a part of a larger tensor, and one position for all
        some = torch.randint(0, 9000, (B, T + 1), device=of["device"], dtype=kind)
        for positions in (some[:, 1:], some[:1, :1].expand(B, T)):
            angles = positions[..., None].float() * frequencies
            expected = angles.double().repeat(1, 1, 2)
            cos, sin = kernels.rotary_table(positions, frequencies, scaling, of["dtype"])
            given = kernels.rotary_table(torch.ones_like(some[:1, :1]), angles[-1, -1], scaling, of["dtype"])
            differing = (given[0] != cos[-1, -1]).sum() + (given[1] != sin[-1, -1]).sum()
            found = error(cos, expected.cos() * scaling), error(sin, expected.sin() * scaling), float(differing)
            worst = {name: max(value, new) for (name, value), new in zip(worst.items(), found, strict=True)}
    return worst


def append_errors(kernels: Any, B: int, rows: int, S: int, filled: int, **of: Any) -> dict[str, float]:
    """What differs in the table, and in the two counters, after `append_positions` of one token."""
    slots, _, end = cache(B, S, 1, filled, 2, of["device"])
    new, start = torch.arange(rows, device=of["device"], dtype=torch.int32)[:, None] - 1, torch.full_like(end, -5)
    expected = slots.clone()
    for row in range(rows):
        expected[row, filled] = new[row, 0]
    kernels.append_positions(slots, start, end, new)
    return {"table": float((slots != expected).sum()), "counters": float(start != filled) + float(end != filled + 1)}


def greedy_errors(kernels: Any, rows: int, vocabulary: int, **of: Any) -> dict[str, float]:
    """Rows that differ after two steps of `greedy_tokens`; half of the rows end with the first."""
    torch.manual_seed(rows)
    logits = torch.randint(-9, 9, (rows, vocabulary), device=of["device"]).to(of["dtype"])
    best = torch.tensor([row.index(max(row)) for row in logits.tolist()], device=of["device"])
    ends, pad = torch.full((4,), -1, device=of["device"]), torch.tensor(vocabulary, device=of["device"])
    ends[1] = best[0]
    tokens, ids, column = (
        torch.zeros_like(best),
        torch.zeros(rows, 5, dtype=torch.long, device=of["device"]),
        pad * 0 + 3,
    )
    unfinished, lasted, goes_on = torch.ones_like(best), pad.new_zeros(()), pad.new_zeros((), dtype=torch.bool)
    for _ in range(2):
        kernels.greedy_tokens(logits, ends, pad, tokens, ids, column, unfinished, goes_on, lasted)
    goes = best != best[0]
    return {
        "first": float((ids[:, 3] != best).sum()),
        "second": float((ids[:, 4] != torch.where(goes, best, pad)).sum() + (tokens != ids[:, 4]).sum()),
        "others": float(ids[:, :3].abs().sum() + (column != 5).sum()),
        "ends": float((unfinished != goes.long()).sum() + (goes_on != goes.any()) + (lasted != 2 * int(goes.any()))),
    }


def received_errors(
    kernels: Any, B: int, H: int, G: int, T: int, S: int, K: int, filled: int, softcap: float, padding: int,
    shuffled: bool = False, **of: Any,
) -> dict[str, float]:  # fmt: skip
    """Errors of `received_attention` against a loop over tokens."""
    torch.manual_seed(S + T)
    query, keys = torch.randn(B, T, H, K, **of).transpose(1, 2), torch.randn(B, G, S, K, **of)
    of_keys, of_queries, _ = cache(B, S, T, filled, padding, of["device"])
    if shuffled:
        of_keys[:, :filled] = of_keys[:, torch.randperm(filled)]
    expected = torch.zeros(B, S, dtype=torch.float64, device=of["device"])
    for b in range(B):
        for t in range(T):
            seen = (of_keys[b] >= 0) & (of_keys[b] <= of_queries[b, t])
            if seen.any():
                score = query[b, :, t, None].double() @ keys[b].double().repeat_interleave(H // G, 0).mT * K**-0.5
                score = softcap * torch.tanh(score / softcap) if softcap else score
                expected[b] += score[:, 0].masked_fill(~seen, float("-inf")).softmax(-1).mean(0)
    got = kernels.received_attention(query, keys, of_keys, of_queries, K**-0.5, softcap)
    return {"received": error(got, expected), "unseen": float(got[expected == 0].abs().sum())}


LINEARS = {
    "one row": (1, 72, False, 0.0),
    "one row, Gemma's norm": (1, 576, True, 1.0),
    "one row, several tiles": (1, 2064, True, 0.0),
    "two rows": (2, 72, True, 0.0),
    "17 rows": (17, 200, False, 0.0),
    "64 rows": (64, 136, True, 1.0),
    "3 rows, long": (3, 2056, True, 0.0),
    "40 rows, long": (40, 2304, False, 0.0),
    "3 rows, whole": (3, 200, True, 1.0, 132),
    "16 rows, whole, without norm": (16, 256, False, 0.0, 132),
    "32 rows, whole": (32, 72, True, 0.0, 132),
    "7 rows, whole and wide": (7, 1544, True, 0.0, 132),
    "7 rows, not whole": (7, 136, True, 0.0, 1),
    "30 rows, not whole": (30, 200, True, 1.0, 1),
}
# B, H, G, T, S, K, V, filled, window, softcap, padding
ATTENTIONS = {
    "one token": (1, 4, 4, 1, 130, 32, 32, 129, 0, 0.0, 0),
    "first token": (2, 4, 2, 1, 70, 16, 16, 1, 0, 0.0, 0),
    "8 heads a group, 3 tokens": (1, 8, 1, 3, 200, 32, 48, 150, 0, 0.0, 0),
    "padding, window, softcap": (2, 6, 2, 1, 300, 24, 16, 290, 40, 20.0, 11),
    "a row of padding": (2, 3, 3, 17, 70, 16, 16, 17, 0, 0.0, 17),
    "several parts": (1, 2, 1, 1, 700, 64, 64, 650, 0, 0.0, 0),
}
PREFILLS = {
    "causal": (1, 2, 1, 130, 200, 32, 32, 180, 0, 0.0, 0),
    "padding, window": (2, 2, 1, 150, 260, 24, 16, 250, 50, 0.0, 90),
    "softcap, no order": (1, 2, 2, 70, 300, 16, 16, 300, 0, 10.0, 0, True),
}
# B, H, G, T, S, K, filled, softcap, padding
RECEIVED = {
    "causal": (1, 2, 1, 150, 200, 32, 180, 0.0, 0),
    "padding": (2, 4, 2, 70, 140, 24, 130, 0.0, 90),
    "softcap, no order": (1, 2, 2, 40, 300, 16, 300, 10.0, 0, True),
}
# B, T, R / 2, scaling
TABLES = {"one token": (1, 1, 32, 1.0), "odd sizes": (3, 5, 7, 0.7)}
# rows, vocabulary
GREEDY = {"one row": (1, 5000), "odd sizes": (5, 2049), "64 rows": (64, 130)}
# B, rows, S, filled
APPENDS = {"first slot": (1, 1, 9, 0), "some rows": (40, 37, 9, 8)}
# rotated, norm
ROTATIONS = {"one token": (32, False), "8 heads a group, 3 tokens": (16, True), "padding, window, softcap": (24, True)}


def cases(**of: Any) -> Iterator[tuple[str, Callable[[ModuleType], dict[str, float]], str]]:
    """Name, a function of the module to test, and the module's name."""
    for name, case in LINEARS.items():
        yield f"linear: {name}", lambda kernels, case=case: linear_errors(kernels, *case, **of), "small_linear"
    for name, case in ATTENTIONS.items():
        yield f"decode: {name}", lambda kernels, case=case: attention_errors(kernels, *case, **of), "decode_attention"
    for name, case in PREFILLS.items():
        yield f"prefill: {name}", lambda kernels, case=case: attention_errors(kernels, *case, **of), "prefill_attention"
    for name, more in ROTATIONS.items():
        arguments = (*ATTENTIONS[name], *more)
        yield f"rope: {name}", lambda kernels, a=arguments: rope_errors(kernels, *a, **of), "decode_attention"
    for name, case in RECEIVED.items():
        yield (
            f"received: {name}",
            lambda kernels, case=case: received_errors(kernels, *case, **of),
            "received_attention",
        )
    for name, case in TABLES.items():
        yield f"table: {name}", lambda kernels, case=case: table_errors(kernels, *case, **of), "rotary_table"
    for name, case in APPENDS.items():
        yield f"append: {name}", lambda kernels, case=case: append_errors(kernels, *case, **of), "append_positions"
    for name, case in GREEDY.items():
        yield f"greedy: {name}", lambda kernels, case=case: greedy_errors(kernels, *case, **of), "greedy_tokens"


# -- programs ---------------------------------------------------------------------------------------------------------


def _kernels(name: str) -> Any:
    import importlib

    return importlib.import_module(f"effpass.lowering.kernels.{name}")


def interpret() -> dict[str, dict[str, float]]:
    """Errors of all cases in float32; outputs and buffers start as NaN."""
    set_up()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills empty tensors with NaN
    of = {"device": torch.device("cpu"), "dtype": torch.float32}
    return {name: run(_kernels(module)) for name, run, module in cases(**of)}


def compile_all() -> dict[str, int]:
    """Bytes of shared memory of each kernel, compiled for compute capability 9.0 at the sizes of a real layer."""
    names = ("launch", "small_linear", "decode_attention", "prefill_attention", "rotary_table", "append_positions")
    launch, linear, decode, prefill, table, append, greedy = map(_kernels, (*names, "greedy_tokens"))
    modules = (launch, linear, decode, prefill, table, append, greedy, _kernels("received_attention"))
    launches = compile_instead(modules, KERNELS)

    def some(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def numbers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32)

    for size, dtype in ((128, torch.bfloat16), (256, torch.bfloat16), (128, torch.float32)):
        _kernels("received_attention").received_attention(
            some(1, 32, 256, size, dtype=dtype), some(1, 8, 512, size, dtype=dtype), numbers(1, 512), numbers(1, 256),
            0.1, 0.0,
        )  # fmt: skip
    for rows in (1, 8, 64):
        x, norm = some(rows, 2048), some(2048)
        linear.fused_linear(x, [some(2048, 2048), some(1024, 2048)], [None, some(1024)], norm, 1e-6, 0.0, None)
        linear.gated_linear(x, some(6144, 2048), some(6144, 2048), norm, 1e-6, 1.0, "silu")
        linear.fused_linear(some(rows, 9216), [some(2048, 9216)], [None], None, 0.0, 0.0, x)
    for rows, inner in ((8, 576), (32, 576), (8, 1536), (32, 1536)):
        x, norm = some(rows, inner), some(inner)
        linear.fused_linear(x, [some(576, inner), some(192, inner)], [None, some(192)], norm, 1e-6, 0.0, None)
        linear.gated_linear(x, some(1536, inner), some(1536, inner), norm, 1e-6, 1.0, "silu")
        linear.fused_linear(x, [some(576, inner)], [None], None, 0.0, 0.0, some(rows, 576))
    for tokens in (1, 4):
        q, k, v, norm = some(1, tokens, 32, 128), some(1, tokens, 8, 128), some(1, tokens, 8, 128), some(128)
        decode.rope_cached_attention(
            q, k, v, some(1, tokens, 128), some(1, tokens, 128), norm, norm, 1e-6, 0.0, some(1, 8, 1024, 128),
            some(1, 8, 1024, 128), numbers(1, 1024), numbers(1, tokens), numbers(1), 0.1, 0, 0.0,
        )  # fmt: skip
    for module, tokens in ((decode, 1), (prefill, 300)):
        cached = some(1, 8, 1024, 128), some(1, 8, 1024, 128), numbers(1, 1024), numbers(1, tokens), numbers(1)
        module.cached_attention(some(1, 32, tokens, 128), *cached, 0.1, 512, 30.0)
    table.rotary_table(numbers(1, 1), some(64, dtype=torch.float32), 1.0, torch.bfloat16)
    table.rotary_table(numbers(2, 8).long(), some(64), 1.0, torch.bfloat16)
    append.append_positions(numbers(4, 1024), numbers(1), numbers(1), numbers(3, 1))
    long = torch.zeros(2, dtype=torch.long)
    greedy.greedy_tokens(
        some(2, 49152), long, long[0], long, long[:, None], long[:1], long, torch.ones((), dtype=torch.bool), long[0]
    )
    return {f"{name}{number}": size for number, (name, size) in enumerate(launches)}


if __name__ == "__main__":
    if sys.argv[1] == "interpret":
        assert os.environ.get("TRITON_INTERPRET") == "1", "Triton reads TRITON_INTERPRET when it is imported"
        print(json.dumps(interpret()))
    else:
        print(json.dumps(compile_all()))
