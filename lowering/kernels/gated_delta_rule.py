"""Launchers of the Triton kernels of `effpass::gated_delta_rule`: two launches forward, five backward.

    forward:    inside (all chunks)  →  state_forward (the chunks of a sequence, one after another)
    backward:   inside, without pairs of tokens  →  state_forward, keeping states  →  state_backward (in reverse)
                →  value_gradient (all chunks)  →  key_gradient (all chunks)

The equations are those of :mod:`effpass.lowering.ops.gated_delta_rule_chunks`. `inside`
(:mod:`~effpass.lowering.kernels.gated_delta_inside`) computes what does not depend on the states; `state_forward` and
`state_backward` (:mod:`~effpass.lowering.kernels.gated_delta_state`) are the only sequential part; `value_gradient` and
`key_gradient` (:mod:`~effpass.lowering.kernels.gated_delta_gradient`) compute the gradients of the inputs. If gates are
vectors without a bound, `inside` and `key_gradient` are launched twice: for chunks with steep decay, and for the others
(:mod:`~effpass.lowering.kernels.gated_delta_inputs`).

Few long sequences with few heads leave most of a device idle in the sequential part. They are divided into segments,
for which a map of the states and their join are launched in addition, in each direction.

Inputs and output are kept between forward and backward pass, and P and T, which take 16 KiB per chunk and value head in
bfloat16. For K = V = 128, intermediate results take 6 bytes per token, value head and channel in the forward pass, and
20 in the backward pass, or 22 if one β of each channel erases and writes; segments add at most 16 K² bytes for each
multiprocessor. They are in the dtype of q; decays, √β, states between segments or at the end and sums of chunks are
float32, and the kernels accumulate in float32. There is no autotuning: tile sizes and segments follow from K, V, T and
the number of sequences and heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from effpass.lowering.kernels.gated_delta_gradient import WARPS, key_gradient, value_gradient
from effpass.lowering.kernels.gated_delta_inputs import LOWEST, lower_triangle, table
from effpass.lowering.kernels.gated_delta_inside import inside
from effpass.lowering.kernels.gated_delta_state import join, state_backward, state_forward
from effpass.lowering.kernels.launch import multiprocessors
from effpass.lowering.ops.gated_delta_rule_inputs import Inputs, Settings

__all__ = ["backward", "forward", "shape_of_pairs", "supported"]

CHUNK = 64  # tokens per chunk
_LARGEST = 256  # maximum number of channels of keys and of values

# Tile sizes, which may need adjustment for other GPUs.
_BLOCK = 32  # key channels per tile of `inside`, for four warps
_REGISTERS = 168  # per thread of `inside`, for three programs per multiprocessor; not for steep chunks, which spill
_COLUMNS = 64  # state columns per program, for four warps; fewer than 64 do not fill a wgmma tile
_WIDE = 128  # state columns per program, for eight warps, if segments times heads alone fill the device
_STAGES = 2  # chunks in flight in `state_forward` and `state_backward`
_LEAST_SEGMENTS = 3  # per sequence: as each is run through twice, two would take as long as one
_LEAST_CHUNKS = 4  # per segment
_FEW_SEGMENTS, _MANY_CHUNKS = 4, 16  # more segments than a few have many chunks: `join` takes one after another
_PROBED = 6  # chunks of a probe
_PROBE_FROM = 32  # chunks per segment from which on a probe is worth its time
_JOIN_COLUMNS = 16  # state columns per program of `join`, for four warps
_JOIN_BLOCK = 64  # key channels that `join` reads at a time
_VALUE_TILE = 64  # channels per tile of `value_gradient`, for four warps
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supported(inputs: Inputs) -> bool:
    """Return whether the kernels support the dtype and the head sizes of a call."""
    return inputs.q.dtype in _DTYPES and inputs.q.shape[3] <= _LARGEST and inputs.v.shape[3] <= _LARGEST


def shape_of_pairs(inputs: Inputs, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    """Return the shape of P and T of all chunks."""
    return _chunks(inputs, cu_seqlens), inputs.v.shape[2], CHUNK, CHUNK


def _chunks(inputs: Inputs, cu_seqlens: Tensor | None) -> int:
    """Return the number of chunks; of packed sequences the maximum, so that the host need not wait for the device."""
    batch, tokens = inputs.q.shape[:2]
    return batch * -(-tokens // CHUNK) if cu_seqlens is None else tokens // CHUNK + cu_seqlens.shape[0] - 1


def _rows(x: Tensor | None) -> Tensor | None:
    """Return `x` [B, T, ...] with one token stride across the batch and contiguous channels; copied if necessary."""
    if x is None:
        return None
    is_even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if is_even and (x.dim() == 3 or x.stride(3) == 1) else x.contiguous()


@dataclass(frozen=True)
class _Call:
    """What all launches of a call share.

    Attributes:
        inputs: tensors of the call, with strides that the kernels support.
        settings: constants of the call.
        chunks: number of chunks n, including empty ones, which packed sequences may have.
        sequences: number of sequences N.
        places: int32 [n, 2], first token and number of tokens of each chunk; None if sequences are not packed.
        first: int32 [N], first chunk of each sequence; None if sequences are not packed.
        cu_seqlens: [N + 1], offsets of packed sequences; None if sequences are not packed.
    """

    inputs: Inputs
    settings: Settings
    chunks: int
    sequences: int
    places: Tensor | None
    first: Tensor | None
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs, settings: Settings, cu_seqlens: Tensor | None, sequences: int) -> _Call:
        rows = [_rows(x) for x in inputs[:6]]
        inputs = Inputs(*rows, _whole(inputs.A_log), _whole(inputs.dt_bias))  # type: ignore[arg-type, call-arg]
        chunks = _chunks(inputs, cu_seqlens)
        if cu_seqlens is None:
            return cls(inputs, settings, chunks, sequences, None, None, None)
        lengths = cu_seqlens.diff()
        ends = ((lengths + CHUNK - 1) // CHUNK).cumsum(0)
        number = torch.arange(chunks, device=cu_seqlens.device)
        of = torch.searchsorted(ends, number, right=True).clamp_(max=sequences - 1)
        first = ends - (lengths + CHUNK - 1) // CHUNK
        within = (number - first[of]) * CHUNK
        filled = (lengths[of] - within).clamp(0, CHUNK)
        places = torch.stack((cu_seqlens[:-1][of] + within, filled), 1).to(torch.int32)
        return cls(inputs, settings, chunks, sequences, places, first.to(torch.int32), cu_seqlens)

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """HV, K, V, and K and V as padded in the workspace."""
        (_, _, heads, value_size), key_size = self.inputs.v.shape, self.inputs.q.shape[3]
        return heads, key_size, value_size, _power(key_size), _power(value_size)

    @property
    def is_large(self) -> bool:
        """Whether states fill the registers of the sequential kernels."""
        return self.sizes[3] > 128

    @cached_property
    def segments(self) -> int:
        """The number of segments into which each sequence is divided."""
        fitting = multiprocessors(self.inputs.q.device) // (self.sequences * self.sizes[0])
        chunks = self.chunks // self.sequences
        segments = min(fitting, chunks // _LEAST_CHUNKS, max(_FEW_SEGMENTS, chunks // _MANY_CHUNKS))
        return segments if segments >= _LEAST_SEGMENTS else 1

    @cached_property
    def probed(self) -> int:
        """The number of chunks in which launches in mode "probe" look for a state that fades; 0 without probes."""
        is_long = self.chunks // self.sequences >= _PROBE_FROM * self.segments
        return _PROBED if self.segments > 1 and is_long else 0

    @property
    def ranges(self) -> tuple[str, ...]:
        """The values of the constant RANGE, one for each launch over all chunks."""
        if self.inputs.gate.dim() == 3:
            return ("mild",)
        if self.inputs.q.dtype != torch.bfloat16:
            return ("steep",)  # the mild form needs e^80, which float16 lacks, and in float32 too much shared memory
        bound = self.settings.lower_bound
        is_mild = bound is not None and bound * CHUNK // 4 >= LOWEST.value
        return ("mild",) if is_mild else ("mild only", "steep only")

    def flags(self) -> dict[str, Any]:
        """Return the compile-time constants of the kernels over all chunks, except for RANGE."""
        q, _, _, gate, beta, _, A_log, dt_bias = self.inputs
        settings, (heads, key_size, _, keys, _) = self.settings, self.sizes
        return {
            "GROUP": heads // q.shape[2], "K": key_size, "KP": keys,
            "GATE": "log" if A_log is None else "softplus" if settings.lower_bound is None else "bounded",
            "SCALAR_GATE": gate.dim() == 3, "HAS_BIAS": dt_bias is not None, "SCALAR_BETA": beta.dim() == 3,
            "NORMALIZE": settings.normalize, "LOGITS": settings.beta_logits, "VARLEN": self.places is not None,
            "PRECISION": _precision(q.dtype),
        }  # fmt: skip

    def steep(self) -> Tensor:
        """Allocate int8 [n, HV], to which `inside` writes whether each chunk is steep."""
        return self.inputs.q.new_empty(self.chunks, self.sizes[0], dtype=torch.int8)

    def tables(self) -> tuple[Tensor, Tensor]:
        matrices = table(self.inputs.q.device)
        return matrices if self.places is None else self.places, matrices

    def constants(self) -> tuple[float, float]:
        return self.settings.scale, self.settings.lower_bound or 0.0


def _strides(*tensors: Tensor | None) -> list[int]:
    return [n for x in tensors for n in ((0, 0) if x is None else (x.stride(1), x.stride(2)))]


def _whole(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of float32 products: six bfloat16 products, which save shared memory."""
    if dtype != torch.float32:
        return "tf32"
    return "ieee" if triton.knobs.runtime.interpret else "bf16x6"


class _Inside(NamedTuple):
    """Outputs of `inside`; KP is K as padded in the workspace.

    Attributes:
        q_in: [n, HV, C, KP], Q̃.
        k_in: [n, HV, C, KP], B̃.
        k_out: [n, HV, C, KP], Ã.
        scores: [n, HV, C, C], P; in the backward pass, that of the forward pass.
        inverses: [n, HV, C, C], T = (I + L)⁻¹; likewise.
        decay: float32 [n, HV, KP], decay of the state over the chunk.
        strengths: float32 [n, HV, C], √β if β is one number per head; otherwise unused.
        norms: float32 [n, HV, 2, C], 1 / ‖q‖ and 1 / ‖k‖; only in the backward pass, if they are normalized.
        marks: float32 [n, HV, 4, KP], G of base 2 after every 16 tokens; only in the backward pass, if gates have
            channels.
    """

    q_in: Tensor
    k_in: Tensor
    k_out: Tensor
    scores: Tensor
    inverses: Tensor
    decay: Tensor
    strengths: Tensor
    norms: Tensor
    marks: Tensor


def _inside(call: _Call, steep: Tensor, pairs: tuple[Tensor, Tensor], backward: bool) -> _Inside:
    """Launch `inside`, which writes `pairs`, P and T, unless it runs for the backward pass.

    `steep` int8 [n, HV] is written if both mild and steep chunks may occur.
    """
    q, k, _, gate, beta, _, A_log, dt_bias = call.inputs
    heads, _, _, keys, _ = call.sizes
    lead = (call.chunks, heads)
    q_in, k_in, k_out = (q.new_empty(*lead, CHUNK, keys) for _ in range(3))
    decay = q.new_empty(*lead, keys, dtype=torch.float32)
    strengths = q.new_empty(*lead, CHUNK, dtype=torch.float32) if beta.dim() == 3 else decay
    norms = q.new_empty(*lead, 2, CHUNK, dtype=torch.float32) if backward and call.settings.normalize else decay
    marks = q.new_empty(*lead, 4, keys, dtype=torch.float32) if backward and gate.dim() == 4 else decay
    found = _Inside(q_in, k_in, k_out, *pairs, decay, strengths, norms, marks)
    precision = _precision(q.dtype)
    if q.dtype != torch.float32 and call.settings.normalize:
        precision = "float16"
    for chosen in call.ranges:
        limit = {"maxnreg": _REGISTERS} if chosen.startswith("mild") and q.dtype != torch.float32 else {}
        inside[(call.chunks * heads,)](
            q, k, gate, beta, decay if A_log is None else A_log, decay if dt_bias is None else dt_bias, *call.tables(),
            steep, *found, q.shape[1], heads, *_strides(q, k, gate, beta), *call.constants(), **call.flags(),
            BK=min(keys, _BLOCK), RANGE=chosen, INVERSE=precision, BACKWARD=backward, num_warps=4, num_stages=1,
            **limit,
        )  # fmt: skip
    return found


def _state_flags(call: _Call) -> dict[str, Any]:
    """Return the compile-time constants of the sequential kernels, including BV, the state columns per program."""
    heads, key_size, value_size, keys, values = call.sizes
    is_large, lanes = call.is_large, call.sequences * call.segments * heads
    if call.inputs.q.dtype == torch.float32:
        columns, warps, stages = 16 if is_large else 32, 8, 1
    elif values >= _WIDE and (is_large or lanes >= 0.7 * multiprocessors(call.inputs.q.device)):
        columns, warps, stages = _WIDE, 8, 1 if is_large else _STAGES
    else:
        columns, warps, stages = _COLUMNS, 4, 1 if is_large else _STAGES
    return {
        "K": key_size, "V": value_size, "KP": keys, "VP": values, "VARLEN": call.places is not None,
        "PROBED": call.probed, "BV": min(values, columns), "PRECISION": _precision(call.inputs.q.dtype),
        "STAGES": stages, "num_warps": warps, "num_stages": 1,
    }  # fmt: skip


def _grid(call: _Call, flags: dict[str, Any], rows: int) -> tuple[int]:
    # One-dimensional, since the other dimensions are limited to 65535; programs of the same head are adjacent.
    return (call.sequences * call.segments * call.sizes[0] * (rows // flags["BV"]),)


def _places(call: _Call, stand_in: Tensor) -> tuple[Tensor, Tensor, int, int, int]:
    """Return what tells programs of the sequential kernels their tokens."""
    first, ends = (stand_in if x is None else x for x in (call.first, call.cu_seqlens))
    return first, ends, call.inputs.q.shape[1], call.segments, call.sizes[0]


class _Maps(NamedTuple):
    """What launches in modes "map" and "probe" write; empty if there are no segments.

    Attributes:
        maps: float32 [N, segments, HV, VP + KP, KP], Nᵀ or Dᵀ above Mᵀ.
        at_end: int8 [N, segments, HV, KP / rows], whether a probe of a segment's last chunks saw these rows fade, so
            that Mᵀ is 0, and not written.
        at_start: the same of its first chunks.
        rows: number of rows of a program.
    """

    maps: Tensor
    at_end: Tensor
    at_start: Tensor
    rows: int

    @classmethod
    def of(cls, call: _Call) -> _Maps:
        heads, _, _, keys, values = call.sizes
        lead, device = (call.sequences if call.segments > 1 else 0, call.segments, heads), call.inputs.q.device
        rows = min(_state_flags(call)["BV"], keys)
        maps = torch.empty(*lead, values + keys, keys, dtype=torch.float32, device=device)
        at_end, at_start = torch.empty(2, *lead, keys // rows, dtype=torch.int8, device=device)
        return cls(maps, at_end, at_start, rows)


def _join(call: _Call, maps: _Maps, given: Tensor | None, backward: bool) -> Tensor:
    """Return the states before all segments, float32 [N, segments, HV, K, V], or the gradients of those after them."""
    heads, key_size, value_size, keys, values = call.sizes
    states = maps.maps.new_empty(*maps.maps.shape[:3], key_size, value_size)
    columns = min(values, _JOIN_COLUMNS)
    join[(call.sequences * heads * (values // columns),)](
        maps.maps, maps.at_end, states if given is None else given, states, call.segments, heads, K=key_size,
        V=value_size, KP=keys, VP=values, BV=columns, BK=min(keys, _JOIN_BLOCK), BLOCKS=keys // maps.rows,
        HAS_GIVEN=given is not None, PROBED=call.probed, BACKWARD=backward, PRECISION=_precision(call.inputs.q.dtype),
        num_warps=4, num_stages=1,
    )  # fmt: skip
    return states


def _state_forward(
    call: _Call,
    found: _Inside,
    state: Tensor | None,
    output: Tensor,
    final: Tensor,
    kept: tuple[Tensor, Tensor] | None,
    maps: _Maps,
) -> None:
    """Launch `state_forward`; if there are segments, also what `maps` needs before and `state_backward` after it."""
    beta, write_beta = call.inputs.beta, call.inputs.write_beta
    of_values, flags = beta if write_beta is None else write_beta, _state_flags(call)
    *_, keys, values = call.sizes

    def launch(mode: str, rows: int, state: Tensor | None, at_start: bool = False, **changed: Any) -> None:
        state_forward[_grid(call, flags | changed, rows)](
            *found[:7], call.inputs.v, of_values, final if state is None else state, output, final,
            *(kept or (output, output)), maps.maps, maps.at_start if at_start else maps.at_end,
            *_places(call, found.decay), *_strides(call.inputs.v, of_values), SCALAR_BETA=beta.dim() == 3,
            LOGITS=call.settings.beta_logits, HAS_INITIAL=state is not None, MODE=mode, AT_START=at_start,
            AHEAD=not call.is_large,
            **(flags | changed),
        )  # fmt: skip

    state = _whole(state)
    if call.segments > 1:
        if call.probed:
            launch("probe", keys, None, BV=maps.rows)
        launch("map", values + keys, state, BV=maps.rows)
        state = _join(call, maps, state, backward=False)
        if call.probed and kept is not None:
            launch("probe", keys, None, at_start=True, BV=maps.rows)
    launch("output" if kept is None else "keep", values, state)


def _state_backward(
    call: _Call, found: _Inside, d_output: Tensor, d_final: Tensor | None, d_kept: tuple[Tensor, Tensor],
    d_initial: Tensor, maps: _Maps,
) -> None:  # fmt: skip
    flags, values = _state_flags(call), call.sizes[4]

    def launch(mode: str, d_final: Tensor | None, **changed: Any) -> None:
        state_backward[_grid(call, flags | changed, values)](
            *found[:6], d_output, d_initial if d_final is None else d_final, *d_kept, d_initial, maps.maps,
            maps.at_start, *_places(call, found.decay), *_strides(d_output), HAS_FINAL=d_final is not None, MODE=mode,
            **(flags | changed),
        )  # fmt: skip

    d_final = _whole(d_final)
    if call.segments > 1:
        launch("map", d_final, BV=maps.rows)
        d_final = _join(call, maps, d_final, backward=True)
    launch("keep", d_final)


def forward(
    inputs: Inputs,
    settings: Settings,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    sequences: int,
    pairs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the output [B, T, HV, V] and the final state, float32 [N, HV, K, V]; P and T are written to `pairs`.

    Arguments must have been checked; only `cu_seqlens` is checked here, by an assertion on the device.
    """
    if cu_seqlens is not None:  # asserted only here, since the backward pass gets the same offsets
        is_rising = (cu_seqlens.diff() >= 0).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == inputs.q.shape[1])
        torch._assert_async(is_rising, "effpass::gated_delta_rule: cu_seqlens does not rise from 0 to T")
    call = _Call.of(inputs, settings, cu_seqlens, sequences)
    heads, key_size, value_size, _, _ = call.sizes
    output = inputs.v.new_empty(inputs.v.shape)
    final = output.new_empty(sequences, heads, key_size, value_size, dtype=torch.float32)
    _state_forward(call, _inside(call, call.steep(), pairs, backward=False), state, output, final, None, _Maps.of(call))
    return output, final


def backward(
    inputs: Inputs,
    settings: Settings,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    sequences: int,
    output: Tensor,
    pairs: tuple[Tensor, Tensor],
    d_output: Tensor,
    d_final: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Return the gradients of the inputs, in the order of their fields, and of the initial state.

    Arguments must have been checked. The gradient of the initial state is float32; those of None inputs are None.
    """
    call = _Call.of(inputs, settings, cu_seqlens, sequences)
    heads, key_size, value_size, keys, values = call.sizes
    q, k, v, gate, beta, write_beta, A_log, dt_bias = call.inputs
    out, given = _rows(d_output), _rows(output)
    assert out is not None
    assert given is not None
    steep = call.steep()
    found = _inside(call, steep, pairs, backward=True)
    befores, d_afters = (q.new_empty(call.chunks, heads, values, keys) for _ in range(2))
    changes, d_values = (q.new_empty(call.chunks, heads, CHUNK, values) for _ in range(2))
    initial = torch.empty(sequences, heads, key_size, value_size, dtype=torch.float32, device=q.device)
    maps = _Maps.of(call)
    _state_forward(call, found, state, changes, initial, (befores, changes), maps)
    _state_backward(call, found, out, d_final, (d_values, d_afters), initial, maps)
    chunks, tokens = call.chunks, q.shape[1]
    # What has been read for the last time is written over.
    d_rows, d_queries, d_columns, of_states = found.q_in, found.k_in, found.k_out, found.decay
    d_lower, d_scores, along = (torch.empty_like(x) for x in (*pairs, found.norms))
    d_v, d_beta = v.new_empty(v.shape), beta.new_empty(beta.shape)
    d_write = None if write_beta is None else write_beta.new_empty(write_beta.shape)
    is_shared = write_beta is None and beta.dim() == 4
    of_values = torch.empty_like(d_rows, dtype=beta.dtype) if is_shared else d_beta
    block = _VALUE_TILE if q.dtype != torch.float32 else _VALUE_TILE // 2
    flags = call.flags() | {"HAS_WRITE": write_beta is not None}
    optional = [q if x is None else x for x in (write_beta, A_log, dt_bias)]
    value_gradient[(chunks * heads,)](
        v, gate, beta, *optional, call.tables()[0], changes, d_values, befores, d_afters, given, out, d_v, d_beta,
        of_values if d_write is None else d_write, d_lower, d_scores, along, d_rows, d_queries, d_columns, of_states,
        tokens, heads, *_strides(v, gate, beta, write_beta, given, out), call.constants()[1],
        **{name: x for name, x in flags.items() if name not in ("GROUP", "K")},
        V=value_size, VP=values, BV=min(values, block), BK=min(keys, block), num_warps=4, num_stages=1,
    )  # fmt: skip
    del changes, d_values, befores, d_afters, maps  # free intermediate results before further gradients are allocated
    d_q, d_k = (q.new_empty(*v.shape[:3], key_size) for _ in range(2))
    d_gate = gate.new_empty(gate.shape)
    # Chunks without tokens write nothing, but their rows are part of the sum over chunks.
    blank = torch.zeros if call.places is not None else torch.empty
    widths = 0 if A_log is None else heads, 0 if dt_bias is None else math.prod(gate.shape[2:])
    of_warps = blank(chunks * WARPS.value, sum(widths), dtype=torch.float32, device=q.device)
    d_rates, d_biases = of_warps.split(widths, 1)
    for chosen in call.ranges:
        key_gradient[(chunks * heads,)](
            q, k, gate, beta, *optional[1:], *call.tables(), lower_triangle(q.device), steep, found.marks, found.norms,
            along, d_lower, d_scores, d_rows, d_queries, d_columns, of_states, of_values, d_q, d_k, d_gate, d_beta,
            d_rates, d_biases, of_warps.stride(0), tokens, heads, *_strides(q, k, gate, beta), *call.constants(),
            **flags, RANGE=chosen, num_warps=WARPS.value, num_stages=1,
        )  # fmt: skip
    of_rates, of_biases = of_warps.sum(0).split(widths)  # copied, as outputs of an operator share no memory
    d_A_log = None if A_log is None else of_rates.to(A_log.dtype, copy=True)
    d_bias = None if dt_bias is None else of_biases.view(gate.shape[2:]).to(dt_bias.dtype, copy=True)
    if heads != q.shape[2]:
        d_q, d_k = (x.unflatten(2, (q.shape[2], -1)).sum(3) for x in (d_q, d_k))
    return (d_q, d_k, d_v, d_gate, d_beta, d_write, d_A_log, d_bias), initial
