"""Area `decode`: the decode engine against a compiled model with a static cache, and against the hardware.

Ours is what a user calls: the time that `generate` of a prepared model takes for more tokens, over the number of these
tokens. The peer is one forward of `torch.compile(mode="reduce-overhead")` over a static cache of fixed length, warmed,
with the choice of the token; dynamic `generate` of transformers is printed beside, and is no peer.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

import effpass
from benchmarks.backend import _compile, _decode_step, _dtype, _free, _weight_bytes
from benchmarks.decode_chain import chain
from benchmarks.decode_products import products
from benchmarks.rows import Row, bandwidth, measure, row, sync
from benchmarks.shapes import head_dim, random_model
from effpass.runtime import session

AREA = "decode"
PROMPT, SLOTS = 512, 1024
NO_PASSES: dict[str, Any] = {"version": 1, "passes": []}


def _shapes(device: str, smoke: bool) -> list[str]:
    if smoke or device == "cpu":
        return ["tiny"]
    return os.environ.get("EFFPASS_SHAPES", "smollm2-135m,qwen3-1.7b,llama-3.1-8b").split(",")


def _seconds_a_token(generate: Callable[[int], Any], short: int, long: int, runs: int, device: str) -> float:
    """Median over `runs` of what `long - short` further tokens take, a token."""
    seconds = []
    for _ in range(runs):
        times = []
        for tokens in (short, long):
            sync(device)
            started = time.perf_counter()
            generate(tokens)
            sync(device)
            times.append(time.perf_counter() - started)
        seconds.append((times[1] - times[0]) / (long - short))
    return median(seconds)


def _generate(model: Any, ids: Tensor) -> Callable[[int], Any]:
    return lambda new: model.generate(
        input_ids=ids, min_new_tokens=new, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
    )


def _cache_bytes(model: Any, positions: int) -> int:
    config = model.config
    element = next(model.parameters()).element_size()
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim(config) * element * positions


def _greedy(model: Any, rows: int, smoke: bool, device: str) -> tuple[float, float, float]:
    """Seconds a token of ours, seconds of the first call, and the bound."""
    ids = torch.randint(5, model.config.vocab_size, (rows, PROMPT), device=device)
    generate = _generate(model, ids)
    short, long, runs = (4, 12, 1) if smoke else (32, 160, 5)
    started = time.perf_counter()
    generate(long)
    first = time.perf_counter() - started
    generate(short)
    ours = _seconds_a_token(generate, short, long, runs, device)
    read = _weight_bytes(model) + rows * _cache_bytes(model, PROMPT + (short + long) // 2)
    return ours, first, read / bandwidth(device)


def batch1(device: str, smoke: bool) -> Iterator[Row]:
    """Greedy decoding at batch 1, three shapes, and the peer."""
    for shape in _shapes(device, smoke):
        model = effpass.prepare(random_model(shape, device, _dtype(device)), NO_PASSES)
        yield from _batch(shape, model, 1, smoke, device)
        del model
        _free(device)


def _batch(shape: str, model: Any, rows: int, smoke: bool, device: str) -> Iterator[Row]:
    ours, first, bound = _greedy(model, rows, smoke, device)
    step = _decode_step(model, device, _compile(model, device, backend="inductor"), rows)
    peer = measure(lambda: step().argmax(-1), device, warmup=5, runs=3 if smoke else 15, inner=20)
    yield row(
        AREA, f"{shape}, {_dtype(device)}, batch {rows}, prompt {PROMPT}".replace("torch.", ""),
        "greedy, a token" if rows == 1 else "greedy, a step", ours * 1e3, "ms", device=device, peer=peer.median * 1e3,
        peer_name=f"inductor reduce-overhead, static cache of {SLOTS}", bound=bound * 1e3, runs=5,
        note=f"{bound / ours:.0%} of the bound; first call {first:.1f} s",
    )  # fmt: skip


def batches(device: str, smoke: bool) -> Iterator[Row]:
    """Greedy decoding of 8 and 32 sequences, and the peer."""
    for shape in _shapes(device, smoke):
        model = effpass.prepare(random_model(shape, device, _dtype(device)), NO_PASSES)
        for rows in (8, 32):
            yield from _batch(shape, model, rows, smoke, device)
        del model
        _free(device)


def dynamic(device: str, smoke: bool) -> Iterator[Row]:
    """transformers' own generate with its default cache: printed, no peer."""
    for shape in _shapes(device, smoke)[:2]:
        model = random_model(shape, device, _dtype(device))
        ids = torch.randint(5, model.config.vocab_size, (1, PROMPT), device=device)
        generate = _generate(model, ids)
        generate(2)
        seconds = _seconds_a_token(generate, 2, 6 if smoke else 18, 1 if smoke else 3, device)
        yield row(AREA, f"{shape}, batch 1, prompt {PROMPT}", "transformers' generate, a token", seconds * 1e3, "ms",
                  device=device, runs=3)  # fmt: skip
        del model
        _free(device)


def floor(device: str, smoke: bool) -> Iterator[Row]:
    """What 150 kernels in one CUDA graph take that do next to nothing: 30 layers of five."""
    if device != "cuda":
        return
    x = torch.zeros(576, device=device)
    graph = torch.cuda.CUDAGraph()
    x.add_(1)
    with torch.cuda.graph(graph):
        for _ in range(150):
            x.add_(1)
    timing = measure(graph.replay, device, warmup=10, runs=15, inner=20)
    yield row(AREA, "150 kernels of 576 elements in one CUDA graph", "launch floor", timing.median * 1e3, "ms",
              device=device, runs=15)  # fmt: skip


def prefill(device: str, smoke: bool) -> Iterator[Row]:
    """The first token of long prompts, and the share that cuDNN's attention alone takes of it."""
    shape = "tiny" if smoke or device == "cpu" else "llama-3.1-8b"
    lengths = (64, 128) if shape == "tiny" else (8192, 32768)
    model = random_model(shape, device, _dtype(device), max_position_embeddings=40960)
    own = type(model).generate
    model = effpass.prepare(model, NO_PASSES)
    config = model.config
    for length in lengths:
        ids = torch.randint(5, config.vocab_size, (1, length), device=device)
        one = {"input_ids": ids, "max_new_tokens": 1, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        ours = measure(lambda one=one: model.generate(**one), device, warmup=1, runs=3)
        peer = measure(lambda one=one: own(model, **one), device, warmup=1, runs=3)
        q, k, v = (
            torch.randn(1, heads, length, head_dim(config), device=device, dtype=_dtype(device))
            for heads in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        )
        attention = measure(lambda q=q, k=k, v=v: _cudnn(q, k, v), device, warmup=2, runs=5)
        share = attention.median * config.num_hidden_layers / ours.median
        yield row(
            AREA, f"{shape}, {_dtype(device)}, batch 1, prompt {length}".replace("torch.", ""), "first token",
            ours.median * 1e3, "ms", device=device, peer=peer.median * 1e3, peer_name="transformers' generate, sdpa",
            runs=3, note=f"SDPA cuDNN alone over the layers is {share:.0%} of it",
        )  # fmt: skip


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention import sdpa_kernel

    from effpass.runtime.attention import PREFILL

    with sdpa_kernel(PREFILL, set_priority=True):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def short_prompts(device: str, smoke: bool) -> Iterator[Row]:
    """First tokens of short prompts, each of a length that was never met before, from CUDA graphs and without."""
    shape = "tiny" if smoke or device == "cpu" else "smollm2-135m"
    model = effpass.prepare(random_model(shape, device, _dtype(device)), NO_PASSES)
    lengths = range(101, 500, 199 if smoke else 23)
    model.generate(_prompt(model, 900), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)

    def median_of(lengths: Iterable[int]) -> float:
        seconds = []
        for length in lengths:
            ids = _prompt(model, length)
            sync(device)
            started = time.perf_counter()
            model.generate(ids, max_new_tokens=1, do_sample=False, eos_token_id=None, pad_token_id=0)
            sync(device)
            seconds.append(time.perf_counter() - started)
        return median(seconds)

    recorded, session._PROMPT_GRAPHS = session._PROMPT_GRAPHS, ()
    try:
        theirs = median_of(lengths)
    finally:
        session._PROMPT_GRAPHS = recorded
    median_of([n - 1 for n in lengths] * 2)  # each size is recorded when it occurs again
    ours = median_of(n + 1 for n in lengths)
    yield row(
        AREA, f"{shape}, {_dtype(device)}, prompts of {lengths[0]} to {lengths[-1]} tokens".replace("torch.", ""),
        "first token, each length new", ours * 1e3, "ms", device=device, peer=theirs * 1e3,
        peer_name="operator by operator", runs=len(lengths), note="medians of whole calls of generate",
    )  # fmt: skip


def _prompt(model: Any, length: int) -> Tensor:
    return torch.randint(5, model.config.vocab_size, (1, length), device=model.device)


_FIRST = """
import sys, time, torch, transformers
import effpass
from benchmarks.backend import _dtype
from benchmarks.decode import NO_PASSES
from benchmarks.shapes import random_model
device, shape = sys.argv[1:]
model = random_model(shape, device, _dtype(device))
ids = torch.randint(5, 90, (1, 32), device=device)
started = time.perf_counter()
model = effpass.prepare(model, NO_PASSES)
times = []
class Streamer:
    def put(self, value): times.append(time.perf_counter() - started)
    def end(self): pass
model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0, streamer=Streamer())
print("seconds", times[1], times[2], times[-1])
"""


def first_token(device: str, smoke: bool) -> Iterator[Row]:
    """A new process with empty and with warm on-disk caches: `prepare` and the first tokens of a loaded model."""
    shape = "tiny" if smoke or device == "cpu" else "llama-3.1-8b"
    with tempfile.TemporaryDirectory() as cache:
        for state in ("cold", "warm"):
            places = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton", "EFFPASS_CACHE": cache}
            command = [sys.executable, "-c", _FIRST, device, shape]
            done = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            first, second, last = map(float, done.stdout.split("seconds")[1].split())
            yield row(AREA, f"{shape}, {state} caches", "prepare to the first decoded token", second, "s",
                      device=device, note=f"token of the prompt {first:.1f} s, eighth token {last:.1f} s")  # fmt: skip


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "floor": floor,
    "chain": chain,
    "products": products,
    "batch1": batch1,
    "batches": batches,
    "dynamic": dynamic,
    "prefill": prefill,
    "short_prompts": short_prompts,
    "first_token": first_token,
}
