"""Text in and out: streaming, closing a stream, stop strings."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from tiny_checkpoint import make_checkpoint

import effpass
from effpass.runtime.session import Session

NO_PASSES: dict[str, Any] = {"version": 1, "passes": []}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = effpass.load_model(str(make_checkpoint(tmp_path_factory.mktemp("model") / "tiny")))
    return effpass.prepare(found.model, NO_PASSES), found.tokenizer


def test_pieces_join_to_the_whole(loaded: Any) -> None:
    model, tokenizer = loaded
    inputs = tokenizer("abc", return_tensors="pt")
    whole = type(model).generate(model, **inputs, max_new_tokens=20, do_sample=False)[0, 3:]
    pieces = list(effpass.generate(model, tokenizer, "abc", max_new_tokens=20, do_sample=False))
    assert "".join(pieces) == tokenizer.decode(whole, skip_special_tokens=True)


def test_closing_a_stream_ends_the_generation(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    steps = 0
    step = Session.step

    def slow(session: Session, tail: Any = None) -> None:
        nonlocal steps
        steps += 1
        time.sleep(0.01)
        step(session, tail)

    monkeypatch.setattr(Session, "step", slow)
    before = threading.active_count()
    (space,) = tokenizer(" ")["input_ids"]
    others = [token for token in range(257) if token != space]  # text is streamed up to the last space
    stream = effpass.generate(model, tokenizer, "a b", max_new_tokens=200, suppress_tokens=others, do_sample=False)
    assert next(stream) == " "
    stream.close()
    assert threading.active_count() == before
    assert 0 < steps < 199
    assert len(model.effpass_engine._free) == 1  # the buffers are back
    assert model.config._attn_implementation == "sdpa"


def test_streams_of_one_model_wait_for_each_other(loaded: Any) -> None:
    model, tokenizer = loaded
    ids = tokenizer("abc", return_tensors="pt")["input_ids"]
    before = model(input_ids=ids).logits
    texts = ("abc", "hello you", "x")
    alone = ["".join(effpass.generate(model, tokenizer, t, max_new_tokens=30, do_sample=False)) for t in texts]
    streams = [effpass.generate(model, tokenizer, t, max_new_tokens=30, do_sample=False) for t in texts]
    first = [next(stream, "") for stream in streams]  # all have begun
    assert [a + "".join(rest) for a, rest in zip(first, streams, strict=True)] == alone
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(input_ids=ids).logits, before)


def test_a_tokenizer_that_fails_ends_the_stream(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = loaded
    said: list[str] = []

    def decode(*_: Any, **__: Any) -> str:
        raise IndexError("piece id is out of range")

    def read() -> None:
        try:
            list(effpass.generate(model, tokenizer, "abc", max_new_tokens=4, do_sample=False))
        except IndexError as error:
            said.append(str(error))

    monkeypatch.setattr(type(tokenizer), "decode", decode)
    reader = threading.Thread(target=read, daemon=True)  # which would wait forever
    reader.start()
    reader.join(60)
    assert said == ["piece id is out of range"]


def test_stop_strings(loaded: Any) -> None:
    model, tokenizer = loaded
    inputs = tokenizer(["xyz", "qrs"], return_tensors="pt")
    free = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=None)
    text = tokenizer.decode(free[0, 3:])
    stop = next(text[i : i + 2] for i in range(6, 20) if text[i : i + 2].isprintable())
    how = {"max_new_tokens": 30, "do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
    theirs = type(model).generate(model, **inputs, **how)
    assert theirs.shape[1] <= 33
    assert torch.equal(model.generate(**inputs, **how), theirs)
    config = type(model.generation_config)(**{**model.generation_config.to_dict(), "stop_strings": [stop]})
    again = model.generate(**inputs, max_new_tokens=30, do_sample=False, generation_config=config, tokenizer=tokenizer)
    assert torch.equal(again, theirs)
    assert config.stop_strings == [stop]
