"""`received_attention` against the sums of a whole attention matrix."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from effpass.core.errors import EffpassError
from effpass.lowering.ops import received_attention as module

op = torch.ops.effpass.received_attention


def inputs(tokens: int = 9, slots: int = 14) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    query, keys = torch.randn(2, tokens, 6, 16).transpose(1, 2), torch.randn(2, 3, slots, 16)
    of_keys = torch.arange(slots, dtype=torch.int32).repeat(2, 1)
    of_keys[0] = (of_keys[0] - 4).clamp(min=-1)  # row 0 is padded by four
    return query, keys, of_keys, of_keys[:, slots - tokens :].contiguous()


def whole(query, keys, of_keys, of_queries, scale, softcap):
    """From weights that stand in memory, in float64."""
    score = query.double() @ keys.double().repeat_interleave(2, 1).mT * scale
    if softcap:
        score = softcap * torch.tanh(score / softcap)
    visible = (of_keys[:, None, None] >= 0) & (of_keys[:, None, None] <= of_queries[:, None, :, None])
    weights = score.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num(0)
    return weights.sum(2).mean(1)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("at_once", [1, 1 << 24])
def test_sums_of_columns(softcap: float, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ELEMENTS", at_once)
    given = inputs()
    got = op(*given, 0.25, softcap)
    torch.testing.assert_close(got.double(), whole(*given, 0.25, softcap), rtol=1e-5, atol=1e-6)
    assert (got[0, :4] == 0).all()  # padding
    torch.testing.assert_close(got.sum(1), torch.tensor([9.0, 9.0]))


def test_padding_gives_nothing() -> None:
    query, keys, of_keys, of_queries = inputs(14, 14)
    got = op(query, keys, of_keys, of_queries, 0.25, 0.0)
    torch.testing.assert_close(got.sum(1), torch.tensor([10.0, 14.0]))


def test_opcheck() -> None:
    torch.library.opcheck(op, (*inputs(), 0.25, 0.0))


def test_it_counts_the_scores_twice() -> None:
    with FlopCounterMode(display=False) as counter:
        op(*inputs(), 0.25, 0.0)
    assert counter.get_total_flops() == 2 * (2 * 2 * 6 * 9 * 14 * 16)


def test_sizes_that_do_not_match() -> None:
    query, keys, of_keys, of_queries = inputs()
    with pytest.raises(EffpassError, match="can't attend to keys"):
        op(query[:, :5], keys, of_keys, of_queries, 0.25, 0.0)
    with pytest.raises(EffpassError, match="have key_positions"):
        op(query, keys, of_keys[:, :2], of_queries, 0.25, 0.0)
