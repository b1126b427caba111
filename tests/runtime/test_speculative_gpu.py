"""Speculative decoding on a GPU: a round is one CUDA graph that waits for nothing."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
from speculative_drafts import KINDS, LIKELY, PEAKED, draft_model
from token_statistics import FALSE_ALARM, conditionals, joint_of, p_value
from torch import Tensor
from transformers import LlamaConfig

import effpass
from effpass.runtime.attention import reading_cache
from effpass.runtime.speculative import (
    C2T,
    Eagle2,
    EagleDraft,
    EagleHead,
    HeadConfig,
    ModelDraft,
    NGramDraft,
    Speculator,
    Static,
    chain,
    generate,
)

pytestmark = pytest.mark.gpu

NO_PASSES: dict[str, Any] = {"version": 1, "passes": []}
FREE = {"max_new_tokens": 24, "eos_token_id": None}


def make(family: str = "llama", **overrides: Any) -> Any:
    return families.make(family, **overrides).cuda()


def inputs(length: int = 11) -> dict[str, Tensor]:
    given = families.batch(length)
    return {k: given[k].cuda() for k in ("input_ids", "attention_mask")}


def head(model: Any) -> EagleHead:
    torch.manual_seed(1)
    made = EagleHead(HeadConfig(LlamaConfig(**{**families.COMMON, "num_hidden_layers": 1}), 48, (0, 1)))
    made.choose_tokens(torch.arange(48) * 2)
    made.share(model)
    return made.cuda().eval().requires_grad_(False)


def speculate(ready: Any, draft: Any, **arguments: Any) -> tuple[Tensor, Speculator]:
    backend = ready.effpass_engine.backend
    if isinstance(draft, (ModelDraft, EagleDraft)):
        draft.backend = backend
    speculator = Speculator(ready.effpass_engine, draft, switches=False)

    def loop(model: Any, input_ids: Tensor, **prepared: Any) -> Any:
        return generate(speculator, input_ids, **prepared)

    return type(ready).generate(ready, **arguments, custom_generate=loop), speculator


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family: str) -> None:
    model, given = make(family), inputs()
    expected = model.generate(**given, **FREE)
    ready = effpass.prepare(model, NO_PASSES)
    draft = draft_model("random", family).cuda()
    assert torch.equal(speculate(ready, ModelDraft(draft, KINDS["eagle2"]), **given, **FREE)[0], expected)
    assert torch.equal(speculate(ready, NGramDraft(4), **given, **FREE)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["right", "random"])
def test_every_tree(kind: str, how: str) -> None:
    model, given = make(), inputs()
    expected = model.generate(**given, **FREE)
    ready = effpass.prepare(model, NO_PASSES)
    out, found = speculate(ready, ModelDraft(draft_model(how).cuda(), KINDS[kind]), **given, **FREE)
    assert torch.equal(out, expected)
    if kind == "c2t":
        assert found.last is not None
        assert 1 < found.last.verified / found.last.rounds < KINDS[kind].nodes - 2
    (round_,) = found._free.values()
    recorded = {how for how, *_ in round_._graphs}
    assert "first" in recorded
    assert recorded <= {"first", *(f"round of {size}" for size in KINDS[kind].sizes)}
    again, _ = speculate(ready, found.draft, **given, **FREE)
    assert torch.equal(again, expected)


@pytest.mark.parametrize("kind", ["chain", "eagle2", "c2t, keeps all"])
def test_a_head(kind: str) -> None:
    model, given = make(), inputs()
    expected = model.generate(**given, **FREE)
    ready = effpass.prepare(model, NO_PASSES)
    assert torch.equal(speculate(ready, EagleDraft(head(model), KINDS[kind]), **given, **FREE)[0], expected)


def test_three_sequences_share_the_graph_of_four_and_end_one_by_one() -> None:
    model = make()
    ids = families.batch(9)["input_ids"].cuda()
    ids = torch.cat([ids, ids[:1].flip(1)])
    free = model.generate(input_ids=ids, **FREE)
    how = {"max_new_tokens": 24, "eos_token_id": [int(free[0, 12]), int(free[1, 18])], "pad_token_id": 0}
    expected = model.generate(input_ids=ids, **how)
    ready = effpass.prepare(model, NO_PASSES)
    out, found = speculate(ready, ModelDraft(draft_model("right").cuda(), KINDS["static"]), input_ids=ids, **how)
    assert torch.equal(out, expected)
    assert list(found._free) == [4]


def test_processors_of_the_text() -> None:
    model, given = make(), inputs()
    how = {**FREE, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}
    expected = model.generate(**given, **how)
    ready = effpass.prepare(model, NO_PASSES)
    assert torch.equal(speculate(ready, ModelDraft(draft_model("right").cuda(), KINDS["eagle2"]), **given, **how)[0],
                       expected)  # fmt: skip


def test_sampled_text_depends_on_the_seed_alone() -> None:
    model, given = make(), inputs()
    ready, texts = effpass.prepare(model, NO_PASSES), []
    how = {**FREE, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    drafts = [ModelDraft(draft_model("random").cuda(), KINDS[kind]) for kind in ("chain", "static", "eagle2")]
    for seed, draft in ((0, drafts[0]), (0, drafts[1]), (0, drafts[2]), (0, NGramDraft(3)), (1, drafts[0])):
        torch.manual_seed(seed)
        texts.append(speculate(ready, draft, **given, **how)[0])
    assert all(torch.equal(text, texts[0]) for text in texts[:4])
    assert not torch.equal(texts[0], texts[4])


SMALL: dict[str, Any] = {"chain": chain(2), "static": Static((2, 2)), "eagle2": Eagle2(3, 2, 6)}
SMALL["c2t"] = C2T(LIKELY, 0.5, 3, 2, 6)
WARPED = {"temperature": 0.7, "top_p": 0.8}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("chain", {}),
        ("static", WARPED),
        ("eagle2", {}),
        ("c2t", {}),
        ("c2t", WARPED),
        ("eagle2", {"repetition_penalty": 1.3}),
    ],
)
def test_sampled_answers_have_the_model_s_distribution(kind: str, how: dict[str, float]) -> None:
    model, prompt = make(**PEAKED), torch.tensor([[3, 5, 4, 5]], device="cuda")
    expected = joint_of(conditionals(model, prompt, 4, **how))
    ready, draft = effpass.prepare(model, NO_PASSES), ModelDraft(draft_model("near", **PEAKED).cuda(), SMALL[kind])
    many = {"num_return_sequences": 256 if "repetition_penalty" in how else 2048, "max_new_tokens": 4, "top_k": 0}
    torch.manual_seed(0)
    out, found = speculate(
        ready, draft, input_ids=prompt, do_sample=True, eos_token_id=None, pad_token_id=0, **many, **how
    )
    assert found.last is not None
    assert found.last.acceptance_length > 1.1
    assert p_value(expected, out[:, 4:].cpu()) > FALSE_ALARM


@pytest.mark.parametrize("draft", ["model", "head", "ngram"])
def test_rounds_do_not_wait_for_the_device(draft: str) -> None:
    model, given = make(), inputs()
    ready = effpass.prepare(model, NO_PASSES)
    made: Any = NGramDraft(4)
    if draft == "model":
        made = ModelDraft(draft_model("random").cuda(), KINDS["c2t"])
    elif draft == "head":
        made = EagleDraft(head(model), KINDS["eagle2"])
    _, found = speculate(ready, made, **given, **FREE)
    if draft == "model":  # some nodes are kept, and some are not
        assert found.last is not None
        assert 1 < found.last.verified / found.last.rounds < KINDS["c2t"].nodes - 2
    (round_,) = found._free.values()
    with torch.no_grad(), reading_cache(ready), round_.target.attached(), made.running():
        round_.progress.position.fill_(12)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                round_.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_plain_steps_and_rounds_in_turn() -> None:
    model, given = make(max_position_embeddings=512), inputs()
    long = {"max_new_tokens": 200, "eos_token_id": None}
    expected = model.generate(**given, **long)
    ready = effpass.prepare(model, NO_PASSES)
    for how in ("wrong", "right"):
        draft = draft_model(how, max_position_embeddings=512).cuda()
        assert torch.equal(ready.generate(**given, **long, draft=draft, tree="chain:4"), expected)
    found = ready.effpass_engine.speculators
    assert all(
        pace.plain is not None and pace.round is not None for s, _ in found.values() for pace in s._paces.values()
    )


def test_new_weights_are_read() -> None:
    ready, given = effpass.prepare(make(), NO_PASSES), inputs()
    draft = draft_model("random").cuda()
    before = ready.generate(**given, **FREE, draft=draft, tree="static")
    ready.load_state_dict(make(seed=1).state_dict(), assign=True)  # other tensors, at other addresses
    after = ready.generate(**given, **FREE, draft=draft, tree="static")
    assert not torch.equal(before, after)
    assert torch.equal(after, type(ready).generate(ready, **given, **FREE))


def test_release_frees_the_buffers() -> None:
    model, given = make(), inputs()
    ready, draft = effpass.prepare(model, NO_PASSES), draft_model("random").cuda()
    ready.generate(**given, **FREE, draft=draft)
    ready.effpass_engine.release()
    before = torch.cuda.memory_allocated()
    ready.generate(**given, **FREE, draft=draft)
    assert torch.cuda.memory_allocated() > before
    ready.effpass_engine.release()
    assert torch.cuda.memory_allocated() <= before + 2**16


def test_a_stream_gets_every_token_in_order() -> None:
    ready, seen = effpass.prepare(make(), NO_PASSES), []

    class Streamer:
        def put(self, value: Tensor) -> None:
            seen.append(value)

        def end(self) -> None:
            seen.append(None)

    ids = families.batch(8)["input_ids"][1:].cuda()
    out = ready.generate(input_ids=ids, **FREE, streamer=Streamer(), draft=draft_model("random").cuda(), tree="static")
    assert [int(t) for t in seen[1:-1]] == out[0, 8:].tolist()
    assert seen[-1] is None


def test_in_bfloat16_every_token_is_all_but_the_best() -> None:
    """Of the model alone, given the text before: rounding may choose between tokens that are nearly equal."""
    model = make(hidden_size=128, num_attention_heads=8, num_key_value_heads=2, vocab_size=4000).bfloat16()
    ids = families.batch(12)["input_ids"].cuda()
    ready = effpass.prepare(model, NO_PASSES)
    draft = ModelDraft(model, KINDS["eagle2"])
    out, found = speculate(ready, draft, input_ids=ids, max_new_tokens=60, eos_token_id=None)
    assert found.last.acceptance_length > 1.5
    logits = model(out).logits[:, 11:-1].float()
    chosen = logits.gather(2, out[:, 12:, None])[..., 0]
    assert float((logits.amax(2) - chosen).max()) <= 2 * 2**-8 * float(logits.abs().max())
