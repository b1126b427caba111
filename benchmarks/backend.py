"""Area `backend`: what it costs to go through effpass, and what an attached adapter's merge gains.

The peer is `torch.compile(backend="inductor")` on the same model in the same process. "retraced" is effpass with a pass
that changes nothing: the whole road through the dialect, and none of its gains.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch

import benchmarks.identity
from benchmarks.rows import Row, bandwidth, measure, measure_pair, row
from benchmarks.shapes import head_dim, random_model

AREA = "backend"
RETRACED = {"passes": ["identity"]}


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _graphed(options: dict[str, Any], device: str) -> dict[str, Any]:
    """The options of mode="reduce-overhead": CUDA graphs."""
    return {**options, "inner_options": {"triton.cudagraphs": True}} if device == "cuda" else options


def _decode_step(model: Any, device: str, compiled: Callable[..., Any], rows: int = 1) -> Callable[[], Any]:
    """One token of each row over a static cache of 1024 positions."""
    from transformers import StaticCache

    config = model.config if not hasattr(model, "get_base_model") else model.get_base_model().config
    cache = StaticCache(config, max_cache_len=1024)
    # Made beforehand: a first call that makes the cache would be a graph of its own.
    cache.early_initialization(rows, config.num_key_value_heads, head_dim(config), _dtype(device), torch.device(device))
    ids = torch.full((rows, 1), 5, device=device)
    positions = torch.full((rows, 1), 512, device=device)

    def step() -> Any:
        with torch.no_grad():
            return compiled(input_ids=ids, position_ids=positions, past_key_values=cache).logits

    return step


def _compile(model: Any, device: str, **how: Any) -> Callable[..., Any]:
    """A compiled forward with code caches of its own, so that two compilations of one model do not share guards."""
    benchmarks.identity.register()
    forward = type(model).forward

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(model, *args, **kwargs)

    if how.get("backend") == "inductor" and device == "cuda":
        how = {"mode": "reduce-overhead"}
    own = types.FunctionType(call.__code__.replace(), call.__globals__, closure=call.__closure__)
    return torch.compile(own, **how)


def _weight_bytes(model: Any) -> int:
    tied = {
        id(p): p for n, p in model.named_parameters() if "embed_tokens" not in n or model.config.tie_word_embeddings
    }
    return sum(p.numel() * p.element_size() for p in tied.values())


def no_pass(device: str, smoke: bool) -> Iterator[Row]:
    """Decode step through the retraced graph against plain Inductor, both graph-captured on a GPU."""
    shapes = (
        ["tiny"] if smoke else ["smollm2-135m", "qwen3-1.7b", "llama-3.1-8b"] if device == "cuda" else ["smollm2-135m"]
    )
    for shape in shapes:
        model = random_model(shape, device, _dtype(device))
        peer = _decode_step(model, device, _compile(model, device, backend="inductor"))
        ours = _decode_step(
            model, device, _compile(model, device, backend="effpass", options=_graphed(RETRACED, device))
        )
        runs, inner = (3, 1) if smoke else (15, 20 if device == "cuda" else 2)
        a, b = measure_pair(ours, peer, device, warmup=5, runs=runs, inner=inner)
        difference = float((ours().float() - peer().float()).abs().max())
        bound = _weight_bytes(model) / bandwidth(device)
        yield (
            row(AREA, f"{shape} decode, batch 1, static cache 1024, {_dtype(device)}".replace("torch.", ""),
                "step time, retraced", a.median * 1e3, "ms", device=device, peer=b.median * 1e3, peer_name="inductor",
                bound=bound * 1e3, runs=runs,
                note=f"CUDA graphs on both sides; largest logit difference {difference:.2g}" if device == "cuda"
                else f"largest logit difference {difference:.2g}")
        )  # fmt: skip
        del model, ours, peer
        _free(device)


def merged_adapter(device: str, smoke: bool) -> Iterator[Row]:
    """A PeftModel with rank-16 adapters on all linear layers: default effpass against plain Inductor, decode step."""
    from peft import LoraConfig, get_peft_model

    from effpass.backend import reports

    shape = "tiny" if smoke else "smollm2-135m"
    base = random_model(shape, device, _dtype(device))
    model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)).eval()
    model.requires_grad_(False)
    peer = _decode_step(model, device, _compile(model, device, backend="inductor"))
    options = {"passes": [{"merge_lora": {"require": True}}]}
    ours = _decode_step(model, device, _compile(model, device, backend="effpass", options=_graphed(options, device)))
    runs, inner = (3, 1) if smoke else (15, 20 if device == "cuda" else 2)
    a, b = measure_pair(ours, peer, device, warmup=5, runs=runs, inner=inner)
    hits = reports[-1].hits
    difference = float((ours().float() - peer().float()).abs().max())
    yield (
        row(AREA, f"{shape} + LoRA r16 on {hits} linears, decode, batch 1", "step time, merged in the graph",
            a.median * 1e3, "ms", device=device, peer=b.median * 1e3, peer_name="inductor, adapter unmerged",
            bound=_weight_bytes(base) / bandwidth(device) * 1e3, runs=runs,
            note=f"largest logit difference {difference:.2g}")
    )  # fmt: skip
    yield _check_of_derived(hits, ours, device)


def derived_check(device: str, smoke: bool) -> Iterator[Row]:
    """What the wrapper looks at in each call when no weight changed, for more and more adapters: work of the host."""
    from peft import LoraConfig, get_peft_model

    for layers in (4,) if smoke else (4, 14, 42):
        base = random_model("tiny", "cpu", torch.float32, num_hidden_layers=layers)
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]
        model = get_peft_model(base, LoraConfig(r=4, target_modules=modules, init_lora_weights=False)).eval()
        model.requires_grad_(False)
        options = {"passes": [{"merge_lora": {"require": True}}], "inner": "aot_eager"}
        step = _decode_step(model, "cpu", _compile(model, "cpu", backend="effpass", options=options))
        step()
        yield _check_of_derived(len(modules) * layers, step, "cpu")
        _free("cpu")


def _check_of_derived(count: int, step: Callable[[], Any], device: str) -> Row:
    """The row of a compiled `step` with `count` derived weights."""
    from effpass.core.derived_arguments import DerivedArguments

    (arguments,) = [a for a in DerivedArguments.live if len(a.specs) == count]
    call = _arguments_of_a_call(arguments, step)
    check = measure(lambda: arguments.values(call), "cpu", warmup=20, runs=50, inner=20)
    originals = len(arguments.positions)
    return row(AREA, f"{count} derived weights of {originals} originals, nothing stepped", "derived_check",
               check.median * 1e6, "us a call", device=device, runs=50)  # fmt: skip


def _arguments_of_a_call(arguments: Any, call: Callable[[], Any]) -> list[Any]:
    """What the wrapper gets from Dynamo in one call."""
    captured: list[Any] = []
    compiled = arguments.function

    def record(*args: Any) -> Any:
        captured.append(args)
        return compiled(*args)

    arguments.function = record
    try:
        call()
    finally:
        arguments.function = compiled
    return list(captured[0][: len(captured[0]) - len(arguments.specs)])


def _free(device: str) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


_WORKER = """
import sys, time, torch
import benchmarks.identity
benchmarks.identity.register()
from benchmarks.backend import _compile, _decode_step, _dtype, RETRACED
from benchmarks.shapes import random_model
device, shape, how, layers = sys.argv[1:5]
torch.set_num_threads(max(1, torch.get_num_threads()))
model = random_model(shape, device, _dtype(device), **({"num_hidden_layers": int(layers)} if int(layers) else {}))
torch.compile(lambda x: x + 1)(torch.ones(3, device=device))  # imports and the compiler's worker pool are not counted
options = {"effpass": dict(backend="effpass", options=RETRACED), "inductor": dict(backend="inductor")}[how]
step = _decode_step(model, device, torch.compile(model, **options))
started = time.perf_counter()
step()
if device == "cuda":
    torch.cuda.synchronize()
print("seconds", time.perf_counter() - started)
"""


def compile_time(device: str, smoke: bool) -> Iterator[Row]:
    """First call with empty and with warm on-disk caches, each in a process of its own, the two backends in turn."""
    shape, layers = ("tiny", 0) if smoke else ("smollm2-135m", 0 if device == "cuda" else 8)
    depth = f", {layers} layers" if layers else ""
    with tempfile.TemporaryDirectory() as ours, tempfile.TemporaryDirectory() as theirs:
        for state, runs in (("cold", 1), ("warm", 1 if smoke else 3)):
            pairs = [
                (
                    _first_call(device, shape, "effpass", layers, ours),
                    _first_call(device, shape, "inductor", layers, theirs),
                )
                for _ in range(runs)
            ]
            a, b = zip(*pairs, strict=True)
            yield (
                row(AREA, f"{shape}{depth} decode graph, {state} caches", "compile time, retraced", median(a), "s",
                    device=device, peer=median(b), peer_name="inductor", runs=runs,
                    note=", ".join(f"{ours:.2f} / {peer:.2f}" for ours, peer in pairs) if runs > 1 else "")
            )  # fmt: skip


def _first_call(device: str, shape: str, how: str, layers: int, cache: str) -> float:
    """Seconds of the first call in a new process whose on-disk caches stand in `cache`."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
    command = [sys.executable, "-c", _WORKER, device, shape, how, str(layers)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split("seconds")[1])


def compilations(device: str, smoke: bool) -> Iterator[Row]:
    """32 prompt lengths, and layers compiled one by one: how many graphs, how much memory."""
    benchmarks.identity.register()
    from effpass.backend import reports

    model = random_model("tiny", device, torch.float32, num_hidden_layers=4)
    reports.clear()
    compiled = torch.compile(model, backend="effpass", options={**RETRACED, "inner": "aot_eager"})
    memory = []
    with torch.no_grad():
        for length in range(17, 49):
            compiled(input_ids=torch.full((2, length), 5, device=device), use_cache=False)
            gc.collect()
            memory.append(_memory(device))
    yield (row(AREA, "32 prompt lengths, batch 2", "graphs compiled", len(reports), "graphs", device=device))
    yield (
        row(AREA, "32 prompt lengths, batch 2", "memory grown over the last 16 lengths", memory[-1] - memory[15], "MiB",
            device=device)
    )  # fmt: skip
    _free(device)
    reports.clear()
    for layer in model.model.layers:
        layer.compile(backend="effpass", options={**RETRACED, "inner": "aot_eager"})
    with torch.no_grad():
        model(input_ids=torch.full((2, 16), 5, device=device), use_cache=False)
    yield (row(AREA, "4 equal layers, each compiled", "graphs compiled", len(reports), "graphs", device=device))


def _memory(device: str) -> float:
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def pass_time(device: str, smoke: bool) -> Iterator[Row]:
    """Time in the manager per layer, for 8 to 128 layers: linear when it stays the same."""
    from effpass.core.dynamo import program_from_dynamo
    from effpass.core.manager import PassManager

    for layers in (4, 8) if smoke else (8, 32, 128):
        model = random_model("tiny", "cpu", torch.float32, num_hidden_layers=layers)
        seconds: dict[str, float] = {}

        def backend(gm: Any, inputs: Any, seconds: dict[str, float] = seconds) -> Any:
            started = time.perf_counter()
            program = program_from_dynamo(gm, inputs)
            seconds["retrace"] = time.perf_counter() - started
            started = time.perf_counter()
            PassManager([benchmarks.identity.Identity()]).run(program)
            seconds["passes"] = time.perf_counter() - started
            return gm.forward

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend=backend)(input_ids=torch.full((2, 16), 5), use_cache=False)
        for what, value in seconds.items():
            yield (row(AREA, f"{layers} layers", f"{what} time per layer", value / layers * 1e3, "ms", device="cpu"))


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "no_pass": no_pass,
    "merged_adapter": merged_adapter,
    "derived_check": derived_check,
    "compile_time": compile_time,
    "compilations": compilations,
    "pass_time": pass_time,
}
