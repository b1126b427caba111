"""Area `linear_attention`: `effpass::gated_delta_rule` in its modes against the kernels of other libraries.

All sides start from the same raw inputs. Ours and peers are called from Python as a model calls them, in a row of
calls; `in a graph` is without Python. Peers tune themselves in a first call, which is not in their time; its seconds
are in the note. One shape is one case: run each in a process of its own. The bound is what inputs, outputs and
gradients hold, read and written once, at the bandwidth of a read-only kernel in that run.

Shapes are B x T x H x D, those of flash-linear-attention's own benchmark and smaller ones, at which launches cost most.
In cases `weak`, gates are as a layer begins, and its state lasts for thousands of tokens; in cases `fast`, channels
decay as in flash-linear-attention's own benchmark. A peer that drops what has decayed depends on that.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import linear_attention_conversion, linear_attention_quality
from benchmarks.alone import alone
from benchmarks.linear_attention_peers import LOWER_BOUND, MODES, Call, Gates, Raw, ours, peers
from benchmarks.rows import Row, bandwidth, measure, row, seconds_a_call
from effpass.lowering.ops.gated_delta_rule_step import gated_delta_rule_step

AREA = "linear_attention"

SHAPES = (
    (1, 8192, 96, 128), (2, 16384, 16, 128), (4, 2048, 16, 128), (4, 4096, 64, 128), (8, 2048, 32, 256),
    (8, 1024, 8, 64),
    (8, 2048, 16, 128), (1, 65536, 16, 128),  # further shapes with published figures
    (1, 1024, 8, 128), (1, 2048, 16, 128), (1, 4096, 16, 128),  # bound by launches
)  # fmt: skip
WEAK = ((1, 8192, 96, 128), (1, 65536, 16, 128), (1, 4096, 16, 128))


class _Figures(NamedTuple):
    seconds: float
    first: float  # of the first call: compilation and tuning
    peak: float  # bytes beyond the inputs
    captured: float | None
    kept: float = math.nan  # bytes beyond inputs and output that a forward pass holds for the backward pass


def _figures(run: Callable[[], object], device: str) -> _Figures:
    started = time.perf_counter()
    run()
    if device != "cuda":
        return _Figures(measure(run, device, warmup=0, runs=3).median, time.perf_counter() - started, math.nan, None)
    torch.cuda.synchronize()
    first = time.perf_counter() - started
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    seconds = seconds_a_call(lambda turn: run(), 20, captured=False)
    captured = None
    try:
        captured = seconds_a_call(lambda turn: run(), 4, captured=True)
    except Exception as error:  # a peer that waits for the host can't be captured
        print(f"not captured: {type(error).__name__}: {str(error)[:200]}")
        torch.cuda.synchronize()
    return _Figures(seconds, first, peak, captured)


def _kept(call: Call, raw: Raw) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    output = call(raw)
    return torch.cuda.memory_allocated() - before - output.nbytes


def _running(what: str, call: Call, raw: Raw, mode: str, d_output: Tensor) -> Callable[[], object]:
    if what == "forward":
        return lambda: call(raw)
    leaves = [*raw.used(mode), raw.A_log, raw.dt_bias]
    return lambda: torch.autograd.grad(call(raw), leaves, d_output)


def _case(what: str, shape: tuple[int, int, int, int], gates: Gates, device: str, smoke: bool) -> Iterator[Row]:
    shape = (1, 128, 2, 32) if smoke or device != "cuda" else shape
    raw = Raw.random(shape, device, gates)
    raw = raw.requiring_grad() if what == "training" else raw
    d_output = torch.randn_like(raw.v)
    label = "x".join(map(str, shape)) + ("" if gates == "usual" else f", {gates} gates")
    found: dict[str, _Figures] = {}
    for mode in MODES:
        with torch.inference_mode(what == "forward"):
            found[mode] = _figures(_running(what, ours(mode), raw, mode, d_output), device)
        if what == "training" and device == "cuda":
            found[mode] = found[mode]._replace(kept=_kept(ours(mode), raw))
    had_peer = False
    for name, call, mode in peers(what) if device == "cuda" else ():
        try:
            peer = _figures(_running(what, call, raw, mode or "fg2+", d_output), device)
            if what == "training":
                peer = peer._replace(kept=_kept(call, raw))
            if mode is not None:
                same = ours(mode)(raw).detach()
                difference = float((call(raw).detach() - same).float().norm() / same.float().norm())
                print(f"{label}: output of {name} differs from ours by {difference:.1e}")
        except Exception as error:  # a peer that does not serve a shape says nothing about the others
            print(f"{what} {label}: {name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        had_peer = True
        yield from _compared(what, label, raw, found, device, name, peer)
    if not had_peer:
        yield from _compared(what, label, raw, found, device, "", None)


def _compared(
    what: str, label: str, raw: Raw, found: dict[str, _Figures], device: str, name: str, peer: _Figures | None
) -> Iterator[Row]:
    """Rows of all modes beside one peer, or alone."""
    for mode, own in found.items():
        held = sum(x.numel() * x.element_size() for x in (*raw.used(mode), raw.v))  # and the output
        bound = held * (1 if what == "forward" else 3) / bandwidth(device) * 1e3
        note = f"first call {own.first:.1f} s" + ("" if peer is None else f"; the peer's {peer.first:.1f} s")
        common: dict[str, Any] = {"device": device, "peer_name": name}
        yield row(
            AREA, f"{mode} {label}", what, own.seconds * 1e3, "ms", peer=None if peer is None else peer.seconds * 1e3,
            bound=bound, runs=7, note=note, **common,
        )  # fmt: skip
        if own.captured and (peer is None or peer.captured):
            of_peer = None if peer is None or peer.captured is None else peer.captured * 1e3
            yield row(AREA, f"{mode} {label}", f"{what}, in a graph", own.captured * 1e3, "ms", peer=of_peer,
                      bound=bound, runs=7, note=note, **common)  # fmt: skip
        if peer is not None:
            yield row(AREA, f"{mode} {label}", f"{what}, peak memory beyond inputs", own.peak / 2**20, "MiB",
                      peer=peer.peak / 2**20, **common)  # fmt: skip
            if what == "training":
                yield row(AREA, f"{mode} {label}", f"{what}, memory kept beyond inputs and output", own.kept / 2**20,
                          "MiB", peer=peer.kept / 2**20, **common)  # fmt: skip


def decode(device: str, smoke: bool) -> Iterator[Row]:
    """One token of 16 heads of 128 x 128, in a graph; the bound reads and writes the state."""
    small = smoke or device != "cuda"
    for batch in (1, 16, 128):
        raw, states = _decoding(batch, device, small)
        for mode in MODES:
            step = _decode_step(raw, states, mode)
            with torch.inference_mode():
                if device == "cuda":
                    seconds = seconds_a_call(step, len(states), captured=True)
                else:
                    seconds = measure(lambda step=step: step(0), device, runs=3).median  # type: ignore[misc]
            peer = _decode_peer(raw, states) if device == "cuda" and mode == "kda" else None
            yield row(
                AREA, f"{mode}, {_decode_label(states)}", "decode, a step", seconds * 1e6, "us", device=device,
                peer=None if peer is None else peer * 1e6,
                peer_name="" if peer is None else "fla-core fused_recurrent_kda",
                bound=2 * states[0].nbytes / bandwidth(device) * 1e6, runs=7, note=f"{len(states)} states in turn",
            )  # fmt: skip


def _decoding(batch: int, device: str, small: bool) -> tuple[Raw, Tensor]:
    """A token, and as many states [turns, B, H, D, D] in turn as no cache holds until their next one."""
    heads, size = (2, 32) if small else (16, 128)
    turns = 1 if small else min(256, max(8, 2**28 // (batch * heads * size * size * 4)))
    return Raw.random((batch, 1, heads, size), device), torch.randn(turns, batch, heads, size, size, device=device)


def _decode_label(states: Tensor) -> str:
    return f"{states.shape[2]} heads of {states.shape[3]}, batch {states.shape[1]}"


def _decode_step(raw: Raw, states: Tensor, mode: str) -> Callable[[int], Tensor]:
    return lambda turn: gated_delta_rule_step(
        raw.q, raw.k, raw.v, raw.gate, *raw.betas(mode), states[turn], A_log=raw.A_log, dt_bias=raw.dt_bias,
        lower_bound=LOWER_BOUND,
    )  # fmt: skip


def _decode_peer(raw: Raw, states: Tensor) -> float | None:
    if importlib.util.find_spec("fla") is None or "fla" not in os.environ.get("EFFPASS_PEERS", "fla"):
        return None
    recurrent = importlib.import_module("fla.ops.kda").fused_recurrent_kda

    def step(turn: int) -> object:
        return recurrent(
            raw.q, raw.k, raw.v, raw.gate, raw.beta, A_log=raw.A_log, dt_bias=raw.dt_bias.flatten(),
            initial_state=states[turn], output_final_state=True, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True, lower_bound=LOWER_BOUND,
        )  # fmt: skip

    try:
        with torch.inference_mode():
            return seconds_a_call(step, len(states), captured=True)
    except Exception as error:
        print(f"fused_recurrent_kda: {type(error).__name__}: {str(error)[:300]}")
        torch.cuda.synchronize()
        return None


def linear(device: str, smoke: bool) -> Iterator[Row]:
    """Time a token from 8k to 1M tokens of one sequence."""
    small = smoke or device != "cuda"
    heads, size = (2, 32) if small else (8, 128)
    for tokens in (256, 512) if small else tuple(2**n for n in range(13, 21)):
        raw = Raw.random((1, tokens, heads, size), device)
        with torch.inference_mode():
            figures = _figures(lambda raw=raw: ours("fg2+")(raw), device)  # type: ignore[misc]
        held = sum(x.numel() * x.element_size() for x in (*raw.used("fg2+"), raw.v))
        yield row(AREA, f"fg2+ 1x{tokens}x{heads}x{size}", "forward, a token", figures.seconds / tokens * 1e9, "ns",
                  device=device, bound=held / bandwidth(device) / tokens * 1e9, runs=7)  # fmt: skip


def kernels(device: str, smoke: bool) -> Iterator[Row]:
    """What each kernel takes of a forward and backward pass, all its launches together."""
    if device != "cuda":
        return
    for mode, name in (("kda", "KDA"), ("fg2", "FG2-GDN"), ("fg2+", "FG2-GDN+")):
        raw = Raw.random((1, 8192, 96, 128), device, "fast").requiring_grad()
        run = _running("training", ours(mode), raw, mode, torch.randn_like(raw.v))
        run()
        with alone(), profile(activities=[ProfilerActivity.CUDA]) as profiled:
            for _ in range(7):
                run()
            torch.cuda.synchronize()
        for event in profiled.key_averages():
            microseconds, launches = event.self_device_time_total / 7, event.count // 7
            if microseconds > 100:  # not the sums over chunks
                metric = event.key + (", two launches" if launches == 2 else "")
                case = f"1x8192x96x128, {name}, kernels of forward and backward"
                yield row(AREA, case, metric, microseconds, "us", device=device, runs=7)


_COLD = """
import time, torch
from benchmarks.linear_attention_peers import Raw, ours
raw = Raw.random((2, 1024, 16, 128), "cuda").requiring_grad()
torch.cuda.synchronize()
started = time.perf_counter()
ours({mode!r})(raw).sum().backward()
torch.cuda.synchronize()
print(time.perf_counter() - started)
"""


def cold(device: str, smoke: bool) -> Iterator[Row]:
    """First forward and backward pass of a process that finds nothing compiled."""
    if device != "cuda":
        return
    for mode in MODES:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, "-c", _COLD.format(mode=mode)], capture_output=True, text=True, check=True,
                env={**os.environ, "TRITON_CACHE_DIR": folder},
            )  # fmt: skip
        yield row(AREA, mode, "cold start of forward and backward", float(done.stdout.split()[-1]), "s", device=device)


# -- sizes that the kernels could have --------------------------------------------------------------------------------

_SIZES: tuple[dict[str, int], ...] = (
    {}, {"_BLOCK": 64}, {"_STAGES": 1}, {"_STAGES": 3}, {"_COLUMNS": 32}, {"_WIDE": 1024}, {"_VALUE_TILE": 32},
)  # fmt: skip


def sizes(device: str, smoke: bool) -> Iterator[Row]:
    """The sizes of the kernels, one changed at a time: which of them a GPU likes best."""
    if device != "cuda":
        return
    kernels = importlib.import_module("effpass.lowering.kernels.gated_delta_rule")
    for shape in ((1, 8192, 96, 128), (8, 2048, 16, 128), (2, 16384, 16, 128), (1, 4096, 16, 128)):
        raw = Raw.random(shape, device).requiring_grad()
        d_output, label = torch.randn_like(raw.v), "x".join(map(str, shape))
        plain: dict[str, float] = {}
        for changed in _SIZES:
            before = {name: getattr(kernels, name) for name in changed}
            for name, value in changed.items():
                setattr(kernels, name, value)
            case = f"fg2+ {label}, {', '.join(f'{n} = {v}' for n, v in changed.items()) or 'as it is'}"
            try:
                for what in ("forward", "training"):
                    run = _running(what, ours("fg2+"), raw, "fg2+", d_output)
                    with torch.inference_mode(what == "forward"):
                        run()
                        found = seconds_a_call(lambda turn, run=run: run(), 10, captured=False, runs=3)  # type: ignore[misc]
                    plain.setdefault(what, found)
                    yield row(AREA, case, what, found * 1e3, "ms", device=device, peer=plain[what] * 1e3,
                              peer_name="as it is", runs=3)  # fmt: skip
            except Exception as error:  # a size that does not fit
                print(f"{case}: {type(error).__name__}: {str(error)[:200]}")
            for name, value in before.items():
                setattr(kernels, name, value)


_STEP_SIZES = ((32, 4), (32, 2), (32, 8), (16, 2), (16, 4), (64, 4), (64, 8), (128, 8))  # columns and warps


def decode_sizes(device: str, smoke: bool) -> Iterator[Row]:
    """The decode step of 16 sequences with other programs, and PyTorch's own kernel that adds to a state in place."""
    if device != "cuda":
        return
    kernels = importlib.import_module("effpass.lowering.kernels.gated_delta_rule_step")
    raw, states = _decoding(16, device, smoke)
    bound, own = 2 * states[0].nbytes / bandwidth(device) * 1e6, (kernels._COLUMNS, kernels._WARPS)
    with torch.inference_mode():
        plain = seconds_a_call(lambda turn: states[turn].add_(1.0), len(states), captured=True)
        for columns, warps in _STEP_SIZES:
            kernels._COLUMNS, kernels._WARPS = columns, warps
            try:
                found = seconds_a_call(_decode_step(raw, states, "fg2+"), len(states), captured=True)
            finally:
                kernels._COLUMNS, kernels._WARPS = own
            yield row(
                AREA, f"fg2+, {_decode_label(states)}", f"decode, a step, {columns} columns in {warps} warps",
                found * 1e6, "us", device=device, peer=plain * 1e6, peer_name="a state plus 1 in place, PyTorch",
                bound=bound, runs=7,
            )  # fmt: skip


def _cases() -> dict[str, Callable[[str, bool], Iterator[Row]]]:
    found: dict[str, Callable[[str, bool], Iterator[Row]]] = {}
    for what, short in (("forward", "fwd"), ("training", "train")):
        for gates in get_args(Gates):
            for shape in WEAK if gates == "weak" else SHAPES:
                kind = short if gates == "usual" else f"{short}-{gates}"
                found[f"{kind}-{'x'.join(map(str, shape))}"] = partial(_case, what, shape, gates)
    return found


CASES: dict[str, Callable[[str, bool], Iterator[Row]]] = {
    **_cases(), "decode": decode, "linear": linear, "cold": cold, "kernels": kernels, "sizes": sizes,
    "decode-sizes": decode_sizes, **linear_attention_quality.CASES,
    **linear_attention_conversion.CASES,
}  # fmt: skip
