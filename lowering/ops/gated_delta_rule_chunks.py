"""Chunked form of the gated delta rule, forward and backward, in PyTorch: no loop over tokens, no overflow.

    L_ij = Σ_d κ_id κ_jd e^(G_id − G_jd)  (j < i)        P_ij = Σ_d q̂_id κ_jd e^(G_id − G_jd)  (j ≤ i)
    B̃ = κ ⊙ e^G,  Q̃ = q̂ ⊙ e^G,  Ã = κ ⊙ e^(G_C − G)       W = (I + L)⁻¹ B̃,  u = (I + L)⁻¹ ζ
    U = u − W S₀        O = Q̃ S₀ + P U        S_C = e^(G_C) ⊙ S₀ + Ãᵀ U

q̂, κ, ζ and the log decay g ≤ 0 are those of :mod:`effpass.lowering.ops.gated_delta_rule_inputs`. G is the running sum
of g inside a chunk of C tokens, S₀ the state before the chunk and S_C the state after it; O is the output.

Computing L and P as products of e^(G_i) and e^(−G_j) would overflow. Instead a chunk is split into halves, recursively
down to single tokens. Each pair j < i is handled in the block in which j lies in the earlier and i in the later half:
with m the end of the earlier half, e^(G_i − G_m) and e^(G_m − G_j) are both at most 1.

Shapes: n chunks of all sequences, HV value heads, C tokens per chunk, K key size; tensors are [n, HV, C, K].
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effpass.lowering.ops.gated_delta_rule_inputs import Prepared

__all__ = ["Chunks", "chunk_backward", "chunk_forward"]

LONGEST = 64  # maximum tokens per chunk; a power of two, since chunks are split into halves


class Chunks(NamedTuple):
    """Assignment of tokens to chunks, none of which crosses the end of a sequence.

    Attributes:
        tokens: int64 [n, C], index of each place's token among the B T tokens; `total` for an empty place.
        first: index of the first chunk of each sequence, followed by n.
        total: number of tokens, B T.
    """

    tokens: Tensor
    first: list[int]
    total: int

    @classmethod
    def of(cls, boundaries: list[int]) -> Chunks:
        """Return the chunks of sequences that span boundaries[i] to boundaries[i + 1], from 0 to B T."""
        lengths = [stop - start for start, stop in itertools.pairwise(boundaries)]
        size = 1
        while size < min(max(lengths), LONGEST):
            size *= 2
        counts = torch.tensor([-(-length // size) for length in lengths])
        first = [0, *counts.cumsum(0).tolist()]
        start, stop, before = (
            torch.tensor(x).repeat_interleave(counts) for x in (boundaries[:-1], boundaries[1:], first[:-1])
        )
        number = torch.arange(first[-1]) - before
        tokens = (start + number * size)[:, None] + torch.arange(size)
        return cls(torch.where(tokens < stop[:, None], tokens, boundaries[-1]), first, boundaries[-1])

    def to(self, device: torch.device) -> Chunks:
        """Return the chunks with `tokens` on `device`."""
        return self._replace(tokens=self.tokens.to(device))

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, HV, X] → [n, HV, C, X], with zeros in empty places, which leave the state unchanged."""
        rows = x.flatten(0, 1)
        rows = torch.cat((rows, rows.new_zeros(1, *rows.shape[1:])))
        return rows[self.tokens].transpose(1, 2)

    def unpack(self, x: Tensor, batch: int) -> Tensor:
        """[n, HV, C, X] → [B, T, HV, X]."""
        return x.transpose(1, 2)[self.tokens < self.total].unflatten(0, (batch, -1))

    def steps(self) -> list[tuple[Tensor, Tensor]]:
        """For each chunk index within a sequence: the sequences that have such a chunk, and their chunks."""
        first = torch.tensor(self.first)
        counts = first.diff()
        out = []
        for place in range(int(counts.max())):
            sequences = (counts > place).nonzero()[:, 0]
            out.append((sequences, first[sequences] + place))
        return out


# -- products with the decay between two tokens -----------------------------------------------------------------------


def _halves(size: int) -> list[int]:
    out = []
    while size > 1:
        size //= 2
        out.append(size)
    return out


def _halved(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Views of `x` [..., C, K]: earlier and later half of each block of 2 · `half` tokens, [..., blocks, half, K]."""
    early, late = x.unflatten(-2, (-1, 2, half)).unbind(-3)
    return early, late


def _decays(g: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Decays from the earlier half's end to each later token, and from each earlier token to that end."""
    early, late = _halved(g, half)
    return late.cumsum(-2).exp(), _sums_after(early).exp()


def _sums_after(g: Tensor) -> Tensor:
    """Sum of the `g` of all later tokens, [..., C, K]: not as a difference of running sums, which loses digits."""
    return F.pad(g[..., 1:, :].flip(-2).cumsum(-2).flip(-2), (0, 0, 0, 1))


def _blocks(scores: Tensor, half: int) -> Tensor:
    """View of scores [..., C, C]: later by earlier half of each block, [..., blocks, half, half]."""
    split = scores.unflatten(-1, (-1, 2, half)).unflatten(-4, (-1, 2, half))  # [..., block, 2, half, block, 2, half]
    return split[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _scores(rows: Tensor, columns: Tensor, g: Tensor, has_diagonal: bool) -> Tensor:
    """Σ_d rows_id columns_jd e^(G_id − G_jd) for j < i, and for j = i if `has_diagonal`; zeros elsewhere."""
    size = rows.shape[-2]
    out = rows.new_zeros(*rows.shape[:-1], size)
    for half in _halves(size):
        to_late, from_early = _decays(g, half)
        late = _halved(rows, half)[1] * to_late
        early = _halved(columns, half)[0] * from_early
        _blocks(out, half).copy_(late @ early.transpose(-1, -2))
    if has_diagonal:
        out.diagonal(dim1=-2, dim2=-1).copy_((rows * columns).sum(-1))
    return out


def _scores_backward(
    rows: Tensor, columns: Tensor, g: Tensor, gradient: Tensor, has_diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `rows` and `columns` from the lower triangle of `gradient`."""
    size = rows.shape[-2]
    d_rows, d_columns = torch.zeros_like(rows), torch.zeros_like(columns)
    for half in _halves(size):
        to_late, from_early = _decays(g, half)
        late = _halved(rows, half)[1] * to_late
        early = _halved(columns, half)[0] * from_early
        block = _blocks(gradient, half)
        _halved(d_rows, half)[1].add_((block @ early) * to_late)
        _halved(d_columns, half)[0].add_((block.transpose(-1, -2) @ late) * from_early)
    if has_diagonal:
        diagonal = gradient.diagonal(dim1=-2, dim2=-1)[..., None]
        d_rows += diagonal * columns
        d_columns += diagonal * rows
    return d_rows, d_columns


# -- chunks -----------------------------------------------------------------------------------------------------------


class _Inside(NamedTuple):
    """Quantities of the chunks that do not depend on the states before them."""

    q: Tensor  # q̂
    key: Tensor  # κ
    g: Tensor
    from_start: Tensor  # e^G, decay from the start of the chunk to each token
    to_end: Tensor  # e^(G_C − G), decay from each token to the end of the chunk
    lower: Tensor  # L
    scores: Tensor  # P
    q_in: Tensor  # Q̃
    k_in: Tensor  # B̃
    k_out: Tensor  # Ã
    w: Tensor  # W
    u: Tensor
    decay: Tensor  # e^(G_C) as [n, HV, K or 1, 1]


def _inside(prepared: Prepared, chunks: Chunks) -> _Inside:
    q, key, value, g = (chunks.pack(x) for x in prepared)
    sums = g.cumsum(-2)
    from_start, to_end = sums.exp(), _sums_after(g).exp()
    lower, scores = _scores(key, key, g, False), _scores(q, key, g, True)
    k_in = key * from_start
    # unitriangular=True takes the diagonal as ones and thus solves with I + L.
    w, u = torch.linalg.solve_triangular(lower, torch.cat((k_in, value), -1), upper=False, unitriangular=True).split(
        (key.shape[-1], value.shape[-1]), -1
    )
    decay = sums[..., -1:, :].exp().transpose(-1, -2)
    q_in, k_out = q * from_start, key * to_end
    return _Inside(q, key, g, from_start, to_end, lower, scores, q_in, k_in, k_out, w, u, decay)


def _states(inside: _Inside, chunks: Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk [n, HV, K, V], and U; `state` [N, HV, K, V] is updated to the final state."""
    befores = inside.w.new_empty(*inside.k_in.shape[:2], inside.k_in.shape[-1], inside.u.shape[-1])
    change = torch.empty_like(inside.u)
    for sequences, at in chunks.steps():
        before = state[sequences]
        befores[at] = before
        change[at] = inside.u[at] - inside.w[at] @ before
        state[sequences] = inside.decay[at] * before + inside.k_out[at].transpose(-1, -2) @ change[at]
    return befores, change


def chunk_forward(prepared: Prepared, chunks: Chunks, initial_state: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the output [B, T, HV, V] and the final state [N, HV, K, V], in the dtype of `prepared`.

    Args:
        prepared: q̂, κ, ζ and g.
        chunks: chunks of the tokens.
        initial_state: [N, HV, K, V]; not written.
    """
    inside, state = _inside(prepared, chunks), initial_state.clone()
    befores, change = _states(inside, chunks, state)
    return chunks.unpack(inside.q_in @ befores + inside.scores @ change, prepared.q.shape[0]), state


def chunk_backward(
    prepared: Prepared, chunks: Chunks, initial_state: Tensor, d_output: Tensor, d_state: Tensor
) -> tuple[Prepared, Tensor]:
    """Compute the gradients of q̂, κ, ζ and g, and of the initial state. The forward pass is recomputed.

    Args:
        prepared: q̂, κ, ζ and g, as in the forward pass.
        chunks: chunks of the tokens.
        initial_state: [N, HV, K, V].
        d_output: [B, T, HV, V], gradient of the output.
        d_state: [N, HV, K, V], gradient of the final state.
    """
    inside = _inside(prepared, chunks)
    befores, change = _states(inside, chunks, initial_state.clone())
    d_output, d_state = chunks.pack(d_output), d_state.clone()
    d_afters, d_change = torch.empty_like(befores), inside.scores.transpose(-1, -2) @ d_output
    for sequences, at in reversed(chunks.steps()):
        after = d_state[sequences]
        d_afters[at] = after
        new = d_change[at] + inside.k_out[at] @ after
        d_change[at] = new
        d_state[sequences] = (
            inside.decay[at] * after
            + inside.q_in[at].transpose(-1, -2) @ d_output[at]
            - inside.w[at].transpose(-1, -2) @ new
        )
    d_value = torch.linalg.solve_triangular(inside.lower.transpose(-1, -2), d_change, upper=True, unitriangular=True)
    key, q, g = inside.key, inside.q, inside.g
    d_rows, d_columns = _scores_backward(key, key, g, -d_value @ change.transpose(-1, -2), False)
    d_q, d_columns_of_scores = _scores_backward(q, key, g, d_output @ change.transpose(-1, -2), True)
    d_rows = d_rows - (d_value @ befores.transpose(-1, -2)) * inside.from_start
    d_q = d_q + (d_output @ befores.transpose(-1, -2)) * inside.from_start
    d_columns_of_state = (change @ d_afters.transpose(-1, -2)) * inside.to_end
    d_columns = d_columns + d_columns_of_scores + d_columns_of_state
    # κ occurs in rows i (with e^G_i) and in columns j (with e^−G_j); the names of its gradients say in which.
    # The gradient of G: rows carry e^G, columns e^−G, and the last token's G is also the decay of the chunk. g_t enters
    # G of all tokens from t on, so that its gradient is a reversed cumulative sum.
    d_sums = key * d_rows + q * d_q - key * d_columns
    d_sums[..., -1, :] += (d_columns_of_state * key).sum(-2) + (inside.decay * d_afters * befores).sum(-1)
    if g.shape[-1] == 1:  # one decay per head
        d_sums = d_sums.sum(-1, keepdim=True)
    d_g = d_sums.flip(-2).cumsum(-2).flip(-2)
    batch = prepared.q.shape[0]
    gradients = Prepared(*(chunks.unpack(x, batch) for x in (d_q, d_rows + d_columns, d_value, d_g)))
    return gradients, d_state
