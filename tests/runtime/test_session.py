"""The decode step as it is recorded: compiled whole, lengths on the device, and equal to the step that is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import families
import pytest
import torch

from effpass.runtime.attention import reading_cache
from effpass.runtime.session import Session


def recorded_step(session: Session, compiled: Callable[..., Any]) -> None:
    """What a CUDA graph would hold, run now."""
    with session._recording():
        session._move()
        session.cache.append(session._position)
        session._forward(compiled, None)
    session.cache.advance(1)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_a_recorded_step_is_a_step(family: str) -> None:
    graphs = []

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    given, model = families.batch(11), families.make(family)
    with torch.no_grad(), reading_cache(model):
        # Four rows of buffers for two sequences, as in a bucket.
        ours, plain = (Session(model, 4, 64, backend) for _ in range(2))
        for session in (ours, plain):
            session.begin(2)
            session.prefill(given["input_ids"], given["attention_mask"].bool(), 4)
        compiled = ours._compile()
        for _ in range(3):
            token = plain.logits.argmax(-1, keepdim=True)
            ours.tokens.copy_(token)
            plain.tokens.copy_(token)
            plain.step()
            recorded_step(ours, compiled)
            # The same products in another order of summation: 1e-6 of the logits' size.
            torch.testing.assert_close(ours.logits[:2], plain.logits[:2], rtol=1e-5, atol=2e-6)
    torch._dynamo.reset()
    assert len(graphs) == 1
    writes = [n for n in graphs[0].graph.nodes if "cache_write" in str(n.target)]
    assert len(writes) == model.config.num_hidden_layers


def test_rows_of_a_bucket_that_are_empty_stay_out_of_it() -> None:
    given, model = families.batch(11), families.make("llama")
    with torch.no_grad(), reading_cache(model):
        session = Session(model, 4, 64, None)
        session.begin(2)
        session.prefill(given["input_ids"], None, 32)
        session.tokens.fill_(5)
        for _ in range(3):
            session.step()
    positions = session.cache.slots.positions
    assert (positions[2:] == -1).all()
    assert positions[:2, :14].tolist() == [list(range(14))] * 2
    assert session.logits.isfinite().all()


def test_crop_goes_back_to_an_earlier_step() -> None:
    given, model = families.batch(11), families.make("llama")
    mask = given["attention_mask"].bool()
    with torch.no_grad(), reading_cache(model):
        session = Session(model, 2, 64, None)
        session.begin(2)
        session.prefill(given["input_ids"], mask, 32)
        session.tokens.fill_(5)
        session.step()
        once = session.logits.clone()
        session.tokens.fill_(9)
        session.step()
        session.crop(11)
        assert session.length == session.cache.slots.length == int(session.cache.slots.filled) == 11
        assert (session.cache.slots.positions[:, 11:] == -1).all()
        session.tokens.fill_(5)
        session.step()
    assert torch.equal(session.logits, once)


def test_layers_say_what_they_hold() -> None:
    model = families.make("gemma3")
    with torch.no_grad(), reading_cache(model):
        session = Session(model, 2, 32, None)
        session.begin(2)
        session.prefill(families.batch(11)["input_ids"], None, 32)
    cache = session.cache
    assert [cache.buffers(i).window for i in range(2)] == [8, 0]
    assert cache.get_seq_length() == 11
    assert cache.is_sliding == [True, False]
    assert cache.buffers(0).get_max_length() == 32
    assert cache.buffers(0).keys is not None
    assert cache.buffers(0).keys.shape == (2, 2, 32, 16)
