"""Area `moe`: whole layers of experts, from the routing to the weighted sum, against those of other libraries.

Ours is `effpass::moe_ffn` as it chooses its kernel. Up to 1024 tokens every side is captured in a CUDA graph, and the
experts of transformers compiled before; beyond, they are compiled and not captured. Routings change from call to call,
so that no cache holds the experts of the next one. The bound is the larger of reading the experts that a routing meets
once, at the bandwidth of a read-only kernel in that run, and of the floating-point work at the rate of a large product
in that run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

import effpass.lowering.ops.moe_ffn  # noqa: F401  (registers the operator)
from benchmarks import moe_pairs, moe_ranks, moe_ranks_decode, moe_ranks_stack, moe_symmetric, moe_tiles
from benchmarks.alone import alone
from benchmarks.backend import _compile, _decode_step, _dtype, _free
from benchmarks.decode import NO_PASSES, PROMPT, _greedy
from benchmarks.optimizer import matmul_rate as measured_rate
from benchmarks.rows import Row, bandwidth, measure, row, seconds_a_call
from effpass.lowering.ops.moe_ffn_choice import available, fitted, keep, run_kernel
from effpass.lowering.ops.moe_ffn_cost import Shape, best
from effpass.lowering.ops.moe_ffn_fit import measure as fit_device
from effpass.lowering.ops.moe_ffn_fit import random_layer

AREA = "moe"

SHAPES = {
    "mixtral-8x7b": Shape(2, 8, 4096, 14336),
    "qwen3-30b-a3b": Shape(8, 128, 2048, 768),
    "deepseek-v2-lite": Shape(6, 64, 2048, 1408),
    "deepseek-v2": Shape(6, 160, 5120, 1536),
}
SEVERAL_GPUS = ("qwen3-30b-a3b", "deepseek-v2")
TINY = Shape(2, 4, 64, 96)
TOKENS = (1, 16, 128, 1024, 8192)
LARGEST_GRAPH = 1024
#: Loads at which the fastest tile depends on the routing.
CLOSE = (
    ("mixtral-8x7b", 128),
    ("qwen3-30b-a3b", 1024),
    ("deepseek-v2-lite", 8192),
    ("deepseek-v2-lite", 1024),
    ("deepseek-v2", 1024),
)
GATE = ("silu", 1.0, 0.0, 0.0, False)
Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # x, experts, weights


def _tokens(device: str, smoke: bool) -> tuple[int, ...]:
    if smoke or device == "cpu":
        return (1, 16)
    return tuple(int(n) for n in os.environ.get("EFFPASS_TOKENS", ",".join(map(str, TOKENS))).split(","))


def _routings(shape: Shape, tokens: int, count: int, skewed: bool, device: str) -> tuple[Tensor, Tensor]:
    """Routings [count, T, k]; skewed: the expert at place n of a random order is 1 / n as likely (Zipf)."""
    torch.manual_seed(tokens)
    scores = -torch.empty(count, tokens, shape.experts, device=device).exponential_().log()
    if skewed:
        order = torch.rand(count, 1, shape.experts, device=device).argsort(-1)
        scores = scores - (order + 1).log()
    return scores.topk(shape.each, dim=-1).indices, torch.rand(tokens, shape.each, device=device).softmax(-1)


matmul_rate = functools.cache(measured_rate)


def _bound(shape: Shape, routings: Tensor, device: str) -> tuple[float, float]:
    """Seconds to read the experts that are met, and to compute."""
    met = sum(len(routing.unique()) for routing in routings) / len(routings)
    pairs = routings[0].numel()
    size = shape.width * shape.inner
    return met * 3 * size * shape.element_size / bandwidth(device), 6 * pairs * size / matmul_rate(device)


# -- peers ------------------------------------------------------------------------------------------------------------


def _transformers(implementation: str, gate_up: Tensor, down: Tensor) -> Call:
    """The experts of transformers, which all its gated families share, on these weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    experts, width, inner = down.shape
    config = MixtralConfig(hidden_size=width, intermediate_size=inner, num_local_experts=experts)
    config._experts_implementation = implementation
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj, module.down_proj = (torch.nn.Parameter(t, requires_grad=False) for t in (gate_up, down))
    return module


def _compiled(implementation: str, gate_up: Tensor, down: Tensor) -> Call:
    return torch.compile(_transformers(implementation, gate_up, down), fullgraph=True, dynamic=False)


def _sonic(gate_up: Tensor, down: Tensor) -> Call | None:
    """SonicMoE on these weights; None where it is not installed or does not load."""
    if importlib.util.find_spec("sonicmoe") is None:
        return None
    try:
        sonic = importlib.import_module("sonicmoe")
        swiglu = importlib.import_module("sonicmoe.enums").ActivationType.SWIGLU
    except Exception as error:  # it compiles and asks for versions while it is imported
        print(f"SonicMoE does not load: {type(error).__name__}: {error}")
        return None
    w1, w2 = gate_up.permute(1, 2, 0), down.permute(1, 2, 0)

    def call(x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        tokens, each = experts.shape
        token = torch.arange(tokens, device=x.device, dtype=torch.int32).repeat_interleave(each)
        scores, ids = weights.reshape(-1).float(), experts.reshape(-1).int()
        return sonic.moe_general_routing_inputs(
            x, scores, token, ids, w1, None, w2, None, down.shape[0], torch.cuda.current_stream().cuda_stream, swiglu,
            True, True,
        )[0]  # fmt: skip

    return call


def _vllm(gate_up: Tensor, down: Tensor) -> tuple[str, Call] | None:
    from benchmarks.moe_vllm import vllm_experts  # needs Triton

    return vllm_experts(gate_up, down)


def _peers(shape: Shape, tokens: int, gate_up: Tensor, down: Tensor) -> Iterator[tuple[str, Call]]:
    yield "transformers grouped_mm", _compiled("grouped_mm", gate_up, down)
    copied = tokens * shape.each * 3 * shape.width * shape.inner * shape.element_size
    if copied < 12e9:  # it copies the experts of every pair
        yield "transformers batched_mm", _compiled("batched_mm", gate_up, down)
    sonic = _sonic(gate_up, down)
    if sonic is not None:
        yield "SonicMoE", sonic
    vllm = _vllm(gate_up, down)
    if vllm is not None:
        yield vllm


# -- cases ------------------------------------------------------------------------------------------------------------


def _seconds(call: Call, x: Tensor, ids: Tensor, weights: Tensor, captured: bool, device: str) -> float:
    if device == "cuda":
        return seconds_a_call(lambda turn: call(x, ids[turn], weights), len(ids), captured=captured)
    return measure(lambda: call(x, ids[0], weights), device, warmup=1, runs=3).median


def _ours(gate_up: Tensor, down: Tensor) -> Call:
    return lambda x, ids, weights: torch.ops.effpass.moe_ffn(
        x, ids, weights, gate_up, None, down, None, *GATE, False
    )[0]  # fmt: skip


def _layer(name: str, device: str, smoke: bool) -> Iterator[Row]:
    """Every load of one layer, even and skewed, against each peer; and what another kernel would have saved."""
    shape = TINY if smoke or device == "cpu" else SHAPES[name]
    dtype = _dtype(device)
    with torch.inference_mode():
        gate_up, down = random_layer(shape, torch.device(device), dtype)
    for tokens in _tokens(device, smoke):
        torch._dynamo.reset()  # compiled for this load alone
        peers = list(_peers(shape, tokens, gate_up, down)) if device == "cuda" else []
        for routing, skewed in (("even", False), ("skewed", True)):
            case = f"{name}, {tokens} tokens, {routing}"
            with torch.no_grad():
                yield from _cell(case, shape, tokens, skewed, gate_up, down, peers, device)
    del gate_up, down, peers
    _free(device)


def _cell(
    case: str,
    shape: Shape,
    tokens: int,
    skewed: bool,
    gate_up: Tensor,
    down: Tensor,
    peers: list[tuple[str, Call]],
    device: str,
) -> Iterator[Row]:
    ids, weights = _routings(shape, tokens, 2 if tokens > LARGEST_GRAPH else 4, skewed, device)
    x = torch.randn(tokens, shape.width, device=device, dtype=gate_up.dtype)
    captured = tokens <= LARGEST_GRAPH
    reading, computing = _bound(shape, ids, device)
    bound = max(reading, computing)
    ours = _seconds(_ours(gate_up, down), x, ids, weights, captured, device)
    note = f"{ours / bound:.2f} of the bound, {'memory' if reading > computing else 'compute'}"
    if device == "cuda":
        chosen, others = _kernels(shape, x, ids, weights, gate_up, down, captured)
        fastest = min(others, key=lambda kernel: others[kernel])
        note = f"{chosen}; {note}; " + ", ".join(f"{k} {t * 1e6:.0f} us" for k, t in others.items())
        regret = others[chosen] / others[fastest] - 1
        yield row(AREA, case, "lost by the choice of the kernel", regret * 100, "%", device=device, runs=7,
                  note=f"chosen {chosen}, best {fastest}")  # fmt: skip
    reference = _ours(gate_up, down)(x, ids[0], weights)
    found = False
    for peer, call in peers:
        try:
            difference = (call(x, ids[0], weights) - reference).abs().max() / reference.abs().max()
            theirs = _seconds(call, x, ids, weights, captured, device)
        except Exception as error:  # a peer that fails at this load says nothing about the others
            print(f"{case}: {peer}: {type(error).__name__}: {str(error)[:300]}")
            with suppress(RuntimeError):  # what it left on the device
                torch.cuda.synchronize()
            continue
        found = True
        yield row(
            AREA, case, "layer of experts", ours * 1e6, "us", device=device, peer=theirs * 1e6, peer_name=peer,
            bound=bound * 1e6, runs=7, note=f"{note}; outputs differ by {float(difference):.1e}",
        )  # fmt: skip
    if not found:
        yield row(AREA, case, "layer of experts", ours * 1e6, "us", device=device, bound=bound * 1e6, runs=7, note=note)


def _kernels(
    shape: Shape, x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, captured: bool
) -> tuple[str, dict[str, float]]:
    """The chosen kernel, and seconds of each that is not far from it."""
    names = [n for n in available(x, gate_up, down) if not (captured and n == "by_expert")]
    chosen = best(x.shape[0], shape, fitted(x.device, x.dtype), names)
    seconds = {}
    for name in names:
        if (name == "rows" and x.shape[0] > 16) or (name in ("library", "by_expert") and x.shape[0] < 128):
            continue
        call: Call = lambda x, ids, w, name=name: run_kernel(  # noqa: E731
            name, x, ids, w, gate_up, None, down, None, *GATE
        )
        seconds[name] = _seconds(call, x, ids, weights, captured, "cuda")
    return chosen, seconds


def fit(device: str, smoke: bool) -> Iterator[Row]:
    """Fit the choice to this device first, as `effpass calibrate moe` does; notes have the timings that it fits."""
    if device != "cuda":
        return
    started = time.perf_counter()
    with alone():
        found, errors = fit_device(torch.device(device, torch.cuda.current_device()), _dtype(device), print)
    seconds = time.perf_counter() - started
    keep(found)
    yield row(AREA, "calibrate moe", "time to fit a device", seconds, "s", device=device)
    for kernel, error in errors.items():
        yield row(AREA, f"calibrate moe, {kernel}", "root mean square error of the fit", error * 100, "%",
                  device=device, note=_timings(found.timings.get(kernel, ())))  # fmt: skip


def _timings(timings: Sequence[tuple[int, Shape, float]]) -> str:
    """By layer (k, E, D, F), tokens and microseconds, so that another cost model can be judged by rows alone."""
    layers: dict[str, list[str]] = {}
    for tokens, shape, seconds in timings:
        layer = f"{shape.each} of {shape.experts}, {shape.width} x {shape.inner}"
        layers.setdefault(layer, []).append(f"{tokens} in {seconds * 1e6:.4g} us")
    return "; ".join(f"{layer}: {', '.join(parts)}" for layer, parts in layers.items())


def _autotuned(name: str, device: str, smoke: bool) -> Iterator[Row]:
    """Inductor's max-autotune on transformers' grouped_mm; about a minute of compilation for each number of tokens."""
    if device != "cuda":
        return
    shape = SHAPES[name]
    with torch.inference_mode():
        gate_up, down = random_layer(shape, torch.device(device), _dtype(device))
    for tokens in (int(n) for n in os.environ.get("EFFPASS_TOKENS", "16,1024,8192").split(",")):
        torch._dynamo.reset()
        mode = "max-autotune-no-cudagraphs"  # captured by hand, like the others
        call = torch.compile(_transformers("grouped_mm", gate_up, down), fullgraph=True, mode=mode)
        for routing, skewed in (("even", False), ("skewed", True)):
            ids, weights = _routings(shape, tokens, 2 if tokens > LARGEST_GRAPH else 4, skewed, device)
            x = torch.randn(tokens, shape.width, device=device, dtype=gate_up.dtype)
            with torch.no_grad():
                ours, theirs = (
                    _seconds(side, x, ids, weights, tokens <= LARGEST_GRAPH, device)
                    for side in (_ours(gate_up, down), call)
                )
            yield row(
                AREA, f"{name}, {tokens} tokens, {routing}", "layer of experts", ours * 1e6, "us", device=device,
                peer=theirs * 1e6, peer_name="Inductor max-autotune, grouped_mm",
                bound=max(_bound(shape, ids, device)) * 1e6, runs=7,
            )  # fmt: skip
    del gate_up, down, call
    _free(device)


def stack(device: str, smoke: bool) -> Iterator[Row]:
    """Layers of Qwen3-30B-A3B that decode in one graph, as `generate` of a prepared model runs them."""
    import effpass

    if device != "cuda":
        return
    model = _qwen3_moe(device, layers=8)
    model.set_experts_implementation("batched_mm")  # what transformers decodes with
    step = _decode_step(model, device, _compile(model, device, backend="inductor"))
    peer = measure(lambda step=step: step().argmax(-1), device, warmup=5, runs=15, inner=10)  # type: ignore[misc]
    del step
    torch._dynamo.reset()
    model.set_experts_implementation("grouped_mm")
    model = effpass.prepare(model, NO_PASSES)
    for rows in (1, 8):
        ours, first, _ = _greedy(model, rows, smoke, device)
        yield row(
            AREA, f"8 layers of Qwen3-30B-A3B, batch {rows}, prompt {PROMPT}", "greedy, a step", ours * 1e3, "ms",
            device=device, peer=peer.median * 1e3 if rows == 1 else None,
            peer_name="inductor reduce-overhead, batched_mm, static cache of 1024" if rows == 1 else "", runs=5,
            note=f"first call {first:.1f} s",
        )  # fmt: skip


def _qwen3_moe(device: str, layers: int) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
        moe_intermediate_size=768, decoder_sparse_step=1, max_position_embeddings=4096,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return Qwen3MoeForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    "fit": fit,
    **{name: lambda device, smoke, name=name: _layer(name, device, smoke) for name in SHAPES},  # type: ignore[misc]
    **{f"autotuned-{name}": functools.partial(_autotuned, name) for name in SHAPES},
    "stack": stack,
    "pairs": moe_pairs.pairs,
    "tiles": functools.partial(moe_tiles.tiles, tuple((name, SHAPES[name], n) for name, n in CLOSE), _routings),
    **{f"eps-{name}": functools.partial(moe_ranks.layers, name, SHAPES[name]) for name in SEVERAL_GPUS},
    **{f"eps-stack-{name}": functools.partial(moe_ranks_stack.stack, name) for name in SEVERAL_GPUS},
    f"eps-decode-{moe_ranks_decode.NAME}": moe_ranks_decode.decode,
    **{f"eps-symmetric-{name}": functools.partial(moe_symmetric.cells, name, SHAPES[name]) for name in SEVERAL_GPUS},
}
