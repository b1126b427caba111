"""Block-sparse attention of prompts on the CPU: lists against a loop over blocks, sums against brute force."""

from __future__ import annotations

import pytest
import sparse_kernel_cases
import torch

from effpass.core.errors import EffpassError
from effpass.lowering.ops import cached_attention  # noqa: F401  (registers the operator)
from effpass.lowering.ops.block_sparse_attention import (
    TOLERANCE,
    BlockSelection,
    Spans,
    _selected,
    block_sparse,
    weights,
)

ops = torch.ops.effpass


class Reference:
    """The reference under the names that the kernels have."""

    selected = staticmethod(_selected)
    block_sparse_attention = ops.block_sparse_attention


@pytest.mark.parametrize("name", sparse_kernel_cases.PROMPTS)
def test_lists_and_sums_against_brute_force(name: str) -> None:
    of = {"device": torch.device("cpu"), "dtype": torch.float32}
    found = sparse_kernel_cases.prompt_errors(Reference, *sparse_kernel_cases.PROMPTS[name], **of)
    assert all(value <= TOLERANCE[torch.float32] for value in found.values()), found


def some(tokens: int, slots: int, padding: int = 0) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    query = torch.randn(2, tokens, 4, 16).transpose(1, 2)
    keys, values = torch.randn(2, 2, slots, 16), torch.randn(2, 2, slots, 8)
    positions = sparse_kernel_cases.positions_of([slots - padding, slots], slots, 0)
    return query, keys, values, positions, positions[:, slots - tokens :].contiguous()


@pytest.mark.parametrize("how", [BlockSelection(1.0, block_k=64), BlockSelection(threshold=1.0, block_k=32)])
def test_all_blocks_are_dense_attention(how: BlockSelection) -> None:
    case = some(300, 430, padding=70)
    end = torch.tensor([430], dtype=torch.int32)
    expected = ops.cached_attention(*case[:3], case[3], case[4], end, 0.25, 0, 0.0)
    torch.testing.assert_close(block_sparse(how, *case, 0.25), expected, rtol=1e-5, atol=2e-6)


def test_weights_are_a_softmax_over_pooled_blocks() -> None:
    query, keys, _, positions, now = some(200, 256)
    spans = Spans.of(positions, now, 64, 64)
    ((first, w),) = weights(query, keys, positions, now, spans, 0.25, 64, 64)
    assert first == 0
    q, k = query[:, :, 64:128].mean(2), keys.view(2, 2, 4, 64, 16).mean(3)
    seen = 3  # tile 1 ends at position 183, block 2 at 191
    scores = torch.einsum("bghk,bgnk->bghn", q.view(2, 2, 2, 16), k[:, :, :seen]) * 0.25
    torch.testing.assert_close(w[:, :, 1, :seen], scores.softmax(-1).mean(2), rtol=1e-5, atol=1e-6)
    assert (w[:, :, 1, seen:] == -1).all()


def test_few_tiles_at_a_time_give_the_same_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    from effpass.lowering.ops import block_sparse_attention as module

    case = some(600, 700)
    arguments = (*case[:2], *case[3:], 0.25, 64, 64, 1, 1, 0.4, 0.0, 8)
    lists, counts = ops.choose_key_blocks(*arguments)
    monkeypatch.setattr(module, "_WEIGHTS", 3 * 2 * 4 * 11)
    again = ops.choose_key_blocks(*arguments)
    assert torch.equal(again[1], counts)
    live = torch.arange(8) < counts[..., 1:]
    assert torch.equal(again[0][live], lists[live])
    assert counts.shape == (2, 2, 10, 2)


def test_opcheck_and_bad_sizes() -> None:
    case = some(130, 200)
    chosen = (*case[:2], *case[3:], 0.25, 64, 64, 1, 1, 0.4, 0.0, 4)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.choose_key_blocks.default, chosen, test_utils=tests)
    lists, counts = ops.choose_key_blocks(*chosen)
    arguments = (*case, lists, counts, 0.25, 0.0, 64, 64)
    torch.library.opcheck(ops.block_sparse_attention.default, arguments, test_utils=tests)
    with pytest.raises(EffpassError, match=r"lists are \[B, G, Q, M\] with Q = 3 tiles of 64 queries"):
        ops.block_sparse_attention(*case, lists[:, :, :2], counts, 0.25, 0.0, 64, 64)
    with pytest.raises(EffpassError, match="block_q is 100"):
        BlockSelection(block_q=100)
